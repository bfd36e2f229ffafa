"""dat_cuda.reference against loops over Python floats, and its rules for odd input."""

import math

import naive
import numpy as np
import pytest
import torch

from dat_cuda import reference

VERSIONS = ("dat", "dat++")
NAN, INF = math.nan, math.inf


def rand(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def assert_close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual.numpy(), expected, rtol=tolerance, atol=tolerance)


def attention_inputs(batch=2, heads=4, groups=2, dim=3, queries=(3, 4), keys=5, table=(5, 7)):
    channels = heads * dim
    return {
        "q": rand(batch, channels, *queries),
        "k": rand(batch, channels, keys),
        "v": rand(batch, channels, keys),
        "pos": rand(batch, groups, keys, 2),
        "rpe_table": rand(heads, *table),
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("factor", (2, 0.5, 0, -1))
@pytest.mark.parametrize("size", ((4, 5), (1, 1), (1, 6), (3, 1)))
@pytest.mark.parametrize("keys", ((2, 3), (1, 1), (1, 4)))
def test_sample(version, factor, size, keys):
    x, offset = rand(2, 6, *size), rand(2 * 3, 2, *keys)
    options = {"groups": 3, "offset_range_factor": factor, "version": version}
    sampled, pos = reference.deform_sample(x, offset, **options)
    want_sampled, want_pos = naive.deform_sample(x.numpy(), offset.numpy(), 3, factor, version)
    assert_close(pos, want_pos)
    assert_close(sampled, want_sampled)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("queries", ((3, 4), (1, 1), (1, 5)))
@pytest.mark.parametrize("table", ((5, 7), (1, 1), (1, 4), (2, 9)))
@pytest.mark.parametrize("keys", (1, 6))
def test_attention(version, queries, table, keys):
    given = attention_inputs(queries=queries, table=table, keys=keys)
    bias = rand(2, 4, queries[0] * queries[1], keys)
    out = reference.deform_attention(**given, heads=4, bias=bias, scale=0.4, version=version)
    arrays = [tensor.numpy() for tensor in given.values()]
    assert_close(out, naive.deform_attention(*arrays, 4, bias.numpy(), 0.4, version))


@pytest.mark.parametrize("groups", (1, 2, 4))
def test_attention_groups(groups):
    given = attention_inputs(groups=groups)
    out = reference.deform_attention(**given, heads=4)
    arrays = [tensor.numpy() for tensor in given.values()]
    assert_close(out, naive.deform_attention(*arrays, 4, None, None, "dat++"))


@pytest.mark.parametrize("shape", ((5,), (12, 1), (4, 1, 5), (2, 1, 12, 5), (1, 4, 12, 5), ()))
def test_attention_without_table_broadcasts_bias(shape):
    given = attention_inputs()
    q, k, v = given["q"], given["k"], given["v"]
    bias = rand(*shape)
    out = reference.deform_attention(q, k, v, heads=4, bias=bias)
    full = bias.expand(2, 4, 12, 5).numpy()
    arrays = (q.numpy(), k.numpy(), v.numpy(), None, None)
    assert_close(out, naive.deform_attention(*arrays, 4, full, None, "dat++"))


def test_scale_zero_is_a_scale():
    given = attention_inputs()
    out = reference.deform_attention(given["q"], given["k"], given["v"], heads=4, scale=0.0)
    assert_close(out, given["v"].mean(-1)[..., None, None].expand_as(out).numpy())


@pytest.mark.parametrize("size", ((4, 5), (1, 1), (1, 6), (3, 1)))
@pytest.mark.parametrize("where", ((NAN, 0.1), (0.1, NAN), (INF, 0.1), (0.1, -INF), (-INF, INF)))
def test_sample_at_nan_and_infinity(size, where):
    x = rand(2, 6, *size).requires_grad_()
    offset = rand(2 * 3, 2, 2, 3)
    offset[1, :, 1, 2] = torch.tensor(where)
    offset.requires_grad_()
    options = {"groups": 3, "offset_range_factor": 0, "version": "dat"}
    sampled, pos = reference.deform_sample(x, offset, **options)
    want_sampled, want_pos = naive.deform_sample(
        x.detach().numpy(), offset.detach().numpy(), 3, 0, "dat"
    )
    assert_close(pos.detach(), want_pos)
    assert_close(sampled.detach(), want_sampled)

    sampled.sum().backward()
    assert torch.isfinite(x.grad).all()
    at_it = offset.grad[1, :, 1, 2]
    assert at_it.isnan().all() if any(map(math.isnan, where)) else (at_it == 0).all()
    offset.grad[1, :, 1, 2] = 0
    assert torch.isfinite(offset.grad).all()


@pytest.mark.parametrize("table", ((5, 7), (1, 1), (1, 4), (3, 1)))
@pytest.mark.parametrize("where", ((NAN, 0.1), (0.1, NAN), (INF, 0.1), (0.1, -INF), (-INF, INF)))
def test_attention_at_nan_and_infinity(table, where):
    given = attention_inputs(table=table)
    given["pos"][1, 1, 2] = torch.tensor(where, dtype=torch.float64)
    out = reference.deform_attention(**given, heads=4)
    with np.errstate(invalid="ignore"):
        arrays = [tensor.numpy() for tensor in given.values()]
        assert_close(out, naive.deform_attention(*arrays, 4, None, None, "dat++"))
    if any(map(math.isnan, where)):
        assert out[1, 6:].isnan().all()
        assert torch.isfinite(out[0]).all() and torch.isfinite(out[1, :6]).all()


@pytest.mark.parametrize("far", (1e3, 1e9, 1e30, -1e30, 1.7e38))
def test_far_positions_are_outside(far):
    given = {name: tensor.float() for name, tensor in attention_inputs().items()}
    given["pos"][0, 0, 3] = torch.tensor([far, 0.0])
    arrays = [tensor.double().numpy() for tensor in given.values()]
    out = reference.deform_attention(**given, heads=4)
    assert_close(out, naive.deform_attention(*arrays, 4, None, None, "dat++"), 1e-5)

    offset = torch.full((1, 2, 1, 1), far)
    options = {"groups": 1, "offset_range_factor": 0, "version": "dat"}
    sampled, _ = reference.deform_sample(torch.ones(1, 1, 4, 4), offset, **options)
    assert sampled.item() == 0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("factor", (2, 0, -1))
def test_sample_gradients(version, factor):
    def sample(x, offset):
        options = {"groups": 2, "offset_range_factor": factor, "version": version}
        return reference.deform_sample(x, offset, **options)

    assert torch.autograd.gradcheck(
        sample, (rand(2, 4, 5, 6).requires_grad_(), (rand(4, 2, 2, 3) / 4).requires_grad_())
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_attention_gradients(version):
    given = attention_inputs(batch=1, heads=2, groups=1, dim=2, queries=(2, 3), keys=4)
    given["bias"] = rand(2, 1, 4)
    tensors = [tensor.requires_grad_() for tensor in given.values()]

    def attend(q, k, v, pos, rpe_table, bias):
        return reference.deform_attention(
            q, k, v, pos, rpe_table, heads=2, bias=bias, version=version
        )

    assert torch.autograd.gradcheck(attend, tensors)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_keeps_coordinates(dtype):
    # Pixel 1000 of 2049: the spacing of half-precision numbers near it is half a pixel or more.
    x = torch.arange(2049.0).remainder(7).reshape(1, 1, 1, 2049)
    offset = torch.zeros(1, 2, 1, 512)
    options = {"groups": 1, "offset_range_factor": -1, "version": "dat++"}
    want, _ = reference.deform_sample(x, offset, **options)
    sampled, pos = reference.deform_sample(x.to(dtype), offset.to(dtype), **options)
    assert sampled.dtype == dtype and pos.dtype == torch.float32
    assert torch.equal(sampled, want.to(dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_attention_dtypes(dtype):
    given = {name: tensor.to(dtype) for name, tensor in attention_inputs().items()}
    given["pos"] = given["pos"].float()
    out = reference.deform_attention(**given, heads=4)
    assert out.dtype == dtype
    arrays = [tensor.double().numpy() for tensor in given.values()]
    want = naive.deform_attention(*arrays, 4, None, None, "dat++")
    # Scores of a few units, rounded once or twice, move the weights by as many units of eps.
    assert_close(out.double(), want, 16 * torch.finfo(dtype).eps)


def test_dropout_is_that_of_the_weights():
    keys, p = 400, 0.3
    q, k = torch.zeros(2, 8, 5, 5), rand(2, 8, keys, dtype=torch.float32)
    v = torch.ones(2, 8, keys)
    out = reference.deform_attention(q, k, v, heads=2, dropout_p=p)
    kept = out * keys * (1 - p)
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=2e-2)
    # 2*2*25 independent rows of 400 draws: six standard deviations.
    assert abs(out.mean().item() - 1) < 6 * math.sqrt(p / (1 - p) / (100 * keys))
    assert out.std() > 0
    torch.testing.assert_close(out[:, :1].expand(2, 4, 5, 5), out[:, :4])


def test_empty_batch():
    given = attention_inputs(batch=0)
    assert reference.deform_attention(**given, heads=4).shape == (0, 12, 3, 4)
    sampled, pos = reference.deform_sample(
        rand(0, 6, 4, 5), rand(0, 2, 2, 3), groups=3, offset_range_factor=2
    )
    assert sampled.shape == (0, 6, 6) and pos.shape == (0, 3, 6, 2)


def test_strided_views():
    given = attention_inputs()
    want = reference.deform_attention(**given, heads=4)
    given = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in given.items()}
    torch.testing.assert_close(reference.deform_attention(**given, heads=4), want)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"q": rand(2, 12, 3, 4).int()}, r"q must be a floating-point tensor, got torch.int32"),
        ({"q": rand(12, 3, 4)}, r"q must have shape \[B, C, H, W\].*got \[12, 3, 4\]"),
        ({"k": rand(2, 11, 5)}, r"k must have shape .*= \[2, 12, any\], got \[2, 11, 5\]"),
        ({"v": rand(2, 12, 6)}, r"v must have shape .*= \[2, 12, 5\], got \[2, 12, 6\]"),
        ({"v": rand(2, 12, 5).float()}, r"v must have the dtype of q, torch.float64"),
        ({"pos": rand(2, 2, 5, 3)}, r"pos must have shape \[B, groups, N, 2\].*got \[2, 2, 5, 3\]"),
        ({"pos": rand(2, 3, 5, 2)}, r"groups \(of pos\) must .*divide heads \(4\), got 3"),
        ({"pos": None}, r"rpe_table needs pos"),
        ({"rpe_table": rand(3, 5, 7)}, r"rpe_table must have shape .*\[4, any, any\]"),
        ({"bias": rand(2, 3, 12, 5)}, r"bias must be broadcastable.*\[2, 4, 12, 5\].*\[2, 3, 12"),
        ({"bias": rand(1, 2, 4, 12, 5)}, r"bias must be broadcastable"),
        ({"heads": 5}, r"heads must be positive and divide q's channels \(12\), got 5"),
        ({"heads": 0}, r"heads must be positive"),
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\], got 1.5"),
        ({"version": "dat+++"}, r"version must be one of .*got 'dat\+\+\+'"),
    ),
)
def test_attention_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        reference.deform_attention(**(attention_inputs() | {"heads": 4} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"x": rand(2, 6, 5, 5).int()}, r"x must be a floating-point tensor"),
        ({"x": rand(2, 6, 5)}, r"x must have shape \[B, C, H, W\]"),
        ({"offset": rand(2, 2, 3, 3)}, r"offset must have shape .*\[6, 2, any, any\], got \[2, 2"),
        ({"groups": 4}, r"groups must be positive and divide x's channels \(6\), got 4"),
        ({"version": "2022"}, r"version must be one of"),
    ),
)
def test_sample_refuses(change, message):
    given = {"x": rand(2, 6, 5, 5), "offset": rand(6, 2, 3, 3), "groups": 3}
    with pytest.raises(ValueError, match=message):
        reference.deform_sample(**(given | {"offset_range_factor": 1} | change))
