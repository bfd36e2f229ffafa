"""Whole models, fused against the same model on the reference: images a second and peak memory.

One model with one set of weights runs both ways; `dat_cuda.backend("reference")` makes it the
published formulas in plain PyTorch. Training is forward, backward and nothing else. At 800 x 1333
the model is a backbone (`features_only`). The two must agree before they are timed: their largest
difference is in the table, relative to the largest value.

    python benchmarks/model.py --cases dat_tiny_224,datpp_tiny_det --json model.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import common
import memory
import report
import timing
import torch
from torch import Tensor, nn

import dat_cuda
from dat_cuda import _rss, models

# name: (builder, height, width, images)
CASES = {
    "dat_tiny_224": ("dat_tiny", 224, 224, 8),
    "datpp_tiny_224": ("datpp_tiny", 224, 224, 8),
    "dat_base_384": ("dat_base_384", 384, 384, 2),
    "datpp_base_384": ("datpp_base_384", 384, 384, 2),
    "dat_tiny_det": ("dat_tiny", 800, 1333, 1),
    "datpp_tiny_det": ("datpp_tiny", 800, 1333, 1),
}
MODES = ("inference", "training")
BACKENDS = {"fused": "auto", "reference": "reference"}
SPEED_BARS = {
    "dat_tiny_224": 1.2,
    "datpp_tiny_224": 1.3,
    "dat_tiny_det": 3.0,
    "datpp_tiny_det": 3.0,
}
MEMORY_BAR = 1 / 3  # of the reference's, at 800 x 1333
TOLERANCE = 1e-3  # in float32, through all layers, relative to the largest value


def build(case: str, mode: str, device: str) -> nn.Module:
    """The model with offsets and position tables that are not close to zero."""
    builder, height, _, _ = CASES[case]
    torch.manual_seed(0)
    model = getattr(models, builder)(drop_path_rate=0.0, features_only=case.endswith("_det"))
    for name, parameter in model.named_parameters():
        if name.endswith(("rpe_table", "rpb", "relative_position_bias_table")):
            nn.init.normal_(parameter, std=0.5)
    return model.to(device).train(mode == "training")


def images(case: str, batch: int | None, device: str) -> Tensor:
    _, height, width, few = CASES[case]
    torch.manual_seed(1)
    return torch.randn(batch or few, 3, height, width).to(device)


def call(model: nn.Module, x: Tensor, side: str, mode: str) -> Callable[[], Tensor]:
    """() -> the last map or the logits; in training after backward, which adds to no gradient."""
    parameters = list(model.parameters())

    def run() -> Tensor:
        with dat_cuda.backend(BACKENDS[side]), torch.set_grad_enabled(mode == "training"):
            result = model(x)
            maps = result if isinstance(result, list) else [result]
            if mode == "training":
                torch.autograd.grad(sum(y.square().mean() for y in maps), parameters)
            return maps[-1].detach()

    return run


def prepare(case: str, batch: int | None, side: str, mode: str, device: str):
    """The warm-up and the call whose memory is measured (see memory.py)."""
    model = build(case, mode, device)
    x = images(case, batch, device)
    return call(model, x[:1, :, :64, :64], side, mode), call(model, x, side, mode)


def run_case(case: str, mode: str, options: argparse.Namespace) -> dict[str, object]:
    """One row: both sides."""
    model = build(case, mode, options.device)
    x = images(case, options.batch, options.device)
    calls = {side: call(model, x, side, mode) for side in BACKENDS}
    fused, reference = (calls[side]() for side in BACKENDS)
    difference = (fused - reference).abs().max().item() / reference.abs().max().item()
    del fused, reference
    row: dict[str, object] = {
        **{"case": case, "mode": mode, "images": len(x), "difference": difference},
        **{"ms": {}, "spread": {}, "peak_bytes": {}},
    }
    if not difference < TOLERANCE:
        raise SystemExit(f"{case} {mode}: fused and reference differ by {difference:.1e}")
    samples = timing.interleaved(
        calls, device=options.device, budget=options.budget_seconds, repeats=options.repeats
    )
    for side, taken in samples.items():
        row["ms"][side], row["spread"][side] = timing.median_and_spread(taken)
    del calls, model, x
    _rss.release_freed()
    if not options.no_memory:
        on_cuda = options.device == "cuda"
        for side in BACKENDS:
            arguments = case, options.batch, side, mode, options.device
            extra, _ = (
                memory.peak_cuda(*prepare(*arguments))
                if on_cuda
                else memory.peak_cpu(prepare, *arguments)
            )
            row["peak_bytes"][side] = extra
    return row


HEADS = (
    *("case", "mode", "images", "fused images/s", "reference images/s", "speed-up"),
    *("fused MiB", "reference MiB", "memory", "difference", "bars"),
)


def cells(row: dict) -> list[str]:
    ms, peak, case = row["ms"], row["peak_bytes"], row["case"]
    speedup = ms["reference"] / ms["fused"]
    bars = []
    if case in SPEED_BARS:
        verdict = "met" if speedup >= SPEED_BARS[case] else "MISSED"
        bars.append(f"{SPEED_BARS[case]}x {verdict}")
    if peak and case.endswith("_det"):
        verdict = "met" if peak["fused"] <= MEMORY_BAR * peak["reference"] else "MISSED"
        bars.append(f"a third of the memory {verdict}")
    rates = [f"{1e3 * row['images'] / ms[side]:.2f}" for side in BACKENDS]
    sizes = [f"{peak[side] / 2**20:.0f}" if peak else "-" for side in BACKENDS]
    share = f"{peak['fused'] / peak['reference']:.2f}" if peak else "-"
    return [
        *(case, row["mode"], str(row["images"]), *rates, f"{speedup:.2f}"),
        *(*sizes, share, f"{row['difference']:.0e}", "; ".join(bars) or "-"),
    ]


def markdown(machine: dict, rows: list[dict]) -> str:
    lines = [" | ".join(HEADS), " | ".join("---" for _ in HEADS)]
    lines += [" | ".join(cells(row)) for row in rows]
    return "\n".join([report.header(machine) + ".", "", *(f"| {line} |" for line in lines)]) + "\n"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--cases", default=",".join(CASES), metavar=",".join(CASES))
    add("--modes", default=",".join(MODES), metavar=",".join(MODES))
    add("--batch", type=int, metavar="N", help="images at a time (default: few, by the case)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--repeats", type=int, default=9, help="rounds of samples, at most (default 9)")
    add("--budget-seconds", type=float, default=20.0, help="of timing, for each case and mode")
    add("--no-memory", action="store_true", help="skip the peak memory measurement")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = arguments()
    options = parser.parse_args(argv)
    cases, modes = options.cases.split(","), options.modes.split(",")
    for name, given, known in (("--cases", cases, CASES), ("--modes", modes, MODES)):
        for value in given:
            if value not in known:
                parser.error(f"{name}: {value!r} is none of {', '.join(known)}")
    torch.set_num_threads(options.threads)
    machine = common.machine(options.device)
    print(report.header(machine), flush=True)
    rows = []
    for case in cases:
        for mode in modes:
            rows.append(run_case(case, mode, options))
            print("  ".join(cells(rows[-1])), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    if options.markdown:
        options.markdown.write_text(markdown(machine, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
