"""Dense attention with an additive bias, as the window and neighbourhood blocks need it."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dat_cuda.functional import backend_name, deform_attention, is_native


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, heads: int, dropout_p: float = 0.0
) -> Tensor:
    """softmax(q.k / sqrt(C / heads) + bias) . v with dropout of the weights.

    q [B, M, C], k, v [B, N, C], bias [heads, M, N] or None -> [B, M, C], C = (heads, channels).

    On the CPU this is the fused operator without positions, the only way there that has a gradient
    of the bias and never stores the scores; on other devices scaled_dot_product_attention; and on
    the reference back end the formula.
    """
    if backend_name() == "reference":
        return _formula(q, k, v, bias, heads, dropout_p)
    if q.device.type == "cpu" and is_native(q):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        bias = None if bias is None else bias.unsqueeze(0).to(q.dtype)
        out = deform_attention(q.unsqueeze(2), k, v, heads=heads, bias=bias, dropout_p=dropout_p)
        return out.squeeze(2).transpose(1, 2)
    q, k, v = (rearrange(t, "b n (h c) -> b h n c", h=heads) for t in (q, k, v))
    bias = None if bias is None else bias.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p)
    return rearrange(out, "b h n c -> b n (h c)")


def _formula(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, dropout_p: float
) -> Tensor:
    q, k, v = (rearrange(t, "b n (h c) -> b h n c", h=heads) for t in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    weights = F.dropout(scores.softmax(dim=-1), dropout_p)
    return rearrange(weights @ v, "b h n c -> b n (h c)")
