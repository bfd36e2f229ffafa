"""The two fused operators of deformable attention, with autograd.

Vision Transformer with Deformable Attention (CVPR 2022) and DAT++ (2023). Everything between the
projections is here: :func:`deform_sample` takes offsets to sampled features,
:func:`deform_attention` takes queries, keys and values to the attention's output. Both run native
kernels where the device has them and :mod:`dat_cuda.reference` elsewhere. Coordinates are in the
order (y, x).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dat_cuda import _C, reference

from ._autograd import no_second_derivative, run_below_autograd

__all__ = ["backend", "deform_attention", "deform_sample"]

BACKENDS = ("auto", "reference")
NATIVE_DEVICES = ("cpu", "cuda") if _C.build_info()["cuda"] else ("cpu",)

_ops = torch.ops.dat_cuda
_backend = "auto"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose, for the whole process, what computes the operators inside the ``with`` block.

    ``"auto"``: native kernels where the device has them, the reference elsewhere (the default).
    ``"reference"``: plain PyTorch everywhere.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def backend_name() -> str:
    """What :func:`backend` chose last, "auto" at first."""
    return _backend


def is_native(features: Tensor) -> bool:
    """Whether operators on these features run native kernels here and now."""
    return _backend != "reference" and features.device.type in NATIVE_DEVICES


def has_cpu_ways(x: Tensor) -> bool:
    """Whether to compute around the operators as native CPU kernels deserve; elsewhere, and in what
    a compiler sees, the plain module is best."""
    return x.device.type == "cpu" and is_native(x) and not torch.compiler.is_compiling()


def _accumulation_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _readable(parameter: Tensor, features: Tensor) -> Tensor:
    """An offset or a table in a dtype that the operators read: cast only if it has neither."""
    accumulation = _accumulation_dtype(features)
    return parameter if parameter.dtype == features.dtype else parameter.to(accumulation)


def _check_device(device: torch.device, **tensors: Tensor | None) -> None:
    # Before the dispatcher: it would run the fake kernel if one of them is a meta tensor.
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device} as the others, got {tensor.device}")


def deform_sample(
    x: Tensor,
    offset: Tensor,
    *,
    groups: int,
    offset_range_factor: float,
    version: str = "dat++",
) -> tuple[Tensor, Tensor]:
    r"""Sample features at reference points moved by learned, bounded offsets.

    With K reference points on an axis, D = K (``"dat"``) or max(K - 1, 1) (``"dat++"``), and f the
    ``offset_range_factor``::

        ref(i) = (i + 1/2) / D * 2 - 1            (K = 1: 0)
        pos    = ref + tanh(offset) * f / D       f > 0
                 ref + offset  |  ref             f = 0, "dat" | "dat++"
                 tanh(offset + ref)  |  clamp(offset + ref, -1, 1)   f < 0, "dat" | "dat++"
        sampled[c, n] = bilinear(x[c], pos[n])    align_corners, zeros outside

    Source: "Vision Transformer with Deformable Attention", CVPR 2022, and DAT++, 2023, with their
    published code.

    Args:
        x: ``[B, C, H, W]``, float32, float64, float16 or bfloat16, any strides.
        offset: ``[B * G, 2, Hk, Wk]`` as the offset network gives it, channel 0 along y. Used in
            float32 (float64 when x is float64).
        groups: G, divides C; group g's channels are sampled at group g's positions.
        offset_range_factor: f above.
        version: ``"dat"`` or ``"dat++"``.

    Returns:
        ``sampled [B, C, N]`` in the dtype of x, N = Hk * Wk, and ``pos [B, G, N, 2]`` in float32
        (float64 when x is float64). Both are differentiable in ``x`` and ``offset``. A NaN position
        gives NaN features, an infinite one gives zeros. On the CPU ``sampled`` is in channels-last
        memory if x lies so, else contiguous.

    Raises:
        RuntimeError, ValueError: an argument has the wrong shape, dtype or value.
    """
    _check_device(x.device, offset=offset)
    if not is_native(x):
        return reference.deform_sample(
            x, offset, groups=groups, offset_range_factor=offset_range_factor, version=version
        )
    settings = groups, float(offset_range_factor), version
    return _Sample.call(x, _readable(offset, x), *settings)


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
    r"""Attention of a query map to sampled keys, with a bias interpolated at their positions.

    For head h with d = C / heads channels, query m at lattice point (i, j) and key n::

        s[m, n]   = scale * q[m] . k[n] + bilinear(rpe_table[h], (grid(i, j) - pos[n]) / 2) + bias
        out[m]    = sum over n of dropout(softmax_n(s[m, n])) v[n]
        grid(i)   = (2 i + 1) / L - 1  ("dat"),  2 i / (L - 1) - 1  ("dat++"; 0 where L = 1)

    The scores are never in memory: the forward keeps their log-sum-exp, the backward computes them
    again. Source: as :func:`deform_sample`.

    Args:
        q: ``[B, C, H, W]``, float32, float64, float16 or bfloat16, any strides.
        k, v: ``[B, C, N]``, dtype of q, any strides.
        pos: ``[B, G, N, 2]`` in (y, x); G divides heads, and heads / G neighbouring heads share a
            group. Only the table uses it. Computed with in float32 (float64 for float64 q).
        rpe_table: ``[heads, Th, Tw]`` of any size, zeros outside, align_corners. Computed with in
            float32 (float64 for float64 q). Needs ``pos``. Finite: next to an infinite value the
            scores are NaN, on CUDA for up to seven more rows of queries. A ``bias`` masks keys.
        heads: number of heads, divides C.
        bias: dense additive bias, broadcastable to ``[B, heads, H * W, N]``, dtype of q. It masks
            keys with -inf, or finite values; but on CUDA the gradients of a row whose keys all have
            -1e8 or less are too large, by their number.
        scale: factor of q . k; by default ``(C / heads) ** -0.5``.
        dropout_p: rate at which probabilities are dropped; ``torch.manual_seed`` reproduces it.
        version: ``"dat"`` or ``"dat++"``: the query grid.

    Returns:
        ``out [B, C, H, W]`` in the dtype of q, differentiable in q, k, v, pos, rpe_table and bias;
        on the CPU in channels-last memory if q lies so, else contiguous.
        A NaN position gives NaN where its key takes part, an infinite one no table bias.

    Under ``torch.autocast`` float32 q, k, v and bias are cast to the autocast dtype. On CUDA
    the gradients of rpe_table, and of a bias that is broadcast, repeat bit by bit only where
    ``torch.use_deterministic_algorithms`` asks for it.

    Raises:
        RuntimeError, ValueError: an argument has the wrong shape, dtype or value.
    """
    _check_device(q.device, k=k, v=v, pos=pos, rpe_table=rpe_table, bias=bias)
    if heads < 1 or q.dim() != 4 or q.shape[1] < heads or q.shape[1] % heads:
        raise ValueError(
            f"q must have shape [B, C, H, W] with C a positive multiple of heads, got "
            f"{list(q.shape)} and {heads} heads"
        )
    q, k, v, bias = _autocast(q, k, v, bias)
    if not is_native(q):
        return reference.deform_attention(
            q, k, v, pos, rpe_table,
            heads=heads, bias=bias, scale=scale, dropout_p=dropout_p, version=version,
        )  # fmt: skip
    if scale is None:
        scale = (q.shape[1] // heads) ** -0.5
    if rpe_table is None:
        pos = None
    elif pos is not None:
        pos, rpe_table = pos.to(_accumulation_dtype(q)), _readable(rpe_table, q)
    if bias is not None:
        bias = _four_dims(bias, q, k)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=q.device)
    out, _ = _Attention.call(
        q, k, v, pos, rpe_table, bias, seed, heads, float(scale), float(dropout_p), version
    )
    return out


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(q: Tensor, *others: Tensor | None) -> list[Any]:
    """Features in the autocast dtype where autocast is on for their device."""
    tensors = [q, *others]
    if not is_autocast(q):
        return tensors
    dtype = torch.get_autocast_dtype(q.device.type)
    return [t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors]


def _four_dims(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The bias with all four dimensions; its gradient is dense along queries and keys."""
    bias = bias[(None,) * (4 - bias.dim())]
    dense = (q.shape[2] * q.shape[3], k.shape[-1])
    fits = all(size in (1, full) for size, full in zip(bias.shape[2:], dense, strict=False))
    # A wrong shape is left to the operator, which says what is wrong.
    return bias.expand(-1, -1, *dense) if bias.requires_grad and bias.dim() == 4 and fits else bias


# Registration: what a traced graph sees, and the gradients.


def _new_features(x: Tensor, pixels: int) -> Tensor:
    """[B, C, pixels] for x [B, C, ...], as csrc/ops.h lays it out."""
    if x.device.type != "cpu" or x.stride(1) != 1:
        return x.new_empty((x.shape[0], x.shape[1], pixels))
    return x.new_empty((x.shape[0], pixels, x.shape[1])).transpose(1, 2)


def _laid_out_like(x: Tensor) -> Tensor:
    """An output for features [B, C, H, W] or [B, C, N]."""
    pixels = x.shape[2] * x.shape[3] if x.dim() == 4 else x.shape[2]
    return _new_features(x, pixels).view(x.shape)


@torch.library.register_fake("dat_cuda::deform_sample_forward")
def _(x, offset, groups, offset_range_factor, version):
    keys = offset.shape[2] * offset.shape[3]
    pos = x.new_empty((x.shape[0], groups, keys, 2), dtype=_accumulation_dtype(x))
    return _new_features(x, keys), pos


@torch.library.register_fake("dat_cuda::deform_sample_backward")
def _(grad_sampled, grad_pos, x, offset, groups, offset_range_factor, version):
    return _laid_out_like(x), offset.new_empty(offset.shape)


@torch.library.register_fake("dat_cuda::deform_attention_forward")
def _(q, k, v, pos, rpe_table, bias, seed, heads, scale, dropout_p, version):
    lse = (q.shape[0], heads, q.shape[2] * q.shape[3])
    return _laid_out_like(q), q.new_empty(lse, dtype=_accumulation_dtype(q))


@torch.library.register_fake("dat_cuda::deform_attention_backward")
def _(
    grad_out, q, k, v, pos, rpe_table, bias, seed, out, lse, heads, scale, dropout_p, version,
    bias_grad, deterministic,
):  # fmt: skip
    none = lse.new_empty((0,))
    return (
        _laid_out_like(q),
        _laid_out_like(k),
        _laid_out_like(v),
        none if rpe_table is None else pos.new_empty(pos.shape),
        none.clone() if rpe_table is None else rpe_table.new_empty(rpe_table.shape),
        q.new_empty(bias.shape) if bias is not None and bias_grad else none.clone(),
    )


class _Operator(torch.autograd.Function):
    """A registered forward operator with its gradient; both are also registered for tracing."""

    operator: str

    @staticmethod
    def traced(*args):
        """The registered operator, for tracing."""
        raise NotImplementedError

    @staticmethod
    def save(ctx, inputs, output) -> None:
        """Keep in ctx what backward needs."""
        raise NotImplementedError

    @classmethod
    def call(cls, *args):
        # Registered autograd costs more per call than a Function with everything in forward.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return cls.traced(*args)
        return cls.apply(*args)

    @classmethod
    def register(cls) -> None:
        name = f"dat_cuda::{cls.operator}"
        torch.library.register_autograd(name, cls.backward, setup_context=cls.save)
        backward_name = name.replace("_forward", "_backward")
        torch.library.register_autograd(backward_name, no_second_derivative)


class _Sample(_Operator):
    operator = "deform_sample_forward"

    @staticmethod
    def traced(*args):
        return run_below_autograd(_ops.deform_sample_forward.default, *args)

    @staticmethod
    def save(ctx, inputs, output):
        x, offset, *ctx.settings = inputs
        ctx.save_for_backward(x, offset)
        ctx.set_materialize_grads(False)

    @staticmethod
    def forward(ctx, *inputs):
        output = run_below_autograd(_ops.deform_sample_forward.default, *inputs)
        _Sample.save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad_sampled, grad_pos):
        x, offset = ctx.saved_tensors
        if grad_sampled is None:
            grad_sampled = x.new_zeros((*x.shape[:2], offset.shape[2] * offset.shape[3]))
        grad_x, grad_offset = run_below_autograd(
            _ops.deform_sample_backward.default, grad_sampled, grad_pos, x, offset, *ctx.settings
        )
        return grad_x, grad_offset, None, None, None


class _Attention(_Operator):
    operator = "deform_attention_forward"

    @staticmethod
    def traced(*args):
        return run_below_autograd(_ops.deform_attention_forward.default, *args)

    @staticmethod
    def save(ctx, inputs, output):
        *tensors, ctx.heads, ctx.scale, ctx.dropout_p, ctx.version = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)  # of lse there is none

    @staticmethod
    def forward(ctx, *inputs):
        output = run_below_autograd(_ops.deform_attention_forward.default, *inputs)
        _Attention.save(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])
        return output

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None:
            return (None,) * 11
        q, k, v, pos, rpe_table, bias, seed, out, lse = ctx.saved_tensors
        bias_grad = bias is not None and ctx.needs_input_grad[5]
        *grads, grad_pos, grad_table, grad_bias = run_below_autograd(
            _ops.deform_attention_backward.default,
            grad_out, q, k, v, pos, rpe_table, bias, seed, out, lse,
            ctx.heads, ctx.scale, ctx.dropout_p, ctx.version, bias_grad,
            torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        if rpe_table is None:
            grad_pos = grad_table = None
        return (*grads, grad_pos, grad_table, grad_bias if bias_grad else None, *(None,) * 5)


_Sample.register()
_Attention.register()
