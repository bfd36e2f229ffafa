"""Attention within windows, shifted or not: LocalAttention and ShiftWindowAttention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dat_cuda.models.attend import Windows, attend_windows

Pair = tuple[int, int]
MASKED = -100.0  # what the published code adds to the score of a pair that must not meet


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
        check_divides("heads", heads, "dim", dim)
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

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        return self._windows(x, shift=0), None, None

    def _windows(self, x: Tensor, shift: int) -> Tensor:
        height, width = self.window_size
        x = x.permute(0, 2, 3, 1)
        size = x.shape[1:3]
        if size[0] % height or size[1] % width:
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
        index = index.roll((-shift, -shift), (1, 2))
        index = rearrange(index, "b (r y) (s x) -> b r s (y x)", y=height, x=width)
        if not shift:
            return [index.flatten(0, 2)]
        parts = index[:, :-1, :-1], index[:, :-1, -1:], index[:, -1:, :-1], index[:, -1:, -1:]
        return [part.flatten(0, 2) for part in parts]

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

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        return self._windows(x, shift=self.shift_size), None, None


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


def pair(size: int | Pair) -> Pair:
    """(height, width) of a square, or of what is a pair already."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def check_divides(name: str, value: int, of: str, whole: int) -> None:
    if value < 1 or whole % value:
        raise ValueError(f"{name} must divide {of} {whole}, got {value}")
