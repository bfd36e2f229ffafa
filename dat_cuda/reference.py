"""Deformable attention in plain PyTorch: the definition the fused operators are held to.

Any floating dtype, any device, differentiable by autograd. The formulas are those of "Vision
Transformer with Deformable Attention" (CVPR 2022, version "dat") and of "DAT++: Spatially Dynamic
Vision Transformer with Deformable Attention" (2023, version "dat++"). Coordinates are (y, x) and
are computed in float32, or in float64 for float64 inputs, whatever the dtype of the features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

VERSIONS = ("dat", "dat++")

# Beyond this no map or table of two points or more has a tap (see _finite).
_FAR = 16.0


def reference_points(
    height: int,
    width: int,
    version: str = "dat++",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The key grid before it is deformed: [height, width, 2] in (y, x).

    Point i of K is (i + .5)/K * 2 - 1 in "dat" and (i + .5)/(K - 1) * 2 - 1 in "dat++", whose last
    point lies outside the map. A single point (K = 1) is at 0.
    """
    y, x = (_points(n, 0.5, version, dtype, device) for n in (height, width))
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


def query_grid(
    height: int,
    width: int,
    version: str = "dat++",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The places of the queries: [height, width, 2] in (y, x).

    Point i of L is (i + .5)/L * 2 - 1 in "dat" and i/(L - 1) * 2 - 1 in "dat++". A single point
    (L = 1) is at 0.
    """
    shifts = [0.0 if version == "dat++" and n > 1 else 0.5 for n in (height, width)]
    y = _points(height, shifts[0], version, dtype, device)
    x = _points(width, shifts[1], version, dtype, device)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


def deform_sample(
    x: Tensor,
    offset: Tensor,
    *,
    groups: int,
    offset_range_factor: float,
    version: str = "dat++",
) -> tuple[Tensor, Tensor]:
    """Keys' positions from the offsets, and the features bilinearly sampled there.

    pos = bound(offset, reference) with f = offset_range_factor and K keys along the axis:

        f > 0   ref + tanh(offset) * f / K ("dat"), ref + tanh(offset) * f / (K - 1) ("dat++")
        f = 0   ref + offset ("dat"), ref ("dat++")
        f < 0   tanh(ref + offset) ("dat"), clamp(ref + offset, -1, 1) ("dat++")

    K - 1 counts as 1 where K = 1. -1 and 1 are the centres of the map's outermost pixels
    (align_corners), taps outside the map are zero, and on an axis of one pixel every finite
    coordinate is that pixel. A NaN coordinate gives NaN, an infinite one gives zero, and so do
    their gradients.

    Args:
        x: [B, C, H, W], floating.
        offset: [B*groups, 2, Hk, Wk], channel 0 is y and channel 1 is x.

    Returns:
        sampled [B, C, Hk*Wk] in the dtype of x, and pos [B, groups, Hk*Wk, 2] in float32 (float64
        when x is float64).

    Raises:
        ValueError: an argument has a wrong shape or value.
    """
    _check_version(version)
    _check_floating("x", x)
    _check_shape("x", x, "[B, C, H, W]", (None, None, None, None))
    batch, channels, height, width = x.shape
    _check_division("x's channels", channels, "groups", groups)
    _check_shape("offset", offset, "[B*groups, 2, Hk, Wk]", (batch * groups, 2, None, None))
    if math.isnan(offset_range_factor):
        raise ValueError("offset_range_factor must be a number, got nan")

    dtype = _coordinate_dtype(x)
    pos = _bound(offset.to(dtype), offset_range_factor, version).flatten(1, 2)  # [B*G, N, 2]
    maps = x.to(dtype).reshape(batch * groups, channels // groups, height, width)
    grid = _finite(pos).flip(-1).unsqueeze(1)
    sampled = _bilinear(maps, grid, pos.unsqueeze(1)).squeeze(2)
    sampled = sampled + _poison(pos).unsqueeze(1)
    sampled = sampled.to(x.dtype).reshape(batch, channels, pos.shape[1])
    return sampled, pos.unflatten(0, (batch, groups))


def deform_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None = None,
    rpe_table: Tensor | None = None,
    *,
    heads: int,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    version: str = "dat++",
) -> Tensor:
    """softmax(scale * q.k + table bias + bias) . v, for every head, with dropout on the softmax.

    The table bias of (query, key, head) is rpe_table[head], bilinearly sampled at
    (query_grid - pos)/2 with -1 and 1 at the centres of the outermost cells (align_corners) and
    zero outside; on an axis of one cell every finite coordinate is that cell. Heads are shared out
    evenly: head i uses group i // (heads/groups) of pos. A NaN in pos makes the rows of its batch
    element and group NaN, an infinity gives zero bias.

    Args:
        q: [B, C, H, W], floating, C = heads * head_dim.
        k, v: [B, C, N], dtype of q.
        pos: [B, groups, N, 2] in (y, x). Only the table uses it.
        rpe_table: [heads, Th, Tw], any size. Needs pos.
        bias: dense additive bias, broadcastable to [B, heads, H*W, N].
        scale: head_dim**-0.5 unless given.
        dropout_p: as in torch.nn.functional.dropout; 0 in evaluation.

    Returns:
        [B, C, H, W] in the dtype of q.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value.
    """
    _check_attention(q, k, v, pos, rpe_table, heads, bias, dropout_p, version)
    height, width = q.shape[2:]
    q = rearrange(q, "b (h d) y x -> b h d (y x)", h=heads)
    k = rearrange(k, "b (h d) n -> b h d n", h=heads)
    v = rearrange(v, "b (h d) n -> b h d n", h=heads)
    if pos is not None and rpe_table is not None:
        pos = pos.to(_coordinate_dtype(q))
        # NaN scores, at the cost of one pass over k instead of one over the bias.
        poison = _poison(pos).repeat_interleave(heads // pos.shape[1], dim=1).unsqueeze(2)
        k = k + poison.to(k.dtype)

    scale = q.shape[2] ** -0.5 if scale is None else scale
    scores = torch.einsum("bhdm,bhdn->bhmn", q, k) * scale
    if pos is not None and rpe_table is not None:
        scores = scores + _table_bias(rpe_table, pos, height, width, version).to(q.dtype)
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout_p)
    out = torch.einsum("bhmn,bhdn->bhdm", weights, v)
    return rearrange(out, "b h d (y x) -> b (h d) y x", y=height)


def _table_bias(table: Tensor, pos: Tensor, height: int, width: int, version: str) -> Tensor:
    """[B, heads, H*W, N]: table [heads, Th, Tw] at (query_grid - pos)/2, pos [B, G, N, 2]."""
    batch, groups = pos.shape[:2]
    heads = table.shape[0]
    queries = query_grid(height, width, version, dtype=pos.dtype, device=pos.device)
    keys = rearrange(_finite(pos), "b g n c -> (b g) 1 n c")
    displacement = (queries.reshape(1, -1, 1, 2) - keys) * 0.5
    maps = table.to(pos.dtype).expand(batch, -1, -1, -1)
    maps = maps.reshape(batch * groups, heads // groups, *table.shape[1:])
    sampled = _bilinear(maps, displacement.flip(-1), rearrange(pos, "b g n c -> (b g) 1 n c"))
    return sampled.reshape(batch, heads, height * width, pos.shape[2])


def _bilinear(maps: Tensor, grid: Tensor, pos: Tensor) -> Tensor:
    """grid_sample with zeros where pos [B, 1, N, 2], that the (x, y) grid came from, is infinite.

    Only an axis of one point needs them: there, grid_sample ignores the coordinate.
    """
    sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    if maps.shape[2] == 1 or maps.shape[3] == 1:
        sampled = sampled.masked_fill(pos.isinf().any(-1).unsqueeze(1), 0.0)
    return sampled


def _finite(pos: Tensor) -> Tensor:
    """pos without the values that grid_sample must not convert to integers."""
    return pos.nan_to_num(nan=_FAR).clamp(-_FAR, _FAR)


def _poison(pos: Tensor) -> Tensor:
    """[..., 2] -> [...]: NaN, like the gradient of both coordinates, where one is NaN; else 0."""
    return pos.masked_fill(~pos.isnan().any(-1, keepdim=True), 0.0).sum(-1).square()


def _bound(offset: Tensor, factor: float, version: str) -> Tensor:
    """offset [B*G, 2, Hk, Wk] -> pos [B*G, Hk, Wk, 2]."""
    height, width = offset.shape[2:]
    points = reference_points(height, width, version, dtype=offset.dtype, device=offset.device)
    reference = points.movedim(-1, 0)
    if factor < 0:
        pos = reference + offset
        pos = pos.tanh() if version == "dat" else pos.clamp(-1.0, 1.0)
    elif factor == 0 and version == "dat":
        pos = reference + offset
    else:
        y, x = offset.tanh().unbind(1)
        step = [factor / _span(size, version) for size in (height, width)]
        pos = reference + torch.stack((y * step[0], x * step[1]), dim=1)
    return pos.movedim(1, -1)


def _points(
    size: int, shift: float, version: str, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    points = torch.arange(size, dtype=dtype, device=device) + shift
    return points / _span(size, version) * 2.0 - 1.0


def _span(size: int, version: str) -> int:
    return size if version == "dat" else max(size - 1, 1)


def _coordinate_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    rpe_table: Tensor | None,
    heads: int,
    bias: Tensor | None,
    dropout_p: float,
    version: str,
) -> None:
    _check_version(version)
    _check_floating("q", q)
    _check_shape("q", q, "[B, C, H, W]", (None, None, None, None))
    batch, channels, height, width = q.shape
    _check_division("q's channels", channels, "heads", heads)
    _check_shape("k", k, "[B, C, N] of q", (batch, channels, None))
    keys = k.shape[2]
    _check_shape("v", v, "[B, C, N] of k", (batch, channels, keys))
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    if rpe_table is not None and pos is None:
        raise ValueError("rpe_table needs pos, the keys' positions, got None")
    if pos is not None and rpe_table is not None:
        _check_shape("pos", pos, "[B, groups, N, 2]", (batch, None, keys, 2))
        _check_division("heads", heads, "groups (of pos)", pos.shape[1])
        _check_shape("rpe_table", rpe_table, "[heads, Th, Tw]", (heads, None, None))
    if bias is not None:
        full = (batch, heads, height * width, keys)
        fits = bias.dim() <= 4 and all(
            have in (1, want) for have, want in zip(bias.shape[::-1], full[::-1], strict=False)
        )
        if not fits:
            raise ValueError(
                f"bias must be broadcastable to [B, heads, H*W, N] = {list(full)}, "
                f"got {list(bias.shape)}"
            )


def _check_version(version: str) -> None:
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {VERSIONS}, got {version!r}")


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def _check_shape(name: str, tensor: Tensor, symbols: str, sizes: Sequence[int | None]) -> None:
    """ValueError unless the shape is sizes, None standing for any batch or positive size."""
    fits = tensor.dim() == len(sizes) and all(
        have > 0 or axis == 0 if want is None else have == want
        for axis, (have, want) in enumerate(zip(tensor.shape, sizes, strict=True))
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name} must have shape {symbols} = [{wanted}], got {list(tensor.shape)}")


def _check_division(name: str, total: int, parts_name: str, parts: int) -> None:
    if parts < 1 or total % parts:
        raise ValueError(f"{parts_name} must be positive and divide {name} ({total}), got {parts}")
