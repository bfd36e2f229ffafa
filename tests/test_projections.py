"""Projections over channels on the CPU, and the transposition that they do with maps."""

import pytest
import torch
import torch.nn.functional as F
from operator_cases import pairwise, poisoned_memory, threads
from test_offsets import laid_out as in_layout
from torch.utils.flop_counter import FlopCounterMode

from dat_cuda import projections
from dat_cuda.projections import has_few_pixels, is_channels_last, laid_out, project

CASES = pairwise(
    dtype=(torch.float64, torch.float32),
    # Products for oneDNN, at 128 channels and more, and smaller ones.
    channels=((3, 5), (40, 17), (128, 144), (192, 130)),
    size=((1, 1), (7, 7), (4, 5), (9, 13), (10,), (14, 14)),
    batch=(1, 2, 3),
    layout=("contiguous", "channels_last", "sliced"),
    asks_for_channels_last=(False, True),
    layer=(torch.nn.Conv2d, torch.nn.Linear),
    grad=("contiguous", "channels_last", "expanded"),
    threads=(1, 2, 3),
)


def describe(case):
    return "-".join(str(getattr(value, "__name__", value)) for value in case.values())


def in_memory(x, layout):
    return in_layout(x.unsqueeze(2), layout).squeeze(2) if x.dim() == 3 else in_layout(x, layout)


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_project(case):
    inputs, outputs = case["channels"]
    dtype, size = case["dtype"], case["size"]
    kernel = (1, 1) if case["layer"] is torch.nn.Conv2d else ()
    exact = [
        torch.randn(shape, dtype=torch.float64).to(dtype).double().requires_grad_()
        for shape in ((case["batch"], inputs, *size), (outputs, inputs, *kernel), (outputs,))
    ]
    right = torch.einsum("bi...,oi->bo...", exact[0], exact[1].flatten(1))
    right = right + exact[2].view(-1, *[1] * len(size))

    layer = case["layer"](inputs, outputs, *kernel[:1]).to(dtype)
    with torch.no_grad():
        for parameter, value in zip((layer.weight, layer.bias), exact[1:], strict=True):
            parameter.copy_(value)
    x = in_memory(exact[0].detach().to(dtype), case["layout"]).requires_grad_()
    grad = torch.randn(right.shape, dtype=dtype)
    if case["grad"] == "expanded":
        grad = grad.flatten()[0].expand(right.shape)
    else:
        grad = in_memory(grad, case["grad"])
    with threads(case["threads"]):
        y = project(layer, x, case["asks_for_channels_last"])
        grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)
        with torch.no_grad():
            assert torch.equal(project(layer, x, case["asks_for_channels_last"]), y)
    rights = right, *torch.autograd.grad(right, exact, grad.double())
    pixels = right.numel() / outputs
    terms = inputs, outputs, pixels, pixels  # in a sum, each about 1
    for count, result, wanted in zip(terms, (y, *grads), rights, strict=True):
        assert result.dtype == dtype and result.shape == wanted.shape
        scale = wanted.abs().max().clamp(min=count**0.5)
        assert (result.double() - wanted).abs().max() / scale < 20 * torch.finfo(dtype).eps
    assert not has_few_pixels(x) or y.movedim(1, -1).is_contiguous()
    assert is_channels_last(y) or y.is_contiguous()


@pytest.mark.parametrize("wanted", ((0,), (1,), (2,), (0, 2), (1, 2)), ids=str)
@pytest.mark.parametrize("pixels", (49, 196))
def test_only_the_gradients_that_are_wanted(wanted, pixels):
    layer, x = torch.nn.Conv2d(160, 160, 1), torch.randn(2, 160, 1, pixels)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate((x, layer.weight, layer.bias))]
    project(layer, x).sum().backward()
    found = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    layer(x).sum().backward()
    for index, (t, got) in enumerate(zip(leaves, found, strict=True)):
        assert (got is not None) == (index in wanted)
        if got is not None:
            torch.testing.assert_close(got, t.grad, rtol=1e-4, atol=1e-4)


def count_of_onednn(monkeypatch, layer, x, backward=True):
    calls = []
    operator = projections._onednn
    monkeypatch.setattr(projections, "_onednn", lambda *a: calls.append(a) or operator(*a))
    y = project(layer, x)
    if backward:
        y.sum().backward()
    return len(calls)


@pytest.mark.skipif(projections._onednn is None, reason="oneDNN serves AVX2 and AVX-512 here")
def test_who_multiplies(monkeypatch):
    layer, x = torch.nn.Conv2d(160, 160, 1), torch.randn(2, 160, 7, 7, requires_grad=True)

    def count(*arguments, **options):
        with monkeypatch.context() as patch:
            return count_of_onednn(patch, *arguments, **options)

    assert count(layer, x) == 3
    assert count(layer, x.detach()[:, :, :2, :2].requires_grad_()) == 0  # too small
    assert count(layer, torch.randn(2, 160, 14, 14)) == 0  # too many pixels
    assert count(layer.double(), x.double()) == 0
    layer.float()
    with torch.backends.mkldnn.flags(enabled=False):
        assert count(layer, x) == 0
    with torch.autocast("cpu"):
        assert count(layer, x) == 0
    with torch.no_grad():
        assert count(layer, x, backward=False) == 1
        with torch.autocast("cpu"):
            assert count(layer, x, backward=False) == 0
            assert project(layer, x).dtype == torch.bfloat16


@pytest.mark.parametrize("pixels", (5, 60))
def test_autocast_has_gradients(pixels):
    layer, x = torch.nn.Conv2d(40, 40, 1), torch.randn(2, 40, 1, pixels, requires_grad=True)
    leaves = x, layer.weight, layer.bias
    with torch.autocast("cpu"):
        y, right = project(layer, x), layer(x)
    assert y.dtype == torch.bfloat16
    grad = torch.randn(y.shape, dtype=torch.bfloat16)
    found = torch.autograd.grad(y, leaves, grad)
    for got, wanted in zip(found, torch.autograd.grad(right, leaves, grad), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("pixels", (5, 60))
def test_half_precision(dtype, pixels):
    layer, x = torch.nn.Conv2d(40, 40, 1).to(dtype), torch.randn(2, 40, 1, pixels, dtype=dtype)
    leaves = x.requires_grad_(), layer.weight, layer.bias
    y, right = project(layer, x), layer(x)
    grad = torch.randn_like(y)
    found = y, *torch.autograd.grad(y, leaves, grad)
    rights = right, *torch.autograd.grad(right, leaves, grad)
    for got, wanted in zip(found, rights, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("pixels", (4, 40))
def test_no_images(pixels):
    layer, x = torch.nn.Conv2d(16, 8, 1), torch.randn(0, 16, 1, pixels, requires_grad=True)
    y = project(layer, x)
    assert y.shape == (0, 8, 1, pixels)
    grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), torch.ones_like(y))
    assert [g.shape for g in grads] == [x.shape, layer.weight.shape, layer.bias.shape]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("batch", (1, 2))
def test_pixels_between_the_channels_out_and_in(batch):
    layer, x = torch.nn.Conv2d(40, 17, 1), torch.randn(batch, 40, 1, 20)
    project(layer, x).sum().backward()  # an expanded gradient
    torch.testing.assert_close(layer.bias.grad, torch.full((17,), 20.0 * batch))
    wanted = x.sum((0, 2, 3)).expand(17, -1).view_as(layer.weight)
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", (0, 2))
def test_a_bias_with_gaps(stride):
    layer, x = torch.nn.Conv2d(160, 160, 1), torch.randn(3, 160, 7, 7)
    layer.bias = torch.nn.Parameter(torch.randn(320).as_strided((160,), (stride,)))
    with torch.no_grad():
        torch.testing.assert_close(project(layer, x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", (torch.nn.Conv2d, torch.nn.Linear))
def test_what_autocast_keeps_has_gradients(kind):
    layer = kind(160, 160, *([1] if kind is torch.nn.Conv2d else []))
    x = torch.randn(2, 160, 7, 7)
    with torch.autocast("cpu"):
        with torch.no_grad():
            project(layer, x)
        project(layer, x).sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None


def test_only_what_the_gradients_need_is_kept():
    frozen = torch.nn.Conv2d(16, 16, 1).requires_grad_(False)
    x = torch.randn(2, 16, 2, 2, requires_grad=True) * 1
    y = project(frozen, x)
    x += y  # none of the gradients needs it
    x.sum().backward()
    layer = torch.nn.Conv2d(16, 16, 1)
    y = project(layer, torch.randn(2, 16, 2, 2))
    with torch.no_grad():
        layer.weight += 1
    y.sum().backward()


def test_what_watches_sees_operators_of_torch():
    layer, x = torch.nn.Conv2d(160, 160, 1), torch.randn(2, 160, 7, 7)
    with FlopCounterMode(display=False) as counter:
        project(layer, x).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 2 * 49 * 160 * 160  # forward, and of the weight
    layer.requires_grad_(False)
    traced = torch.jit.trace(lambda x: project(layer, x), x)
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("pixels", (4, 40))
def test_results_may_be_changed_in_place(pixels, channels_last):
    layer, x = torch.nn.Conv2d(16, 16, 1), torch.randn(2, 16, 1, pixels, requires_grad=True)
    project(layer, x, channels_last).mul_(2).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(2 * layer(x).sum(), x)[0])


def test_layers_that_are_not_plain_are_called():
    x = torch.randn(1, 16, 2, 2)
    hooked, without_bias = torch.nn.Conv2d(16, 8, 1), torch.nn.Conv2d(16, 8, 1, bias=False)
    hooked.register_forward_hook(lambda module, inputs, result: 2 * result)
    for layer in (hooked, without_bias, torch.nn.Sequential(torch.nn.Conv2d(16, 8, 1))):
        torch.testing.assert_close(project(layer, x), layer(x))

    class Scaled(torch.Tensor):
        """A weight with a meaning of its own, as quantized ones have."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is F.conv2d:
                return super().__torch_function__(func, types, args, kwargs) * 3
            return super().__torch_function__(func, types, args, kwargs)

    layer = torch.nn.Conv2d(16, 8, 1)
    right = 3 * layer(x)
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Scaled))
    torch.testing.assert_close(torch.Tensor(project(layer, x).detach()), right.detach())


TRANSPOSED = pairwise(
    dtype=(torch.float64, torch.float32),
    batch=(1, 2, 5),
    rows=(1, 7, 16, 49, 130),
    columns=(1, 5, 16, 64, 65, 150),
    gap=(0, 3),
    threads=(1, 2, 3),
)


@pytest.mark.parametrize("case", TRANSPOSED, ids=describe)
def test_transpose(case):
    shape = case["batch"], case["rows"], case["columns"] + case["gap"]
    x = torch.randn(shape, dtype=case["dtype"])[..., : case["columns"]]
    x[0, 0, 0], x[-1, -1, -1] = -torch.inf, torch.inf
    with threads(case["threads"]), poisoned_memory():
        out = torch.ops.dat_cuda.transpose(x)
    assert out.is_contiguous()
    assert torch.equal(out, x.transpose(1, 2))
    torch.library.opcheck(
        torch.ops.dat_cuda.transpose.default, (x,), test_utils=("test_schema", "test_faketensor")
    )


def test_wrong_arguments_of_transpose():
    x = torch.randn(2, 3, 4)
    for argument, said in (
        (x[0], r"x must have shape \[B, R, C\]"),
        (x.half(), "x must be float32 or float64, got float16"),
        (x.transpose(1, 2), "x must have the elements of a row side by side, got stride 4"),
        (torch.empty(1).expand(1, 2**31, 1), "fewer than 2\\^31 rows"),
    ):
        with pytest.raises(RuntimeError, match=said):
            torch.ops.dat_cuda.transpose(argument)
    assert torch.ops.dat_cuda.transpose(x[:, :0]).shape == (2, 4, 0)


def test_the_layout_of_a_map():
    planes = torch.randn(2, 16, 3, 3, requires_grad=True)
    rows = laid_out(planes)
    assert torch.equal(rows, planes) and rows.movedim(1, -1).is_contiguous()
    assert laid_out(rows) is rows
    many = torch.randn(2, 4, 3, 3)
    assert laid_out(many) is many
    grad = torch.randn(2, 16, 3, 3)
    assert torch.equal(torch.autograd.grad(rows, planes, grad)[0], grad)
