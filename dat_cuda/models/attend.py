"""Dense attention with an additive bias: for windows, neighbourhoods and pyramids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dat_cuda._autograd import first_derivative_only
from dat_cuda.functional import backend_name, deform_attention, has_cpu_ways, is_native

_ops = torch.ops.dat_cuda


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


def attend_windows(
    qkv: Tensor, parts: list[Windows], *, heads: int, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """Attention within windows of pixels: qkv [rows, 3 C] -> [rows, C].

    Every row is a query of one window; it may be a key of many.
    """
    if has_cpu_ways(qkv):
        biases = [part.bias.to(qkv.dtype) for part in parts]
        return _AttendWindows.apply(qkv, parts, (heads, scale, dropout_p), *biases)
    done = []
    for part in parts:
        q, k, v = _operands(qkv, part.queries, part.keys)
        out = attend(q, k, v, part.bias, heads=heads, scale=scale, dropout_p=dropout_p)
        done.append(out.transpose(1, 2).flatten(0, 1))
    order = torch.cat([part.queries.flatten() for part in parts])
    inverse = torch.empty_like(order)
    inverse.scatter_(0, order, torch.arange(len(order), device=order.device))
    return torch.cat(done).index_select(0, inverse)


class _AttendWindows(torch.autograd.Function):
    """By operators that read rows, and write or add to them, where they lie (csrc/windows.h)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, parts: list, settings: tuple, *biases: Tensor) -> Tensor:
        qkv = qkv.contiguous()
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        ctx.windows, ctx.settings, lses = [], settings, []
        for part, bias in zip(parts, biases, strict=True):
            seed = torch.randint(2**62, (1,)) if settings[-1] else None
            rows = part.queries.contiguous(), part.keys.contiguous()
            lse = _ops.window_attention_forward(qkv, *rows, bias, seed, *settings, out)
            ctx.windows.append((*rows, seed))
            lses.append(lse)
        ctx.save_for_backward(qkv, out, *biases, *lses)
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple:
        qkv, out, *saved = ctx.saved_tensors
        biases, lses = saved[: len(ctx.windows)], saved[len(ctx.windows) :]
        grad = grad.contiguous()
        grad_qkv = torch.zeros_like(qkv)
        grad_biases = [
            _ops.window_attention_backward(
                grad, qkv, queries, keys, bias, seed, out, lse, *ctx.settings, grad_qkv
            )
            for (queries, keys, seed), bias, lse in zip(ctx.windows, biases, lses, strict=True)
        ]
        return grad_qkv, None, None, *grad_biases


def _operands(qkv: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [windows, C, M], k, v [windows, C, N]: the taken-out rows, seen channels first."""
    channels = qkv.shape[1] // 3
    q, kv = (
        rows.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
        for rows, index in ((qkv[:, :channels], queries), (qkv[:, channels:], keys))
    )
    return q, *kv.chunk(2, dim=1)
