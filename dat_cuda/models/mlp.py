"""The MLPs of the blocks. Large ones run in pieces on the CPU: see docs/models.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dat_cuda.attention import has_cpu_ways, is_plain
from dat_cuda.functional import is_autocast

LARGE = 2**24  # bytes of hidden values


class TransformerMLP(nn.Module):
    """Linear, GELU, Linear over the channels of x [B, channels, H, W], `expansion` times wider
    between; `drop` is the dropout after each."""

    def __init__(self, channels: int, expansion: int, drop: float = 0.0) -> None:
        super().__init__()
        self.hidden = channels * expansion
        self.chunk: Any = nn.Sequential()
        self.chunk.add_module("linear1", nn.Linear(channels, channels * expansion))
        self.chunk.add_module("act", nn.GELU())
        self.chunk.add_module("drop1", nn.Dropout(drop, inplace=True))
        self.chunk.add_module("linear2", nn.Linear(channels * expansion, channels))
        self.chunk.add_module("drop2", nn.Dropout(drop, inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        is_large = x[..., 0].numel() * self.hidden * x.element_size() > LARGE
        y = self._in_pieces(x) if is_large and self._is_plain(x) else self.chunk(x)
        return y.permute(0, 3, 1, 2)

    def _is_plain(self, x: Tensor) -> bool:
        linear1, act, *drops, linear2 = (self.chunk[i] for i in (0, 1, 2, 4, 3))
        is_dropped = any(drop.training and drop.p > 0 for drop in drops)
        is_gelu = type(act) is nn.GELU and act.approximate == "none"
        layers = is_plain(linear1) and is_plain(linear2)
        return layers and is_gelu and not is_dropped and has_cpu_ways(x) and not is_autocast(x)

    def _in_pieces(self, x: Tensor) -> Tensor:
        first, last = self.chunk[0], self.chunk[3]
        parameters = first.weight, first.bias, last.weight, last.bias
        y = _LargeMLP.apply(x.flatten(0, 2), torch.is_grad_enabled(), *parameters)
        return y.view(x.shape)


class _LargeMLP(torch.autograd.Function):
    """The MLP of many rows, some at a time; its gradient computes GELU again, so that one hidden
    map is kept in place of two. Blocks of tens of MiB cost more to get than to fill."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, is_kept: bool, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> Tensor:
        y = torch.empty_like(x)
        hidden = x.new_empty(len(x), len(w1)) if is_kept else None
        for piece in _pieces(len(x), len(w1) * x.element_size()):
            into = None if hidden is None else hidden[piece]
            h = torch.addmm(b1, x[piece], w1.t(), out=into)
            torch.addmm(b2, F.gelu(h), w2.t(), out=y[piece])
        if hidden is not None:
            ctx.save_for_backward(x, hidden, w1, w2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, hidden, w1, w2 = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_w1, grad_w2 = torch.zeros_like(w1), torch.zeros_like(w2)
        grad_b1 = w1.new_zeros(len(w1))
        for piece in _pieces(len(x), hidden[0].nbytes):
            g, h = grad[piece], hidden[piece]
            grad_w2.addmm_(g.t(), F.gelu(h))
            grad_h = torch.ops.aten.gelu_backward(g @ w2, h)
            grad_w1.addmm_(grad_h.t(), x[piece])
            grad_b1 += grad_h.sum(0)
            torch.mm(grad_h, w1, out=grad_x[piece])
        return grad_x, None, grad_w1, grad_b1, grad_w2, grad.sum(0)


def _pieces(rows: int, row_bytes: int) -> list[slice]:
    """Slices of rows of about half of LARGE bytes."""
    step = max(1, LARGE // 2 // row_bytes)
    return [slice(start, start + step) for start in range(0, rows, step)]


class TransformerMLPWithConv(nn.Module):
    """TransformerMLP with a 3x3 depthwise convolution in the middle, x [B, channels, H, W].

    linear2(drop(GELU(dwc(linear1(x)))))                     version "dat" (2022)
    linear2(GELU(z + dwc(z))),  z = drop(linear1(x))         version "dat++" (2023)
    """

    def __init__(
        self, channels: int, expansion: int, drop: float = 0.0, version: str = "dat++"
    ) -> None:
        super().__init__()
        hidden = channels * expansion
        self.version = version
        self.linear1: Any = self._projection(channels, hidden)
        self.drop1 = nn.Dropout(drop, inplace=True)
        self.act = nn.GELU()
        self.linear2: Any = self._projection(hidden, channels)
        self.drop2 = nn.Dropout(drop, inplace=True)
        self.dwc = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)

    def _projection(self, inputs: int, outputs: int) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, 1)
        return conv if self.version == "dat" else nn.Sequential(conv)

    def forward(self, x: Tensor) -> Tensor:
        return _by_images(self._run, x, self.dwc.in_channels * x.shape[2] * x.shape[3])

    def _run(self, x: Tensor) -> Tensor:
        if self.version == "dat":
            x = self.drop1(self.act(self.dwc(_pointwise(self.linear1, x))))
            return self.drop2(_pointwise(self.linear2, x))
        x = self.drop1(_pointwise(self.linear1[0], x))
        if has_cpu_ways(x) and is_plain(self.dwc):
            # The sum is a convolution, too, and GELU is faster on what looks contiguous.
            weight = _plus_identity(self.dwc.weight)
            x = F.conv2d(x, weight, self.dwc.bias, padding=1, groups=len(weight))
            x = x.permute(0, 2, 3, 1)
            if torch.is_grad_enabled() or type(self.act) is not nn.GELU:
                x = self.act(x)
            else:
                x = torch.ops.aten.gelu_(x, approximate=self.act.approximate)
            x = x.permute(0, 3, 1, 2)
        else:
            x = self.act(x + self.dwc(x))
        return self.drop2(_pointwise(self.linear2[0], x))


def _by_images(run: Callable[[Tensor], Tensor], x: Tensor, hidden: int) -> Tensor:
    """run(x), on the CPU for a few images at a time where their hidden values, `hidden` each, are
    many: what the passes over them share stays in cache."""
    image = hidden * x.element_size()
    if not has_cpu_ways(x) or len(x) * image <= LARGE:
        return run(x)
    return torch.cat([run(x[piece]) for piece in _pieces(len(x), image)])


def _pointwise(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """1x1 convolution of channels-last maps: beside native CPU kernels a matrix product."""
    if not has_cpu_ways(x) or not is_plain(layer):
        return layer(x)
    y = F.linear(x.permute(0, 2, 3, 1), layer.weight.flatten(1), layer.bias)
    return y.permute(0, 3, 1, 2)


def _plus_identity(weight: Tensor) -> Tensor:
    """Weights [C, 1, 3, 3] of a depthwise convolution that adds what it is given."""
    identity = torch.zeros_like(weight[:1])
    identity[0, 0, 1, 1] = 1
    return weight + identity
