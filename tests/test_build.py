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


@pytest.fixture
def machine(toolchain, monkeypatch, tmp_path):
    """nvcc that knows some architectures, on a machine with some GPUs."""

    def make(known, gpus=None):
        commands = {"nvcc": "\n".join(f"compute_{number}" for number in known)}
        if gpus is not None:
            commands["nvidia-smi"] = "\n".join(gpus)
        for name, answer in commands.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n/bin/cat <<END\n{answer}\nEND\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return toolchain.Nvcc(str(tmp_path / "nvcc"), "12.9")

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return make


ALL = ["50", "75", "80", "86", "87", "89", "90", "100", "103", "120", "121"]


def test_all_supported_architectures_without_a_gpu(toolchain, machine, capsys):
    found = toolchain.cuda_architectures(machine(ALL))
    assert found == ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
    assert capsys.readouterr().out == ""


def test_architectures_that_nvcc_does_not_know_are_left_out(toolchain, machine, capsys):
    found = toolchain.cuda_architectures(machine(["70", "75", "80", "86", "89", "90"]))
    assert found == ["7.5", "8.0", "8.6", "8.9", "9.0+PTX"]
    notice = "dat_cuda: not compiling for 10.0, 12.0, which nvcc 12.9 does not know\n"
    assert capsys.readouterr().out == notice


@pytest.mark.parametrize(
    ("gpus", "found"),
    (
        (["9.0"], ["9.0"]),
        (["12.0", "8.0", "8.0"], ["8.0", "12.0"]),
        (["13.0"], "12.0+PTX"),  # newer than nvcc: the driver compiles the PTX
        (["[N/A]"], "12.0+PTX"),
        ([], "12.0+PTX"),
    ),
)
def test_only_the_gpus_of_this_machine(toolchain, machine, gpus, found):
    architectures = toolchain.cuda_architectures(machine(ALL, gpus))
    assert architectures == found or architectures[-1] == found


def test_the_list_in_the_environment_decides(toolchain, machine, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;8.0 9.0a;10.0+PTX")
    found = toolchain.cuda_architectures(machine(ALL, ["8.9"]))
    assert found == ["8.0", "9.0a", "10.0+PTX"]
    assert "not compiling for 7.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("listed", "names"),
    (("Ampere", "'Ampere'"), ("3.5;7.0", "3.5, 7.0"), ("7.5+PTX;9.0", "'7.5+PTX'")),
)
def test_a_list_that_cannot_be_compiled_for(toolchain, machine, monkeypatch, listed, names):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(toolchain.BuildError) as error:
        toolchain.cuda_architectures(machine(ALL))
    assert names in one_sentence(error) and "TORCH_CUDA_ARCH_LIST" in one_sentence(error)


def test_the_gpus_of_a_kind_share_their_ptx(toolchain):
    import dat_ninja

    assert list(dat_ninja.architecture_flags(["7.5", "8.0", "9.0a", "12.0+PTX"])) == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_90",
        "-gencode=arch=compute_100,code=sm_120",
        "-gencode=arch=compute_100,code=compute_100",
    ]


@pytest.mark.parametrize("wanted", (None, "0"))
def test_cuda_can_be_declined(toolchain, machine, monkeypatch, tmp_path, wanted):
    import dat_ninja

    asked = []
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: asked.append("nvcc"))
    monkeypatch.setattr(dat_ninja.NinjaFile, "run", lambda self: None)
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "kernel.cu").touch()
    monkeypatch.delenv("DAT_CUDA", raising=False)
    if wanted:
        monkeypatch.setenv("DAT_CUDA", wanted)
    dat_ninja.build_extension(tmp_path, tmp_path / "build", tmp_path / "_C.so", "1")
    assert asked == ([] if wanted == "0" else ["nvcc"])
