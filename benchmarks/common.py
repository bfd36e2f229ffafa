"""What the benchmarks share: the cases, the machine, the rows, the correctness rule."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

DTYPES = {n: getattr(torch, n) for n in ("float32", "float64", "bfloat16", "float16")}
DIRECTIONS = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention layer of a published model and the input it meets.

    q, out [batch, channels, height, width]; k, v [batch, channels, keys];
    pos [batch, groups, keys, 2]; rpe_table [heads, 2 * table[0] - 1, 2 * table[1] - 1].
    """

    name: str
    batch: int
    height: int
    width: int
    channels: int
    heads: int
    groups: int
    key_height: int
    key_width: int
    table: tuple[int, int]
    stride: int
    ksize: int
    version: str = "dat++"

    @property
    def keys(self) -> int:
        return self.key_height * self.key_width

    @property
    def pairs(self) -> int:
        """Entries of the scores that the plain formula materialises."""
        return self.batch * self.heads * self.height * self.width * self.keys

    @property
    def offset_range_factor(self) -> float:
        return -1.0 if self.version == "dat++" else 2.0

    def flops(self, direction: str) -> float:
        """The two products of the formula; backward counts 2.5 times as much again."""
        forward = 4.0 * self.pairs * (self.channels // self.heads)
        return forward if direction == "forward" else 3.5 * forward

    def shrunk(self) -> Case:
        """The same layer at a size that touches the same code and next to no memory."""
        return dataclasses.replace(
            self,
            batch=1,
            height=min(self.height, 9),
            width=min(self.width, 9),
            key_height=min(self.key_height, 3),
            key_width=min(self.key_width, 3),
        )


_ALL = (
    Case("datpp_s_1", 4, 56, 56, 96, 3, 1, 7, 7, (56, 56), 8, 9),
    Case("datpp_s_2", 4, 28, 28, 192, 6, 2, 7, 7, (28, 28), 4, 7),
    Case("datpp_s_3", 4, 14, 14, 384, 12, 3, 7, 7, (14, 14), 2, 5),
    Case("datpp_s_4", 4, 7, 7, 768, 24, 6, 7, 7, (7, 7), 1, 3),
    Case("dat_t_3", 4, 14, 14, 384, 12, 3, 14, 14, (14, 14), 1, 5, "dat"),
    Case("datpp_b384_1", 2, 96, 96, 128, 4, 2, 12, 12, (96, 96), 8, 9),
    Case("det_2", 1, 100, 167, 192, 6, 2, 25, 42, (28, 28), 4, 7),
    Case("det_1", 1, 200, 334, 96, 3, 1, 25, 42, (56, 56), 8, 9),
)
DEFAULT_CASES = tuple(case.name for case in _ALL)
TINY = Case("tiny", 2, 6, 6, 16, 2, 2, 3, 3, (6, 6), 2, 3)
CASES = {case.name: case for case in (*_ALL, TINY)}


def _git(*arguments: str) -> str:
    """What git says of the tree that holds this file, "" where it says nothing."""
    try:
        ran = subprocess.run(
            ("git", *arguments), cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _simd() -> str:
    try:
        from dat_cuda import _C
    except ImportError:
        return "not built"
    return str(_C.simd())


def machine(device: str) -> dict[str, object]:
    """What a number must be read with: the machine, the versions, the commit."""
    return {
        "cpu": _cpu_model(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "simd": _simd(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain")),
    }


def new_row(
    case: Case, dtype: str, direction: str, implementation: str, device: str
) -> dict[str, object]:
    """A row before it was measured: every field that the JSON has but `machine`."""
    unknown = ("reason", "errors", "reference_errors", "ms", "spread", "samples", "gemm_fraction")
    unknown += ("gemm_gflops", "extra_bytes", "outputs_bytes", "memory_reason")
    return {
        "case": case.name,
        "shape": dataclasses.asdict(case),
        "dtype": dtype,
        "device": device,
        "direction": direction,
        "implementation": implementation,
        "status": "ok",
        **dict.fromkeys(
            (*unknown, "reference_errors", "extra_bytes", "outputs_bytes", "memory_reason")
        ),
    }


def worst(
    found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor], pos: torch.Tensor | None
) -> dict[str, float]:
    """Largest error of each tensor, relative to the largest exact value.

    The gradient of a position jumps where a key meets the border of a table cell, so it is
    compared by its root mean square, without the coordinates that were clamped onto the last
    border (where no gradient would flow on).
    """
    errors = {}
    for name, right in exact.items():
        error = found[name].double() - right
        if name == "grad_pos" and pos is not None:
            inside = pos.abs() < 1
            error, right = error[inside], right[inside]
            errors[name] = float(error.square().mean().sqrt() / right.square().mean().sqrt())
        else:
            errors[name] = float(error.abs().max() / right.abs().max())
    return errors


def yardstick(dtype: torch.dtype) -> tuple[torch.dtype, float]:
    """(the dtype in which the error of the reference is taken, what to multiply it by).

    In float64 the reference is the measure itself, so its error in float32 is scaled down.
    """
    if dtype != torch.float64:
        return dtype, 1.0
    return torch.float32, torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def violations(
    errors: Mapping[str, float], reference_errors: Mapping[str, float], dtype: torch.dtype
) -> list[str]:
    """The rule: at most twice the error of the reference in the same dtype, plus 8 roundings."""
    said = []
    for name, error in errors.items():
        allowed = 2 * reference_errors[name] + 8 * torch.finfo(dtype).eps
        if not error <= allowed:  # a NaN is a violation too
            said.append(f"{name} is off by {error:.1e}, {allowed:.1e} allowed")
    return said
