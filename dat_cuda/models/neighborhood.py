"""Neighbourhood attention without the NATTEN package."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dat_cuda.functional import has_cpu_ways
from dat_cuda.models.attend import Windows, attend, attend_windows


class NeighborhoodAttention2D(nn.Module):
    """Every pixel attends to the kernel_size x kernel_size pixels nearest to it.

    At an edge of the map the neighbourhood is moved inside, so that it always has its full size.

        q, k, v = qkv(x)
        y       = proj(softmax(q.k * scale + rpb[k - q + kernel_size - 1]) . v)

    With `dilation` the neighbours are that many pixels apart. A map smaller than kernel_size *
    dilation is padded with zeros below and on the right. Source: Neighborhood Attention Transformer
    (CVPR 2023), with the bias that NATTEN had up to 0.17.

    The map is cut into tiles of about 8 x 8 queries, and a tile attends, masked, to the window that
    holds its neighbourhoods. So for kernel_size 7 k and v are copied 3 times, not 49 times, and the
    products are 4 times those of the neighbourhoods alone.

    Args:
        dim, num_heads: channels, and heads that divide them.
        kernel_size: side of the neighbourhood, odd.
        attn_drop, proj_drop: dropout of the attention weights and of the result.
        dilation: distance of neighbours.
        rel_pos_bias, qkv_bias: whether there are `rpb` and a bias of `qkv`.
        qk_scale: factor of q.k; by default (dim / num_heads) ** -0.5.

    Forward: x [B, dim, H, W] -> (y like x, None, None).
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dilation: int = 1,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if dilation < 1:
            raise ValueError(f"dilation must be positive, got {dilation}")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        side = 2 * kernel_size - 1
        rpb = nn.Parameter(torch.zeros(num_heads, side, side)) if rel_pos_bias else None
        self.rpb: nn.Parameter | None
        self.register_parameter("rpb", rpb)
        if rpb is not None:
            nn.init.trunc_normal_(rpb, std=0.02)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        if x.dim() != 4:
            raise ValueError(f"x must have shape [B, dim, H, W], got {list(x.shape)}")
        height, width = x.shape[2:]
        least = self.kernel_size * self.dilation
        if min(height, width) < least:
            x = F.pad(x, (0, max(0, least - width), 0, max(0, least - height)))
        x = x.permute(0, 2, 3, 1)
        qkv = self.qkv(x)
        size = qkv.shape[:3]
        dropout_p = self.attn_drop.p if self.attn_drop.training else 0.0
        settings: dict[str, Any] = {
            "heads": self.num_heads,
            "scale": self.scale,
            "dropout_p": dropout_p,
        }
        parts = _parts(size, self.kernel_size, self.dilation, qkv.device)
        is_whole = len(parts) == 1 and all(
            band.covers(side)
            for band, side in zip((parts[0].row, parts[0].column), size[1:], strict=True)
        )
        if is_whole and not has_cpu_ways(qkv):
            q, k, v = qkv.flatten(1, 2).transpose(1, 2).chunk(3, dim=1)
            out = attend(q, k, v, self._bias(parts[0], qkv), **settings).transpose(1, 2)
        else:
            windows = [Windows(p.queries, p.keys, self._bias(p, qkv)) for p in parts]
            out = attend_windows(qkv.flatten(0, 2), windows, **settings)
        y = self.proj(out.reshape(*size, -1)[:, :height, :width])
        return self.proj_drop(y).permute(0, 3, 1, 2), None, None

    def _bias(self, part: _Part, like: Tensor) -> Tensor:
        """[heads, queries of a tile, keys of its window], -inf outside the neighbourhood."""
        side = 2 * self.kernel_size - 1
        (inside_y, y), (inside_x, x) = (
            band.places(self.kernel_size, like.device) for band in (part.row, part.column)
        )
        inside = inside_y[:, None, :, None] & inside_x[None, :, None, :]
        place = side * y[:, None, :, None] + x[None, :, None, :]
        place = torch.where(inside, place, side**2).flatten()
        table = like.new_zeros(self.num_heads, side**2) if self.rpb is None else self.rpb.flatten(1)
        table = F.pad(table, (0, 1), value=-torch.inf).to(like.dtype)
        return table.index_select(1, place).unflatten(1, (part.queries.shape[1], -1))


@dataclass
class _Band:
    """Tiles along an axis whose queries and keys lie alike, so that they share one bias."""

    start: int  # first query of the first tile
    first: int  # first key of its window
    tile: int  # queries of a tile
    window: int  # keys of its window
    begins: tuple[int, ...]  # where in the window each query's neighbourhood begins
    tiles: int = 1

    def covers(self, length: int) -> bool:
        """Whether a single tile is the whole axis, for keys, too."""
        return self.tile == self.window == length

    def places(self, kernel: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """[tile, window]: is the key in the query's neighbourhood, and where in the table."""
        key = torch.arange(self.window, device=device)
        begin = torch.tensor(self.begins, device=device).unsqueeze(1)
        query = torch.arange(self.tile, device=device).unsqueeze(1)
        inside = (key >= begin) & (key < begin + kernel)
        return inside, key - query + (self.first - self.start + kernel - 1)


@functools.lru_cache(maxsize=256)
def _bands(length: int, kernel: int) -> list[_Band]:
    """The tiles that cover an axis; the last one may be smaller."""
    size = _tile(length, kernel)
    bands: list[_Band] = []
    for start in range(0, length, size):
        tile = min(size, length - start)
        window = min(tile + kernel - 1, length)
        first = min(max(start - kernel // 2, 0), length - window)
        begins = tuple(
            min(max(query - kernel // 2, 0), length - kernel) - first
            for query in range(start, start + tile)
        )
        new = _Band(start, first, tile, window, begins)
        before = bands[-1] if bands else None
        if before and before.begins == begins and start - first == before.start - before.first:
            before.tiles += 1
        else:
            bands.append(new)
    return bands


def _tile(length: int, kernel: int) -> int:
    """Queries of a tile along an axis: the larger, the less k and v are copied and the more is
    computed in vain. Of three sizes, the one that leaves the smallest remainder."""
    if length <= 2 * kernel:
        return length
    least = max(kernel, 6)
    return min(range(least, least + 3), key=lambda tile: (-length % tile, -tile))


@dataclass
class _Part:
    """The tiles of a band of rows and a band of columns, as numbers of pixels."""

    row: _Band
    column: _Band
    queries: Tensor  # [tiles, pixels]
    keys: Tensor  # [tiles, pixels]


def _parts(size: tuple[int, ...], kernel: int, dilation: int, device: torch.device) -> list[_Part]:
    """The tiles of the maps [B, H, W]; with dilation, of each of the maps that do not meet."""
    pixels = torch.arange(math.prod(size), device=device).view(size)
    parts = []
    for i, j in product(range(dilation), repeat=2):
        apart = pixels[:, i::dilation, j::dilation]
        bands = (_bands(side, kernel) for side in apart.shape[1:])
        for row, column in product(*bands):
            below, right = (band.tile * (band.tiles - 1) for band in (row, column))
            steps = row.tile, column.tile
            parts.append(
                _Part(
                    row,
                    column,
                    _blocks(apart[:, row.start :, column.start :], steps, steps, (below, right)),
                    _blocks(
                        apart[:, row.first :, column.first :],
                        (row.window, column.window),
                        steps,
                        (below, right),
                    ),
                )
            )
    return parts


def _blocks(
    pixels: Tensor, block: tuple[int, int], step: tuple[int, int], last: tuple[int, int]
) -> Tensor:
    """[blocks, pixels]: blocks of [B, H, W], `step` apart, the last ones beginning at `last`."""
    pixels = pixels[:, : last[0] + block[0], : last[1] + block[1]]
    pixels = pixels.unfold(1, block[0], step[0]).unfold(2, block[1], step[1])
    return rearrange(pixels, "b r s y x -> (b r s) (y x)")
