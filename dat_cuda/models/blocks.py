"""The blocks of DAT and DAT++ beside deformable attention, with the published parameters.

All take and give maps [B, C, H, W]; attention blocks give (map, None, None), as deformable
attention gives (map, pos, reference). They compute over [B, H, W, C], so that maps flow through a
model in channels-last memory without copies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dat_cuda.models.attend import attend
from dat_cuda.models.mlp import TransformerMLP, TransformerMLPWithConv
from dat_cuda.models.neighborhood import NeighborhoodAttention2D
from dat_cuda.models.windows import LocalAttention, ShiftWindowAttention, check_divides
from dat_cuda.offsets import LayerNormProxy
from dat_cuda.projections import is_channels_last, laid_out, project

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
        check_divides("num_heads", num_heads, "dim", dim)
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

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        x = laid_out(x)
        reduced = self.proj_ds(x) if self.sr_ratio > 1 else x
        k, v = project(self.kv, reduced).flatten(2).chunk(2, dim=1)
        dropout_p = self.attn_drop.p if self.attn_drop.training else 0.0
        q = project(self.q, x).flatten(2)
        out = attend(q, k, v, None, heads=self.num_heads, scale=self.scale, dropout_p=dropout_p)
        out = out.unflatten(2, x.shape[2:])
        return self.proj_drop(project(self.proj, out, is_channels_last(x))), None, None


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
