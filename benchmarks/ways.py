"""The five ways to compute deform_attention that the benchmark sets side by side.

Each takes q [B, C, H, W], k, v [B, C, N], pos [B, G, N, 2], rpe_table [heads, Th, Tw] and
returns [B, C, H, W]; whatever layout a way works in, it pays for getting there and back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Case
from torch.nn.attention.flex_attention import flex_attention

from dat_cuda import functional, reference

Tensors = tuple[torch.Tensor, ...]
Way = Callable[..., torch.Tensor]
WAYS = ("fused", "reference", "compiled", "sdpa", "flex")
EXTRA_WAYS = ("lean",)  # measured when asked for
INPUTS = ("q", "k", "v", "pos", "rpe_table")


def _heads_last(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, heads * d, ...] to contiguous [B, heads, L, d], the layout that attention likes best."""
    return x.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3).contiguous()


def _image(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B, heads, L, d] back to contiguous [B, heads * d, H, W]."""
    return x.transpose(2, 3).reshape(like.shape)


def _dense_bias(rpe_table: torch.Tensor, grid: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, heads, H * W, N] from grid [B * G, H * W, N, 2] in (x, y)."""
    batch = len(grid) // groups
    table = rpe_table.unflatten(0, (groups, -1)).repeat(batch, 1, 1, 1)
    bias = F.grid_sample(table.to(grid.dtype), grid, mode="bilinear", align_corners=True)
    return bias.unflatten(0, (batch, groups)).flatten(1, 2)


def _sdpa(q, k, v, pos, rpe_table, *, heads: int, version: str) -> torch.Tensor:
    """The bias from grid_sample, as the published code makes it, then PyTorch's own attention."""
    groups = pos.shape[1]
    grid = reference.query_grid(*q.shape[2:], version, dtype=pos.dtype, device=pos.device)
    grid = (grid.reshape(1, -1, 1, 2) - pos.flatten(0, 1).unsqueeze(1)).flip(-1) * 0.5
    bias = _dense_bias(rpe_table, grid, groups)
    q4, k4, v4 = (_heads_last(t, heads) for t in (q, k, v))
    return _image(F.scaled_dot_product_attention(q4, k4, v4, attn_mask=bias.to(q.dtype)), q)


def _lean(q, k, v, pos, rpe_table, *, heads: int, version: str) -> torch.Tensor:
    """The plain formula with its factors and the swap to (x, y) before the dense tensors exist."""
    groups = pos.shape[1]
    grid = reference.query_grid(*q.shape[2:], version, dtype=pos.dtype, device=pos.device)
    grid = grid.flip(-1).reshape(1, -1, 1, 2) / 2 - pos.flip(-1).flatten(0, 1).unsqueeze(1) / 2
    bias = _dense_bias(rpe_table, grid, groups)
    q4, k4, v4 = (t.flatten(2).unflatten(1, (heads, -1)) for t in (q, k, v))
    scores = torch.einsum("bhdm,bhdn->bhmn", q4 * q4.shape[2] ** -0.5, k4) + bias.to(q.dtype)
    return torch.einsum("bhmn,bhdn->bhdm", scores.softmax(-1), v4).reshape(q.shape)


def _flex(q, k, v, pos, rpe_table, *, heads: int, version: str, attention: Way) -> torch.Tensor:
    """FlexAttention whose score_mod blends the four table taps of (query, key).

    The table is padded with the zeros that lie outside it, so that taps need a clamp only.
    """
    height, width = q.shape[2:]
    per_group = heads // pos.shape[1]
    spans = torch.tensor(rpe_table.shape[1:], device=q.device) - 1
    grid = reference.query_grid(height, width, version, dtype=pos.dtype, device=pos.device)
    rows, columns = grid[:, 0, 0] * (spans[0] / 4) + 1, grid[0, :, 1] * (spans[1] / 4) + 1
    shift_y, shift_x = (s.contiguous() for s in ((2 - pos) * (spans / 4)).unbind(-1))
    table = F.pad(rpe_table, (1, 2, 1, 2))
    bottom, right = rpe_table.shape[1] + 1, rpe_table.shape[2] + 1

    def score_mod(score, b, h, i, j):
        y = torch.clamp(rows[i // width] + shift_y[b, h // per_group, j], 0, bottom)
        x = torch.clamp(columns[i % width] + shift_x[b, h // per_group, j], 0, right)
        y0, x0 = y.to(torch.int32), x.to(torch.int32)
        wy, wx = y - y0, x - x0
        low = table[h, y0, x0] * (1 - wx) + table[h, y0, x0 + 1] * wx
        high = table[h, y0 + 1, x0] * (1 - wx) + table[h, y0 + 1, x0 + 1] * wx
        return score + low * (1 - wy) + high * wy

    q4, k4, v4 = (_heads_last(t, heads) for t in (q, k, v))
    return _image(attention(q4, k4, v4, score_mod=score_mod), q)


def way(name: str, case: Case) -> Way:
    """The named way with the case's heads and version bound."""
    bound = {"heads": case.heads, "version": case.version}
    if name == "compiled":
        plain = functools.partial(reference.deform_attention, **bound)
        return torch.compile(plain, dynamic=False)
    if name == "flex":
        # Alone: it takes no captured tensor that is made in the compiled graph.
        attention = torch.compile(flex_attention, dynamic=False)
        return functools.partial(_flex, attention=attention, **bound)
    plain_ways = {
        "fused": functional.deform_attention,
        "reference": reference.deform_attention,
        "sdpa": _sdpa,
        "lean": _lean,
    }
    return functools.partial(plain_ways[name], **bound)


def inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensors, torch.Tensor]:
    """((q, k, v, pos, rpe_table), grad_out), the same for the same case whatever the way.

    Standard normal q and k give scores of unit variance. Keys stray from their reference points
    by about the distance to the next one; dat++ clamps them to the image.
    """
    made = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made)

    size = (case.batch, case.channels)
    image = (*size, case.height, case.width)
    q, k, v = normal(*image), normal(*size, case.keys), normal(*size, case.keys)
    table = 0.5 * normal(case.heads, *(2 * t - 1 for t in case.table))
    points = reference.reference_points(case.key_height, case.key_width, case.version)
    spacing = torch.tensor((2 / case.key_height, 2 / case.key_width))
    pos = points.flatten(0, 1) + spacing * normal(case.batch, case.groups, case.keys, 2)
    if case.version == "dat++":
        pos = pos.clamp(-1, 1)
    grad_out = normal(*image).to(device, dtype)
    exact = dtype == torch.float64
    moved = [t.to(device, dtype) for t in (q, k, v)]
    pos = pos.to(device, torch.float64 if exact else torch.float32)
    return (*moved, pos, table.to(device, dtype)), grad_out


def call(compute: Way, tensors: Tensors, grad_out: torch.Tensor, direction: str) -> Callable:
    """What is timed: () -> out, or () -> (out, gradients of every input)."""
    if direction == "forward":

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return compute(*tensors)

        return forward

    leaves = [t.detach().requires_grad_() for t in tensors]

    def forward_backward() -> tuple:
        out = compute(*leaves)
        return out.detach(), torch.autograd.grad(out, leaves, grad_out)

    return forward_backward
