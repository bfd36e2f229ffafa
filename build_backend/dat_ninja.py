"""Compiles csrc/ into one extension module with ninja, which rebuilds only what changed."""

import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import dat_toolchain
from dat_toolchain import OLDEST_TORCH, BuildError, Nvcc, Torch

# In the order of linking. An inline function of the standard library that several variants
# emit is taken from the first of them, so no machine runs one compiled for a newer machine.
SIMD_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c "
    "-mprefer-vector-width=512",
}
CXX_FLAGS = (
    "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -Wall -Wextra "
    "-ffp-contract=fast -fno-math-errno"
)
NVCC_FLAGS = "-std=c++17 -O3 -DNDEBUG -Xcompiler -fPIC,-fvisibility=hidden"

RULES = """
rule cxx
  command = $cxx -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in $variant

rule nvcc
  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in

rule link
  command = $linker $in -o $out $flags
  description = link
"""


def simd_variants() -> list[str]:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return list(SIMD_FLAGS)
    return ["baseline"]


def architecture_flags(architectures: Iterable[str]) -> Iterable[str]:
    """Machine code for each, made of few kinds of PTX, which takes longer to make: without tensor
    cores, with them, and for 10.0 and later, which get better code from PTX of their own. Nothing
    in it is special to an architecture, as 9.0a would allow."""
    for architecture in architectures:
        number = int("".join(re.match(r"(\d+)\.(\d)", architecture).groups()))
        virtual = 100 if number >= 100 else 80 if number >= 80 else number
        yield f"-gencode=arch=compute_{virtual},code=sm_{number}"
        if architecture.endswith("+PTX"):
            yield f"-gencode=arch=compute_{virtual},code=compute_{virtual}"


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _flags(*flags: str) -> str:
    return shlex.join(flags).replace("$", "$$")


class NinjaFile:
    """The text of a build.ninja: sources relative to the project, outputs in build_dir."""

    def __init__(
        self, project: Path, build_dir: Path, version: str, torch: Torch, nvcc: Nvcc | None
    ):
        self.project = project
        self.build_dir = build_dir
        self.version = version
        self.torch = torch
        self.nvcc = nvcc
        self.simd = simd_variants()
        self.objects: list[Path] = []
        self.compiler = dat_toolchain.find_compiler()
        self.lines = [f"builddir = {_path(build_dir)}", f"cxx = {_flags(*self.compiler)}"]
        if nvcc:
            self.lines.append(f"nvcc = {_flags(nvcc.command, '-ccbin', self.compiler[0])}")
        self.lines.append(RULES)

    @cached_property
    def architectures(self) -> list[str]:
        return dat_toolchain.cuda_architectures(self.nvcc)

    def sources(self, pattern: str) -> list[Path]:
        return sorted(path.relative_to(self.project) for path in self.project.glob(pattern))

    def compile(self, rule: str, source: Path, flags: Iterable[str], variant: str = "") -> None:
        target = self.build_dir / source.with_suffix(f".{variant or rule}.o")
        self.objects.append(target)
        self.lines.append(f"build {_path(target)}: {rule} {_path(source)}")
        self.lines.append(f"  variant = {variant}")
        self.lines.append(f"  flags = {_flags(*flags)}\n")

    def cxx_flags(self) -> list[str]:
        flags = CXX_FLAGS.split() + ["-Icsrc"]
        flags += ["-isystem", str(self.torch.include)]
        # The headers' error messages hold their file names: no path of this machine in them.
        flags.append(f"-fmacro-prefix-map={self.torch.root}=torch")
        flags.append("-DTORCH_TARGET_VERSION=0x{:02x}{:02x}{:012x}".format(*OLDEST_TORCH, 0))
        flags += [f"-DDAT_HAVE_{variant.upper()}" for variant in self.simd]
        if self.nvcc:
            flags.append("-DDAT_WITH_CUDA")
        return flags + shlex.split(os.environ.get("CXXFLAGS", ""))

    def module_flags(self) -> list[str]:
        """What csrc/module.cpp alone needs: Python, pybind11 and the facts that it reports."""
        import pybind11

        flags = [f'-DDAT_VERSION="{self.version}"', f'-DDAT_TORCH_VERSION="{self.torch.version}"']
        if self.nvcc:
            flags.append(f'-DDAT_CUDA_VERSION="{self.nvcc.version}"')
            flags.append(f'-DDAT_CUDA_ARCHITECTURES="{";".join(self.architectures)}"')
        for include in (pybind11.get_include(), sysconfig.get_path("include")):
            flags += ["-isystem", include]
        return flags

    def add_sources(self) -> None:
        if self.nvcc:  # first, for they take longest
            self.add_cuda_sources(architecture_flags(self.architectures))
        common = self.cxx_flags()
        kernels = self.sources("csrc/cpu/kernels*.cpp")
        others = self.sources("csrc/*.cpp") + self.sources("csrc/cpu/*.cpp")
        for source in others:
            if source in kernels:
                continue
            extra = self.module_flags() if source.name == "module.cpp" else []
            self.compile("cxx", source, common + extra)
        for variant in self.simd:
            flags = [*SIMD_FLAGS[variant].split(), f"-DDAT_SIMD={variant}"]
            for source in kernels:
                self.compile("cxx", source, common + flags, variant)

    def add_cuda_sources(self, flags: Iterable[str]) -> None:
        flags = [*NVCC_FLAGS.split(), *flags]
        for source in self.sources("csrc/cuda/*.cu"):
            self.compile("nvcc", source, flags)

    def linker(self) -> str:
        if platform.system() == "Darwin":
            return _flags(*self.compiler, "-bundle", "-undefined", "dynamic_lookup")
        if self.nvcc:
            return "$nvcc -shared -cudart static -Xlinker --as-needed"
        return _flags(*self.compiler, "-shared", "-Wl,--as-needed")

    def link(self, output: Path, *more_flags: str) -> None:
        # No run path: dat_cuda imports torch first, which loads these libraries. For the linker
        # alone: nvcc keeps the folders that it is told of in what it makes.
        flags = ["-Xlinker", f"-L{self.torch.lib}", "-Xlinker", "-ltorch_cpu", *more_flags]
        flags += shlex.split(os.environ.get("LDFLAGS", ""))
        inputs = " ".join(_path(target) for target in self.objects)
        self.lines.append(f"build {_path(output)}: link {inputs}")
        self.lines.append(f"  linker = {self.linker()}")
        self.lines.append(f"  flags = {_flags(*flags)}\n")

    def run(self) -> None:
        """Brings the outputs up to date; in `project`, so that no path of it gets built in."""
        self.build_dir.mkdir(parents=True, exist_ok=True)
        path = self.build_dir / "build.ninja"
        path.write_text("\n".join(self.lines))
        command = [sys.executable, "-m", "ninja", "-f", str(path)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        if subprocess.run(command, cwd=self.project).returncode:
            raise BuildError("compiling dat_cuda failed: the compiler's messages are above")


def build_extension(project: Path, build_dir: Path, output: Path, version: str) -> None:
    wants_cuda = os.environ.get("DAT_CUDA") != "0" and any(project.glob("csrc/cuda/*.cu"))
    nvcc = dat_toolchain.find_nvcc() if wants_cuda else None
    ninja_file = NinjaFile(project, build_dir, version, dat_toolchain.require_torch(), nvcc)
    ninja_file.add_sources()
    ninja_file.link(output)
    ninja_file.run()
