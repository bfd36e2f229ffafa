"""The two operators as loops over Python floats, for checking what is fast: see the formulas in
dat_cuda.reference. Nothing here is shared with the package."""

import math
from itertools import product

import numpy as np


def reference_point(i, size, version):
    return (i + 0.5) / (size if version == "dat" else max(size - 1, 1)) * 2 - 1


def query_point(i, size, version):
    if size == 1:
        return 0.0
    return (i + 0.5) / size * 2 - 1 if version == "dat" else i / (size - 1) * 2 - 1


def bound(offset, i, size, factor, version):
    ref = reference_point(i, size, version)
    if version == "dat":
        if factor > 0:
            return ref + math.tanh(offset) * factor / size
        return ref + offset if factor == 0 else math.tanh(offset + ref)
    if factor >= 0:
        return ref + math.tanh(offset) * factor / max(size - 1, 1)
    return min(max(offset + ref, -1.0), 1.0) if not math.isnan(offset) else math.nan


def bilinear(plane, y, x):
    """plane [H, W] at (y, x), -1 and 1 being the centres of its outermost cells."""
    if math.isnan(y) or math.isnan(x):
        return math.nan
    if math.isinf(y) or math.isinf(x):
        return 0.0
    height, width = plane.shape
    row, column = (y + 1) / 2 * (height - 1), (x + 1) / 2 * (width - 1)
    total = 0.0
    for a, b in product((0, 1), repeat=2):
        r, c = math.floor(row) + a, math.floor(column) + b
        if 0 <= r < height and 0 <= c < width:
            total += (1 - abs(row - r)) * (1 - abs(column - c)) * plane[r, c]
    return total


def deform_sample(x, offset, groups, factor, version):
    """x [B, C, H, W], offset [B*G, 2, Hk, Wk] -> sampled [B, C, N], pos [B, G, N, 2]."""
    batch, channels = x.shape[:2]
    hk, wk = offset.shape[2:]
    sampled = np.empty((batch, channels, hk * wk))
    pos = np.empty((batch, groups, hk * wk, 2))
    for b, g, i, j in product(range(batch), range(groups), range(hk), range(wk)):
        dy, dx = offset[b * groups + g, :, i, j]
        y = bound(dy, i, hk, factor, version)
        x_ = bound(dx, j, wk, factor, version)
        pos[b, g, i * wk + j] = y, x_
        per_group = channels // groups
        for c in range(g * per_group, (g + 1) * per_group):
            sampled[b, c, i * wk + j] = bilinear(x[b, c], y, x_)
    return sampled, pos


def deform_attention(q, k, v, pos, table, heads, bias, scale, version):
    """q [B, C, H, W], k, v [B, C, N], pos [B, G, N, 2] or None, bias [B, heads, H*W, N] or None."""
    batch, channels, height, width = q.shape
    keys, dim = k.shape[2], channels // heads
    scale = dim**-0.5 if scale is None else scale
    out = np.empty_like(q)
    for b, h, i, j in product(range(batch), range(heads), range(height), range(width)):
        mine = slice(h * dim, (h + 1) * dim)
        scores = np.empty(keys)
        for n in range(keys):
            scores[n] = scale * sum(q[b, mine, i, j] * k[b, mine, n])
            if pos is not None:
                y, x = pos[b, h // (heads // pos.shape[1]), n]
                dy = (query_point(i, height, version) - y) / 2
                dx = (query_point(j, width, version) - x) / 2
                scores[n] += bilinear(table[h], dy, dx)
            if bias is not None:
                scores[n] += bias[b, h, i * width + j, n]
        weights = np.exp(scores - scores.max())
        out[b, mine, i, j] = (v[b, mine] * weights).sum(-1) / weights.sum()
    return out
