"""What ptxas makes of csrc/cuda: registers, spills, shared memory and the mix of instructions.

Compiles with the build's own flags, keeps what it made in build/kernel_budget, and needs no GPU.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "build_backend"))

import dat_ninja  # noqa: E402
import dat_toolchain  # noqa: E402

CUBIN = """
rule cubin
  command = $nvcc -MMD -MF $out.d $flags -cubin -Xptxas -v $in -o $out 2> $out.log $
    || { cat $out.log >&2; exit 1; }
  depfile = $out.d
  deps = gcc
  description = compile $in for $variant
"""
KINDS = ("HMMA", "FFMA", "DFMA", "LDS", "LDSM", "STS", "LDG", "MUFU", "other")


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor holds; registers are handed out as `registers_per_block` says."""

    warps: int
    blocks: int
    shared: int  # bytes


MULTIPROCESSORS = {
    "80": Multiprocessor(64, 32, 164 * 1024),
    "90": Multiprocessor(64, 32, 228 * 1024),
    "120": Multiprocessor(48, 24, 100 * 1024),
}


@dataclass
class Kernel:
    symbol: str
    label: str
    architecture: str
    registers: int
    spills: int  # bytes stored and loaded
    shared: int  # static, bytes
    mix: Counter | None = None  # of the loop that holds most products, else of all

    def blocks_at_once(self, threads: int, dynamic_shared: int) -> int:
        """Blocks that a multiprocessor holds. Each of its four parts gives a warp registers in
        units of 256, out of 16384; a block takes 1 KiB of shared memory for the system."""
        limit = MULTIPROCESSORS[self.architecture]
        warps = -(-threads // 32)
        of_warp = -(-self.registers * 32 // 256) * 256
        shared = -(-(self.shared + dynamic_shared + 1024) // 128) * 128
        by_registers = 16384 // of_warp * 4 // warps
        return min(limit.blocks, limit.warps // warps, limit.shared // shared, by_registers)


def unavailable() -> str | None:
    """Why nothing can be compiled here."""
    if dat_toolchain.find_nvcc() is None:
        return "no nvcc: put it on PATH or point CUDA_HOME at its toolkit"
    return None


class CubinNinja(dat_ninja.NinjaFile):
    """Machine code alone, with ptxas's report beside it."""

    def cubin(self, source: Path, architecture: str) -> Path:
        name = f"{architecture[:-1]}.{architecture[-1]}"
        flags = [*dat_ninja.NVCC_FLAGS.split(), *dat_ninja.architecture_flags([name])]
        self.compile("cubin", source, flags, f"sm_{architecture}")
        return self.objects[-1]


@functools.cache
def _biases() -> list[str]:
    text = (PROJECT / "csrc/kernels/plan.h").read_text()
    return re.findall(r"^  (\w+),", text.split("enum class Bias")[1].split("}")[0], re.MULTILINE)


def label(name: str) -> str:
    """A kernel's demangled name as one reads it: attention_forward<Mma<bfloat16, 32>, unit>."""
    name = re.sub(r"^void |dat::cuda::|__nv_(?=bfloat16)", "", name)
    name = re.sub(r"\(Bias\)(\d+)", lambda m: _biases()[int(m[1])], name).split("(")[0]
    return name.replace("_kernel<", "<").replace("__half", "float16")


def _demangled(symbols: list[str]) -> list[str]:
    ran = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def _reported(log: str, architecture: str) -> list[Kernel]:
    """The kernels of a file, but those compiled to nothing (is_compiled in common.cuh)."""
    numbers = (r"(\d+) bytes spill stores", r"(\d+) bytes spill loads", r"Used (\d+) registers")
    entries = log.split("Compiling entry function '")[1:]
    symbols = [entry.split("'")[0] for entry in entries]
    kernels = []
    for entry, symbol, name in zip(entries, symbols, _demangled(symbols), strict=True):
        stores, loads, registers = (int(re.search(pattern, entry)[1]) for pattern in numbers)
        shared = re.search(r"(\d+) bytes smem", entry)
        static_shared = int(shared[1]) if shared else 0
        if not re.search(r"Simt<(__half|__nv_bfloat16)", name):
            kernels.append(
                Kernel(symbol, label(name), architecture, registers, stores + loads, static_shared)
            )
    return kernels


def _kind(name: str) -> str:
    name = {"LDGSTS": "LDG"}.get(name, name)
    return name if name in KINDS else "other"


def _mixes(cubin: Path) -> dict[str, Counter]:
    """By symbol: the instructions of the smallest loop that holds most of a kernel's products, of
    the whole kernel where there is none."""
    from ptxemu import sass

    kernels, targets = sass.load(str(cubin))
    mixes = {}
    for symbol, code in kernels.items():
        at = {address: i for i, (address, *_) in enumerate(code)}
        kinds = [_kind(sass.opcode(text).split(".")[0]) for _, text, *_ in code]
        products = ("HMMA",) if "HMMA" in kinds else ("FFMA", "DFMA")
        before = [0, *accumulate(kind in products for kind in kinds)]
        loops = [(0, len(code) - 1)]
        for end, (_, text, *_) in enumerate(code):
            branch = re.search(r"\bBRA\b.*`\((\S+)\)", text)
            start = at[targets[symbol].get(branch[1], code[end][0])] if branch else end
            if start < end and before[end + 1] - before[start] >= max(1, before[-1] * 3 / 4):
                loops.append((start, end))
        start, end = min(loops, key=lambda loop: loop[1] - loop[0])
        mixes[symbol] = Counter(kinds[start : end + 1])
    return mixes


def missing_disassembler() -> str | None:
    try:
        from ptxemu import sass

        sass.find_nvdisasm()
    except ImportError:
        return "the instruction mix needs the emulator's folder: point PTXEMU_HOME at it"
    except FileNotFoundError:
        return "the instruction mix needs nvdisasm: pip install nvidia-cuda-nvdisasm"
    return None


def kernels(pattern: str = "*", architectures: tuple[str, ...] = tuple(MULTIPROCESSORS)):
    """Every kernel of the csrc/cuda/*.cu whose stem matches, for each architecture."""
    build = PROJECT / "build" / "kernel_budget"
    ninja = CubinNinja(PROJECT, build, "", dat_toolchain.require_torch(), dat_toolchain.find_nvcc())
    ninja.lines.append(CUBIN)
    made = [
        (ninja.cubin(source, architecture), architecture)
        for source in ninja.sources(f"csrc/cuda/{pattern}.cu")
        for architecture in architectures
    ]
    ninja.run()
    found = []
    disassembles = missing_disassembler() is None
    for cubin, architecture in made:
        here = _reported(Path(f"{cubin}.log").read_text(), architecture)
        mixes = _mixes(cubin) if here and disassembles else {}
        for kernel in here:
            kernel.mix = mixes.get(kernel.symbol)
        found += here
    return found
