"""The CUDA kernels' machine code and traffic, held to kernel_budget.json; needs no GPU.

Static part: registers, spills, shared memory and instruction mix of every kernel that nvcc makes
for sm_80, sm_90 and sm_120, and how many blocks of the 224-pixel cases a multiprocessor holds.
Emulated part: the attention's cases on the emulated device, counted: bytes over compulsory bytes,
sectors a request, bank conflicts, instructions for 32 pairs of query and key, and for each resource
the time that it takes at least over the floor (traffic.py).

    python benchmarks/kernel_budget.py             print all
    python benchmarks/kernel_budget.py --check     and exit with 1 where a budget or bar is exceeded
    python benchmarks/kernel_budget.py --update    and write what was measured as the budget
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import machine_code
import traffic
from machine_code import KINDS, MULTIPROCESSORS

BUDGET = Path(__file__).with_suffix(".json")
# What the design asks for. Of cases: bytes over compulsory bytes, time at least over the floor.
BARS = {
    "datpp_s_1 bfloat16 forward": {"dram": 1.15, "h100": 2},
    "datpp_s_2 bfloat16 forward": {"dram": 1.15, "h100": 2},
    "datpp_s_3 bfloat16 forward": {"dram": 1.15, "h100": 2},
    "datpp_s_4 bfloat16 forward": {"dram": 1.15, "h100": 2},
    "dat_t_3 bfloat16 forward": {"dram": 1.15, "h100": 3},
    "det_2 bfloat16 forward": {"dram": 1.15, "h100": 5},
    "det_2 float32 forward": {"dram": 1.15},
    "datpp_s_1 bfloat16 backward": {"h100": 3},
    "datpp_s_2 bfloat16 backward": {"h100": 3},
    "datpp_s_3 bfloat16 backward": {"h100": 3},
    "datpp_s_4 bfloat16 backward": {"h100": 3},
    "dat_t_3 bfloat16 backward": {"h100": 3},
}
# Blocks that a multiprocessor of these must hold.
RESIDENT = {"80": 2, "90": 2}
# Devices of the emulator that share their limits: sm_120 has as much shared memory as an RTX 4090.
DEVICES = {"80": "a100", "90": "h100", "120": "rtx4090"}
ROOM = 1.02  # of ratios over what was measured: other torch releases draw other positions
Budget = dict[str, dict]


def table(rows: Iterable[Iterable[object]]) -> str:
    cells = [[f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def static(pattern: str, architectures: list[str]) -> tuple[Budget, list[tuple]]:
    """Prints the machine code's figures and returns those that have a budget, and what `residency`
    does."""
    kernels = machine_code.kernels(pattern, architectures)
    kernels.sort(key=lambda kernel: (kernel.label, int(kernel.architecture)))
    rows = [("kernel", "sm", "registers", "spills", "shared", *KINDS)]
    found: Budget = {}
    for kernel in kernels:
        mix = [kernel.mix[kind] if kernel.mix else "-" for kind in KINDS]
        numbers = {"registers": kernel.registers, "spills": kernel.spills}
        found.setdefault(kernel.label, {})[f"sm_{kernel.architecture}"] = numbers
        rows.append((kernel.label, kernel.architecture, *numbers.values(), kernel.shared, *mix))
    print(table(rows))
    if reason := machine_code.missing_disassembler():
        print(reason)
    return found, residency(kernels)


def residency(kernels: list[machine_code.Kernel]) -> list[tuple]:
    """Prints what a multiprocessor holds of the 224-pixel cases, whose launches the emulator knows,
    and returns rows of what it holds too few of."""
    if reason := traffic.unavailable():
        print(f"blocks on a multiprocessor: {reason}")
        return []
    too_few = []
    rows = [("case", "kernel", "sm", "blocks", "threads", "registers", "shared", "held", "warps")]
    compiled = {(kernel.label, kernel.architecture): kernel for kernel in kernels}
    for name in (name for name in traffic.NAMES if not name.startswith("det")):
        for architecture, device in DEVICES.items():
            for part in traffic.measure(name, "bfloat16", device, counted=False):
                for launch in part.launches:
                    kernel = compiled.get((machine_code.label(launch.kernel), architecture))
                    if kernel is None:
                        continue
                    threads, shared = math.prod(launch.block), launch.smem
                    held = kernel.blocks_at_once(threads, shared)
                    least = RESIDENT.get(architecture, 1)
                    if held < least:
                        label = f"{name} {kernel.label} sm_{architecture} blocks held"
                        too_few.append((label, held, f"at least {least}"))
                    numbers = (math.prod(launch.grid), threads, kernel.registers)
                    rows.append(
                        (
                            name, kernel.label, architecture, *numbers,
                            shared + kernel.shared, held, held * -(-threads // 32),
                        )
                    )  # fmt: skip
    print("\n" + table(rows))
    return too_few


def emulated(cases: list[str]) -> Budget:
    """Prints the cases' traffic and bounds and returns those figures that have a budget."""
    heads = ("case", "GPU", "bytes", "sectors/req", "conflicts", "insts", *traffic.RESOURCES)
    rows: list[tuple] = [(*heads, "floor us", "ratio", "bar")]
    found: Budget = {}
    for name, dtype in traffic.CASES:
        if name not in cases:
            continue
        for gpu in traffic.RATES:
            for part in traffic.measure(name, dtype, gpu):
                bounds, bar = part.bounds(), BARS.get(part.key, {}).get(gpu, "-")
                found.setdefault(part.key, {"dram": part.dram})[gpu] = part.ratio
                counts = (part.dram, part.sectors_per_request, part.conflicts, part.instructions)
                ratios = [bounds[resource] / part.floor for resource in traffic.RESOURCES]
                rows.append((part.key, gpu, *counts, *ratios, part.floor, part.ratio, bar))
    print(table(rows))
    return found


def numbers(entries: dict, path: str = "") -> Iterator[tuple[str, float]]:
    for name, value in entries.items():
        name = f"{path} {name}".strip()
        if isinstance(value, dict):
            yield from numbers(value, name)
        else:
            yield name, value


def exceeded(found: Budget, limits: Budget, what: str = "budget") -> list[tuple]:
    """Rows of what is over its limit; everything must have a budget, few things have a bar."""
    known = dict(numbers(limits))
    rows = []
    for name, value in numbers(found):
        limit = known.get(name)
        if limit is None and what == "budget":
            rows.append((name, value, "no budget: run with --update"))
        elif limit is not None and not value <= limit:
            rows.append((name, value, f"{what} {limit}"))
    return rows


def load() -> dict[str, Budget]:
    empty: dict[str, Budget] = {"compiler": {}, "kernels": {}, "cases": {}}
    return json.loads(BUDGET.read_text()) if BUDGET.exists() else empty


def compiler() -> dict[str, str]:
    """What the figures depend on, beside the sources."""
    return {"nvcc": machine_code.dat_toolchain.find_nvcc().version}


def update(found: dict[str, Budget], afresh: bool) -> None:
    """Writes the figures as the budget, a line each. What was not measured stays, but kernels go
    where all that there are were measured."""
    budget = load() | {"compiler": compiler()}
    if afresh:
        budget["kernels"] = {}
    for label, values in found["kernels"].items():
        budget["kernels"][label] = budget["kernels"].get(label, {}) | values
    for key, values in found["cases"].items():
        budget["cases"][key] = {
            name: math.ceil(value * ROOM * 100) / 100 for name, value in values.items()
        }
    parts = []
    for part, entries in budget.items():
        lines = (f"  {json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries))
        parts.append(f' "{part}": {{\n' + ",\n".join(lines) + "\n }")
    BUDGET.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = {"type": lambda text: text.split(","), "metavar": "A,B"}
    parser.add_argument("--part", choices=("static", "emulated"), help="only one of the two")
    parser.add_argument("--files", default="*", metavar="GLOB", help="stems of csrc/cuda/*.cu")
    parser.add_argument("--arch", default=list(MULTIPROCESSORS), **listed)
    parser.add_argument("--cases", default=list(traffic.NAMES), **listed)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true")
    action.add_argument("--update", action="store_true")
    options = parser.parse_args(argv)
    found: dict[str, Budget] = {"kernels": {}, "cases": {}}
    wanted = (options.part,) if options.part else ("static", "emulated")
    for part, module in (("static", machine_code), ("emulated", traffic)):
        if part in wanted and (reason := module.unavailable()):
            print(f"the {part} part cannot run: {reason}")
            return 1
    wrong = []
    rows: list[tuple] = []
    if "static" in wanted:
        found["kernels"], rows = static(options.files, options.arch)
    if "emulated" in wanted:
        found["cases"] = emulated(options.cases)
        wrong += traffic.emulator_faults()
    if options.update:
        all_kernels = options.files == "*" and set(options.arch) == set(MULTIPROCESSORS)
        update(found, afresh="static" in wanted and all_kernels)
    if options.check:
        if load()["compiler"] != compiler():
            print(f"\nthe budget is of {load()['compiler']}, these figures of {compiler()}")
        rows += exceeded(found["cases"], BARS, "bar")
        for part, measured in found.items():
            rows += exceeded(measured, load()[part])
        wrong += [table([("exceeded", "measured", "limit"), *rows])] if rows else []
    print("\n" + ("\n".join(wrong) if wrong else "nothing is wrong"))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
