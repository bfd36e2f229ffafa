"""Dropout of the weights: F.dropout's statistics, torch's seed, one mask in both passes."""

import math

import pytest
import torch
from operator_cases import gradcheck, threads

import dat_cuda

KEYS, SIZE = 70, (12, 20)  # two key tiles, the second one not a multiple of four


def kept_weights(p, batch=2, heads=3, dtype=torch.float64, keys=KEYS, **options):
    """[B, heads, N, M]: equal weights that survived, times N: 0 or 1 / (1 - p)."""
    q = torch.zeros(batch, heads * keys, *SIZE, dtype=dtype)
    # With the identity for values, the output is the matrix of weights.
    v = torch.eye(keys, dtype=dtype).repeat(batch, heads, 1)
    out = dat_cuda.deform_attention(q, torch.zeros_like(v), v, heads=heads, dropout_p=p, **options)
    return (out * keys).view(batch, heads, keys, -1)


@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_rate_and_scale(backend, p, dtype):
    weights = kept_weights(p, dtype=dtype)
    kept = weights != 0
    # Six standard deviations.
    assert abs(kept.double().mean().item() - (1 - p)) < 6 * math.sqrt(p * (1 - p) / kept.numel())
    scale = torch.full_like(weights[kept], 1 / (1 - p))
    torch.testing.assert_close(weights[kept], scale, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_high_rates_do_not_overflow(backend):
    """Scores of 4.5, whose exponentials, times the scale of 1,000, float16 cannot hold."""
    dtype, keys = torch.float16, 8
    bias = torch.full((1, keys), 4.5, dtype=dtype)
    weights = kept_weights(0.999, batch=8, dtype=dtype, keys=keys, bias=bias)
    kept = weights[weights != 0]
    assert kept.numel() > 0
    torch.testing.assert_close(kept, torch.full_like(kept, 1000), rtol=4e-3, atol=0)


@pytest.mark.parametrize("axis", range(4), ids=("images", "heads", "keys", "queries"))
def test_masks_are_independent(backend, axis):
    """Of any two images, heads, keys or queries, near or far: no draw serves twice."""
    signs = (kept_weights(0.5) != 0).movedim(axis, 0).flatten(1).double() * 2 - 1
    correlation = signs @ signs.T / signs.shape[1]
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 7 / math.sqrt(signs.shape[1])


def test_every_key_and_query_is_drawn_for(backend):
    """The rate holds for each key and each query, not only on the whole."""
    kept = (kept_weights(0.5, batch=4) != 0).double()
    for dims in ((0, 1, 2), (0, 1, 3)):
        rate = kept.mean(dims)
        draws = kept.numel() / rate.numel()
        assert ((rate - 0.5).abs() < 7 * math.sqrt(0.25 / draws)).all()


def test_the_seed_decides(backend, seed):
    first = kept_weights(0.5)
    second = kept_weights(0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(seed)
    assert torch.equal(kept_weights(0.5), first)
    assert torch.equal(kept_weights(0.5), second)
    torch.manual_seed(seed + 1)
    assert not torch.equal(kept_weights(0.5), first)


@pytest.mark.parametrize("count", (2, 3))
def test_the_number_of_threads_does_not_matter(backend, seed, count):
    with threads(1):
        want = kept_weights(0.4)
    torch.manual_seed(seed)
    with threads(count):
        assert torch.equal(kept_weights(0.4), want)


def test_no_dropout_draws_nothing(backend):
    state = torch.get_rng_state()
    weights = kept_weights(0.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(weights, torch.ones_like(weights))


def inputs(keys=KEYS, dim=2, size=(3, 5), dtype=torch.float64):
    heads = 2
    tensors = (
        torch.randn(2, heads * dim, *size, dtype=dtype),
        *torch.randn(2, 2, heads * dim, keys, dtype=dtype).unbind(),
        torch.rand(2, 1, keys, 2, dtype=dtype) * 2 - 1,
        torch.randn(heads, 5, 9, dtype=dtype),
        torch.randn(size[0] * size[1], keys, dtype=dtype),
    )
    return [tensor.requires_grad_() for tensor in tensors]


def attend(q, k, v, pos, table, bias, p):
    return dat_cuda.deform_attention(q, k, v, pos, table, heads=2, bias=bias, dropout_p=p)


def test_rate_one_drops_everything(backend):
    tensors = inputs()
    out = attend(*tensors, p=1.0)
    assert (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), tensors):
        assert (grad == 0).all()


def test_backward_drops_the_same_weights(backend, seed):
    """A gradient of the values is the row of weights, mask and all: out is linear in them."""
    q, k, v, *rest = inputs(dtype=torch.float64)
    out = attend(q, k, v, *rest, p=0.6)
    grad_out = torch.randn_like(out)
    (grad_v,) = torch.autograd.grad(out, v, grad_out)
    torch.testing.assert_close((grad_v * v).sum(), (grad_out * out).sum())
    torch.manual_seed(seed)
    direction = torch.randn_like(v)
    # inputs() drew from the generator before the mask was: draw the same again.
    torch.manual_seed(seed)
    inputs(dtype=torch.float64)
    moved = attend(q, k, v + direction, *rest, p=0.6)
    torch.testing.assert_close((grad_v * direction).sum(), (grad_out * (moved - out)).sum())


def test_gradients(backend, seed):
    tensors = inputs(keys=66, dim=1, size=(1, 2))

    def under_one_mask(*tensors):
        torch.manual_seed(seed)
        return attend(*tensors, p=0.4)

    gradcheck(backend, under_one_mask, tensors, fast=True)
