"""DAttention at the sizes of DAT++ on a photograph: reference against fused."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import dat_cuda
from dat_cuda import _rss, picture

DIMS = (96, 192, 384, 768)
HEADS = (3, 6, 12, 24)
GROUPS = (1, 2, 3, 6)
STRIDES = (8, 4, 2, 1)
KERNELS = (9, 7, 5, 3)
SIDES = ("reference", "fused")
ROUNDS = 15
# How far keys stray from their reference points, as a fraction of the image's half side.
WANDER = 0.12


@dataclass
class Stage:
    """What was found about one stage."""

    name: str
    queries: int  # along each side
    pos: Tensor  # [1, G, Hk, Wk, 2] in (y, x)
    reference: Tensor  # likewise
    difference: float
    largest: float
    milliseconds: dict[str, float]
    peak: dict[str, int | None]

    @property
    def speedup(self) -> float:
        return self.milliseconds["reference"] / self.milliseconds["fused"]


def photograph(path: Path | None) -> Image.Image:
    """The middle square of the image at its own resolution; without a path, a cat."""
    if path is None:
        image = Image.fromarray(skimage.data.chelsea())
    else:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    side = min(image.size)
    return ImageOps.fit(image, (side, side))


def _attention(stage: int, side: int) -> dat_cuda.DAttention:
    """A layer whose random offsets and position table are not close to zero."""
    layer = dat_cuda.DAttention(
        (side, side),
        (side // STRIDES[stage], side // STRIDES[stage]),
        HEADS[stage],
        DIMS[stage] // HEADS[stage],
        GROUPS[stage],
        attn_drop=0.0,
        proj_drop=0.0,
        stride=STRIDES[stage],
        offset_range_factor=-1.0,
        use_pe=True,
        dwc_pe=False,
        no_off=False,
        fixed_pe=False,
        ksize=KERNELS[stage],
    )
    # A GELU of normalised features has a mean square of about 0.42.
    std = {"conv_offset.3.weight": WANDER / (0.42 * layer.n_group_channels) ** 0.5}
    std["rpe_table"] = 0.5
    for name, value in std.items():
        nn.init.normal_(layer.get_parameter(name), std=value)
    return layer.eval()


def _features(image: Image.Image, size: int) -> Tensor:
    """[1, 3, size, size], normalised."""
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    x = pixels.view(1, image.height, image.width, 3).movedim(-1, 1).float() / 255
    return (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True).clamp(min=1e-3)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _peak(call: Callable[[], object]) -> int | None:
    try:
        return _rss.peak_growth(call)[0]
    except OSError:
        return None


def _measure(layer: dat_cuda.DAttention, x: Tensor, stage: int) -> Stage:
    def side(backend: str) -> Callable[[], tuple]:
        def forward() -> tuple:
            with dat_cuda.backend(backend):
                return layer(x)

        return forward

    calls = {"reference": side("reference"), "fused": side("auto")}
    (expected, _, _), (y, pos, reference) = (calls[name]() for name in SIDES)
    peak = {name: _peak(calls[name]) for name in SIDES}
    samples: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(ROUNDS):
        for name in SIDES:
            calls[name]()
            samples[name].append(_seconds(calls[name]))
    return Stage(
        name=str(stage + 1),
        queries=x.shape[2],
        pos=pos,
        reference=reference,
        difference=float((y - expected).abs().max()),
        largest=float(expected.abs().max()),
        milliseconds={name: 1e3 * statistics.median(samples[name]) for name in SIDES},
        peak=peak,
    )


@torch.no_grad()
def stages(image: Image.Image, size: int) -> Iterator[Stage]:
    """Runs the four stages one after the other, each on what the one before made."""
    torch.manual_seed(0)
    x = nn.Conv2d(3, DIMS[0], 4, 4)(_features(image, size))
    for stage, dim in enumerate(DIMS):
        if stage > 0:
            x = nn.Conv2d(DIMS[stage - 1], dim, 2, 2)(x)
        x = F.group_norm(x, 1)
        layer = _attention(stage, x.shape[2])
        yield _measure(layer, x, stage)
        x = x + layer(x)[0]


def _mebibytes(peak: int | None) -> str:
    return "-" if peak is None else f"{peak / 2**20:.1f}"


def _table(found: list[Stage]) -> Table:
    table = Table(
        title="DAttention forward, one image",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("stage")
    sides = [f"{side}\n{unit}" for unit in ("ms", "peak MiB") for side in SIDES]
    for head in ("queries", "keys", "max\ndiff", *sides[:2], "times\nfaster", *sides[2:]):
        table.add_column(head, justify="right")
    for stage in found:
        table.add_row(
            stage.name,
            f"{stage.queries}x{stage.queries}",
            "x".join(map(str, stage.pos.shape[2:4])),
            f"{stage.difference:.1e}",
            *(f"{stage.milliseconds[side]:.2f}" for side in SIDES),
            f"{stage.speedup:.1f}",
            *(_mebibytes(stage.peak[side]) for side in SIDES),
        )
    return table


def run(image: Image.Image, size: int, out: Path) -> None:
    """Measures on the image at size x size, prints the table and writes the picture to out."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    found = []
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("stem", total=len(DIMS))
        for stage in stages(image, size):
            found.append(stage)
            progress.update(task, advance=1, description=f"stage {stage.name}")
    console.print(_table(found))
    worst = max(stage.difference / stage.largest for stage in found)
    console.print(f"They agree to {worst:.1e} of the largest value.")
    panels = [
        picture.Panel(
            f"stage {stage.name}, group {group + 1}",
            stage.reference[0, group].flatten(0, 1).tolist(),
            stage.pos[0, group].flatten(0, 1).tolist(),
            stage.queries,
        )
        for stage in found
        for group in range(stage.pos.shape[1])
    ]
    picture.draw(image, panels, columns=6).save(out, format="PNG")
    console.print(f"Key positions of every group: {out}", highlight=False)
