"""dat-cuda doctor: do the kernels compute the formula on this machine, and how fast?

Every kernel is compared with the reference in float64: all dtypes, head sizes and kinds of bias,
forward and backward, at small sizes. On a GPU the operators are then timed at the sizes of DAT++.
"""

from __future__ import annotations

import itertools
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dat_cuda import _C, __version__, _clock, functional, reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 128)
BATCH = 2

# Gradients of positions jump at cell borders: checks keep this far away from them, in cells.
MARGIN = 1e-3


@dataclass(frozen=True)
class BiasKind:
    """Which way the bias reaches the scores. Sizes are such that all loads are wide, or none."""

    version: str = "dat++"
    size: tuple[int, int] = (12, 16)
    keys: int = 72
    table: tuple[int, int] | None = None
    reach: float = 0.95  # of the keys' positions
    dense: bool = False
    batch: int = 2


# Batches of 40 have enough queries for blocks of several warps on every GPU; small ones are cut
# into blocks of one.
BIASES = {
    "none": BiasKind(),
    "dense": BiasKind(size=(9, 13), keys=70, dense=True),
    "unit": BiasKind(table=(23, 31)),
    "unit, all keys at once": BiasKind(size=(14, 14), keys=49, table=(27, 27), batch=40),
    "slope": BiasKind("dat", table=(23, 31), batch=40),
    "shallow": BiasKind(size=(13, 9), keys=70, table=(6, 5)),
    "steep": BiasKind(size=(9, 13), keys=70, table=(57, 50)),
    "far": BiasKind(size=(9, 13), keys=70, table=(17, 25), reach=1.8),
    "slope, a small map": BiasKind("dat", size=(14, 14), keys=70, table=(27, 27), reach=2.5),
}

# Queries a side, channels, heads and groups of DAT++ at 224 pixels, where there are 7 x 7 keys.
STAGES = ((56, 96, 3, 1), (28, 192, 6, 2), (14, 384, 12, 3), (7, 768, 24, 6))
IMAGES = 64


@dataclass(frozen=True)
class Check:
    """One call of an operator: names of operator and setting, inputs, options, output gradients."""

    operator: str
    dtype: torch.dtype
    setting: str
    inputs: Mapping[str, Tensor]
    grads: Sequence[Tensor]
    options: Mapping[str, Any]

    def results(self, operators, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Outputs and gradients; computed in `dtype`, or with the inputs as they are."""
        leaves = {
            name: (t if dtype is None else t.to(dtype)).detach().requires_grad_()
            for name, t in self.inputs.items()
        }
        outputs = getattr(operators, self.operator)(**leaves, **self.options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [g.to(out.dtype) for g, out in zip(self.grads, outputs, strict=True)]
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        return named | {f"gradient of {n}": g for n, g in zip(leaves, found, strict=True)}

    def worst(self) -> tuple[float, str]:
        """The largest error as a fraction of what is allowed, and of which result it is: twice the
        error of the reference in the same dtype, and some roundings."""
        exact = self.results(reference, torch.float64)
        same, found = self.results(reference), self.results(functional)
        eps = [torch.finfo(dtype).eps for dtype in (_accumulation(self.dtype), self.dtype)]
        fractions = []
        for name, right in exact.items():
            error, usual = (float((t[name].double() - right).abs().max()) for t in (found, same))
            scale = max(1.0, float(right.abs().max()))
            allowed = 2 * usual + (200 * eps[0] + 2 * eps[1]) * scale
            fractions.append((math.inf if math.isnan(error) else error / allowed, name))
        return max(fractions)


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _away_from_borders(draw: Callable[[], Tensor], cells: Callable[[Tensor], Tensor]) -> Tensor:
    """draw(), with values drawn again while one of cells(values) [*shape, any] is near a border."""
    values = draw()
    for _ in range(200):
        places = cells(values)
        near = ((places - places.round()).abs() < MARGIN).any(-1)
        if not near.any():
            break
        values = torch.where(near, draw(), values)
    return values


def attention_check(dtype: torch.dtype, head_dim: int, name: str, device: str) -> Check:
    kind, heads = BIASES[name], 2
    accurate, size = _accumulation(dtype), (kind.batch, heads * head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    def positions(points: Tensor, cells: int) -> Tensor:
        """Of keys along one axis, whose queries are at the points."""
        return _away_from_borders(
            lambda: (torch.rand(kind.batch, 1, kind.keys, dtype=accurate) * 2 - 1) * kind.reach,
            lambda pos: (cells - 1) / 4 * (points - pos.double().unsqueeze(-1) + 2),
        )

    inputs = {"q": normal(*size, *kind.size)}
    inputs |= {name: normal(*size, kind.keys) for name in ("k", "v")}
    if kind.dense:
        inputs["bias"] = normal(kind.batch, heads, kind.size[0] * kind.size[1], kind.keys)
    if kind.table:
        grid = reference.query_grid(*kind.size, kind.version, dtype=torch.float64)
        axes = zip((grid[:, 0, 0], grid[0, :, 1]), kind.table, strict=True)
        inputs["pos"] = torch.stack([positions(*axis) for axis in axes], -1)
        inputs["rpe_table"] = torch.randn(heads, *kind.table, dtype=accurate)
    return Check(
        "deform_attention",
        dtype,
        f"head_dim {head_dim}, bias {name}",
        {name: t.to(device) for name, t in inputs.items()},
        [normal(*size, *kind.size).to(device)],
        {"heads": heads, "version": kind.version},
    )


def sample_check(dtype: torch.dtype, accurate: bool, channels_last: bool, device: str) -> Check:
    """`accurate`: the offset has the dtype that is computed in, not that of x."""
    groups, height, width = 2, 13, 17
    options: dict[str, Any] = {"groups": groups, "offset_range_factor": 2.0, "version": "dat"}
    offset_dtype = _accumulation(dtype) if accurate else dtype

    def cells(offset: Tensor) -> Tensor:
        x = torch.zeros(BATCH, groups, height, width, dtype=torch.float64)
        pos = reference.deform_sample(x, offset.double(), **options)[1]  # [B, G, N, 2]
        pos = pos.transpose(2, 3).reshape(offset.shape)
        return ((pos + 1) / 2 * torch.tensor([[[height - 1]], [[width - 1]]])).unsqueeze(-1)

    offset = _away_from_borders(
        lambda: torch.randn(BATCH * groups, 2, 5, 7).to(offset_dtype), cells
    )
    x = torch.randn(BATCH, groups * 40, height, width).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    grads = [torch.randn(BATCH, groups * 40, 35), torch.randn(BATCH, groups, 35, 2)]
    return Check(
        "deform_sample",
        dtype,
        f"offset {_name(offset_dtype)}, channels {'last' if channels_last else 'first'}",
        {"x": x.to(device), "offset": offset.to(device)},
        [grad.to(device) for grad in grads],
        options,
    )


def checks(device: str) -> Iterator[Check]:
    """The same numbers on every machine."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        for accurate in (True, False) if dtype.itemsize == 2 else (True,):
            for channels_last in (False, True):
                yield sample_check(dtype, accurate, channels_last, device)
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for name in BIASES:
                yield attention_check(dtype, head_dim, name, device)


def validate(device: str) -> list[str]:
    """Makes every check, prints a table, and returns what is wrong, a line each."""
    rows: dict[tuple[str, str], list[float]] = {}
    wrong = []
    for check in checks(device):
        try:
            fraction, result = check.worst()
            reason = f"{result} is off by {fraction:.3g} times what is allowed"
        except RuntimeError as error:
            fraction, reason = math.inf, str(error).strip().splitlines()[0]
        rows.setdefault((check.operator, _name(check.dtype)), []).append(fraction)
        if not fraction <= 1:
            wrong.append(f"{check.operator} {_name(check.dtype)}, {check.setting}: {reason}")
    table: list[Sequence[str]] = [("operator", "dtype", "checks", "wrong", "error / allowed")]
    for key, found in rows.items():
        count = sum(not fraction <= 1 for fraction in found)
        table.append((*key, str(len(found)), str(count), f"{max(found):.2f}"))
    print(_table(table))
    return wrong


def _materialised(q, k, v, pos, rpe_table, *, heads: int) -> Tensor:
    """PyTorch's own attention, given the bias as a tensor."""
    bias = reference._table_bias(rpe_table, pos, q.shape[2], q.shape[3], "dat++").to(q.dtype)
    q4, k4, v4 = (t.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q4, k4, v4, attn_mask=bias)
    return out.transpose(2, 3).reshape(q.shape)


def _stage(side: int, channels: int, heads: int, groups: int, images: int, device: str):
    """By operator: inputs, gradients of the outputs, options and ways to compute a stage's layer,
    under autocast to bfloat16."""
    torch.manual_seed(0)
    x, q, grad_out = torch.randn(3, images, channels, side, side).to(device, torch.bfloat16)
    k, v, grad_sampled = torch.randn(3, images, channels, 49).to(device, torch.bfloat16)
    offset = torch.randn(images * groups, 2, 7, 7).to(device)
    table = torch.randn(heads, 2 * side - 1, 2 * side - 1).to(device)
    options: dict[str, Any] = {"groups": groups, "offset_range_factor": 2.0}
    pos = reference.deform_sample(x, offset, **options)[1]
    attention = (functional.deform_attention, reference.deform_attention, _materialised)
    sample = (functional.deform_sample, reference.deform_sample)
    return {
        "deform_sample": ((x, offset), (grad_sampled, torch.zeros_like(pos)), options, sample),
        "deform_attention": ((q, k, v, pos, table), grad_out, {"heads": heads}, attention),
    }


def _call(way: Callable, inputs, grads, options: Mapping[str, Any], backward: bool) -> Callable:
    leaves = [t.detach().requires_grad_(backward) for t in inputs]

    def forward():
        return way(*leaves, **options)

    return (lambda: torch.autograd.grad(forward(), leaves, grads)) if backward else forward


def time_operators(
    device: str, clock: Callable[..., Callable[[], float]], images: int = IMAGES, repeats: int = 20
) -> None:
    """Prints medians, in milliseconds, of the fused operators and of the ways around them."""
    print(f"\nDAT++ at 224 pixels, {images} images, bfloat16, milliseconds")
    heads = ("operator", "queries", "direction", "fused", "reference", "sdpa", "fused is faster by")
    table: list[Sequence[str]] = [heads]
    for stage in STAGES:
        cases = _stage(*stage, images, device).items()
        for (name, case), backward in itertools.product(cases, (False, True)):
            inputs, grads, options, ways = case
            times = []
            for way in ways:
                try:
                    take = clock(_call(way, inputs, grads, options, backward))
                    times.append(statistics.median(take() for _ in range(repeats)))
                except torch.OutOfMemoryError:
                    times.append(math.inf)
            shown = [f"{t:.3f}" if t < math.inf else "no memory" for t in times]
            shown += ["-"] * (3 - len(shown))
            direction = "forward+backward" if backward else "forward"
            factor = f"{min(times[1:]) / times[0]:.1f}"
            table.append((name, f"{stage[0]}x{stage[0]}", direction, *shown, factor))
    print(_table(table))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def no_gpu() -> str | None:
    """Why no kernel can run on a GPU here."""
    if "cuda" not in functional.NATIVE_DEVICES:
        return "dat_cuda was built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def run() -> int:
    """The exit status: 1 if anything is wrong."""
    reason = no_gpu()
    device = "cpu" if reason else "cuda"
    machine = f"{platform.machine()}, SIMD {_C.simd()}" if reason else torch.cuda.get_device_name()
    print(f"dat_cuda {__version__}, torch {torch.__version__}, {device} ({machine})")
    print("against the reference in float64, forward and backward:")
    wrong = validate(device)
    if reason:
        print(f"\n{reason}: the CUDA kernels were not checked, and nothing was timed")
    elif not wrong:
        time_operators(device, _clock.CudaClock)
    print("\n" + ("\n".join(wrong) if wrong else "everything that was checked is right"))
    return int(bool(wrong))
