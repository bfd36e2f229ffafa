"""The build's search for torch and a compiler, and what it says when they are missing or old."""

import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

BUILD_BACKEND = Path(__file__).resolve().parents[1] / "build_backend"


@pytest.fixture
def toolchain(monkeypatch):
    monkeypatch.syspath_prepend(str(BUILD_BACKEND))
    import dat_toolchain

    return dat_toolchain


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    return text


def fake_torch(folder: Path, version: str) -> list:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('the build imports torch')")
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    return [PathFinder.find_spec("torch", [str(folder)])]


def test_torch_hidden_by_build_isolation_is_found():
    code = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        f"sys.path.insert(0, {str(BUILD_BACKEND)!r})\n"
        "import dat_toolchain; print(dat_toolchain.find_torch().version)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == torch.__version__, run.stderr


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.14.1+cu130", "2.15.0a0+git1234567", "3.0.0"])
def test_supported_torch_is_read_not_imported(toolchain, monkeypatch, tmp_path, version):
    specs = fake_torch(tmp_path, version)
    monkeypatch.setattr(toolchain, "_torch_specs", lambda: specs)
    found = toolchain.find_torch()
    assert (found.root, found.version) == (tmp_path / "torch", version)


@pytest.mark.parametrize("version", ["2.12.1", "1.13.1+cu117", "no-number"])
def test_old_torch_is_refused(toolchain, monkeypatch, tmp_path, version):
    specs = fake_torch(tmp_path, version)
    monkeypatch.setattr(toolchain, "_torch_specs", lambda: specs)
    with pytest.raises(toolchain.BuildError) as error:
        toolchain.check_before_build()
    assert "torch>=2.13" in one_sentence(error) and version in one_sentence(error)


def test_absent_torch(toolchain, monkeypatch):
    monkeypatch.setattr(toolchain, "_torch_specs", lambda: [None, None])
    assert toolchain.find_torch() is None
    with pytest.raises(toolchain.BuildError) as error:
        toolchain.require_torch()
    assert "pip install 'torch>=2.13'" in one_sentence(error)


def test_remains_of_an_uninstalled_torch_count_as_absent(toolchain, monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    specs = [PathFinder.find_spec("torch", [str(tmp_path)])]
    monkeypatch.setattr(toolchain, "_torch_specs", lambda: specs)
    assert toolchain.find_torch() is None


def test_missing_compiler(toolchain, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(toolchain.BuildError) as error:
        toolchain.find_compiler()
    assert "install g++ or clang++" in one_sentence(error)


def test_compiler_from_the_environment(toolchain, monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -m some_wrapper")
    assert toolchain.find_compiler() == [sys.executable, "-m", "some_wrapper"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(toolchain.BuildError) as error:
        toolchain.find_compiler()
    assert "CXX=no-such-compiler" in one_sentence(error)


def test_no_nvcc_is_no_error(toolchain, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert toolchain.find_nvcc() is None
