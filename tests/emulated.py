"""The CUDA kernels on a machine without a GPU: csrc/cuda, compiled by nvcc, on an emulated device.

ptxemu executes the PTX of the real launchers' kernels on CPU tensors and reports what hardware lets
pass: accesses out of bounds, races, misuse of barriers. Its folder is PTXEMU_HOME, by default
../shared/ptxemu; what is built stays in DAT_EMULATED_CACHE, by default in the user's cache.

    python tests/emulated.py [pytest's arguments]

runs the emulated tests under its heap tracker, which gives every CPU tensor exact bounds.
"""

import fcntl
import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]
PTXEMU_HOME = Path(os.environ.get("PTXEMU_HOME") or PROJECT.parent / "shared" / "ptxemu")
sys.path += [str(PROJECT / "build_backend"), str(PTXEMU_HOME)]

import dat_ninja  # noqa: E402
import dat_toolchain  # noqa: E402

# Of the devices of the emulator, those that lack what PTX for 8.0 needs: they have another library.
EARLY = ("t4",)
OPERATORS = [
    f"deform_{name}_{way}" for name in ("sample", "attention") for way in ("forward", "backward")
]
# A launch that takes a minute hangs.
MOST_INSTRUCTIONS = 2 * 10**9


@functools.cache
def unavailable() -> str | None:
    """Why nothing can be emulated here."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "the emulator needs Linux on x86-64"
    if not (PTXEMU_HOME / "ptxemu").is_dir():
        return f"no emulator in {PTXEMU_HOME}: point PTXEMU_HOME at one"
    if _find_nvcc() is None:
        return "no nvcc: put it on PATH or point CUDA_HOME at its toolkit"
    if find_spec("ninja") is None:
        return "ninja is missing: pip install ninja"
    return None


def require() -> None:
    """Skips the test where nothing can be emulated, or, with DAT_REQUIRE_EMULATED=1, fails it."""
    if reason := unavailable():
        (pytest.fail if os.environ.get("DAT_REQUIRE_EMULATED") == "1" else pytest.skip)(reason)


def library_name(early: bool) -> str:
    return "dat_cuda_emulated_early" if early else "dat_cuda_emulated"


def cuda_flags(early: bool = False) -> list[str]:
    """PTX alone, which no ptxas has to compile, readable, with the sources' lines for reports."""
    number = 75 if early else 80
    return [f"-gencode=arch=compute_{number},code=compute_{number}", "-lineinfo", "--no-compress"]


class EmulatedNinja(dat_ninja.NinjaFile):
    """Links the objects of csrc/cuda with the emulator in the place of the CUDA runtime."""

    early = False

    def add_sources(self) -> None:
        name = f"-DDAT_LIBRARY={library_name(self.early)}"
        self.compile("cxx", Path("tests/emulated.cpp"), [*self.cxx_flags(), name])
        self.add_cuda_sources(cuda_flags(self.early))

    def linker(self) -> str:
        return "$cxx -shared -Wl,--wrap=cudaDeviceGetAttribute"


def _find_nvcc() -> dat_toolchain.Nvcc | None:
    """Also sets CUDA_HOME, where the emulator finds the headers: nvcc on PATH may be a wrapper."""
    nvcc = dat_toolchain.find_nvcc()
    if nvcc is None or "CUDA_HOME" in os.environ:
        return nvcc
    answer = subprocess.run([nvcc.command, "--dryrun", "x.cu"], capture_output=True, text=True)
    if root := re.search(r"^#\$ TOP=(.*)$", answer.stderr, re.MULTILINE):
        os.environ["CUDA_HOME"] = str(Path(root[1]).resolve())
    return dat_toolchain.find_nvcc()


@functools.cache
def failure_to_load(early: bool) -> Exception | None:
    """Registers the operators in torch.ops, after building what is not up to date. A failure is
    returned: one is enough for a run of tests."""
    try:
        torch.ops.load_library(_build(early))
    except (dat_toolchain.BuildError, RuntimeError) as error:
        return error
    return None


def _build(early: bool = False) -> Path:
    import ptxemu.build
    import ptxemu.device

    ptxemu.device.load()
    nvcc = _find_nvcc()
    emulator = ptxemu.build.shim()
    cache = os.environ.get("DAT_EMULATED_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dat_cuda", "emulated"
    )
    torch_found = dat_toolchain.require_torch()
    setting = [PROJECT, torch_found, nvcc, emulator, os.environ.get("CXX"), early]
    build = Path(cache).resolve() / hashlib.sha256(repr(setting).encode()).hexdigest()[:16]
    library = build / f"{library_name(early)}.so"
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ninja = EmulatedNinja(PROJECT, build, "", torch_found, nvcc)
        ninja.early = early
        ninja.add_sources()
        ninja.link(library, f"-L{emulator}", "-lptxemu_cudart", f"-Wl,-rpath,{emulator}")
        ninja.run()
    return library


@contextmanager
def multiprocessors(count: int | None):
    """The emulated device has so many, and its maps are cut accordingly: with few, blocks have as
    many warps as they may; with the usual 108, small maps come in blocks of one warp."""
    with pytest.MonkeyPatch.context() as patch:
        if count is not None:
            patch.setenv("DAT_EMULATED_MULTIPROCESSORS", str(count))
        yield


@contextmanager
def emulated(race_seed: int | None = None, device: str = "a100"):
    """The CUDA kernels compute on CPU tensors, as on this device of the emulator; whatever it
    reports is raised at the end.

    With a race_seed also races and reads of uninitialised shared memory, under the order of warps
    that it stands for (0: the usual one).
    """
    require()
    early = device in EARLY
    if error := failure_to_load(early):
        raise error
    import ptxemu

    race = {} if race_seed is None else {"race": True, "seed": race_seed}
    operators = getattr(torch.ops, library_name(early))
    scoped = torch.library._scoped_library("dat_cuda", "IMPL")
    with ptxemu.session(max_inst=MOST_INSTRUCTIONS, device=device, **race), scoped as library:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name in OPERATORS:
                library.impl(name, getattr(operators, name), "CPU")
        yield


def environment() -> dict[str, str]:
    """For a process that finds the emulator, and what this one finds."""
    paths = (str(PTXEMU_HOME), os.environ.get("PYTHONPATH"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def main() -> int:
    if reason := unavailable():
        sys.exit(f"the emulated tests cannot run: {reason}")
    # The command, for `python -m pytest` would test the sources instead of the installed package.
    pytest_command = Path(sys.executable).with_name("pytest")
    return subprocess.call(
        [sys.executable, "-m", "ptxemu", "exec", pytest_command, "-k", "emulated", *sys.argv[1:]],
        env=environment() | {"DAT_REQUIRE_EMULATED": "1"},
    )


if __name__ == "__main__":
    sys.exit(main())
