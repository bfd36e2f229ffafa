"""The emulated device itself: csrc/cuda's kernels run there, and what it reports is not lost."""

import emulated
import pytest
import torch
from operator_cases import describe
from test_operators import ATTENTION_CASES, SAMPLE_CASES, check

import dat_cuda
from dat_cuda import doctor


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


def test_any_block_may_be_the_last(device):
    """Blocks of one (image, head) run at the same time, and the last of them sums what all have:
    the same bits every time."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(*shape).bfloat16().requires_grad_()
        for shape in ((4, 128, 14, 14), (4, 128, 196), (4, 128, 196))
    )
    pos, table = torch.rand(4, 1, 196, 2).mul(2).sub(1).requires_grad_(), torch.randn(4, 27, 27)

    def gradients(threads):
        device.set("threads", threads)
        out = dat_cuda.deform_attention(q, k, v, pos, table, heads=4, version="dat")
        return torch.autograd.grad(out.square().sum(), (q, k, v, pos))

    right = gradients(1)
    assert "columns" in device.launches()[-1].kernel
    for _ in range(5):
        for grad, expected in zip(gradients(4), right, strict=True):
            torch.testing.assert_close(grad, expected, rtol=0, atol=0)


# Of the operators' cases those in half precision, whose kernels are others before 8.0, and a few in
# float32; small ones, for CUDA cores are emulated slowly.
EARLY_CASES = [
    (operator, case)
    for operator, cases in (("deform_attention", ATTENTION_CASES), ("deform_sample", SAMPLE_CASES))
    for dtype, step in ((torch.float16, 1), (torch.bfloat16, 2), (torch.float32, 4))
    for case in [case for case in cases if case.dtype == dtype][::step]
    if getattr(case, "pairs", 0) <= 100_000
]


@pytest.mark.parametrize(
    ("operator", "case"), EARLY_CASES, ids=[f"{o}-{describe(c)}" for o, c in EARLY_CASES]
)
def test_devices_without_tensor_cores(operator, case):
    with emulated.emulated(device="t4"):
        deterministic = getattr(case, "deterministic", True)
        check("emulated", operator, case, deterministic)


@pytest.mark.parametrize("bias", ("dense", "unit", "shallow", "far"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("gpu", ("t4", "rtx4090"))
def test_the_longest_heads_fit_in_shared_memory(gpu, dtype, bias):
    """64 KiB a block, or 99 KiB."""
    with emulated.emulated(device=gpu):
        fraction, result = doctor.attention_check(dtype, 128, bias, "cpu").worst()
    assert fraction <= 1, result


@pytest.mark.parametrize(
    ("shape", "reason"),
    (
        ((1, 130, 2, 2), "head_dim = C / heads must be at most 128 on CUDA, got 130"),
        ((1, 1, 2**16, 2**15), f"H \\* W of q must be below 2\\^31 on CUDA, got {2**31}"),
    ),
)
def test_what_is_refused(device, shape, reason):
    """The memory of large results is reserved, never touched."""
    q, k = torch.zeros(()).half().expand(shape), torch.zeros(1, shape[1], 3).half()
    with pytest.raises(RuntimeError, match=reason):
        dat_cuda.deform_attention(q, k, k, heads=1)


def test_no_bias_costs_nothing(device):
    """Attention without table and bias executes fewer instructions than with a table."""
    counts = {}
    for bias in ("none", "unit"):
        inputs = doctor.attention_check(torch.bfloat16, 32, bias, "cpu").inputs
        dat_cuda.deform_attention(**inputs, heads=2)
        counts[bias] = device.launches()[-1].warp_insts
    assert counts["none"] < counts["unit"]
