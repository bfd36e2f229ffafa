"""Draws keys of deformable attention on a photograph; points are (y, x) in its pixels."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

INK, PAPER, FAINT = (28, 30, 36), (250, 249, 246), (120, 122, 130)
WHITE, AMBER = (255, 255, 255), (255, 176, 0)
# Everything is drawn this many times too large, then reduced, which smooths the lines.
OVERSAMPLING = 2
PANEL, GAP, MARGIN, CAPTION = 300, 20, 40, 34
LARGEST = 15  # radius of the circle of the most attended key, in pixels of the sheet
# Side of a panel over that of the photograph in it: "dat++" reference points leave the image.
ROOM = 1.22

Point = Sequence[float]


@dataclass
class Panel:
    """The keys of one group: where they start and where the offsets take them; or, for one query,
    the keys that it attends to most."""

    caption: str
    reference: Sequence[Point] = ()
    pos: Sequence[Point] = ()
    attended: Sequence[tuple[Point, float]] = ()  # and the share of each
    query: Point | None = None


def _hue(point: Point, size: tuple[int, int]) -> tuple[int, int, int]:
    """A colour for each place in the image, so that keys can be followed."""
    y, x = (min(max(c / side, 0.0), 1.0) for c, side in zip(point, size, strict=True))
    red, green, blue = colorsys.hsv_to_rgb(0.02 + 0.55 * x, 0.85 - 0.25 * y, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _panel(photograph: Image.Image, panel: Panel, width: int, height: int) -> Image.Image:
    inner = round(width / ROOM), round(height / ROOM)
    corner = (width - inner[0]) // 2, (height - inner[1]) // 2
    dim = ImageEnhance.Brightness(ImageEnhance.Color(photograph).enhance(0.35)).enhance(0.55)
    image = Image.new("RGB", (width, height), INK)
    image.paste(dim.resize(inner, Image.Resampling.LANCZOS), corner)
    draw = ImageDraw.Draw(image, "RGBA")
    size = photograph.height, photograph.width
    unit = max(width, height) / PANEL
    # Dots of a dense grid must not cover what is between them.
    dot = min(4.6, 32 / max(1, len(panel.pos)) ** 0.5) * unit

    def at(point: Point) -> tuple[float, float]:
        y, x = point
        return corner[0] + x / size[1] * inner[0], corner[1] + y / size[0] * inner[1]

    for start, end in zip(panel.reference, panel.pos, strict=True):
        draw.line((at(start), at(end)), fill=_hue(start, size), width=max(1, round(dot / 3)))
    for start, end in zip(panel.reference, panel.pos, strict=True):
        outline = max(1, round(dot / 5))
        draw.circle(at(start), 0.55 * dot, outline=WHITE, width=outline)
        draw.circle(at(end), dot, fill=_hue(start, size), outline=INK, width=outline)
    most = max((share for _, share in panel.attended), default=1.0)
    for point, share in panel.attended:
        # The area, not the radius, tells how much.
        radius = max(2.0, LARGEST * (share / most) ** 0.5) * unit
        draw.circle(at(point), radius, fill=(*AMBER, 110), outline=AMBER, width=round(unit))
    if panel.query is not None:
        x, y = at(panel.query)
        for colour, thick, arm in ((INK, 5, 9), (WHITE, 2, 8)):
            for dx, dy in ((arm * unit, 0), (0, arm * unit)):
                draw.line((x - dx, y - dy, x + dx, y + dy), fill=colour, width=round(thick * unit))
    return image


def draw(
    photograph: Image.Image, panels: Sequence[Panel], columns: int, legend: str
) -> Image.Image:
    """The photograph, and beside it the panels in rows."""
    k = OVERSAMPLING
    scale = PANEL * k / max(photograph.size)
    width, height = (max(1, round(side * scale)) for side in photograph.size)
    rows = -(-len(panels) // columns)
    step_x, step_y = width + GAP * k, height + (CAPTION + GAP) * k
    photo_height = min(2, rows) * step_y - (GAP + CAPTION) * k
    photo_width = max(1, round(photo_height * photograph.width / photograph.height))
    left = MARGIN * k + photo_width + GAP * k
    sheet_width = left + columns * step_x - GAP * k + MARGIN * k
    sheet_height = 2 * MARGIN * k + rows * step_y - GAP * k + CAPTION * k
    sheet = Image.new("RGB", (sheet_width, sheet_height), PAPER)
    large = photograph.resize((photo_width, photo_height), Image.Resampling.LANCZOS)
    sheet.paste(large, (MARGIN * k,) * 2)
    text = ImageDraw.Draw(sheet)
    font, small = (ImageFont.load_default(size * k) for size in (17, 16))
    below = MARGIN * k + photo_height + 8 * k
    text.text((MARGIN * k, below), "the image", fill=INK, font=font)
    for i, panel in enumerate(panels):
        x, y = left + i % columns * step_x, MARGIN * k + i // columns * step_y
        sheet.paste(_panel(photograph, panel, width, height), (x, y))
        text.text((x, y + height + 8 * k), panel.caption, fill=INK, font=font)
    place = sheet_width - MARGIN * k, sheet_height - MARGIN * k
    text.text(place, legend, fill=FAINT, font=small, anchor="rs")
    return sheet.resize((sheet_width // k, sheet_height // k), Image.Resampling.LANCZOS)
