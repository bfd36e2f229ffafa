"""What the build finds on this machine: torch, a C++ compiler, and nvcc where there is one.

Nothing here imports torch: its headers, libraries and version are read from its folder.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

OLDEST_TORCH = (2, 13)
TORCH_REQUIREMENT = "torch>={}.{}".format(*OLDEST_TORCH)

# The newest that nvcc knows comes as PTX too, which the driver compiles for newer GPUs.
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
ARCHITECTURE = re.compile(r"(\d+\.\d)[af]?(\+PTX)?")


class BuildError(Exception):
    """Why the build cannot go on: one sentence that names the remedy."""


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


@dataclass(frozen=True)
class Nvcc:
    command: str
    version: str


def target_folders() -> list[str]:
    """The site-packages folders of the environment that the package is built for.

    An isolated build hides them from `sys.path`, while `sysconfig` and `site` still know them.
    """
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    folders += site.getsitepackages()
    # pip turns the user site off while it builds. It counts wherever the base interpreter's
    # packages do, that is outside virtual environments and in those with system packages.
    if sysconfig.get_path("purelib", vars=_base_prefix()) in folders:
        folders.append(site.getusersitepackages())
    return list(dict.fromkeys(folders))


def _base_prefix() -> dict[str, str]:
    names = {"base": "installed_base", "platbase": "installed_platbase"}
    return {name: str(sysconfig.get_config_var(var)) for name, var in names.items()}


def _torch_specs() -> Iterator[ModuleSpec | None]:
    yield importlib.util.find_spec("torch")
    yield PathFinder.find_spec("torch", target_folders())


def find_torch() -> Torch | None:
    """The torch to build against, or None where there is none yet.

    Raises BuildError if it is older than the oldest supported release.
    """
    for spec in _torch_specs():
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent
        found = re.search(r"__version__ = '([^']+)'", (root / "version.py").read_text())
        torch = Torch(root, found[1] if found else "unknown")
        number = re.match(r"(\d+)\.(\d+)", torch.version)
        if number is None or (int(number[1]), int(number[2])) < OLDEST_TORCH:
            raise BuildError(
                f"dat_cuda needs {TORCH_REQUIREMENT}, but {root} holds torch {torch.version}: "
                f"upgrade it with pip install '{TORCH_REQUIREMENT}'"
            )
        return torch
    return None


def require_torch() -> Torch:
    """As `find_torch`, but no torch at all is an error too."""
    torch = find_torch()
    if torch is None:
        raise BuildError(
            f"no torch found to build dat_cuda against: pip install '{TORCH_REQUIREMENT}'"
        )
    return torch


def find_compiler() -> list[str]:
    """The C++ compiler as a command: CXX if it is set, else the first usual name on PATH."""
    if platform.system() == "Windows":
        raise BuildError("dat_cuda does not build on Windows: use it in WSL")
    wanted = os.environ.get("CXX")
    candidates = [shlex.split(wanted)] if wanted else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    reason = f"CXX={wanted} is not a program" if wanted else "no C++ compiler on PATH"
    raise BuildError(f"{reason}: install g++ or clang++, or point CXX at one")


def find_nvcc() -> Nvcc | None:
    """nvcc from CUDA_HOME or PATH, if there is one that answers."""
    home = os.environ.get("CUDA_HOME")
    command = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if command is None:
        return None
    answer = subprocess.run([command, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+\.\d+)", answer.stdout)
    return Nvcc(command, release[1]) if release else None


def _answer(*command: str) -> list[str]:
    """The lines that a command prints; none where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return []
    run = subprocess.run(command, capture_output=True, text=True)
    return [line.strip() for line in run.stdout.splitlines()] if run.returncode == 0 else []


def cuda_architectures(nvcc: Nvcc) -> list[str]:
    """What to compile for, e.g. ["8.0", "9.0+PTX"]: what TORCH_CUDA_ARCH_LIST names, else the GPUs
    of this machine, else all that are supported; but nothing that nvcc does not know."""
    numbers = re.findall(r"compute_(\d+)(\d)\b", " ".join(_answer(nvcc.command, "--list-gpu-arch")))
    known = {".".join(number) for number in numbers}
    present = _answer("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        wanted = re.split(r"[; ]+", listed.strip("; "))
        if wrong := [name for name in wanted if not ARCHITECTURE.fullmatch(name)]:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got {wrong[0]!r}")
        # Launchers choose kernels by the GPU, and those for tensor cores have no code before 8.0.
        early = [
            name for name in wanted if "+PTX" in name and float(ARCHITECTURE.match(name)[1]) < 8
        ]
        if early:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST has {early[0]!r}, but GPUs from 8.0 on need code for 8.0 or "
                "later: give +PTX to such an entry alone"
            )
    elif present and known.issuperset(present):
        wanted = sorted(set(present), key=float)
    else:
        wanted = [*CUDA_ARCHITECTURES]
        newest = max(known.intersection(wanted), key=wanted.index, default=wanted[-1])
        wanted[wanted.index(newest)] += "+PTX"
    kept = [name for name in wanted if ARCHITECTURE.match(name)[1] in known]
    left_out = ", ".join(name for name in wanted if name not in kept)
    if not kept:
        raise BuildError(
            f"nvcc {nvcc.version} does not compile for {left_out}: choose others with "
            "TORCH_CUDA_ARCH_LIST, or build without CUDA with DAT_CUDA=0"
        )
    if left_out:
        print(f"dat_cuda: not compiling for {left_out}, which nvcc {nvcc.version} does not know")
    return kept


def check_before_build() -> Torch | None:
    """Fails on what would fail later anyway, before anything is downloaded for the build."""
    find_compiler()
    return find_torch()
