"""deform_attention five ways, side by side: correctness, then time, memory and rate.

Every way is first compared with the reference in float64 on the same inputs, run one image and
one head at a time so that its scores fit in memory at every case; a way may be off by twice
what the reference in the same dtype is off, plus rounding. Only then are the ways timed, in
rounds within one process, beside a large square torch.mm that gives the GEMM rate. Rates count
the two products of the formula, 4 M N d flops for each head, 3.5 times as many with backward.

    python benchmarks/attention.py --cases datpp_s_1,det_1 --json attention.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import common
import memory
import report
import timing
import torch
import ways
from common import DTYPES, Case

from dat_cuda import reference

BARS = {
    "speedup": {
        name: 6.0 if name in ("datpp_s_1", "datpp_b384_1", "det_1", "det_2") else 3.0
        for name in common.DEFAULT_CASES
    },
    "gemm": {"det_1": 0.45, "det_2": 0.45},
}
NAMES = ("out", *(f"grad_{name}" for name in ways.INPUTS))
Call = Callable[[], object]


def exact(
    case: Case, tensors: ways.Tensors, grad_out: torch.Tensor, direction: str
) -> dict[str, torch.Tensor]:
    """out and, with backward, the gradient of every input, by the reference in float64."""
    q, k, v, pos, table = (t.double() for t in tensors)
    wide, per_group = case.channels // case.heads, case.heads // case.groups
    total = [torch.zeros_like(t) for t in (q, q, k, v, pos, table)]
    for b in range(case.batch):
        for head in range(case.heads):
            image, rows = slice(b, b + 1), slice(head * wide, (head + 1) * wide)
            group = slice(head // per_group, head // per_group + 1)
            places = [(image, rows)] * 3 + [(image, group), (slice(head, head + 1),)]
            leaves = [
                t[at].clone().requires_grad_(direction != "forward")
                for t, at in zip((q, k, v, pos, table), places, strict=True)
            ]
            out = reference.deform_attention(*leaves, heads=1, version=case.version)
            total[0][image, rows] = out.detach()
            if direction != "forward":
                grads = torch.autograd.grad(out, leaves, grad_out[image, rows].double())
                for sums, at, grad in zip(total[1:], places, grads, strict=True):
                    sums[at] += grad
    names = NAMES[:1] if direction == "forward" else NAMES
    return dict(zip(names, total, strict=False))


def _named(result: object) -> dict[str, torch.Tensor]:
    if isinstance(result, tuple):
        out, grads = result
        return dict(zip(NAMES, (out, *grads), strict=True))
    return {"out": result}


def reference_errors(
    case: Case, dtype: torch.dtype, direction: str, device: str, right: dict[str, torch.Tensor]
) -> dict[str, float]:
    """What the rule of correctness goes by."""
    narrow, factor = common.yardstick(dtype)
    tensors, grad_out = ways.inputs(case, narrow, device)
    call = ways.call(ways.way("reference", case), tensors, grad_out, direction)
    errors = common.worst(_named(call()), right, tensors[3])
    return {name: factor * error for name, error in errors.items()}


def prepare(name: str, case: Case, dtype: str, direction: str, device: str) -> tuple[Call, Call]:
    """The warm-up and the call whose memory is measured (see memory.py)."""
    compute = ways.way(name, case)

    def built(at: Case) -> Call:
        tensors, grad_out = ways.inputs(at, DTYPES[dtype], device)
        return ways.call(compute, tensors, grad_out, direction)

    real = built(case)
    return (real if name in ("compiled", "flex") else built(case.shrunk())), real


def _check(
    row: report.Row,
    call: Call,
    right: dict[str, torch.Tensor],
    allowed: dict[str, float],
    pos: torch.Tensor,
) -> bool:
    """Runs the call once and says in the row whether it may be timed."""
    name, dtype = row["implementation"], DTYPES[row["dtype"]]
    try:
        row["errors"] = common.worst(_named(call()), right, pos)
    except Exception as error:
        trains = name == "flex" and row["direction"] != "forward"
        row["status"] = "unsupported" if trains else "failed"
        row["reason"] = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
        return False
    wrong = common.violations(row["errors"], allowed, dtype)
    if wrong:
        row["status"], row["reason"] = "wrong", "; ".join(wrong)
    return not wrong


def run_case(
    case: Case,
    dtype: str,
    direction: str,
    *,
    device: str = "cpu",
    implementations: tuple[str, ...] = ways.WAYS,
    budget: float = 8.0,
    repeats: int = 15,
    with_memory: bool = True,
) -> list[report.Row]:
    """The rows of one case, dtype and direction."""
    torch.compiler.reset()
    tensors, grad_out = ways.inputs(case, DTYPES[dtype], device)
    right = exact(case, tensors, grad_out, direction)
    allowed = reference_errors(case, DTYPES[dtype], direction, device, right)
    rows, calls = [], {}
    for name in implementations:
        row = common.new_row(case, dtype, direction, name, device)
        row["reference_errors"] = allowed
        rows.append(row)
        call = ways.call(ways.way(name, case), tensors, grad_out, direction)
        if _check(row, call, right, allowed, tensors[3]):
            calls[name] = call
    timing.time_rows(
        rows, calls, case.flops(direction), device=device, budget=budget, repeats=repeats
    )
    for row, name in zip(rows, implementations, strict=True):
        if with_memory and row["status"] == "ok":
            memory.fill(row, prepare, name, case, dtype, direction, device)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = report.arguments(__doc__.splitlines()[0], ways.WAYS, ways.EXTRA_WAYS)
    options = parser.parse_args(argv)
    return report.run(options, run_case, BARS)


if __name__ == "__main__":
    sys.exit(main())
