"""The emulated device itself: csrc/cuda's kernels run there, and what it reports is not lost."""

import shlex
import subprocess

import emulated
import pytest
import torch

import dat_cuda


@pytest.fixture
def device():
    with emulated.emulated():
        import ptxemu.device

        yield ptxemu.device


def sample():
    x, offset = torch.randn(2, 3, 4, 5, requires_grad=True), torch.zeros(2, 2, 2, 3)
    return dat_cuda.deform_sample(x, offset, groups=1, offset_range_factor=1)[0]


def test_it_runs_the_kernels(device):
    sample().sum().backward()
    forward, backward = (launch.kernel for launch in device.launches())
    assert "sample_forward" in forward and "sample_backward" in backward


def test_it_raises_what_it_finds(device):
    with pytest.raises(device.Findings, match="sample_forward"), emulated.emulated():
        device.set("max_inst", 1)
        with pytest.raises(RuntimeError, match="launch of sample_forward with .* threads"):
            sample()


@pytest.mark.slow
@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_half_precision_compiles_for_devices_without_its_products(direction, tmp_path):
    """Kernels for sm_75 are in no other build of the tests; only the compiler's front end."""
    emulated.require()
    source = emulated.PROJECT / "csrc" / "cuda" / f"attention_{direction}_bf16.cu"
    flags = ["-std=c++17", "-gencode=arch=compute_75,code=compute_75", "-Xcicc", "-O0", "-ptx"]
    nvcc = shlex.split(emulated.dat_toolchain.find_nvcc().command)
    run = subprocess.run(
        [*nvcc, *flags, f"-I{emulated.PROJECT / 'csrc'}", source, "-o", tmp_path / "out.ptx"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
