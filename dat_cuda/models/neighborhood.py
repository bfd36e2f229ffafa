"""Neighbourhood attention without the NATTEN package."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dat_cuda.models.attend import attend


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
        self.register_parameter("rpb", rpb)
        if rpb is not None:
            nn.init.trunc_normal_(rpb, std=0.02)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        if x.dim() != 4:
            raise ValueError(f"x must have shape [B, dim, H, W], got {list(x.shape)}")
        x = x.permute(0, 2, 3, 1)
        size = x.shape[1:3]
        missing = [max(0, self.kernel_size * self.dilation - side) for side in size]
        if any(missing):
            x = F.pad(x, (0, 0, 0, missing[1], 0, missing[0]))
        qkv = self.qkv(x)
        if self.dilation == 1:
            out = self._neighbors(qkv)
        else:
            out = torch.empty_like(x, dtype=qkv.dtype)
            step = self.dilation
            for i in range(step):
                for j in range(step):
                    out[:, i::step, j::step] = self._neighbors(qkv[:, i::step, j::step])
        y = self.proj_drop(self.proj(out[:, : size[0], : size[1]]))
        return y.permute(0, 3, 1, 2), None, None

    def _neighbors(self, qkv: Tensor) -> Tensor:
        """qkv [B, H, W, 3 C] -> [B, H, W, C] of undilated neighbourhoods."""
        channels = qkv.shape[-1] // 3
        q, kv = qkv.split((channels, 2 * channels), dim=-1)
        if self.scale != (channels // self.num_heads) ** -0.5:
            q = q * (self.scale * (channels // self.num_heads) ** 0.5)  # attend() scales by default
        rows, columns = (_bands(side, self.kernel_size) for side in qkv.shape[1:3])
        lines = []
        for row in rows:
            line = [self._tiles(q, kv, row, column) for column in columns]
            lines.append(torch.cat(line, dim=2))
        return torch.cat(lines, dim=1)

    def _tiles(self, q: Tensor, kv: Tensor, row: _Band, column: _Band) -> Tensor:
        """The part of [B, H, W, C] that the queries of two bands make up."""
        dropout_p = self.attn_drop.p if self.attn_drop.training else 0.0
        queries = q[:, row.queries, column.queries]
        queries = rearrange(
            queries, "b (r y) (s x) c -> (b r s) (y x) c", y=row.tile, x=column.tile
        )
        windows = kv[:, row.keys, column.keys].unfold(1, row.window, row.tile)
        windows = windows.unfold(2, column.window, column.tile)
        k, v = rearrange(windows, "b r s c y x -> (b r s) (y x) c").chunk(2, dim=-1)
        bias = self._bias(row, column, q)
        out = attend(queries, k, v, bias, heads=self.num_heads, dropout_p=dropout_p)
        out = rearrange(
            out, "(b r s) (y x) c -> b (r y) (s x) c", r=row.tiles, s=column.tiles, y=row.tile
        )
        return out[:, row.fresh :, column.fresh :]

    def _bias(self, row: _Band, column: _Band, like: Tensor) -> Tensor:
        """[heads, queries of a tile, keys of its window], -inf outside the neighbourhood.

        Products with ones and zeros spread the table: their gradients are products, too, where an
        index would need a sum by index.
        """
        (inside_y, near_y), (inside_x, near_x) = (
            band.relations(self.kernel_size, like) for band in (row, column)
        )
        inside = inside_y[:, None, :, None] & inside_x[None, :, None, :]
        bias = torch.zeros_like(inside, dtype=like.dtype).masked_fill(~inside, -torch.inf)
        if self.rpb is None:
            bias = bias.expand(self.num_heads, -1, -1, -1, -1)
        else:
            spread = torch.einsum("hij,xcj->hixc", self.rpb.to(like.dtype), near_x)
            bias = bias + torch.einsum("ybi,hixc->hyxbc", near_y, spread)
        return bias.flatten(3, 4).flatten(1, 2)


@dataclass
class _Band:
    """Tiles along an axis whose queries and keys lie alike, so that they share one bias."""

    start: int  # first query of the first tile
    first: int  # first key of its window
    fresh: int  # the queries before this one are computed by the band before
    tile: int  # queries of a tile
    window: int  # keys of its window
    begins: tuple[int, ...]  # where in the window each query's neighbourhood begins
    tiles: int = 1

    @property
    def queries(self) -> slice:
        return slice(self.start, self.start + self.tiles * self.tile)

    @property
    def keys(self) -> slice:
        return slice(self.first, self.first + (self.tiles - 1) * self.tile + self.window)

    def relations(self, kernel: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """inside [tile, window]: is the key in the query's neighbourhood; near [tile, window,
        2 kernel - 1]: 1 at its place in the table, in the dtype of `like`."""
        device = like.device
        key = torch.arange(self.window, device=device)
        begin = torch.tensor(self.begins, device=device).unsqueeze(1)
        inside = (key >= begin) & (key < begin + kernel)
        query = torch.arange(self.tile, device=device).unsqueeze(1)
        place = key - query + (self.first - self.start + kernel - 1)
        near = place.unsqueeze(-1) == torch.arange(2 * kernel - 1, device=device)
        return inside, near.to(like.dtype)


@functools.lru_cache(maxsize=256)
def _bands(length: int, kernel: int) -> list[_Band]:
    """The tiles that cover an axis. The last one ends where the map does."""
    tile = _tile(length, kernel)
    window = min(tile + kernel - 1, length)
    starts = [*range(0, length - tile + 1, tile)]
    if length % tile:
        starts.append(length - tile)
    bands: list[_Band] = []
    done = 0
    for start in starts:
        first = min(max(start - kernel // 2, 0), length - window)
        begins = tuple(
            min(max(query - kernel // 2, 0), length - kernel) - first
            for query in range(start, start + tile)
        )
        new = _Band(start, first, done - start, tile, window, begins)
        done = start + tile
        before = bands[-1] if bands else new
        is_alike = new.begins == before.begins and new.fresh == 0
        if bands and is_alike and start - first == before.start - before.first:
            before.tiles += 1
        else:
            bands.append(new)
    return bands


def _tile(length: int, kernel: int) -> int:
    """Queries of a tile along an axis: the larger, the less k and v are copied and the more is
    computed in vain. Of three sizes, the one whose last tile computes the least again."""
    least = max(kernel, 6)
    if length <= least + 2:
        return length
    return min(range(least, least + 3), key=lambda tile: (-length % tile, -tile))
