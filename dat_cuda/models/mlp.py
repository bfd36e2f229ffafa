"""The MLPs of the blocks. Plain ones run in pieces on the CPU: see docs/models.md."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_cuda._autograd import first_derivative_only
from dat_cuda.functional import has_cpu_ways, is_autocast
from dat_cuda.projections import is_plain

PIECE = 2**23  # bytes of hidden values


class TransformerMLP(nn.Module):
    """Linear, GELU, Linear over the channels of x [B, channels, H, W], `expansion` times wider
    between; `drop` is the dropout after each."""

    def __init__(self, channels: int, expansion: int, drop: float = 0.0) -> None:
        super().__init__()
        self.chunk: Any = nn.Sequential()
        self.chunk.add_module("linear1", nn.Linear(channels, channels * expansion))
        self.chunk.add_module("act", nn.GELU())
        self.chunk.add_module("drop1", nn.Dropout(drop, inplace=True))
        self.chunk.add_module("linear2", nn.Linear(channels * expansion, channels))
        self.chunk.add_module("drop2", nn.Dropout(drop, inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        linear1, act, *drops, linear2 = (self.chunk[i] for i in (0, 1, 2, 4, 3))
        if _is_plain(x, act, drops, [linear1, linear2]):
            return _in_pieces(x, linear1, linear2)
        return self.chunk(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


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
        self.dwc: Any = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)

    def _projection(self, inputs: int, outputs: int) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, 1)
        return conv if self.version == "dat" else nn.Sequential(conv)

    def forward(self, x: Tensor) -> Tensor:
        is_dat = self.version == "dat"
        linear1, linear2 = self.linear1, self.linear2
        if not is_dat:
            linear1, linear2 = linear1[0], linear2[0]
        if _is_plain(x, self.act, [self.drop1, self.drop2], [linear1, self.dwc, linear2]):
            # In the later version the sum is a convolution, too.
            weight = self.dwc.weight if is_dat else _plus_identity(self.dwc.weight)
            return _in_pieces(x, linear1, linear2, weight, self.dwc.bias)
        if is_dat:
            z = self.drop1(self.act(self.dwc(linear1(x))))
        else:
            z = self.drop1(linear1(x))
            z = self.act(z + self.dwc(z))
        return self.drop2(linear2(z))


def _plus_identity(weight: Tensor) -> Tensor:
    """Weights [C, 1, 3, 3] of a depthwise convolution that adds what it is given."""
    identity = torch.zeros_like(weight[:1])
    identity[0, 0, 1, 1] = 1
    return weight + identity


def _is_plain(x: Tensor, act: nn.Module, drops: list[Any], layers: list[nn.Module]) -> bool:
    """Whether the MLP of these modules is what _MLP computes, and x is where that pays."""
    is_dropped = any(drop.training and drop.p > 0 for drop in drops)
    is_gelu = type(act) is nn.GELU and act.approximate == "none"
    if is_dropped or not is_gelu or not all(map(is_plain, layers)):
        return False
    return has_cpu_ways(x) and not is_autocast(x)


def _in_pieces(x: Tensor, linear1: Any, linear2: Any, *conv: Tensor) -> Tensor:
    weights = linear1.weight.flatten(1), linear1.bias, linear2.weight.flatten(1), linear2.bias
    is_kept = torch.is_grad_enabled()
    y = _MLP.apply(x.permute(0, 2, 3, 1).contiguous(), is_kept, *weights, *conv or (None, None))
    return y.permute(0, 3, 1, 2)


class _MLP(torch.autograd.Function):
    """w2 GELU(conv(w1 x + b1)) + b2 of x [B, H, W, C], a piece at a time.

    Pieces stay in cache, and blocks of tens of MiB cost more to get than to fill. One hidden map
    is kept for the gradient, which computes the convolution and GELU again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        is_kept: bool,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        conv: Tensor | None,
        conv_bias: Tensor | None,
    ) -> Tensor:
        y = torch.empty_like(x)
        hidden = x.new_empty(*x.shape[:3], len(w1)) if is_kept else None
        for images, rows in _pieces(x, len(w1)):
            near = rows if conv is None else _grown(rows, x.shape[1])
            part = x[images, near]
            into = None if hidden is None else _flat(hidden[images, near])
            h = torch.mm(_flat(part), w1.t(), out=into).add_(b1).view(*part.shape[:3], -1)
            a = F.gelu(h) if conv is None else torch.ops.aten.gelu_(_convolve(h, conv, conv_bias))
            torch.mm(_flat(a[:, _within(near, rows)]), w2.t(), out=_flat(y[images, rows])).add_(b2)
        if hidden is not None:
            ctx.save_for_backward(x, hidden, w1, b1, w2, conv, conv_bias)
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, hidden, w1, _, w2, conv, conv_bias = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.empty_like(x)
        grad_w1, grad_w2, grad_b1 = map(torch.zeros_like, (w1, w2, w1[:, 0]))
        grad_conv: list[Any] = [p if p is None else torch.zeros_like(p) for p in (conv, conv_bias)]
        for images, rows in _pieces(x, len(w1)):
            near = rows if conv is None else _grown(rows, x.shape[1])
            h = hidden[images, near]
            grad_h = (_flat(grad[images, near]) @ w2).view(h.shape)
            if conv is None:
                torch.ops.aten.gelu_backward(grad_h, h, grad_input=grad_h)
                a = F.gelu(h)
            else:
                far = _grown(near, x.shape[1])
                c = _convolve(hidden[images, far], conv, conv_bias)[:, _within(far, near)]
                torch.ops.aten.gelu_backward(grad_h, c, grad_input=grad_h)
                a = torch.ops.aten.gelu_(c[:, _within(near, rows)])
            grad_w2.addmm_(_flat(grad[images, rows]).t(), _flat(a))
            if conv is not None:
                del a, c  # the next map goes where they were
                grad_h, *parts = _convolve_backward(grad_h, h, conv, _within(near, rows))
                for total, part in zip(grad_conv, parts, strict=True):
                    total.add_(part)
            grad_h = _flat(grad_h)
            grad_w1.addmm_(grad_h.t(), _flat(x[images, rows]))
            grad_b1 += grad_h.sum(0)
            torch.mm(grad_h, w1, out=_flat(grad_x[images, rows]))
        return grad_x, None, grad_w1, grad_b1, grad_w2, _flat(grad).sum(0), *grad_conv


def _pieces(x: Tensor, hidden: int) -> Iterator[tuple[slice, slice]]:
    """Images and rows of x [B, H, W, C], a piece at a time: some whole images or rows of one."""
    count, height, width, _ = x.shape
    row = max(1, width * hidden * x.element_size())
    if height * row <= PIECE:
        step = PIECE // max(1, height * row)
        for start in range(0, count, step):
            yield slice(start, start + step), slice(0, height)
        return
    step = max(1, PIECE // row)
    for image in range(count):
        for start in range(0, height, step):
            yield slice(image, image + 1), slice(start, min(start + step, height))


def _grown(rows: slice, height: int) -> slice:
    """The rows that a 3x3 convolution reads for these."""
    return slice(max(rows.start - 1, 0), min(rows.stop + 1, height))


def _within(outer: slice, rows: slice) -> slice:
    return slice(rows.start - outer.start, rows.stop - outer.start)


def _flat(x: Tensor) -> Tensor:
    """x [B, H, W, C], contiguous, as the matrix of its pixels; a view."""
    return x.view(-1, x.shape[-1])


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The depthwise convolution of x [B, H, W, C]."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
    return y.permute(0, 2, 3, 1)


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor, rows: slice) -> list[Tensor]:
    """The gradients of x, weight and bias that belong to some rows; overwrites the others'."""
    count = len(weight)
    maps = grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    sizes = [count], [1, 1], [1, 1], [1, 1], False, [0, 0], count
    run = partial(torch.ops.aten.convolution_backward, *maps, weight, *sizes)
    if rows == slice(0, x.shape[1]):
        grad_x, *others = run([True, True, True])
    else:
        grad_x, _, _ = run([True, False, False])
        grad[:, : rows.start] = 0
        grad[:, rows.stop :] = 0
        _, *others = run([False, True, True])
    return [grad_x.permute(0, 2, 3, 1)[:, rows], *others]
