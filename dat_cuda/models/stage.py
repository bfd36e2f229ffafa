"""One stage of a DAT: blocks of the letters of stage_spec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dat_cuda.attention import DAttention
from dat_cuda.models import blocks
from dat_cuda.models.blocks import LayerNormProxy
from dat_cuda.models.windows import Pair


class TransformerStage(nn.Module):
    """The blocks of one stage; `spec` holds their letters. See DAT for the arguments.

    Forward: x [B, dim_in, H, W] -> (x [B, dim, H, W], positions, references): of every block what
    deformable attention gives, None for the others.
    """

    def __init__(
        self,
        fmap_size: Pair,
        dim_in: int,
        dim: int,
        spec: Sequence[str],
        drop_path: Sequence[float],
        *,
        attn: dict[str, Any],
        expansion: int,
        drop_rate: float,
        use_dwc_mlp: bool,
        use_lpu: bool,
        layer_scale_value: float,
        version: str,
    ) -> None:
        super().__init__()
        depth = len(spec)
        self.spec = tuple(spec)
        self.use_lpu = use_lpu
        # The order of creation is the published one: a seed gives the published initial weights.
        self.proj = nn.Conv2d(dim_in, dim, 1) if dim_in != dim else nn.Identity()
        self.ln_cnvnxt = nn.ModuleDict(
            {str(d): LayerNormProxy(dim) for d in range(depth) if spec[d] == "X"}
        )
        self.layer_norms = nn.ModuleList(
            LayerNormProxy(dim) if spec[d // 2] != "X" else nn.Identity() for d in range(2 * depth)
        )
        self.mlps = nn.ModuleList(
            blocks.TransformerMLPWithConv(dim, expansion, drop_rate, version)
            if use_dwc_mlp
            else blocks.TransformerMLP(dim, expansion, drop_rate)
            for _ in range(depth)
        )
        self.attns = nn.ModuleList()
        self.drop_path = nn.ModuleList(
            blocks.DropPath(rate) if rate > 0 else nn.Identity() for rate in drop_path
        )
        self.layer_scales = nn.ModuleList(
            blocks.LayerScale(dim, init_values=layer_scale_value)
            if layer_scale_value > 0
            else nn.Identity()
            for _ in range(2 * depth)
        )
        self.local_perception_units = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, 1, 1, groups=dim) if use_lpu else nn.Identity()
            for _ in range(depth)
        )
        for letter in spec:
            self.attns.append(_attention(letter, dim, fmap_size, drop_rate, version, **attn))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        x = self.proj(x)
        positions: list[Tensor | None] = []
        references: list[Tensor | None] = []
        for d, letter in enumerate(self.spec):
            if self.use_lpu:
                x = x + self.local_perception_units[d](x)
            position = reference = None
            if letter == "X":
                y = self.mlps[d](self.ln_cnvnxt[str(d)](self.attns[d](x)))
                x = x + self.drop_path[d](y)
            else:
                y, position, reference = self.attns[d](self.layer_norms[2 * d](x))
                x = x + self.drop_path[d](self.layer_scales[2 * d](y))
                y = self.mlps[d](self.layer_norms[2 * d + 1](x))
                x = x + self.drop_path[d](self.layer_scales[2 * d + 1](y))
            positions.append(position)
            references.append(reference)
        return x, positions, references


def _attention(
    letter: str,
    dim: int,
    fmap_size: Pair,
    proj_drop: float,
    version: str,
    *,
    heads: int,
    attn_drop: float,
    window_size: int,
    sr_ratio: int,
    nat_ksize: int,
    **deformable: Any,
) -> nn.Module:
    """The block of a letter of stage_spec."""
    if letter == "L":
        return blocks.LocalAttention(dim, heads, window_size, attn_drop, proj_drop)
    if letter == "S":
        shift_size = math.ceil(window_size / 2)
        return blocks.ShiftWindowAttention(
            dim, heads, window_size, attn_drop, proj_drop, shift_size, fmap_size
        )
    if letter == "N":
        return blocks.NeighborhoodAttention2D(dim, nat_ksize, heads, attn_drop, proj_drop)
    if letter == "P":
        return blocks.PyramidAttention(dim, heads, attn_drop, proj_drop, sr_ratio)
    if letter == "X":
        return nn.Conv2d(dim, dim, window_size, padding=window_size // 2, groups=dim)
    return DAttention(
        fmap_size,
        fmap_size,
        heads,
        dim // heads,
        attn_drop=attn_drop,
        proj_drop=proj_drop,
        version=version,
        **deformable,
    )
