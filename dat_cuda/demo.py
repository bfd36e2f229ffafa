"""A whole DAT on a photograph: reference against fused, and a picture of its keys."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import skimage.data
import torch
from PIL import Image, ImageOps
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import dat_cuda
from dat_cuda import _rss, models, visualize

SIDES = {"reference": "reference", "fused": "auto"}
ROUNDS = 7
# How far keys of random models stray from their reference points, as a fraction of the image's half
# side.
WANDER = 0.12


def photograph(path: Path | None) -> Image.Image:
    """The middle square of the image at its own resolution; without a path, a cat."""
    if path is None:
        image = Image.fromarray(skimage.data.chelsea())
    else:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    side = min(image.size)
    return ImageOps.fit(image, (side, side))


def build(name: str, size: int, weights: Path | None, console: Console) -> models.DAT:
    """The model, with its published weights or with random ones.

    Raises:
        ValueError, OSError: the file with the weights is none, or does not fit.
    """
    torch.manual_seed(0)
    model = getattr(models, name)(img_size=size)
    if weights is not None:
        console.print(str(models.load_checkpoint(model, weights)), highlight=False)
        return model.eval()
    for key, parameter in model.named_parameters():
        # At first offsets and position tables are next to zero: nothing would be seen of them.
        if key.endswith("conv_offset.3.weight"):
            # A GELU of normalised features has a mean square of about 0.42.
            nn.init.normal_(parameter, std=WANDER / (0.42 * parameter.shape[1]) ** 0.5)
        if key.endswith("rpe_table"):
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _peak(call: Callable[[], object]) -> int | None:
    try:
        return _rss.peak_growth(call)[0]
    except OSError:
        return None


@torch.no_grad()
def _measure(model: nn.Module, x: Tensor, console: Console) -> tuple[dict, dict, dict]:
    """Logits, seconds and peak bytes of both sides, in turns."""

    def forward(side: str) -> Tensor:
        with dat_cuda.backend(SIDES[side]):
            return model(x)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    logits, peaks = {}, {}
    samples: dict[str, list[float]] = {side: [] for side in SIDES}
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("warm up", total=2 * (ROUNDS + 2))
        for side in SIDES:
            logits[side] = forward(side)
            progress.advance(task)
            peaks[side] = _peak(lambda side=side: forward(side))  # type: ignore[misc]
            progress.advance(task)
        for _ in range(ROUNDS):
            for side in SIDES:
                samples[side].append(_seconds(lambda side=side: forward(side)))  # type: ignore[misc]
                progress.update(task, advance=1, description=side)
    return logits, {side: statistics.median(taken) for side, taken in samples.items()}, peaks


def _stages(model: models.DAT, x: Tensor) -> Table:
    """What the deformable blocks of each stage do."""
    with torch.no_grad():
        _, positions, _ = model(x, return_positions=True)
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for head in ("stage", "map", "deformable blocks", "groups", "keys"):
        table.add_column(head, justify="left" if head == "stage" else "right")
    for i, stage in enumerate(positions):
        found = [pos for pos in stage if pos is not None]
        side = -(-x.shape[2] // 2 ** (2 + i))
        keys = "x".join(map(str, found[0].shape[2:4])) if found else "-"
        groups = str(found[0].shape[1]) if found else "-"
        table.add_row(str(i + 1), f"{side}x{side}", f"{len(found)} of {len(stage)}", groups, keys)
    return table


def run(
    image: Image.Image, size: int, out: Path, name: str = "datpp_tiny", weights: Path | None = None
) -> None:
    """Measures on the image at size x size, prints the tables and writes the picture to out."""
    console = Console()
    model = build(name, size, weights, console)
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    x = visualize.normalized(image)
    console.print(_stages(model, x))
    logits, seconds, peaks = _measure(model, x, console)
    table = Table(
        title=f"{name}, one image", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    for head in ("", "ms", "images/s", "peak MiB"):
        table.add_column(head, justify="right" if head else "left")
    for side, taken in seconds.items():
        peak = peaks[side]
        size_mib = "-" if peak is None else f"{peak / 2**20:.0f}"
        table.add_row(side, f"{1e3 * taken:.1f}", f"{1 / taken:.1f}", size_mib)
    console.print(table)
    reference, fused = logits["reference"], logits["fused"]
    worst = float((fused - reference).abs().max() / reference.abs().max())
    faster = seconds["reference"] / seconds["fused"]
    console.print(f"Fused is {faster:.2f} times as fast. They agree to {worst:.1e}.")
    if weights is not None:
        shares, classes = fused.softmax(-1)[0].topk(min(5, fused.shape[1]))
        pairs = zip(classes.tolist(), shares.tolist(), strict=True)
        console.print("Classes: " + ", ".join(f"{c} ({share:.0%})" for c, share in pairs))
    note = "" if weights is not None else "random weights: the keys wander at random"
    queries = [(0.4 * size, 0.35 * size)]
    visualize.plot_keys(model, image, queries=queries, out=out, note=note)
    console.print(f"Keys of every stage and group: {out}", highlight=False)
