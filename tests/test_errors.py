"""Wrong arguments: the error names the argument and says what came."""

import re

import pytest
import torch

import dat_cuda


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def grad(*shape):
    return rand(*shape).requires_grad_()


# Change to a right call, and what the message must contain: the argument's name, then what came.
ATTENTION = (
    ({"q": rand(16, 3, 4)}, "q", "[16, 3, 4]"),
    ({"q": rand(2, 16, 12)}, "q", "[2, 16, 12]"),
    ({"q": rand(2, 16, 3, 4, 1)}, "q", "[2, 16, 3, 4, 1]"),
    ({"q": rand(2, 16, 3, 4, dtype=torch.int64)}, "q", "int64"),
    ({"q": rand(2, 16, 3, 4, dtype=torch.int32)}, "q", "int32"),
    ({"q": rand(2, 16, 3, 4, dtype=torch.complex64)}, "q", "complex64"),
    ({"q": rand(2, 16, 3, 4, dtype=torch.bool)}, "q", "bool"),
    ({"q": rand(3, 16, 3, 4)}, "k", "[2, 16, 5]"),
    ({"k": rand(2, 16, 5, 1)}, "k", "[2, 16, 5, 1]"),
    ({"k": rand(1, 16, 5)}, "k", "[1, 16, 5]"),
    ({"k": rand(2, 12, 5)}, "k", "[2, 12, 5]"),
    ({"k": rand(2, 16, 6)}, "v", "[2, 16, 5]"),
    ({"k": rand(2, 16, 5, dtype=torch.float64)}, "k", "float64"),
    ({"k": rand(2, 16, 5).to("meta")}, "k", "meta"),
    ({"v": rand(2, 16)}, "v", "[2, 16]"),
    ({"v": rand(2, 16, 6)}, "v", "[2, 16, 6]"),
    ({"v": rand(2, 8, 5)}, "v", "[2, 8, 5]"),
    ({"v": rand(2, 16, 5, dtype=torch.bfloat16)}, "v", "bfloat16"),
    ({"v": rand(2, 16, 5).to("meta")}, "v", "meta"),
    ({"pos": rand(2, 2, 5)}, "pos", "[2, 2, 5]"),
    ({"pos": rand(2, 2, 5, 3)}, "pos", "[2, 2, 5, 3]"),
    ({"pos": rand(2, 2, 6, 2)}, "pos", "[2, 2, 6, 2]"),
    ({"pos": rand(1, 2, 5, 2)}, "pos", "[1, 2, 5, 2]"),
    ({"pos": rand(2, 3, 5, 2)}, "pos", "3"),
    ({"pos": rand(2, 0, 5, 2)}, "pos", "0"),
    ({"pos": rand(2, 8, 5, 2)}, "pos", "8"),
    ({"pos": rand(2, 2, 5, 2).to("meta")}, "pos", "meta"),
    ({"pos": None}, "pos", "None"),
    ({"rpe_table": rand(5, 7)}, "rpe_table", "[5, 7]"),
    ({"rpe_table": rand(3, 5, 7)}, "rpe_table", "[3, 5, 7]"),
    ({"rpe_table": rand(2, 4, 5, 7)}, "rpe_table", "[2, 4, 5, 7]"),
    ({"rpe_table": rand(4, 0, 7)}, "rpe_table", "0"),
    ({"rpe_table": rand(4, 5, 7).to("meta")}, "rpe_table", "meta"),
    ({"bias": rand(4)}, "bias", "4]"),
    ({"bias": rand(5, 12)}, "bias", "5, 12]"),
    ({"bias": rand(3, 12, 5)}, "bias", "3, 12, 5]"),
    ({"bias": rand(3, 4, 12, 5)}, "bias", "[3, 4, 12, 5]"),
    ({"bias": rand(1, 2, 4, 12, 5)}, "bias", "[1, 2, 4, 12, 5]"),
    ({"bias": grad(11, 5)}, "bias", "11, 5]"),
    ({"bias": grad(2, 4, 12, 6)}, "bias", "[2, 4, 12, 6]"),
    ({"bias": grad(1, 2, 4, 12, 5)}, "bias", "[1, 2, 4, 12, 5]"),
    ({"bias": rand(12, 5).to("meta")}, "bias", "meta"),
    ({"heads": 3}, "heads", "3"),
    ({"heads": 32}, "heads", "32"),
    ({"heads": 0}, "heads", "0"),
    ({"heads": -4}, "heads", "-4"),
    ({"dropout_p": -0.1}, "dropout_p", "-0.1"),
    ({"dropout_p": 1.5}, "dropout_p", "1.5"),
    ({"dropout_p": float("nan")}, "dropout_p", "nan"),
    ({"version": "dat+++"}, "version", "dat+++"),
    ({"version": ""}, "version", "''"),
)

SAMPLE = (
    ({"x": rand(2, 6, 5)}, "x", "[2, 6, 5]"),
    ({"x": rand(6, 5, 5)}, "x", "[6, 5, 5]"),
    ({"x": rand(2, 6, 5, 5, dtype=torch.int64)}, "x", "int64"),
    ({"x": rand(2, 6, 5, 5, dtype=torch.uint8)}, "x", "uint8"),
    ({"x": rand(2, 6, 0, 5)}, "x", "0"),
    ({"x": rand(3, 6, 5, 5)}, "offset", "[6, 2, 3, 4]"),
    ({"offset": rand(6, 2, 3)}, "offset", "[6, 2, 3]"),
    ({"offset": rand(6, 3, 3, 4)}, "offset", "[6, 3, 3, 4]"),
    ({"offset": rand(2, 2, 3, 4)}, "offset", "[2, 2, 3, 4]"),
    ({"offset": rand(2, 3, 2, 3, 4)}, "offset", "[2, 3, 2, 3, 4]"),
    ({"offset": rand(6, 2, 0, 4)}, "offset", "0"),
    ({"offset": rand(6, 2, 3, 4).to("meta")}, "offset", "meta"),
    ({"groups": 4}, "groups", "4"),
    ({"groups": 0}, "groups", "0"),
    ({"groups": -3}, "groups", "-3"),
    ({"groups": 12}, "groups", "12"),
    ({"offset_range_factor": float("nan")}, "offset_range_factor", "nan"),
    ({"version": "2022"}, "version", "2022"),
)


def name_of(value):
    if isinstance(value, dict):
        return "-".join(
            f"{key}={list(v.shape) if isinstance(v, torch.Tensor) else v}"
            for key, v in value.items()
        )
    return str(value)


def attention(**change):
    right = {
        "q": rand(2, 16, 3, 4),
        "k": rand(2, 16, 5),
        "v": rand(2, 16, 5),
        "pos": rand(2, 2, 5, 2),
        "rpe_table": rand(4, 5, 7),
        "bias": rand(4, 1, 5),
        "heads": 4,
    }
    return dat_cuda.deform_attention(**(right | change))


def sample(**change):
    right = {"x": rand(2, 6, 5, 5), "offset": rand(6, 2, 3, 4)}
    options = {"groups": 3, "offset_range_factor": 1.0}
    return dat_cuda.deform_sample(**(right | options | change))


def assert_refused(call, change, argument, came):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call(**change)
    message = str(caught.value)
    # Not only as a part of another word.
    assert re.search(rf"(?<![a-z_]){argument}(?![a-z_])", message), message
    assert came.lower() in message.lower(), message


def test_the_right_calls_work(backend):
    assert attention().shape == (2, 16, 3, 4)
    assert sample()[0].shape == (2, 6, 12)


@pytest.mark.parametrize(("change", "argument", "came"), ATTENTION, ids=name_of)
def test_attention_refuses(backend, change, argument, came):
    assert_refused(attention, change, argument, came)


@pytest.mark.parametrize(("change", "argument", "came"), SAMPLE, ids=name_of)
def test_sample_refuses(backend, change, argument, came):
    assert_refused(sample, change, argument, came)


def test_no_channels(backend):
    with pytest.raises((ValueError, RuntimeError), match=r"q must|heads must"):
        attention(q=rand(2, 0, 3, 4), k=rand(2, 0, 5), v=rand(2, 0, 5))


def test_no_keys(backend):
    none = {"k": rand(2, 16, 0), "v": rand(2, 16, 0), "pos": rand(2, 2, 0, 2), "bias": None}
    with pytest.raises((ValueError, RuntimeError), match=r"\b(k|N) .*got .*0"):
        attention(**none)


def test_sizes_that_coordinates_cannot_count_are_refused():
    """Beyond 2^24 points float32 coordinates are not exact; expanded views cost no memory."""
    huge = 2**24 + 1
    line = torch.zeros(1, 1, 1).expand(1, 1, huge)
    with pytest.raises(RuntimeError, match=rf"must be between 1 and \d+, got {huge}"):
        dat_cuda.deform_attention(rand(1, 1, 1, 1), line, line, heads=1)
    row = line.unsqueeze(2)
    with pytest.raises(RuntimeError, match=rf"W of x must be between 1 and \d+, got {huge}"):
        dat_cuda.deform_sample(row, rand(1, 2, 1, 1), groups=1, offset_range_factor=1)


@pytest.mark.parametrize("got", (torch.float64, torch.bfloat16))
def test_parameters_in_another_dtype_are_refused(native, got):
    """By the operators themselves: deform_sample and deform_attention cast."""
    name = str(got).removeprefix("torch.")
    x, offset = rand(2, 6, 5, 5, dtype=torch.float16), rand(6, 2, 3, 4, dtype=got)
    message = f"offset must be float32 or float16 for float16 x, got {name}"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dat_cuda.deform_sample_forward(x, offset, 3, 1.0, "dat")
    q, k = rand(2, 16, 3, 4, dtype=torch.float16), rand(2, 16, 5, dtype=torch.float16)
    tensors = q, k, k, rand(2, 2, 5, 2), rand(4, 5, 7, dtype=got), None, None
    message = f"rpe_table must be float32 or float16 for float16 q, got {name}"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dat_cuda.deform_attention_forward(*tensors, 4, 1.0, 0.0, "dat")


def test_positions_without_a_table_have_no_effect(backend):
    pos = rand(2, 2, 5, 2).requires_grad_()
    tensors = {name: rand(2, 16, *size) for name, size in (("q", (3, 4)), ("k", (5,)), ("v", (5,)))}
    out = attention(**tensors, pos=pos, rpe_table=None, bias=None)
    assert torch.equal(out, attention(**tensors, pos=None, rpe_table=None, bias=None))
    assert not out.requires_grad
