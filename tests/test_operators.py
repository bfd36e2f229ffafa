"""The native kernels against the reference: forward and backward, over what their code depends on.

Cases are drawn so that every pair of values of two parameters occurs (operator_cases.pairwise).
"""

import pytest
import torch
from emulated import multiprocessors
from operator_cases import (
    DTYPES,
    LAYOUTS,
    VERSIONS,
    AttentionCase,
    SampleCase,
    assert_as_accurate,
    describe,
    pairwise,
    poisoned_memory,
    run,
    run_in_float64,
    threads,
)

import dat_cuda
from dat_cuda import reference

# Of the emulated device; None: as it is. Another axis would double the cases.
MULTIPROCESSORS = {1: None, 2: 1, 3: 8}

SIZES = ((1, 1), (7, 7), (13, 17), (33, 9), (1, 33), (17, 1), (5, 33), (20, 70))
DENSE = ("N", "MN", "hMN", "1h1N", "B1M1", "B11N", "1hM1", "BhMN")
BIASES = (
    (None, None),
    *((None, dims) for dims in DENSE),
    *((table, None) for table in ("unit", "small", "large", "flat")),
    ("unit", "BhMN"),
    ("unit", "1hMN"),
    ("small", "N"),
    ("large", "B1MN"),
)

SAMPLE_CASES = [
    SampleCase(**row)
    for row in pairwise(
        version=VERSIONS,
        factor=(2, 0.5, 0, -1, 9),
        dtype=DTYPES,
        size=SIZES,
        keys=((1, 1), (7, 7), (1, 5), (13, 1), (5, 13)),
        channels=(1, 5, 16, 33),
        groups=(1, 2, 3),
        layout=LAYOUTS,
        threads=(1, 2, 3),
        accurate=(False, True),
    )
]
ATTENTION_AXES = {
    "version": VERSIONS,
    "bias": BIASES,
    "dtype": DTYPES,
    "size": SIZES,
    "keys": (1, 7, 49, 63, 64, 65, 131, 260),
    "head_dim": (1, 5, 8, 16, 20, 32, 48, 64),
    "heads": ((1, 1), (2, 1), (2, 2), (6, 3)),
    "reach": (0.95, 1.8),
    "layout": LAYOUTS,
    "threads": (1, 2, 3),
    "accurate": (False, True),
    "deterministic": (False, True),
}
# One table cell a query step and all keys near the map have a path of their own in the kernels.
AT_UNIT_SLOPE = {
    "version": ("dat++",),
    "bias": (("unit", None), ("unit", "hMN"), ("unit", "B1M1")),
    "reach": (0.95,),
}
# So have, backward, small maps at slopes near 1 with an even number of keys.
ON_SMALL_MAPS = {
    "version": ("dat",),
    "bias": (("unit", None),),
    "dtype": (torch.bfloat16, torch.float16),
    "size": ((14, 14), (7, 7), (13, 15), (5, 9), (1, 4)),
    "keys": (2, 16, 70, 136, 196, 260),
    "head_dim": (17, 20, 32),
    "reach": (0.95, 2.5),
    "deterministic": (False,),
}
ATTENTION_CASES = [
    AttentionCase(**row)
    for axes in (ATTENTION_AXES, ATTENTION_AXES | AT_UNIT_SLOPE, ATTENTION_AXES | ON_SMALL_MAPS)
    for row in pairwise(**axes)
]
ATTENTION_CASES = [case for case in ATTENTION_CASES if case.is_comparable]


def spoil_scratch(dtype):
    """Leaves NaN in whatever memory the kernels keep between calls."""
    bad = torch.full((1, 64, 20, 20), torch.nan, dtype=dtype, requires_grad=True)
    pos = torch.full((1, 1, 70, 2), torch.nan)
    k = torch.full((1, 64, 70), torch.nan, dtype=dtype)
    for size in (39, 50):
        table = torch.full((1, size, size), torch.nan)
        dat_cuda.deform_attention(bad, k, k, pos, table, heads=1).sum().backward()
    offset = torch.full((1, 2, 8, 8), torch.nan)
    dat_cuda.deform_sample(bad, offset, groups=1, offset_range_factor=1)[0].sum().backward()


def check(native, operator, case, deterministic=True):
    inputs, grads = case.inputs(), case.grads()
    with threads(case.threads), multiprocessors(MULTIPROCESSORS[case.threads]):
        if native == "cpu":
            spoil_scratch(case.dtype)
        with poisoned_memory(deterministic):
            actual = run(getattr(dat_cuda, operator), inputs, grads, **case.options)
    plain = getattr(reference, operator)
    same_dtype = run(plain, inputs, grads, **case.options)
    exact = run_in_float64(plain, inputs, grads, **case.options)
    assert_as_accurate(case, actual, same_dtype, exact)


@pytest.mark.parametrize("case", SAMPLE_CASES, ids=describe)
def test_sample(native, case):
    check(native, "deform_sample", case)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=describe)
def test_attention(native, case):
    check(native, "deform_attention", case, case.deterministic)
