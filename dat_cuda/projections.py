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

from .functional import (
    first_derivative_only,
    has_cpu_ways,
    is_autocast,
    run_below_autograd,
)

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
    bias = cast(Tensor, layer.bias)
    if torch.is_grad_enabled() and not is_autocast(x):
        return _Projection.apply(x, layer.weight, bias, channels_last)
    return run_below_autograd(product, laid_out(x), layer.weight, bias, channels_last)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, channels_last: bool) -> Tensor:
        x = laid_out(x)
        ctx.save_for_backward(x, weight)
        # What is returned must not be a view: a dropout may work in place.
        return run_below_autograd(product, x, weight, bias, channels_last)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return *run_below_autograd(product_backward, grad, x, weight, wanted), None


def product(x: Tensor, weight: Tensor, bias: Tensor, channels_last: bool) -> Tensor:
    """The projection of a map that is laid out."""
    weight = weight.flatten(1)
    if has_few_pixels(x):
        return _as_map(_linear(_as_rows(x), weight, bias), x)
    flat, weight = x.flatten(2), weight.expand(len(x), -1, -1)
    if channels_last:
        y = torch.baddbmm(bias, flat.transpose(1, 2), weight.transpose(1, 2)).transpose(1, 2)
    else:
        y = torch.baddbmm(bias.unsqueeze(1), weight, flat)
    return y.unflatten(2, x.shape[2:])


def product_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple) -> tuple:
    """The gradients that are wanted of x, which is laid out, weight and bias, None for others."""
    grad_x = grad_weight = grad_bias = None
    matrix, flat = weight.flatten(1), grad.flatten(2)
    if has_few_pixels(x):
        grad_rows = _as_rows(laid_out(grad))
        if wanted[0]:
            grad_x = _as_map(_linear(grad_rows, matrix.t()), x)
        if wanted[1]:
            # In rows of pixels: oneDNN is slow where a first factor lies by columns.
            in_rows = flat.stride(2) == 1
            columns = flat.transpose(0, 1).flatten(1) if in_rows else _transposed(grad_rows)
            grad_weight = _linear(columns, _as_rows(x).t())
    else:
        matrix = matrix.expand(len(x), -1, -1)
        if wanted[0] and is_channels_last(grad):
            grad_x = torch.bmm(flat.transpose(1, 2), matrix).transpose(1, 2).view(x.shape)
        elif wanted[0]:
            grad_x = torch.bmm(matrix.transpose(1, 2), flat).view(x.shape)
        if wanted[1]:
            grad_weight = torch.bmm(flat, x.flatten(2).transpose(1, 2)).sum(0)
    if wanted[2]:
        grad_bias = flat.sum((0, 2))
    return grad_x, None if grad_weight is None else grad_weight.view_as(weight), grad_bias


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
        or torch.is_grad_enabled()
        or is_autocast(rows)
        or not torch.backends.mkldnn.enabled
    ):
        return F.linear(rows, weight, bias)
    return _onednn(rows, weight, bias, "none", [], "")


def laid_out(x: Tensor) -> Tensor:
    """A map [B, C, H, W] or [B, C, N] as projections want it: channels-last if of few pixels."""
    if not has_few_pixels(x) or x.movedim(1, -1).is_contiguous():
        return x
    return _LaidOut.apply(x) if torch.is_grad_enabled() else run_below_autograd(_lay_out, x)


class _LaidOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return run_below_autograd(_lay_out, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _lay_out(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    if flat.stride(2) == 1 and x.dtype in (torch.float32, torch.float64):
        return _as_map(_ops.transpose(flat), x)
    return _as_map(flat.transpose(1, 2).contiguous(), x)


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
    return rows.view(len(like), *like.shape[2:], rows.shape[-1]).movedim(-1, 1)


def _transposed(x: Tensor) -> Tensor:
    if x.dtype in (torch.float32, torch.float64):
        return _ops.transpose(x.unsqueeze(0)).squeeze(0)
    return x.t().contiguous()


@torch.library.register_fake("dat_cuda::transpose")
def _(x):
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1]))


def is_plain(layer: nn.Module) -> bool:
    """Whether calling it does nothing but its product: users replace and hook modules."""
    return (
        type(layer) in (nn.Conv2d, nn.Linear)
        and layer.bias is not None
        and type(layer.weight) in (Tensor, nn.Parameter)
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
