"""The installed package: what it says of itself, and that it is the compiled one."""

import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dat_cuda
from dat_cuda import _C


def test_version_is_the_same_everywhere():
    assert dat_cuda.__version__ == importlib.metadata.version("dat_cuda")
    assert dat_cuda.__version__ == _C.build_info()["version"]


def test_build_info():
    info = _C.build_info()
    assert set(info) == {"version", "compiler", "torch", "cuda", "architectures", "simd"}
    assert info["compiler"].split()[0] in ("GCC", "Clang")
    assert (info["cuda"] is None) == (info["architectures"] == [])
    if platform.machine() == "x86_64":
        assert info["simd"] == ["baseline", "avx2", "avx512"]


def test_simd_is_a_variant_that_was_built():
    assert _C.simd() in _C.build_info()["simd"]


def test_types_and_command_are_installed():
    assert (Path(dat_cuda.__file__).parent / "py.typed").exists()
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="dat-cuda")
    assert command.value == "dat_cuda.cli:main"


def test_binary_names_no_folder_of_the_build_machine():
    binary = Path(_C.__file__).read_bytes()
    project = Path(__file__).resolve().parents[1]
    for folder in (Path(torch.__file__).parent, project):
        assert str(folder).encode() not in binary


def test_import_touches_no_gpu_and_prints_nothing(tmp_path):
    code = "import dat_cuda, torch; assert not torch.cuda.is_initialized()"
    # Elsewhere than in the project's root, where the sources would hide the installed package.
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


def readme_examples() -> list[str]:
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("code", readme_examples())
def test_readme_example_runs(code):
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
