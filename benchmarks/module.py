"""The whole DAttention module: fused against the same module on the reference.

One module with one set of weights runs both ways; `dat_cuda.backend("reference")` makes it the
published formula in plain PyTorch, 1x1 convolutions included. Gradients are those of the input
and of every parameter. The correctness check is that of benchmarks/attention.py, but where the
scores would not fit in memory in float64 it is made on a smaller input to the same module.

    python benchmarks/module.py --cases datpp_s_1,det_1 --json module.json
"""

from __future__ import annotations

import copy
import dataclasses
import sys

import common
import memory
import report
import timing
import torch
from common import DTYPES, Case

import dat_cuda

BARS = {
    "speedup": {name: 5.0 if "det" in name else 1.8 for name in common.DEFAULT_CASES},
    "gemm": {},
    "memory": False,
}
SIDES = ("fused", "reference")
BACKENDS = {"fused": "auto", "reference": "reference"}
FEW_PAIRS = 2e7  # scores of 160 MB in float64


def module(case: Case) -> dat_cuda.DAttention:
    """The layer of the case, with offsets and a bias table that are not close to zero."""
    torch.manual_seed(0)
    made = dat_cuda.DAttention(
        case.table,
        (case.key_height, case.key_width),
        case.heads,
        case.channels // case.heads,
        case.groups,
        attn_drop=0.0,
        proj_drop=0.0,
        stride=case.stride,
        offset_range_factor=case.offset_range_factor,
        use_pe=True,
        dwc_pe=False,
        no_off=False,
        fixed_pe=False,
        ksize=case.ksize,
        version=case.version,
    )
    torch.nn.init.normal_(made.rpe_table, std=0.5)
    return made


def inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x and grad_y, [batch, channels, height, width]."""
    torch.manual_seed(1)
    shape = (case.batch, case.channels, case.height, case.width)
    return tuple(torch.randn(shape).to(device, dtype) for _ in range(2))


def call(
    layer: dat_cuda.DAttention, side: str, x: torch.Tensor, grad_y: torch.Tensor, direction: str
):
    """What is timed: () -> y, or () -> (y, gradients of x and of every parameter)."""
    if direction == "forward":

        def forward() -> torch.Tensor:
            with torch.no_grad(), dat_cuda.backend(BACKENDS[side]):
                return layer(x)[0]

        return forward

    x = x.detach().requires_grad_()
    leaves = (x, *layer.parameters())

    def forward_backward() -> tuple:
        with dat_cuda.backend(BACKENDS[side]):
            y = layer(x)[0]
            return y.detach(), torch.autograd.grad(y, leaves, grad_y)

    return forward_backward


def prepare(side: str, case: Case, dtype: str, direction: str, device: str):
    """The warm-up and the call whose memory is measured (see memory.py)."""
    layer = module(case).to(device, DTYPES[dtype])
    small = dataclasses.replace(case, batch=1, height=case.stride * 4, width=case.stride * 4)
    return tuple(
        call(layer, side, *inputs(at, DTYPES[dtype], device), direction) for at in (small, case)
    )


def check(row: report.Row, layer: dat_cuda.DAttention, case: Case) -> None:
    """Compares a side with the module in float64; says in the row on which input."""
    if case.pairs > FEW_PAIRS:
        case = dataclasses.replace(case, height=case.height // 4, width=case.width // 4)
    row["checked_at"] = [case.batch, case.channels, case.height, case.width]
    dtype, direction = DTYPES[row["dtype"]], row["direction"]
    x, grad_y = inputs(case, dtype, row["device"])

    def named(of: dat_cuda.DAttention, side: str, *tensors: torch.Tensor) -> dict:
        result = call(of, side, *tensors, direction)()
        if direction == "forward":
            return {"y": result}
        names = ("x", *(name for name, _ in layer.named_parameters()))
        return {"y": result[0], **dict(zip(names, result[1], strict=True))}

    # Not k's bias: softmax does not see it, so its gradient is rounding alone.
    right = named(copy.deepcopy(layer).double(), "reference", x.double(), grad_y.double())
    right.pop("proj_k.bias", None)
    narrow, factor = common.yardstick(dtype)
    plain = named(copy.deepcopy(layer).to(narrow), "reference", x.to(narrow), grad_y.to(narrow))
    errors = common.worst(plain, right, None)
    row["reference_errors"] = {name: factor * error for name, error in errors.items()}
    row["errors"] = common.worst(named(layer, row["implementation"], x, grad_y), right, None)
    wrong = common.violations(row["errors"], row["reference_errors"], dtype)
    if wrong:
        row["status"], row["reason"] = "wrong", "; ".join(wrong)


def run_case(
    case: Case,
    dtype: str,
    direction: str,
    *,
    device: str = "cpu",
    implementations: tuple[str, ...] = SIDES,
    budget: float = 8.0,
    repeats: int = 15,
    with_memory: bool = True,
) -> list[report.Row]:
    """The rows of one case, dtype and direction."""
    layer = module(case).to(device, DTYPES[dtype])
    tensors = inputs(case, DTYPES[dtype], device)
    rows, calls = [], {}
    for side in implementations:
        row = common.new_row(case, dtype, direction, side, device)
        check(row, layer, case)
        rows.append(row)
        if row["status"] == "ok":
            calls[side] = call(layer, side, *tensors, direction)
            calls[side]()
    timing.time_rows(rows, calls, None, device=device, budget=budget, repeats=repeats)
    for row in rows:
        if with_memory and row["status"] == "ok":
            memory.fill(row, prepare, row["implementation"], case, dtype, direction, device)
    return rows


def main(argv: list[str] | None = None) -> int:
    options = report.arguments(__doc__.splitlines()[0], SIDES).parse_args(argv)
    return report.run(options, run_case, BARS)


if __name__ == "__main__":
    sys.exit(main())
