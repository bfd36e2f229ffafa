"""Rows to tables, JSON and Markdown, and the bars a run is held to."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import common
import timing
import torch
from common import CASES, DEFAULT_CASES, DIRECTIONS, DTYPES

from dat_cuda import doctor

MIB = 2**20
EXTRA_BAR_MIB = 8.0
Row = dict[str, object]


def arguments(
    description: str, implementations: Sequence[str], extra: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """The options that both benchmarks take; `extra` implementations run only when named."""

    def listed(known: Iterable[str]):
        def parse(text: str) -> list[str]:
            names = text.split(",")
            for name in names:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
            return names

        return parse

    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--batch", type=int, metavar="N", help="images (default: few, what suits a CPU)")
    add("--cases", type=listed(CASES), default=list(DEFAULT_CASES), metavar="A,B")
    add("--dtype", type=listed(DTYPES), default=["float32"], metavar="A,B")
    add("--direction", type=listed(DIRECTIONS), default=list(DIRECTIONS), metavar="A,B")
    known = [*implementations, *extra]
    add("--impl", type=listed(known), default=list(implementations), metavar=",".join(known))
    add("--threads", type=int, default=torch.get_num_threads())
    add("--repeats", type=int, default=15, help="rounds of samples, at most (default 15)")
    add("--budget-seconds", type=float, default=8.0, help="per case, dtype and direction")
    add(
        "--keep-freed-memory",
        action="store_true",
        help="have malloc keep what is freed instead of as the system does (see timing.py)",
    )
    add("--no-memory", action="store_true", help="skip the peak memory measurement")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE")
    return parser


def header(machine: Mapping[str, object]) -> str:
    dirty = " with changes" if machine["dirty"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; "
        f"device {machine['device']}; SIMD {machine['simd']} (torch: {machine['torch_simd']}); "
        f"torch {machine['torch']}, Python {machine['python']}; "
        f"commit {str(machine['commit'])[:12]}{dirty}"
    )


def _number(value: object, form: str, scale: float = 1.0) -> str:
    return format(value / scale, form) if isinstance(value, int | float) else "-"


def line(row: Row) -> str:
    """One row for the terminal."""
    what = f"{row['case']:<13}{row['dtype']:<9}{row['direction']:<17}{row['implementation']:<11}"
    if row["status"] != "ok":
        return f"{what}{row['status']}: {row['reason']}"
    return (
        f"{what}{_number(row['ms'], '9.3f')} ms +-{_number(row['spread'], '4.0%')}  "
        f"{_number(row['gemm_fraction'], '6.1%'):>6} of GEMM  "
        f"extra {_number(row['extra_bytes'], '8.1f', MIB):>8} MiB"
    )


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def summary(rows: Sequence[Row], bars: Mapping[str, object]) -> list[Row]:
    """Per case, dtype and direction: fused against the fastest other, and its bars.

    `bars` has `speedup` (case -> factor) and `gemm` (case -> fraction, forward only); they were
    set for float32, memory for every dtype.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["dtype"], row["direction"]), []).append(row)
    single = {k: r for k, group in groups.items() for r in group if r["implementation"] == "fused"}
    lines = []
    for (case, dtype, direction), group in groups.items():
        fused = single.get((case, dtype, direction))
        if fused is None or fused["status"] != "ok":
            continue
        others = [r for r in group if r["status"] == "ok" and r is not fused]
        best = min(others, key=lambda r: r["ms"], default=None)
        speedup = best["ms"] / fused["ms"] if best else None
        held = {}
        if dtype == "float32" and speedup is not None and case in bars["speedup"]:
            held["speedup"] = (bars["speedup"][case], speedup >= bars["speedup"][case])
        if dtype == "float32" and direction == "forward" and case in bars["gemm"]:
            held["gemm"] = (bars["gemm"][case], fused["gemm_fraction"] >= bars["gemm"][case])
        if fused["extra_bytes"] is not None and bars.get("memory", True):
            held["memory"] = (EXTRA_BAR_MIB, fused["extra_bytes"] <= EXTRA_BAR_MIB * MIB)
        full = single.get((case, "float32", direction))
        if dtype == "bfloat16" and full is not None and full["status"] == "ok":
            held["float32 ms"] = (full["ms"], fused["ms"] <= full["ms"])
        lines.append(
            {
                "case": case,
                "dtype": dtype,
                "direction": direction,
                "fused_ms": fused["ms"],
                "best_other": best["implementation"] if best else None,
                "best_other_ms": best["ms"] if best else None,
                "speedup": speedup,
                "gemm_fraction": fused["gemm_fraction"],
                "extra_bytes": fused["extra_bytes"],
                "best_other_extra_bytes": best["extra_bytes"] if best else None,
                "bars": {name: {"bar": bar, "met": met} for name, (bar, met) in held.items()},
            }
        )
    return lines


def _cells(entry: Row) -> list[str]:
    bars = ", ".join(
        f"{name} {bar['bar']:.3g} {_verdict(bar['met'])}" for name, bar in entry["bars"].items()
    )
    other = entry["best_other"]
    return [
        str(entry["case"]),
        str(entry["dtype"]),
        str(entry["direction"]),
        _number(entry["fused_ms"], ".3f"),
        f"{other} {_number(entry['best_other_ms'], '.3f')}" if other else "-",
        _number(entry["speedup"], ".2f"),
        _number(entry["gemm_fraction"], ".1%"),
        _number(entry["extra_bytes"], ".1f", MIB),
        _number(entry["best_other_extra_bytes"], ".1f", MIB),
        bars or "-",
    ]


HEADS = (
    "case",
    "dtype",
    "direction",
    "fused ms",
    "fastest other, ms",
    "speed-up",
    "of GEMM",
    "extra MiB",
    "other's MiB",
    "bars",
)


def text_table(entries: Sequence[Row]) -> str:
    table = [list(HEADS), *(_cells(e) for e in entries)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(HEADS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in table)


def markdown(machine: Mapping[str, object], rows: Sequence[Row], entries: Sequence[Row]) -> str:
    """The summary and, below it, every row."""
    out = [header(machine) + ".", "", "| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    out += ["| " + " | ".join(_cells(e)) + " |" for e in entries]
    heads = ("case", "dtype", "direction", "implementation", "ms", "spread", "of GEMM", "extra MiB")
    out += ["", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [str(row[name]) for name in ("case", "dtype", "direction", "implementation")]
        if row["status"] == "ok":
            cells += [
                _number(row["ms"], ".3f"),
                _number(row["spread"], ".0%"),
                _number(row["gemm_fraction"], ".1%"),
                _number(row["extra_bytes"], ".1f", MIB),
            ]
        else:
            cells += [f"{row['status']}: {row['reason']}", "-", "-", "-"]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def run(
    options: argparse.Namespace, run_case: Callable[..., list[Row]], bars: Mapping[str, object]
) -> int:
    """Measures and prints every row and the summary, and writes the files that were asked for.

    Returns the exit status: 1 where fused failed or gave wrong numbers, 2 where it cannot run.
    """
    if options.device == "cuda":
        if reason := doctor.no_gpu():
            print(f"--device cuda: {reason}", file=sys.stderr)
            return 2
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
        bars = {"speedup": {}, "gemm": {}, "memory": False}  # they were set for the CPU
    torch.set_num_threads(options.threads)
    if options.keep_freed_memory:
        timing.keep_freed_memory()
    machine = common.machine(options.device)
    print(header(machine))
    rows = []
    for name, *what in itertools.product(options.cases, options.dtype, options.direction):
        case = CASES[name]
        made = run_case(
            dataclasses.replace(case, batch=options.batch or case.batch),
            *what,
            device=options.device,
            implementations=tuple(options.impl),
            budget=options.budget_seconds,
            repeats=options.repeats,
            with_memory=not options.no_memory,
        )
        rows += [row | {"machine": machine} for row in made]
        print("\n".join(map(line, made)), flush=True)
    entries = summary(rows, bars)
    print("\n" + text_table(entries))
    if options.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        result = {"machine": machine, "settings": settings, "rows": rows, "summary": entries}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(machine, rows, entries))
    return int(any(r["implementation"] == "fused" and r["status"] != "ok" for r in rows))
