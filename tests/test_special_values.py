"""Positions that are far, infinite or NaN, biases of -inf, empty batches, sizes of one."""

import math

import naive
import numpy as np
import pytest
import torch
from operator_cases import poisoned_memory

import dat_cuda
from dat_cuda import reference

NAN, INF = math.nan, math.inf
FAR = (NAN, INF, -INF, 1e30, -1e30, 3e38, -3e38, 1e5)
VERSIONS = ("dat", "dat++")
DTYPES = (torch.float64, torch.float32)


def assert_close(actual, expected, tolerance=2e-5):
    """NaN where NaN is expected, and only there."""
    expected = torch.as_tensor(expected).to(actual)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def to_numpy(tensors):
    return [tensor.detach().double().cpu().numpy() for tensor in tensors]


def gradients(outputs, inputs):
    with poisoned_memory():
        return torch.autograd.grad(outputs.sum(), inputs)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.bfloat16))
@pytest.mark.parametrize("size", ((6, 5), (1, 1), (1, 7)))
@pytest.mark.parametrize("axis", (0, 1))
def test_sample_far_away(backend, dtype, size, axis):
    x = torch.randn(2, 4, *size).to(dtype).requires_grad_()
    offset = torch.randn(4, 2, 3, 4)
    offset[1, axis, :2] = torch.tensor(FAR).view(2, 4)
    offset = offset.to(torch.float64 if dtype == torch.float64 else torch.float32)
    offset.requires_grad_()
    with poisoned_memory():
        sampled, pos = dat_cuda.deform_sample(
            x, offset, groups=2, offset_range_factor=0, version="dat"
        )
    want, want_pos = naive.deform_sample(*to_numpy((x, offset)), 2, 0, "dat")
    assert_close(pos, want_pos)
    assert_close(sampled, want, 2e-5 if dtype.itemsize > 2 else 2e-2)

    grad_x, grad_offset = gradients(sampled, (x, offset))
    assert torch.isfinite(grad_x).all()
    is_nan = offset.isnan().any(1, keepdim=True).expand_as(offset)
    assert torch.equal(grad_offset.isnan(), is_nan)
    # On an axis of one pixel, every finite coordinate is that pixel.
    limit = torch.tensor([1e4 if n > 1 else INF for n in size]).view(1, 2, 1, 1)
    outside = (offset.abs() >= limit).any(1, keepdim=True).expand_as(offset)
    assert (grad_offset[outside & ~is_nan] == 0).all()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("factor", (2, 0, -1))
def test_sample_bounds_far_offsets(backend, version, factor):
    x, offset = torch.randn(2, 4, 6, 5), torch.randn(4, 2, 3, 4) * 1e4
    offset[0, 0, 0] = torch.tensor([INF, -INF, 3e38, -3e38])
    offset[3, 1, 2, 3] = NAN
    sampled, pos = dat_cuda.deform_sample(
        x, offset, groups=2, offset_range_factor=factor, version=version
    )
    want, want_pos = naive.deform_sample(*to_numpy((x, offset)), 2, factor, version)
    assert_close(pos, want_pos)
    assert_close(sampled, want)


def attention_inputs(dtype=torch.float32, queries=(3, 4), keys=5, table=(5, 7), dim=3):
    """4 heads in 2 groups, 2 images."""
    return {
        "q": torch.randn(2, 4 * dim, *queries, dtype=dtype),
        "k": torch.randn(2, 4 * dim, keys, dtype=dtype),
        "v": torch.randn(2, 4 * dim, keys, dtype=dtype),
        "pos": torch.rand(2, 2, keys, 2, dtype=dtype) * 2 - 1,
        "rpe_table": torch.randn(4, *table, dtype=dtype),
    }


def naive_attention(given, version):
    with np.errstate(invalid="ignore"):
        return naive.deform_attention(*to_numpy(given.values()), 4, None, None, version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("table", ((5, 7), (4, 33), (1, 1), (1, 4)))
def test_attention_far_away(backend, version, dtype, far, table):
    given = attention_inputs(dtype, table=table)
    given["pos"][1, 1, 2, 0] = far
    given["pos"][0, 0, 3, 1] = far
    for tensor in given.values():
        tensor.requires_grad_()
    with poisoned_memory():
        out = dat_cuda.deform_attention(**given, heads=4, version=version)
    assert_close(out.detach(), naive_attention(given, version))

    *_, grad_pos, grad_table = gradients(out, list(given.values()))
    if math.isnan(far):
        # Only what shares an image and a group with the position, or the heads of the table.
        assert torch.isfinite(grad_pos[0, 1]).all() and torch.isfinite(grad_pos[1, 0]).all()
        assert grad_pos[1, 1, 2].isnan().all() and grad_pos[0, 0, 3].isnan().all()
    else:
        assert torch.isfinite(grad_pos).all() and torch.isfinite(grad_table).all()
        assert grad_pos[1, 1, 2, 0] == 0 and grad_pos[0, 0, 3, 1] == 0


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("key", (3, 70))
def test_attention_far_away_among_many_keys(backend, far, key):
    """At the size where the bias is read from windows of the table, with keys in two tiles."""
    given = attention_inputs(queries=(2, 20), keys=71, table=(3, 39), dim=1)
    given["pos"][1, 0, key] = torch.tensor([0.1, far])
    out = dat_cuda.deform_attention(**given, heads=4)
    assert_close(out, naive_attention(given, "dat++"))


@pytest.mark.parametrize("version", VERSIONS)
def test_infinite_table_values_stay_near(backend, version):
    """As far as the documentation says: where the formula has it, on CUDA up to seven rows on."""
    size = (24, 6)
    given = attention_inputs(queries=size, table=(47, 11))
    given["rpe_table"][1, 20, 5] = -INF
    out = dat_cuda.deform_attention(**given, heads=4, version=version)
    want = reference.deform_attention(**given, heads=4, version=version)
    bias = reference._table_bias(given["rpe_table"], given["pos"], *size, version)
    reached = (~torch.isfinite(bias)).any(-1).unflatten(2, size).float()
    rows = 7 if backend in ("cuda", "emulated") else 0
    near = torch.nn.functional.max_pool2d(reached, (2 * rows + 1, 1), 1, (rows, 0)).bool()
    near = near.repeat_interleave(out.shape[1] // 4, 1)
    assert 0 < near.sum() < near.numel()
    assert_close(out[~near], want[~near])
    assert (out.isnan() | (out - want).abs().lt(1e-4))[near].all()


def masked_bias(rows, keys, dtype):
    """[M, N] where some keys are masked, for some rows all up to, from, or but one key; row 0 is
    masked altogether."""
    bias = torch.randn(rows, keys, dtype=dtype)
    bias[torch.rand(rows, keys) < 0.3] = -INF
    bias[1, : keys - 1], bias[1, keys - 1] = -INF, 0.3
    bias[2, 1:], bias[2, 0] = -INF, -0.2
    bias[0] = -INF
    bias[3:, keys // 2] = 0.5
    return bias


@pytest.mark.parametrize("dtype", (*DTYPES, torch.bfloat16))
@pytest.mark.parametrize("keys", (5, 64, 130))
@pytest.mark.parametrize("with_table", (False, True))
def test_masked_keys(backend, dtype, keys, with_table):
    given = {name: t.to(dtype) for name, t in attention_inputs(keys=keys).items()}
    if not with_table:
        del given["pos"], given["rpe_table"]
    given["bias"] = masked_bias(12, keys, dtype)
    tensors = [tensor.requires_grad_() for tensor in given.values()]
    with poisoned_memory():
        out = dat_cuda.deform_attention(**given, heads=4)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    want = reference.deform_attention(**exact, heads=4)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    rows = out.flatten(2)
    assert rows[..., 0].isnan().all() and torch.isfinite(rows[..., 1:]).all()
    assert_close(out, want, tolerance)

    # A loss that leaves the masked row out.
    found = gradients(out.flatten(2)[..., 1:], tensors)
    wanted = torch.autograd.grad(want.flatten(2)[..., 1:].sum(), list(exact.values()))
    # The row's own gradients, and all that sums over rows, are NaN: as softmax has it.
    for name, grad, want_grad in zip(given, found, wanted, strict=True):
        if name in ("q", "bias"):
            grad, want_grad = (
                (g.flatten(2)[..., 1:] if name == "q" else g[1:]) for g in (grad, want_grad)
            )
            assert torch.isfinite(grad).all(), name
            assert_close(grad, want_grad, 10 * tolerance)


def test_masked_keys_get_no_gradient(backend):
    given = attention_inputs(keys=70)
    given["bias"] = torch.zeros(1, 70)
    given["bias"][0, [3, 69]] = -INF
    tensors = [tensor.requires_grad_() for tensor in given.values()]
    out = dat_cuda.deform_attention(**given, heads=4)
    q, k, v, pos, table, bias = gradients(out, tensors)
    assert all(torch.isfinite(grad).all() for grad in (q, k, v, pos, table, bias))
    for grad in (k[..., [3, 69]], v[..., [3, 69]], pos[:, :, [3, 69]], bias[0, [3, 69]]):
        assert (grad == 0).all()


@pytest.mark.parametrize("size", (1e3, 1e4))
def test_scores_beyond_the_exponential(backend, size):
    """The running maximum, not the scores, must decide: here it moves from key tile to key tile."""
    given = attention_inputs(torch.float64, keys=200)
    bias = torch.linspace(-size, size, 200, dtype=torch.float64)
    for shift in (bias, -bias):
        out = dat_cuda.deform_attention(**given, bias=shift, heads=4)
        want = reference.deform_attention(**given, bias=shift, heads=4)
        assert_close(out, want, 1e-10)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize(
    ("masked", "others"),
    ((-1e9, 0), (-1e4, 0), (-1e4, -1e4), (-INF, -120), (-INF, -18), (-20, -18), (-90, -70)),
)
def test_first_keys_masked(backend, dtype, masked, others):
    """What the first tiles of keys say of the maximum must not cost the later ones digits."""
    given = {name: t.to(dtype) for name, t in attention_inputs(keys=70).items()}
    given["pos"] = given["pos"].float()
    bias = torch.full((70,), float(others)).to(dtype)
    bias[:40] = masked
    out = dat_cuda.deform_attention(**given, bias=bias, heads=4)
    exact = {name: t.double() for name, t in given.items()}
    want = reference.deform_attention(**exact, bias=bias.double(), heads=4)
    same = reference.deform_attention(**given, bias=bias, heads=4)
    rounding = (same.double() - want).abs().max().item()
    assert_close(out, want, 2 * rounding + (2e-5 if dtype == torch.float32 else 5e-3))


@pytest.mark.parametrize("masked", (-1e4, -1e6, -1e9, -1e30, torch.finfo(torch.float32).min))
@pytest.mark.parametrize("keys", (5, 64, 130))
def test_rows_that_a_finite_bias_masks_altogether(backend, masked, keys):
    """What is left of such a row's log-sum-exp says nothing of how many keys there are."""
    given = attention_inputs(keys=keys)
    given["bias"] = torch.randn(12, keys)
    given["bias"][3] = masked
    given["bias"][7, : keys - 2] = masked
    exact = {name: t.double().requires_grad_() for name, t in given.items()}
    same = {name: t.clone().requires_grad_() for name, t in given.items()}
    given = {name: t.requires_grad_() for name, t in given.items()}
    results = [
        (out, *torch.autograd.grad(out.sin().sum(), list(tensors.values())))
        for attention, tensors in (
            (dat_cuda.deform_attention, given),
            (reference.deform_attention, same),
            (reference.deform_attention, exact),
        )
        for out in [attention(**tensors, heads=4)]
    ]
    rounding = -masked * torch.finfo(torch.float32).eps  # of a score
    for name, found, plain, right in zip(("out", *given), *results, strict=True):
        if backend in ("cuda", "emulated") and name != "out":
            continue  # there the backward has the log-sum-exp alone
        if rounding > 1:  # so that all scores of the row are the same
            assert_close(found, plain, 1e-5)
        else:
            assert_close(found, right, 1e-5 + 4 * rounding)


def test_empty_batch(backend):
    given = {name: tensor[:0] for name, tensor in attention_inputs().items()}
    given["rpe_table"] = torch.randn(4, 5, 7)
    given["bias"] = torch.randn(12, 5)
    tensors = [tensor.requires_grad_() for tensor in given.values()]
    with poisoned_memory():
        out = dat_cuda.deform_attention(**given, heads=4)
    assert out.shape == (0, 12, 3, 4)
    for tensor, grad in zip(tensors, gradients(out, tensors), strict=True):
        assert grad.shape == tensor.shape and (grad == 0).all()

    x = torch.randn(0, 6, 4, 5, requires_grad=True)
    offset = torch.randn(0, 2, 2, 3, requires_grad=True)
    sampled, pos = dat_cuda.deform_sample(x, offset, groups=3, offset_range_factor=2)
    assert sampled.shape == (0, 6, 6) and pos.shape == (0, 3, 6, 2)
    for tensor, grad in zip((x, offset), gradients(sampled, (x, offset)), strict=True):
        assert grad.shape == tensor.shape


def test_only_one_output_of_sample_is_used(backend):
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    offset = torch.randn(4, 2, 3, 3, requires_grad=True)
    outputs = dat_cuda.deform_sample(x, offset, groups=2, offset_range_factor=2)
    both = torch.autograd.grad((outputs[0].sum(), outputs[1].sum()), (x, offset), retain_graph=True)
    alone = torch.autograd.grad(outputs[0].sum(), (x, offset), retain_graph=True)
    (from_pos,) = torch.autograd.grad(outputs[1].sum(), offset)
    assert_close(alone[0], both[0])
    assert_close(alone[1] + from_pos, both[1])
    assert (from_pos != 0).all()


def test_views_that_span_more_than_two_to_the_31_elements(backend):
    """Index arithmetic in 64 bits. The memory in between is reserved, never touched."""
    far = 2**31 + 8
    if backend == "cuda" and torch.cuda.mem_get_info()[0] < 5 * far:
        pytest.skip("the GPU has too little memory, which it does not only reserve")
    base = torch.empty(2 * far, dtype=torch.float16)
    shapes = {"q": (1, 2, 2, 2), "k": (1, 2, 2), "v": (1, 2, 2)}
    views, plain = {}, {}
    for i, (name, shape) in enumerate(shapes.items()):
        # Along channels, and for q along rows, too: the strides of either are that large.
        strides = (1, 2, far, 1) if len(shape) == 4 else (1, far, 1)
        views[name] = base.as_strided(shape, strides, storage_offset=8 * i)
        plain[name] = torch.randn(shape).half()
        views[name].copy_(plain[name])
    out = dat_cuda.deform_attention(**views, heads=1)
    assert torch.equal(out, dat_cuda.deform_attention(**plain, heads=1))
    offset = torch.zeros(1, 2, 3, 3)
    options = {"groups": 1, "offset_range_factor": 1}
    sampled, _ = dat_cuda.deform_sample(views["q"], offset, **options)
    assert torch.equal(sampled, dat_cuda.deform_sample(plain["q"], offset, **options)[0])


@pytest.mark.parametrize("keys", (49, 64, 65))
def test_huge_scores(backend, keys):
    """Rounded, the log-sum-exp of some rows leaves no key a weight in the backward."""
    if backend in ("cuda", "emulated"):
        pytest.skip("there the backward's own scores may be above the rounded log-sum-exp: 2^1000")
    q = torch.randn(8, 8, 1, 6).mul(1e10).requires_grad_()
    k, v = (torch.randn(8, 8, keys).requires_grad_() for _ in range(2))
    out = dat_cuda.deform_attention(q, k, v, heads=1)
    for grad in gradients(out, (q, k, v)):
        assert torch.isfinite(grad).all()
