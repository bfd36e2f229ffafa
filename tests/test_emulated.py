"""The emulated device itself: csrc/cuda's kernels run there, and what it reports is not lost."""

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
