"""The blocks of DAT and DAT++ beside deformable attention, with the published parameters.

All take and give maps [B, C, H, W]; attention blocks give (map, None, None), as deformable
attention gives (map, pos, reference). They compute over [B, H, W, C], so that maps flow through a
model in channels-last memory without copies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dat_cuda.attention import LayerNormProxy, project
from dat_cuda.models.attend import attend
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
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        rows = x.shape[1] // height
        x = rearrange(x, "b (r y) (s x) c -> b r s (y x) c", y=height, x=width)
        qkv = self.proj_qkv(x)
        bias = self.relative_position_bias_table.index_select(
            0, self.relative_position_index.flatten()
        )
        bias = rearrange(bias, "(m n) h -> h m n", m=height * width)
        out = self._masked(qkv, bias, shift) if shift else self._attend(qkv, bias)
        y = self.proj_drop(self.proj_out(out))
        y = rearrange(y, "b r s (y x) c -> b (r y) (s x) c", r=rows, y=height, x=width)
        if shift:
            y = y.roll((shift, shift), (1, 2))
        return y[:, : size[0], : size[1]].permute(0, 3, 1, 2)

    def _attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """qkv [B, r, s, n, 3 C], bias [heads, n, n] for all windows -> [B, r, s, n, C]."""
        q, k, v = qkv.flatten(0, 2).chunk(3, dim=-1)
        dropout_p = self.attn_drop.p if self.attn_drop.training else 0.0
        out = attend(q, k, v, bias, heads=self.heads, dropout_p=dropout_p)
        return out.unflatten(0, qkv.shape[:3])

    def _masked(self, qkv: Tensor, bias: Tensor, shift: int) -> Tensor:
        """Pixels that the shift brought together from opposite edges do not see each other: they
        share the windows of the last row and of the last column."""
        height, width = self.window_size
        edge_y, edge_x = (_halves(side, shift, bias) for side in (height, width))
        inner_y, inner_x = torch.zeros_like(edge_y), torch.zeros_like(edge_x)
        bands = []
        for rows, y in ((slice(0, -1), inner_y), (slice(-1, None), edge_y)):
            band = []
            for columns, x in ((slice(0, -1), inner_x), (slice(-1, None), edge_x)):
                part = qkv[:, rows, columns]
                if part.numel():
                    apart = (y[:, None, :, None] + x[None, :, None, :]).clamp(max=1)
                    mask = apart.reshape(height * width, -1) * MASKED
                    band.append(self._attend(part, bias + mask))
            if band:
                bands.append(torch.cat(band, dim=2))
        return torch.cat(bands, dim=1)


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
        q, kv = (rearrange(t, "b c h w -> b (h w) c") for t in (self.q(x), self.kv(reduced)))
        k, v = kv.chunk(2, dim=-1)
        dropout_p = self.attn_drop.p if self.attn_drop.training else 0.0
        out = attend(q, k, v, None, heads=self.num_heads, dropout_p=dropout_p)
        out = rearrange(out, "b (h w) c -> b c h w", h=x.shape[2])
        return self.proj_drop(self.proj(out)), None, None


class TransformerMLP(nn.Module):
    """Linear, GELU, Linear over the channels of x [B, channels, H, W], `expansion` times wider
    between; `drop` is the dropout after each."""

    def __init__(self, channels: int, expansion: int, drop: float = 0.0) -> None:
        super().__init__()
        self.chunk = nn.Sequential()
        self.chunk.add_module("linear1", nn.Linear(channels, channels * expansion))
        self.chunk.add_module("act", nn.GELU())
        self.chunk.add_module("drop1", nn.Dropout(drop, inplace=True))
        self.chunk.add_module("linear2", nn.Linear(channels * expansion, channels))
        self.chunk.add_module("drop2", nn.Dropout(drop, inplace=True))

    def forward(self, x: Tensor) -> Tensor:
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
        self.dwc = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)

    def _projection(self, inputs: int, outputs: int) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, 1)
        return conv if self.version == "dat" else nn.Sequential(conv)

    def forward(self, x: Tensor) -> Tensor:
        if self.version == "dat":
            x = self.drop1(self.act(self.dwc(project(self.linear1, x))))
            return self.drop2(project(self.linear2, x))
        x = self.drop1(project(self.linear1[0], x))
        x = self.act(x + self.dwc(x))
        return self.drop2(project(self.linear2[0], x))


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
