"""The blocks of DAT and DAT++ beside deformable attention, with the published parameters.

All take and give maps [B, C, H, W]; attention blocks give (map, None, None), as deformable
attention gives (map, pos, reference). They compute over [B, H, W, C], so that maps flow through a
model in channels-last memory without copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dat_cuda.attention import (
    LayerNormProxy,
    has_cpu_ways,
    is_channels_last,
    is_plain,
    project,
)
from dat_cuda.functional import is_autocast
from dat_cuda.models.attend import Windows, attend, attend_windows
from dat_cuda.models.neighborhood import NeighborhoodAttention2D

__all__ = [
    "DropPath",
    "LayerNormProxy",
    "LayerScale",
    "LocalAttention",
    "NeighborhoodAttention2D",
    "PyramidAttention",
    "ShiftWindowAttention",
    "TransformerMLP",
    "TransformerMLPWithConv",
]

Pair = tuple[int, int]
LARGE = 2**24  # bytes of hidden values
BlockResult = tuple[Tensor, None, None]


class LocalAttention(nn.Module):
    """Attention within windows that do not overlap, with a relative position bias.

        qkv = proj_qkv(x of a window)
        y   = proj_out(softmax(q.k / sqrt(dim / heads) + relative_position_bias_table[k - q]) . v)

    A map that is no multiple of the window is padded with zeros below and on the right. Source:
    Swin Transformer (ICCV 2021), as "Vision Transformer with Deformable Attention" uses it.

    Args:
        dim, heads: channels, and heads that divide them.
        window_size: side of a window, or (height, width).
        attn_drop, proj_drop: dropout of the attention weights and of the result.

    Forward: x [B, dim, H, W] -> (y like x, None, None).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window_size: int | Pair,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        _check_divides("heads", heads, "dim", dim)
        self.window_size = pair(window_size)
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.proj_qkv = nn.Linear(dim, 3 * dim)
        self.proj_out = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop, inplace=True)
        self.attn_drop = nn.Dropout(attn_drop, inplace=True)
        height, width = self.window_size
        table = torch.zeros((2 * height - 1) * (2 * width - 1), heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.01))
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", _relative_index(height, width))

    def forward(self, x: Tensor) -> BlockResult:
        return self._windows(x, shift=0), None, None

    def _windows(self, x: Tensor, shift: int) -> Tensor:
        height, width = self.window_size
        x = x.permute(0, 2, 3, 1)
        size = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -size[1] % width, 0, -size[0] % height))
        parts = [
            Windows(pixels, pixels, bias)
            for pixels, bias in zip(self._pixels(x, shift), self._biases(shift), strict=True)
            if len(pixels)
        ]
        qkv = self.proj_qkv(x).flatten(0, 2)
        dropout_p = self.attn_drop.p if self.attn_drop.training else 0.0
        out = attend_windows(qkv, parts, heads=self.heads, scale=self.scale, dropout_p=dropout_p)
        y = self.proj_drop(self.proj_out(out.view(x.shape)))
        return y[:, : size[0], : size[1]].permute(0, 3, 1, 2)

    def _pixels(self, x: Tensor, shift: int) -> list[Tensor]:
        """Which rows of x [B, H, W, C] make up the windows: [windows, n], a part for every mask."""
        height, width = self.window_size
        index = torch.arange(x.shape[:3].numel(), device=x.device).view(x.shape[:3])
        if not shift:
            index = rearrange(index, "b (r y) (s x) -> (r s b) (y x)", y=height, x=width)
            return [index]
        index = index.roll((-shift, -shift), (1, 2))
        index = rearrange(index, "b (r y) (s x) -> r s b (y x)", y=height, x=width)
        parts = index[:-1, :-1].flatten(0, 1), index[:-1, -1], index[-1, :-1], index[-1:, -1]
        return [part.flatten(0, 1) for part in parts]

    def _biases(self, shift: int) -> list[Tensor]:
        """[heads, n, n] for every part. Pixels that the shift brings together from opposite edges
        do not see each other: they share the windows of the last row and of the last column."""
        n = self.window_size[0] * self.window_size[1]
        table = self.relative_position_bias_table
        bias = table.index_select(0, self.relative_position_index.flatten()).t().reshape(-1, n, n)
        if not shift:
            return [bias]
        y, x = (_halves(side, shift, bias) for side in self.window_size)
        masks = []
        for apart_y, apart_x in ((0 * y, x), (y, 0 * x), (y, x)):
            apart = (apart_y[:, None, :, None] + apart_x[None, :, None, :]).clamp(max=1)
            masks.append(apart.reshape(n, n) * MASKED)
        return [bias, *(bias + mask for mask in masks)]


class ShiftWindowAttention(LocalAttention):
    """LocalAttention in windows moved by shift_size pixels, across the edges of the map.

    Pixels from opposite edges do not attend to each other. Arguments and forward are as
    LocalAttention's, with `shift_size`, smaller than the window, and `fmap_size`: the map's size,
    which shapes nothing but the published buffer `attn_mask`; any size runs.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window_size: int | Pair,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        shift_size: int = 1,
        fmap_size: int | Pair = 56,
    ) -> None:
        super().__init__(dim, heads, window_size, attn_drop, proj_drop)
        if not 0 < shift_size < min(self.window_size):
            raise ValueError(
                f"shift_size must be positive and smaller than window_size {self.window_size}, "
                f"got {shift_size}"
            )
        self.shift_size = shift_size
        self.fmap_size = pair(fmap_size)
        self.register_buffer("attn_mask", self._published_mask())

    def _published_mask(self) -> Tensor:
        """[windows, n, n] of the map at fmap_size: kept for checkpoints, forward makes its own."""
        labels = []
        for length, side in zip(self.fmap_size, self.window_size, strict=True):
            place = torch.arange(length + -length % side)
            labels.append(
                (place >= len(place) - side).int() + (place >= len(place) - self.shift_size).int()
            )
        label = 3 * labels[0][:, None] + labels[1]
        height, width = self.window_size
        label = rearrange(label, "(r y) (s x) -> (r s) (y x)", y=height, x=width)
        return (label.unsqueeze(1) != label.unsqueeze(2)).float() * MASKED

    def forward(self, x: Tensor) -> BlockResult:
        return self._windows(x, shift=self.shift_size), None, None


MASKED = -100.0  # what the published code adds to the score of a pair that must not meet


def _relative_index(height: int, width: int) -> Tensor:
    """[n, n]: the row of the table for the n = height * width pixels of a window, in pairs."""
    y, x = (torch.arange(side) for side in (height, width))
    y = y[:, None] - y + height - 1
    x = x[:, None] - x + width - 1
    index = y[:, None, :, None] * (2 * width - 1) + x[None, :, None, :]
    return index.reshape(height * width, height * width)


def _halves(side: int, shift: int, like: Tensor) -> Tensor:
    """[side, side]: 1 where two places of an edge window come from opposite edges of the map."""
    wrapped = torch.arange(side, device=like.device) >= side - shift
    return (wrapped[:, None] != wrapped).to(like.dtype)


class PyramidAttention(nn.Module):
    """Attention of all pixels to a map reduced by sr_ratio: Pyramid Vision Transformer (ICCV 2021).

        k, v = kv(proj_ds(x)),  y = proj(softmax(q(x).k / sqrt(dim / num_heads)) . v)

    Forward: x [B, dim, H, W] -> (y like x, None, None).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        sr_ratio: int = 1,
    ) -> None:
        super().__init__()
        _check_divides("num_heads", num_heads, "dim", dim)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Conv2d(dim, dim, 1)
        self.kv = nn.Conv2d(dim, 2 * dim, 1)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_drop = nn.Dropout(proj_drop)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.proj_ds = nn.Sequential(
                nn.Conv2d(dim, dim, sr_ratio, sr_ratio), LayerNormProxy(dim)
            )

    def forward(self, x: Tensor) -> BlockResult:
        reduced = self.proj_ds(x) if self.sr_ratio > 1 else x
        k, v = project(self.kv, reduced).flatten(2).chunk(2, dim=1)
        dropout_p = self.attn_drop.p if self.attn_drop.training else 0.0
        q = project(self.q, x).flatten(2)
        out = attend(q, k, v, None, heads=self.num_heads, scale=self.scale, dropout_p=dropout_p)
        out = out.unflatten(2, x.shape[2:])
        return self.proj_drop(project(self.proj, out, is_channels_last(x))), None, None


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


class LayerScale(nn.Module):
    """x [B, dim, H, W] times one learned factor for each channel, at first init_values."""

    def __init__(self, dim: int, inplace: bool = False, init_values: float = 1e-5) -> None:
        super().__init__()
        self.inplace = inplace
        self.weight = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(-1, 1, 1)
        return x.mul_(weight) if self.inplace else x * weight


class DropPath(nn.Module):
    """Drops whole images of a residual branch while training, with probability p, and scales what
    is kept by 1 / (1 - p): Deep Networks with Stochastic Depth (ECCV 2016)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        shape = (len(x),) + (1,) * (x.dim() - 1)
        kept = x.new_empty(shape).bernoulli_(1.0 - self.p)
        return x * (kept / (1.0 - self.p) if self.p < 1.0 else kept)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def pair(size: int | Pair) -> Pair:
    """(height, width) of a square, or of what is a pair already."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _check_divides(name: str, value: int, of: str, whole: int) -> None:
    if value < 1 or whole % value:
        raise ValueError(f"{name} must divide {of} {whole}, got {value}")
