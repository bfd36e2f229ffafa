"""The offset network of DAttention, as native CPU kernels deserve."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._autograd import first_derivative_only
from .functional import is_autocast
from .projections import is_hooked

_ops = torch.ops.dat_cuda


class LayerNormProxy(nn.Module):
    """LayerNorm over the channels of [B, C, H, W]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution of the groups of x [B, C, H, W], each an image of its own, on the CPU.

        out[b G + g, c, i, j] = bias[c] + sum over u, v of
            weight[c, 0, u, v] x[b, g C / G + c, i stride + u - padding, j stride + v - padding]

    Zeros are around x, which has any strides; float32 or float64. weight is [C / G, 1, K, K], bias
    [C / G], out [B G, C / G, Hk, Wk] in channels-last memory. Differentiable in the three tensors.

    Returns out, and x for whoever uses it, too: gradients that come through this one are added to
    in the place of another pass over the map.
    """
    if not torch.is_grad_enabled():
        return _ops.depthwise_forward(x, weight, bias, stride, padding), x
    return _Depthwise.apply(x, weight, bias, stride, padding)


@torch.library.register_fake("dat_cuda::depthwise_forward")
def _(x, weight, bias, stride, padding):
    filters, _, _, kernel = weight.shape
    height, width = ((size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:])
    images = x.shape[0] * x.shape[1] // filters
    return x.new_empty((images, height, width, filters)).permute(0, 3, 1, 2)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *settings: int) -> tuple:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return _ops.depthwise_forward(x, weight, bias, *settings), x

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, more: Tensor | None) -> tuple:
        if grad is None:
            return more, None, None, None, None
        x, weight = ctx.saved_tensors
        return (*_ops.depthwise_backward(grad, more, x, weight, *ctx.settings), None, None)


def offset_head(
    features: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """What makes offsets of a depthwise convolution's features [B G, Hk, Wk, C / G], on the CPU.

        offset[b, i] = sum over c of weight[i, c] GELU(LayerNorm(features)[b, .., c])

    All are contiguous, float32 or float64; norm_weight and norm_bias are the norm's [C / G], weight
    is [2, C / G], offset [B G, 2, Hk, Wk]. Differentiable in the four tensors; the backward makes
    the norm and GELU again.
    """
    if not torch.is_grad_enabled():
        return _ops.offset_head_forward(features, norm_weight, norm_bias, weight, eps)
    return _OffsetHead.apply(features, norm_weight, norm_bias, weight, eps)


@torch.library.register_fake("dat_cuda::offset_head_forward")
def _(features, norm_weight, norm_bias, weight, eps):
    images, height, width, _ = features.shape
    return features.new_empty((images, 2, height, width))


class _OffsetHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)
        return _ops.offset_head_forward(*inputs)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return (*_ops.offset_head_backward(grad, *ctx.saved_tensors, ctx.eps), None)


def is_usual(network: nn.Module, q: Tensor) -> bool:
    """Whether `offsets` gives what this network would: users replace and hook modules."""
    if type(network) is not nn.Sequential or len(network) != 4 or is_hooked(network):
        return False
    first, last = cast(Any, network[0]), cast(Any, network[3])
    if not (_is_plain(first, q) and _is_plain(last, q)) or is_autocast(q):
        return False
    square = all(a == b for a, b in (first.kernel_size, first.stride, first.padding))
    depthwise = first.groups == first.in_channels == first.out_channels
    pointwise = (last.kernel_size, last.stride, last.padding) == ((1, 1), (1, 1), (0, 0))
    return square and depthwise and pointwise and first.bias is not None and last.groups == 1


def _is_plain(layer: Any, q: Tensor) -> bool:
    return (
        type(layer) is nn.Conv2d
        and layer.weight.dtype == q.dtype
        and q.dtype in (torch.float32, torch.float64)
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and isinstance(layer.padding, tuple)
        and not is_hooked(layer)
    )


def offsets(network: nn.Sequential, q: Tensor) -> tuple[Tensor, Tensor]:
    """network(each group of q [B, C, H, W]) [B G, 2, Hk, Wk], of a usual network, on the CPU; and
    q, as `depthwise` returns it."""
    first, norm, activation, last = cast(Any, network)
    weight = first.weight.contiguous()
    features, q = depthwise(q, weight, first.bias, first.stride[0], first.padding[0])
    if _is_usual_head(norm, activation, last):
        rows, plain = features.permute(0, 2, 3, 1), norm.norm
        return offset_head(rows, plain.weight, plain.bias, last.weight.flatten(1), plain.eps), q
    rows = activation(norm(features)).permute(0, 2, 3, 1)
    return F.linear(rows, last.weight.flatten(1), last.bias).permute(0, 3, 1, 2), q


def _is_usual_head(norm: Any, activation: Any, last: Any) -> bool:
    """Whether `offset_head` is what these, of a usual network, give."""
    if type(norm) is not LayerNormProxy or type(activation) is not nn.GELU:
        return False
    plain = norm.norm
    if any(map(is_hooked, (norm, plain, activation))) or type(plain) is not nn.LayerNorm:
        return False
    affine = plain.normalized_shape == (last.in_channels,) and plain.bias is not None
    same_dtype = affine and plain.weight.dtype == plain.bias.dtype == last.weight.dtype
    plain_last = last.bias is None and last.out_channels == 2
    return same_dtype and plain_last and activation.approximate == "none"
