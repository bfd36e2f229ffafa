"""1x1 convolutions and linear layers over the channels of maps, as native CPU kernels deserve.

Where a map has fewer pixels than channels they are products of rows, a row of channels for each
pixel of all images: then the weight gradient is one product, too. Such maps are channels-last in
memory, others as they come.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._autograd import first_derivative_only, run_below_autograd
from .functional import has_cpu_ways, is_autocast

_ops = torch.ops.dat_cuda
_onednn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    else None
)
FEW = 2**21  # multiply-adds: a call of oneDNN costs 10 microseconds more than one of torch.mm


def project(layer: nn.Conv2d | nn.Linear, x: Tensor, channels_last: bool = False) -> Tensor:
    """1x1 convolution, or linear layer, over the channels of x [B, C, H, W] or [B, C, N].

    Beside native CPU kernels a plain layer is a matrix product, which is up to 4 times faster there
    than the convolution (docs/benchmarks.md). Its result is in channels-first memory, as the
    kernels like it, or in channels-last memory if asked for or if there are fewer pixels than
    channels.
    """
    if not has_cpu_ways(x) or not is_plain(layer):
        if isinstance(layer, nn.Linear):
            return layer(x.movedim(1, -1)).movedim(-1, 1)
        return layer(x) if x.dim() == 4 else layer(x.unsqueeze(2)).squeeze(2)
    x, weight, bias = laid_out(x), layer.weight, cast(Tensor, layer.bias)
    if is_autocast(x) or _is_watched():  # autocast keeps what it casts, for calls with gradients
        return _product(x, weight, bias, channels_last)
    if torch.is_grad_enabled():
        return _Projection.apply(x, weight, bias, channels_last)
    return run_below_autograd(_product, x, weight, bias, channels_last)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, channels_last: bool) -> Tensor:
        wants_x, wants_weight, ctx.wants_bias, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        ctx.few_pixels, ctx.weight_shape = has_few_pixels(x), weight.shape
        # What is returned must not be a view: a dropout may work in place.
        return run_below_autograd(_product, x, weight, bias, channels_last)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple:
        backward = _product_of_rows_backward if ctx.few_pixels else _product_backward
        grad_x, grad_weight = run_below_autograd(backward, grad, *ctx.saved_tensors)
        if grad_weight is not None:
            grad_weight = grad_weight.view(ctx.weight_shape)
        grad_bias = grad.flatten(2).sum((0, 2)) if ctx.wants_bias else None
        return grad_x, grad_weight, grad_bias, None


def _product(x: Tensor, weight: Tensor, bias: Tensor, channels_last: bool) -> Tensor:
    """The projection of a map that is laid out."""
    weight = weight.flatten(1)
    if has_few_pixels(x):
        return _as_map(_linear(_as_rows(x), weight, bias), x)
    flat, weight = x.flatten(2), weight.expand(x.shape[0], -1, -1)
    if channels_last:
        y = torch.baddbmm(bias, flat.transpose(1, 2), weight.transpose(1, 2)).transpose(1, 2)
    else:
        y = torch.baddbmm(bias.unsqueeze(1), weight, flat)
    return y.unflatten(2, x.shape[2:])


Gradients = tuple[Tensor | None, Tensor | None]


def _product_backward(grad: Tensor, x: Tensor | None, weight: Tensor | None) -> Gradients:
    """The gradients of x, if weight is given, and of weight [O, I], if x is."""
    grad_x = grad_weight = None
    flat = grad.flatten(2)
    if weight is not None:
        matrix = weight.flatten(1).expand(grad.shape[0], -1, -1)
        if is_channels_last(grad):
            grad_x = torch.bmm(flat.transpose(1, 2), matrix).transpose(1, 2)
        else:
            grad_x = torch.bmm(matrix.transpose(1, 2), flat)
        grad_x = grad_x.unflatten(2, grad.shape[2:])
    if x is not None:
        grad_weight = torch.bmm(flat, x.flatten(2).transpose(1, 2)).sum(0)
    return grad_x, grad_weight


def _product_of_rows_backward(grad: Tensor, x: Tensor | None, weight: Tensor | None) -> Gradients:
    """The same, of maps of few pixels."""
    grad_x = grad_weight = None
    rows = _as_rows(grad if _is_in_rows(grad) else _in_rows(grad))
    if weight is not None:
        grad_x = _as_map(_linear(rows, weight.flatten(1).t()), grad)
    if x is not None:
        # oneDNN is slow where its first factor lies by columns.
        grad_weight = _linear(_transposed(rows), _as_rows(x).t())
    return grad_x, grad_weight


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [M, I] weight^T [I, O] + bias [O]

    In float32 by oneDNN, which torch itself asks only from compiled code and for 16-bit features:
    up to a fifth faster than torch.mm (docs/cpu-kernels.md).
    """
    if (
        _onednn is None
        or rows.dtype != torch.float32
        or weight.dtype != torch.float32
        or (bias is not None and bias.dtype != torch.float32)
        or rows.numel() * len(weight) < FEW
        or is_autocast(rows)
        or not torch.backends.mkldnn.enabled
        or _is_watched()
    ):
        return F.linear(rows, weight, bias)
    if bias is not None:
        bias = bias.contiguous()  # oneDNN reads no strides of it
    return _onednn(rows, weight, bias, "none", [], "")


def _is_watched() -> bool:
    """Whether something that should see torch's own operators traces or counts them."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch.jit.is_tracing()


def laid_out(x: Tensor) -> Tensor:
    """A map [B, C, H, W] or [B, C, N] as projections beside native CPU kernels want it:
    channels-last if it has few pixels."""
    if not has_cpu_ways(x) or not has_few_pixels(x) or _is_in_rows(x):
        return x
    if _is_watched():
        return _in_rows(x)
    return _InRows.apply(x) if torch.is_grad_enabled() else run_below_autograd(_in_rows, x)


class _InRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return run_below_autograd(_in_rows, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _is_in_rows(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def _in_rows(x: Tensor) -> Tensor:
    """A copy of a map in channels-last memory."""
    return _as_map(_transposed(x.flatten(2)), x)


def has_few_pixels(x: Tensor) -> bool:
    """Whether a map [B, C, H, W] or [B, C, N] has fewer pixels than channels."""
    return x.shape[2:].numel() < x.shape[1]


def is_channels_last(x: Tensor) -> bool:
    """Whether neighbours in memory are channels of x [B, C, H, W]."""
    return x.stride(1) == 1 and x.shape[1] > 1


def _as_rows(x: Tensor) -> Tensor:
    """A map in channels-last memory as [B N, C]; a view."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _as_map(rows: Tensor, like: Tensor) -> Tensor:
    """[B N, C] or [B, N, C] as a map of as many pixels as another has; a view."""
    return rows.view(like.shape[0], *like.shape[2:], rows.shape[-1]).movedim(-1, 1)


def _transposed(x: Tensor) -> Tensor:
    """A contiguous copy of [R, C] as [C, R], or of [B, R, C] as [B, C, R]."""
    if x.dtype not in (torch.float32, torch.float64) or x.stride(-1) != 1 or _is_watched():
        return x.transpose(-2, -1).contiguous()
    return _ops.transpose(x) if x.dim() == 3 else _ops.transpose(x.unsqueeze(0)).squeeze(0)


@torch.library.register_fake("dat_cuda::transpose")
def _(x):
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1]))


def is_plain(layer: nn.Module) -> bool:
    """Whether calling it does nothing but its product: users replace and hook modules."""
    return (
        type(layer) in (nn.Conv2d, nn.Linear)
        and all(type(t) in (Tensor, nn.Parameter) for t in (layer.weight, layer.bias))
        and not is_hooked(layer)
    )


def is_hooked(layer: nn.Module) -> bool:
    return any(
        (
            layer._forward_hooks,
            layer._forward_pre_hooks,
            layer._backward_hooks,
            layer._backward_pre_hooks,
        )
    )
