"""Draws where the keys of deformable attention lie on a photograph."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

INK, PAPER, FAINT = (28, 30, 36), (250, 249, 246), (120, 122, 130)
WHITE = (255, 255, 255)
# Everything is drawn this many times too large, then reduced, which smooths the lines.
OVERSAMPLING = 2
PANEL, GAP, MARGIN, CAPTION = 300, 20, 40, 34
# Side of a panel over that of the photograph in it: "dat++" reference points leave the image.
ROOM = 1.22

Point = Sequence[float]  # (y, x), -1 and 1 are the centres of the map's outermost pixels


@dataclass
class Panel:
    """The keys of one group: where they start and where the offsets take them."""

    caption: str
    reference: Sequence[Point]
    pos: Sequence[Point]
    pixels: int  # along each side of the map that the points refer to


def _hue(point: Point) -> tuple[int, int, int]:
    """A colour for each place in the grid, so that keys can be followed."""
    y, x = ((c + 1) / 2.4 for c in point)
    red, green, blue = colorsys.hsv_to_rgb(0.02 + 0.55 * x, 0.85 - 0.25 * y, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _panel(photograph: Image.Image, panel: Panel, side: int) -> Image.Image:
    inner = round(side / ROOM)
    corner = (side - inner) // 2
    dim = ImageEnhance.Brightness(ImageEnhance.Color(photograph).enhance(0.35)).enhance(0.55)
    image = Image.new("RGB", (side, side), INK)
    image.paste(dim.resize((inner, inner), Image.Resampling.LANCZOS), (corner, corner))
    draw = ImageDraw.Draw(image)
    pixel = inner / panel.pixels

    def at(point: Point) -> tuple[float, float]:
        y, x = (corner + pixel / 2 + (c + 1) / 2 * (inner - pixel) for c in point)
        return x, y

    unit = side / 300
    for start, end in zip(panel.reference, panel.pos, strict=True):
        draw.line((at(start), at(end)), fill=_hue(start), width=round(1.6 * unit))
    for start, end in zip(panel.reference, panel.pos, strict=True):
        draw.circle(at(start), 2.6 * unit, outline=WHITE, width=round(unit))
        draw.circle(at(end), 4.6 * unit, fill=_hue(start), outline=INK, width=round(unit))
    return image


def draw(photograph: Image.Image, panels: Sequence[Panel], columns: int) -> Image.Image:
    """The photograph, and beside it a panel for each group with its keys, in rows."""
    k = OVERSAMPLING
    rows = -(-len(panels) // columns)
    step_x, step_y = (PANEL + GAP) * k, (PANEL + CAPTION + GAP) * k
    photo_side = rows * step_y - (GAP + CAPTION) * k
    left = MARGIN * k + photo_side + GAP * k
    width = left + columns * step_x - GAP * k + MARGIN * k
    height = 2 * MARGIN * k + rows * step_y - GAP * k + CAPTION * k
    sheet = Image.new("RGB", (width, height), PAPER)
    sheet.paste(
        photograph.resize((photo_side, photo_side), Image.Resampling.LANCZOS), (MARGIN * k,) * 2
    )
    text = ImageDraw.Draw(sheet)
    font, small = (ImageFont.load_default(size * k) for size in (19, 16))
    below = MARGIN * k + photo_side + 8 * k
    text.text((MARGIN * k, below), "the photograph", fill=INK, font=font)
    for i, panel in enumerate(panels):
        x, y = left + i % columns * step_x, MARGIN * k + i // columns * step_y
        sheet.paste(_panel(photograph, panel, PANEL * k), (x, y))
        text.text((x, y + (PANEL + 8) * k), panel.caption, fill=INK, font=font)
    legend = "ring: reference point; dot: the key, where its offset takes it"
    text.text(
        (width - MARGIN * k, height - MARGIN * k), legend, fill=FAINT, font=small, anchor="rs"
    )
    return sheet.resize((width // k, height // k), Image.Resampling.LANCZOS)
