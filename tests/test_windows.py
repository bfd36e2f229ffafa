"""Attention within windows of rows: the operators of csrc/windows.h against the formula."""

import pytest
import torch
from near import assert_near

import dat_cuda
from dat_cuda.models.attend import Windows, attend_windows

HEADS, CHANNELS = 3, 24
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def tiles(images, height, width, tile, halo):
    """queries and keys [windows, pixels] of all the tiles, which overlap by their halo."""
    index = torch.arange(images * height * width).view(images, height, width)
    queries = index.unfold(1, tile, tile).unfold(2, tile, tile)
    side = tile + 2 * halo
    rows = (torch.arange(0, height, tile) - halo).clamp(0, height - side)
    columns = (torch.arange(0, width, tile) - halo).clamp(0, width - side)
    keys = index.unfold(1, side, 1)[:, rows].unfold(2, side, 1)[:, :, columns]
    return queries.flatten(0, 2).flatten(1), keys.flatten(0, 2).flatten(1)


def made(case, dtype, heads=HEADS):
    images, height, width, tile, halo = case
    queries, keys = tiles(*case)
    parts = torch.randperm(len(queries)).split(len(queries) // 2 + 1)
    qkv = torch.randn(images * height * width, 3 * CHANNELS, dtype=dtype, requires_grad=True)
    biases = [
        torch.randn(heads, queries.shape[1], keys.shape[1], dtype=dtype, requires_grad=True)
        for _ in parts
    ]
    if halo:  # whole windows in the order of the map, as neighbourhoods have them
        parts = [part.sort().values for part in parts]
    return qkv, biases, [(queries[part], keys[part]) for part in parts]


def run(qkv, biases, rows, **settings):
    windows = [Windows(*each, bias) for each, bias in zip(rows, biases, strict=True)]
    return attend_windows(qkv, windows, scale=0.3, **settings)


def gradients(qkv, biases, rows, grad, **settings):
    y = run(qkv, biases, rows, **settings)
    return [y, *torch.autograd.grad(y, [qkv, *biases], grad)]


CASES = {
    "windows": (2, 14, 21, 7, 0),
    "neighbourhoods": (2, 16, 24, 4, 2),
    "wide": (1, 6, 72, 2, 2),
    "more than a tile of queries": (1, 20, 20, 20, 0),
    "three tiles of keys": (2, 16, 16, 8, 2),
}


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_formula(case, dtype, heads, threads):
    qkv, biases, rows = made(case, dtype, heads)
    grad = torch.randn(len(qkv), CHANNELS, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = gradients(qkv, biases, rows, grad, heads=heads)
        again = gradients(qkv, biases, rows, grad, heads=heads)
    finally:
        torch.set_num_threads(before)
    for first, second in zip(actual, again, strict=True):
        assert torch.equal(first, second)  # whichever thread came first
    with dat_cuda.backend("reference"):
        wide = [t.detach().double().requires_grad_() for t in (qkv, *biases)]
        expected = gradients(wide[0], wide[1:], rows, grad.double(), heads=heads)
    names = ("out", "grad_qkv", *("grad_bias",) * len(biases))
    for name, got, want in zip(names, actual, expected, strict=True):
        assert got.dtype == dtype
        assert_near(name, got, want, TOLERANCE[dtype])


def test_dropout_is_drawn_again_for_the_gradient():
    qkv, biases, rows = made((1, 4, 8, 4, 0), torch.float64, 1)

    def seeded(qkv, *biases):
        torch.manual_seed(3)
        return run(qkv, biases, rows, heads=1, dropout_p=0.4)

    torch.autograd.gradcheck(seeded, (qkv, *biases))
    dropped = seeded(qkv, *biases)
    assert torch.equal(dropped, seeded(qkv, *biases))
    assert not torch.equal(dropped, run(qkv, biases, rows, heads=1, dropout_p=0.4))


def test_rows_that_lie_apart():
    qkv, biases, rows = made((2, 8, 8, 4, 2), torch.float64)
    apart = torch.empty(len(qkv), 6 * CHANNELS, dtype=torch.float64)[:, ::2].copy_(qkv.detach())
    torch.testing.assert_close(
        run(apart, biases, rows, heads=HEADS), run(qkv, biases, rows, heads=HEADS)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.tensor([[0, 8]])}, r"queries must be in \[0, 8\), got 8"),
        ({"keys": torch.tensor([[-1, 0, 1]])}, r"keys must be in \[0, 8\), got -1"),
        ({"keys": torch.zeros(2, 3, dtype=torch.long)}, r"keys must have shape \[windows, N\]"),
        ({"queries": torch.zeros(1, 2)}, "queries must be int64, got float32"),
        ({"bias": torch.zeros(2, 2, 4)}, r"bias must have shape \[heads, M, N\] = \[2, 2, 3\]"),
        ({"bias": torch.zeros(2, 2, 3).double()}, "bias must have the dtype of qkv"),
        ({"qkv": torch.zeros(24, 8).t()}, "qkv must be contiguous"),
        ({"qkv": torch.zeros(8, 23)}, "3 C columns"),
        ({"out": torch.zeros(8, 7)}, r"out must have shape .* = \[8, 8\], got \[8, 7\]"),
        ({"heads": 3}, "heads must divide the 8 channels of qkv, got 3"),
        ({"dropout_p": 0.5}, "dropout needs a seed"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "qkv": torch.randn(8, 24),
        "queries": torch.tensor([[0, 1]]),
        "keys": torch.tensor([[0, 1, 7]]),
        "bias": torch.zeros(2, 2, 3),
        "seed": None,
        "heads": 2,
        "scale": 1.0,
        "dropout_p": 0.0,
        "out": torch.zeros(8, 8),
    }
    torch.ops.dat_cuda.window_attention_forward(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dat_cuda.window_attention_forward(**{**arguments, **change})
