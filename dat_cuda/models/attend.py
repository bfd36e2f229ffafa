"""Dense attention with an additive bias: for windows, neighbourhoods and pyramids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from dat_cuda.attention import has_cpu_ways
from dat_cuda.functional import backend_name, deform_attention, is_native

CHUNK = 2**21  # bytes of q, k and v that are taken out at a time


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *,
    heads: int,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(q.k * scale + bias) . v with dropout of the weights.

    q [B, C, M], k, v [B, C, N], bias [heads, M, N] or None -> [B, C, M], C = (heads, channels).

    On the CPU this is the fused operator without positions, the only way there that has a gradient
    of the bias and never stores the scores; on other devices scaled_dot_product_attention; and on
    the reference back end the formula.
    """
    bias = None if bias is None else bias.to(q.dtype)
    if q.device.type == "cpu" and is_native(q):
        bias = None if bias is None else bias.unsqueeze(0)
        out = deform_attention(
            q.unsqueeze(2), k, v, heads=heads, bias=bias, scale=scale, dropout_p=dropout_p
        )
        return out.squeeze(2)
    q, k, v = (rearrange(t, "b (h c) n -> b h n c", h=heads) for t in (q, k, v))
    if backend_name() == "reference":
        scores = torch.einsum("bhmc,bhnc->bhmn", q * scale, k)
        weights = (scores if bias is None else scores + bias).softmax(dim=-1)
        out = torch.einsum("bhmn,bhnc->bhmc", F.dropout(weights, dropout_p), v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout_p, scale=scale)
    return rearrange(out, "b h n c -> b (h c) n")


@dataclass
class Windows:
    """Windows that share a bias [heads, M, N]: which rows are their queries [windows, M] and their
    keys [windows, N]."""

    queries: Tensor
    keys: Tensor
    bias: Tensor

    def chunks(self, row_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
        """queries and keys of some windows at a time, so that what is taken out stays in cache."""
        count = max(1, CHUNK // (row_bytes * self.keys.shape[1]))
        return zip(self.queries.split(count), self.keys.split(count), strict=True)


def attend_windows(
    qkv: Tensor, parts: list[Windows], *, heads: int, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """Attention within windows of pixels: qkv [rows, 3 C] -> [rows, C].

    Every row is a query of one window; it may be a key of many.
    """
    order = torch.cat([part.queries.flatten() for part in parts])
    inverse = torch.empty_like(order)
    inverse.scatter_(0, order, torch.arange(len(order), device=order.device))
    if has_cpu_ways(qkv):
        biases = [part.bias.to(qkv.dtype) for part in parts]
        settings = heads, scale, dropout_p
        return _AttendWindows.apply(qkv, parts, order, inverse, settings, *biases)
    done = []
    for part in parts:
        q, k, v = _operands(qkv, part.queries, part.keys)
        out = attend(q, k, v, part.bias, heads=heads, scale=scale, dropout_p=dropout_p)
        done.append(_pixels(out).flatten(0, 1))
    return torch.cat(done).index_select(0, inverse)


class _AttendWindows(torch.autograd.Function):
    """Some windows at a time: what is taken out for them stays in cache and does not outlive the
    call; the gradient takes it out again. `done` has the rows in the order of the windows."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, parts: list, order: Tensor, inverse: Tensor, settings: tuple,
        *biases: Tensor,
    ) -> Tensor:  # fmt: skip
        heads, scale, dropout_p = settings
        done = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        kept, start = [], 0
        for part, bias in zip(parts, biases, strict=True):
            for queries, keys in part.chunks(qkv[0].nbytes):
                q, k, v = _operands(qkv, queries, keys)
                seed = torch.randint(2**62, (1,)) if dropout_p else None
                out, lse = torch.ops.dat_cuda.deform_attention_forward(
                    q.unsqueeze(2), k, v, None, None, bias.unsqueeze(0), seed,
                    heads, scale, dropout_p, "dat++",
                )  # fmt: skip
                here = slice(start, start := start + queries.numel())
                done[here].unflatten(0, queries.shape).copy_(_pixels(out))
                kept.append((here, seed, lse))
        ctx.save_for_backward(qkv, done, order, inverse, *biases)
        ctx.parts, ctx.settings, ctx.kept = parts, settings, kept
        return done.index_select(0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        qkv, done, order, inverse, *biases = ctx.saved_tensors
        heads, scale, dropout_p = ctx.settings
        channels = done.shape[1]
        grad_done = grad.index_select(0, order)
        # Where the keys of a window are its queries, their gradients go where those of q go.
        apart = any(part.keys is not part.queries for part in ctx.parts)
        grad_rows = qkv.new_empty(len(qkv), channels * (1 if apart else 3))
        grad_kv = qkv.new_zeros(len(qkv), 2 * channels) if apart else None
        grad_biases = [torch.zeros_like(bias) for bias in biases]
        kept = iter(ctx.kept)
        for part, bias, grad_bias in zip(ctx.parts, biases, grad_biases, strict=True):
            for queries, keys in part.chunks(qkv[0].nbytes):
                here, seed, lse = next(kept)
                q, k, v = _operands(qkv, queries, keys)
                out, grad_out = (
                    rows[here].unflatten(0, queries.shape).transpose(1, 2).unsqueeze(2)
                    for rows in (done, grad_done)
                )
                *grads, _, _, grad_dense = torch.ops.dat_cuda.deform_attention_backward(
                    grad_out, q.unsqueeze(2), k, v, None, None, bias.unsqueeze(0), seed, out, lse,
                    heads, scale, dropout_p, "dat++", True, False,
                )  # fmt: skip
                grad_bias += grad_dense.squeeze(0)
                grads = [_pixels(each) for each in grads]
                if grad_kv is not None:
                    rows = torch.cat(grads[1:], dim=2).flatten(0, 1)
                    grad_kv.index_add_(0, keys.flatten(), rows)
                    grads = grads[:1]
                places = grad_rows[here].unflatten(0, queries.shape).split(channels, dim=2)
                for place, each in zip(places, grads, strict=True):
                    place.copy_(each)
        grad_qkv = grad_rows.index_select(0, inverse)
        if grad_kv is not None:
            grad_qkv = torch.cat((grad_qkv, grad_kv), dim=1)
        return grad_qkv, None, None, None, None, *grad_biases


def _operands(qkv: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [windows, C, M], k, v [windows, C, N]: the taken-out rows, seen channels first."""
    channels = qkv.shape[1] // 3
    q, kv = (
        rows.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
        for rows, index in ((qkv[:, :channels], queries), (qkv[:, channels:], keys))
    )
    return q, *kv.chunk(2, dim=1)


def _pixels(windows: Tensor) -> Tensor:
    """[windows, pixels, C] of [windows, C, pixels] or [windows, C, 1, pixels]."""
    return windows.flatten(2).transpose(1, 2)
