"""The offset network on native CPU kernels: its depthwise convolution, and when it is used."""

import math

import pytest
import torch
import torch.nn.functional as F
from operator_cases import pairwise, threads

import dat_cuda
from dat_cuda import DAttention
from dat_cuda.offsets import depthwise, is_usual, offset_head, offsets

GROUPS, BATCH = 2, 3
CASES = pairwise(
    dtype=(torch.float64, torch.float32),
    # Whole vectors of channels, parts of one, and several at a time.
    channels=(1, 5, 16, 40, 64, 96, 128),
    size=((1, 1), (7, 7), (13, 17), (33, 9), (1, 33), (20, 34)),
    kernel=((3, 1, 1), (5, 2, 2), (9, 8, 4), (1, 1, 0), (2, 3, 1), (17, 4, 8)),
    layout=("contiguous", "channels_last", "sliced", "transposed"),
    threads=(1, 2, 3),
)


def describe(case):
    return "-".join(str(value).removeprefix("torch.").replace(", ", "x") for value in case.values())


def laid_out(x, layout):
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_depthwise(case):
    kernel, stride, padding = case["kernel"]
    channels, dtype = case["channels"], case["dtype"]
    height, width = (max(size, kernel - 2 * padding) for size in case["size"])
    exact = [
        torch.randn(shape, dtype=torch.float64).to(dtype).double().requires_grad_()
        for shape in (
            (BATCH, GROUPS * channels, height, width),
            (channels, 1, kernel, kernel),
            (channels,),
        )
    ]
    found = [t.detach().to(dtype) for t in exact]
    found[0] = laid_out(found[0], case["layout"])
    found = [t.requires_grad_() for t in found]
    images = exact[0].reshape(BATCH * GROUPS, channels, height, width)
    right = F.conv2d(images, *exact[1:], stride, padding, groups=channels)
    grads = torch.randn_like(right).to(dtype), torch.randn_like(exact[0]).to(dtype)
    with threads(case["threads"]):
        out, same = depthwise(*found, stride, padding)
        results = out, *torch.autograd.grad((out, same), found, grads)
    rights = (
        right,
        *torch.autograd.grad((right, exact[0] * 1), exact, [grad.double() for grad in grads]),
    )
    assert out.permute(0, 2, 3, 1).is_contiguous()
    # Of random terms, whose sums may come out as small as chance has it.
    pixels = right.numel() / channels
    terms = {"out": kernel**2, "x": kernel**2, "weight": pixels, "bias": pixels}
    for (name, count), result, wanted in zip(terms.items(), results, rights, strict=True):
        error = (result.double() - wanted).abs().max() / wanted.abs().max().clamp(min=count**0.5)
        assert result.dtype == dtype and error < 100 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_only_what_a_filter_meets_counts(layout):
    x = torch.randn(1, 16, 8, 8)
    x[:, :, 4, 4] = torch.nan
    grad = torch.randn(1, 16, 4, 4)
    grad[:, :, 1, 1] = torch.inf
    leaves = [laid_out(x, layout), torch.randn(16, 1, 3, 3), torch.randn(16)]
    out, _ = depthwise(*(t.requires_grad_() for t in leaves), 2, 1)
    reference = F.conv2d(*leaves, 2, 1, groups=16)
    assert torch.equal(out.isnan(), reference.isnan()) and out.isnan().sum() == 16
    grads = torch.autograd.grad(out, leaves, grad)
    wanted = torch.autograd.grad(reference, leaves, grad)
    assert torch.equal(grads[0].isfinite(), wanted[0].isfinite())
    assert torch.equal(grads[1].isfinite(), wanted[1].isfinite())


def test_the_same_with_any_number_of_threads():
    x, weight, bias = torch.randn(5, 96, 14, 14), torch.randn(48, 1, 5, 5), torch.randn(48)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    results = []
    for count in (1, 3):
        with threads(count):
            out, _ = depthwise(*leaves, 2, 2)
            results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    assert all(map(torch.equal, *results))


def test_wrong_arguments():
    x, weight, bias = torch.randn(1, 8, 4, 4), torch.randn(4, 1, 3, 3), torch.randn(4)
    for arguments, said in (
        ((x[0], weight, bias, 1, 1), r"x must have shape \[B, C, H, W\]"),
        ((x, weight[:3], bias, 1, 1), "3 filters, which must divide the 8 channels"),
        ((x, weight[:, :, :2], bias, 1, 1), "weight must have shape"),
        ((x, weight.double(), bias, 1, 1), "weight must have the dtype of x"),
        ((x.half(), weight.half(), bias.half(), 1, 1), "x must be float32 or float64"),
        ((x, weight, bias[:2], 1, 1), "bias must have shape"),
        ((x, weight, bias, 0, 1), "stride must be positive"),
        ((x, torch.randn(4, 1, 7, 7), bias, 1, 1), "smaller than the filters' 7"),
    ):
        with pytest.raises(RuntimeError, match=said):
            depthwise(*arguments)


def layer(**changes):
    arguments = {
        "q_size": (14, 14), "kv_size": (7, 7), "n_heads": 4, "n_head_channels": 8, "n_groups": 2,
        "attn_drop": 0.0, "proj_drop": 0.0, "stride": 2, "offset_range_factor": 2.0,
        "use_pe": True, "dwc_pe": False, "no_off": False, "fixed_pe": False, "ksize": 5,
    }  # fmt: skip
    return DAttention(**(arguments | changes))


def test_the_usual_network_is_computed_natively():
    made, q = layer(), torch.randn(2, 32, 14, 14, requires_grad=True)
    assert is_usual(made.conv_offset, q)
    leaves = [q, *made.conv_offset.parameters()]
    found, same = offsets(made.conv_offset, q)
    right = made.conv_offset(q.reshape(4, 16, 14, 14))
    grad = torch.randn_like(right)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(same, q)
    for a, b in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(right, leaves, grad),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_networks_that_are_not_usual():
    q = torch.randn(1, 32, 14, 14)
    assert not is_usual(layer().conv_offset, q.bfloat16())
    with torch.autocast("cpu"):
        assert not is_usual(layer().conv_offset, q)
    hooked = layer()
    hooked.conv_offset[0].register_forward_hook(lambda *args: None)
    assert not is_usual(hooked.conv_offset, q)
    for index, other in (
        (0, torch.nn.Conv2d(16, 16, 5, 2, 2)),
        (0, torch.nn.Conv2d(16, 16, (5, 3), 2, (2, 1), groups=16)),
        (0, torch.nn.Conv2d(16, 16, 5, 2, 2, groups=16, bias=False)),
        (0, torch.nn.Conv2d(16, 16, 3, 2, 2, dilation=2, groups=16)),
        (0, torch.nn.Conv2d(16, 16, 5, 2, 2, groups=16, padding_mode="circular")),
        (0, torch.nn.Sequential(torch.nn.Conv2d(16, 16, 5, 2, 2, groups=16))),
        (3, torch.nn.Conv2d(16, 2, 3, 1, 1, bias=False)),
        (3, torch.nn.Identity()),
    ):
        made = layer()
        made.conv_offset[index] = other
        assert not is_usual(made.conv_offset, q), other


@pytest.mark.parametrize(
    ("index", "other"),
    (
        (1, torch.nn.GroupNorm(2, 16)),
        (2, torch.nn.ReLU()),
        (2, torch.nn.GELU(approximate="tanh")),
        (3, torch.nn.Conv2d(16, 2, 1)),
        (3, torch.nn.Conv2d(16, 3, 1, bias=False)),
        ("norm", torch.nn.LayerNorm(16, elementwise_affine=False)),
        ("norm", torch.nn.LayerNorm(16, bias=False)),
        ("hook", None),
    ),
    ids=str,
)
def test_what_is_behind_the_convolution_is_called_where_it_is_not_usual(index, other):
    network, q = layer().conv_offset, torch.randn(2, 32, 14, 14)
    if index == "norm":
        network[1].norm = other
    elif index == "hook":
        network[2].register_forward_hook(lambda module, inputs, result: 2 * result)
    else:
        network[index] = other
    assert is_usual(network, q)
    with torch.no_grad():
        right = network(q.reshape(4, 16, 14, 14))
        torch.testing.assert_close(offsets(network, q)[0], right, rtol=1e-4, atol=1e-5)


def test_a_replaced_convolution_is_called():
    made, x = layer(), torch.randn(2, 32, 14, 14)
    made.conv_offset[0] = torch.nn.Conv2d(16, 16, 5, 2, 2)
    with torch.no_grad(), dat_cuda.backend("reference"):
        right = made(x)[0]
    with torch.no_grad():
        torch.testing.assert_close(made(x)[0], right, rtol=1e-4, atol=1e-5)


def formula(features, norm_weight, norm_bias, weight, eps):
    """offset_head in plain PyTorch."""
    normal = F.layer_norm(features, features.shape[-1:], norm_weight, norm_bias, eps)
    return F.linear(F.gelu(normal), weight).permute(0, 3, 1, 2)


HEADS = pairwise(
    dtype=(torch.float64, torch.float32),
    channels=(1, 5, 16, 40, 64, 96, 128, 200),
    size=((1, 1), (7, 7), (13, 17), (1, 33)),
    images=(0, 1, 6),
    threads=(1, 2, 3),
)


@pytest.mark.parametrize("case", HEADS, ids=describe)
def test_offset_head(case):
    channels, dtype, eps = case["channels"], case["dtype"], 0.5
    shapes = ((case["images"], *case["size"], channels), (channels,), (channels,), (2, channels))
    exact = [
        (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).double().requires_grad_()
        for shape in shapes
    ]
    found = [t.detach().to(dtype).requires_grad_() for t in exact]

    right = formula(*exact, eps)
    plain = [t.detach().to(dtype).requires_grad_() for t in exact]
    expected = formula(*plain, eps)
    grad = torch.randn_like(right).to(dtype)
    with threads(case["threads"]):
        out = offset_head(*found, eps)
        results = out, *torch.autograd.grad(out, found, grad)
    assert out.is_contiguous()
    same_dtype = expected, *torch.autograd.grad(expected, plain, grad)
    rights = right, *torch.autograd.grad(right, exact, grad.double())
    # Parameters' gradients are sums over rows; of channels that are alike, what arrives cancels.
    rounding = (8 + math.prod(shapes[0][:3]) ** 0.5) * torch.finfo(dtype).eps
    arriving = max(1, *(float(t.detach().abs().amax()) for t in exact[1::2])) ** 2
    names = "offset", "features", "norm_weight", "norm_bias", "weight"
    for name, result, like, wanted in zip(names, results, same_dtype, rights, strict=True):
        assert result.dtype == dtype and result.shape == wanted.shape, name
        if wanted.numel() == 0:
            continue
        cancels = name in ("features", "norm_weight")
        scale = wanted.abs().max().clamp(min=arriving if cancels else 1)
        error = (result.double() - wanted).abs().max() / scale
        allowed = 2 * (like.double() - wanted).abs().max() / scale + rounding
        assert error <= allowed, (name, error, allowed)


def test_gelu_keeps_its_digits_in_the_tails():
    # Of two channels x and -x the norm leaves about +-1, so the parameters make the argument of
    # GELU: norm_weight 0 and norm_bias the argument.
    x = torch.cat((torch.linspace(-12, 12, 241), torch.tensor([-1e30, 1e30])))
    for value in x.tolist():
        bias = torch.tensor([value, 0.0])
        out = offset_head(
            torch.randn(1, 1, 1, 2), torch.zeros(2), bias, torch.tensor([[1.0, 0], [0, 0]]), 1e-5
        )
        right = value * math.erfc(-value / math.sqrt(2)) / 2
        assert abs(out[0, 0, 0, 0] - right) <= 1e-5 * abs(right) + 1e-37, value


def test_the_offset_head_spreads_nan_within_its_row():
    features = torch.randn(1, 2, 2, 16)
    features[0, 1, 0, 3] = torch.nan
    out = offset_head(features, torch.ones(16), torch.zeros(16), torch.randn(2, 16), 1e-5)
    assert out.isnan().nonzero().tolist() == [[0, 0, 1, 0], [0, 1, 1, 0]]


def test_wrong_arguments_of_the_offset_head():
    features, norm, weight = torch.randn(2, 3, 3, 8), torch.randn(8), torch.randn(2, 8)
    for arguments, said in (
        ((features[0], norm, norm, weight), r"features must have shape \[images, Hk, Wk, C\]"),
        ((features, norm[:4], norm, weight), "norm_weight must have shape"),
        ((features, norm, norm[:4], weight), "norm_bias must have shape"),
        ((features, norm, norm, weight[:1]), "weight must have shape"),
        ((features, norm.double(), norm, weight), "norm_weight must have the dtype of features"),
        ((features.half(), norm.half(), norm.half(), weight.half()), "features must be float32 or"),
        ((features.transpose(1, 2), norm, norm, weight), "features must be contiguous"),
        ((features[..., :0], norm[:0], norm[:0], weight[:, :0]), "C of features"),
    ):
        with pytest.raises(RuntimeError, match=said):
            offset_head(*arguments, 1e-5)
