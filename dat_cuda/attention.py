"""DAttention: the deformable attention module, parameter for parameter the published one."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .functional import deform_attention, deform_sample, has_cpu_ways
from .offsets import LayerNormProxy, is_usual, offsets
from .projections import is_channels_last, laid_out, project
from .reference import VERSIONS, query_grid, reference_points

Encoding = Literal["none", "rpe", "fixed", "log_cpb", "dwc"]


class DAttention(nn.Module):
    """Deformable attention of DAT (version "dat", CVPR 2022) and DAT++ (version "dat++", 2023).

        q      = proj_q(x)
        pos    = bound(conv_offset(q of each group))                     deform_sample
        k, v   = proj_k(xs), proj_v(xs),  xs = x sampled at pos          deform_sample
        y      = proj_out(softmax(q.k / sqrt(head_dim) + bias) . v)      deform_attention

    Arguments, attributes, initialisation, state_dict keys and results are those of the published
    DAttentionBaseline, so its checkpoints load unchanged. What `use_pe` switches on is the first
    that is set of

        dwc_pe     a 3x3 depthwise convolution of q, added after attention
        fixed_pe   a dense bias [heads, H*W, Hk*Wk]; only at q_size
        log_cpb    an MLP of sign(z) log2(|z| + 1)/3, z = 4 (query_grid - pos); "dat++" only
        none       a table sampled at (query_grid - pos)/2; any run-time H, W

    With `no_off` the keys are at the reference points and the offset network is frozen; in "dat++"
    they are the means of stride x stride pixels, and there is no position encoding.

    Args:
        q_size: (H, W) the module is made for: it gives the sizes of the parameters.
        kv_size: (Hk, Wk), used by "dat" only; "dat++" takes q_size // stride.
        n_heads, n_head_channels, n_groups: C = n_heads * n_head_channels; n_groups divides n_heads.
        attn_drop, proj_drop: dropout of the attention weights and of the result.
        stride, ksize: of the offset network. The 2022 code takes stage_idx in the place of ksize:
            give (9, 7, 5, 3)[stage_idx].
        offset_range_factor: see dat_cuda.deform_sample.

    Forward: x [B, C, H, W] -> (y [B, C, H, W], pos, reference), both [B, n_groups, Hk, Wk, 2] in
    (y, x), float32 (float64 for float64 inputs).

    Raises:
        ValueError: arguments that cannot work, or an x that does not fit them.
    """

    rpe_table: Any  # a parameter, a module or None, as the encoding is

    def __init__(
        self,
        q_size: tuple[int, int],
        kv_size: tuple[int, int],
        n_heads: int,
        n_head_channels: int,
        n_groups: int,
        attn_drop: float,
        proj_drop: float,
        stride: int,
        offset_range_factor: float,
        use_pe: bool,
        dwc_pe: bool,
        no_off: bool,
        fixed_pe: bool,
        ksize: int,
        log_cpb: bool = False,
        *,
        version: str = "dat++",
    ) -> None:
        super().__init__()
        _check_arguments(locals())
        self.version = version
        self.dwc_pe = dwc_pe
        self.fixed_pe = fixed_pe
        self.log_cpb = log_cpb
        self.use_pe = use_pe
        self.no_off = no_off
        self.n_heads = n_heads
        self.n_head_channels = n_head_channels
        self.scale = n_head_channels**-0.5
        self.nc = n_heads * n_head_channels
        self.n_groups = n_groups
        self.n_group_heads = n_heads // n_groups
        self.n_group_channels = self.nc // n_groups
        self.q_h, self.q_w = q_size
        self.kv_h, self.kv_w = (
            kv_size if version == "dat" else (self.q_h // stride, self.q_w // stride)
        )
        self.stride = stride
        self.ksize = ksize
        self.offset_range_factor = offset_range_factor

        self.padding = 0 if version == "dat++" and ksize == stride else ksize // 2
        channels = self.n_group_channels
        # The order of creation is the published one: a seed gives the published initial weights.
        self.conv_offset = nn.Sequential(
            nn.Conv2d(channels, channels, ksize, stride, self.padding, groups=channels),
            LayerNormProxy(channels),
            nn.GELU(),
            nn.Conv2d(channels, 2, 1, bias=False),
        )
        if no_off:
            self.conv_offset.requires_grad_(False)
        self.proj_q = nn.Conv2d(self.nc, self.nc, 1)
        self.proj_k = nn.Conv2d(self.nc, self.nc, 1)
        self.proj_v = nn.Conv2d(self.nc, self.nc, 1)
        self.proj_out = nn.Conv2d(self.nc, self.nc, 1)
        self.proj_drop = nn.Dropout(proj_drop, inplace=True)
        self.attn_drop = nn.Dropout(attn_drop, inplace=True)
        self.encoding = self._choose_encoding()
        self.rpe_table = self._make_rpe_table()

    def _choose_encoding(self) -> Encoding:
        if not self.use_pe or (self.no_off and self.version == "dat++"):
            return "none"
        if self.dwc_pe:
            return "dwc"
        if self.fixed_pe:
            return "fixed"
        return "log_cpb" if self.log_cpb else "rpe"

    def _make_rpe_table(self) -> nn.Module | nn.Parameter | None:
        if self.encoding == "none":
            return None
        if self.encoding == "dwc":
            return nn.Conv2d(self.nc, self.nc, 3, padding=1, groups=self.nc)
        if self.encoding == "log_cpb":
            return nn.Sequential(
                nn.Linear(2, 32),
                nn.ReLU(inplace=True),
                nn.Linear(32, self.n_group_heads, bias=False),
            )
        if self.encoding == "fixed":
            keys = self._key_size(self.q_h, self.q_w)
            if keys != (self.kv_h, self.kv_w):
                raise ValueError(
                    f"fixed_pe needs as many keys as kv_size {(self.kv_h, self.kv_w)} (q_size // "
                    f"stride in 'dat++'), but q_size, stride and ksize make {keys}"
                )
            shape = (self.q_h * self.q_w, self.kv_h * self.kv_w)
        else:
            height, width = (
                (self.kv_h, self.kv_w) if self.version == "dat" else (self.q_h, self.q_w)
            )
            shape = (2 * height - 1, 2 * width - 1)
        return nn.Parameter(nn.init.trunc_normal_(torch.zeros(self.n_heads, *shape), std=0.01))

    def _key_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of the offset network's result, or of the pooled map that stands in for it."""
        if self.no_off and self.version == "dat++":
            return height // self.stride, width // self.stride
        margin = 2 * self.padding - self.ksize
        return (height + margin) // self.stride + 1, (width + margin) // self.stride + 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.dim() != 4 or x.shape[1] != self.nc:
            raise ValueError(f"x must have shape [B, {self.nc}, H, W], got {list(x.shape)}")
        out, pos, reference = self._attend(x)
        y = project(self.proj_out, out, is_channels_last(x))
        return self.proj_drop(y), pos, reference

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All but the last projection, whose result may lie where this has put what it made."""
        x = laid_out(x)  # once for projection and samples
        q = project(self.proj_q, x)
        offset, q = self._offsets(q)
        sampled, pos, reference = self._keys(x, offset)
        sampled = laid_out(sampled)  # once for both projections
        k = project(self.proj_k, sampled)
        v = project(self.proj_v, sampled)
        table = self.rpe_table if self.encoding == "rpe" else None
        out = deform_attention(
            q,
            k,
            v,
            pos.flatten(2, 3) if table is not None else None,
            table,
            heads=self.n_heads,
            bias=self._dense_bias(q, pos),
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.attn_drop.training else 0.0,
            version=self.version,
        )
        if self.encoding == "dwc":
            out = out + self.rpe_table(q)
        return out, pos, reference

    def _offsets(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """[B * G, 2, Hk, Wk]; and q for what follows (offsets.depthwise)."""
        batch, _, height, width = q.shape
        if self.no_off:
            # Factor 0 keeps these zeros zero: tanh of a reference point would move it.
            return q.new_zeros(batch * self.n_groups, 2, *self._key_size(height, width)), q
        if has_cpu_ways(q) and is_usual(self.conv_offset, q):
            return offsets(self.conv_offset, q)
        if has_cpu_ways(q) and height * width <= 256:
            # A small map's depthwise backward is faster channels-last (docs/cpu-kernels.md).
            grouped = rearrange(q, "b (g c) y x -> b g y x c", g=self.n_groups).contiguous()
            return self.conv_offset(grouped.flatten(0, 1).permute(0, 3, 1, 2)), q
        return self.conv_offset(q.reshape(-1, self.n_group_channels, height, width)), q

    def _keys(self, x: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sampled [B, C, N], pos and reference [B, G, Hk, Wk, 2]."""
        hk, wk = offset.shape[2:]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        reference = _reference_points(x, hk, wk, self.version, dtype)
        reference = reference.expand(x.shape[0], self.n_groups, -1, -1, -1)
        if self.no_off and self.version == "dat++":
            sampled = F.avg_pool2d(x, self.stride, self.stride).flatten(2)
            pos = reference.clamp(-1.0, 1.0) if self.offset_range_factor < 0 else reference
            return sampled, pos, reference
        sampled, pos = deform_sample(
            x,
            offset,
            groups=self.n_groups,
            offset_range_factor=0.0 if self.no_off else self.offset_range_factor,
            version=self.version,
        )
        return sampled, pos.unflatten(2, (hk, wk)), reference

    def _dense_bias(self, q: Tensor, pos: Tensor) -> Tensor | None:
        """[1 or B, heads, H*W, N] of fixed_pe and log_cpb."""
        height, width = q.shape[2:]
        if self.encoding == "fixed":
            if (height, width) != (self.q_h, self.q_w):
                raise ValueError(
                    f"x must be {self.q_h} x {self.q_w}, the q_size that the dense bias of "
                    f"fixed_pe was made for, got {height} x {width}"
                )
            return self.rpe_table.unsqueeze(0)
        if self.encoding == "log_cpb":
            queries = query_grid(height, width, self.version, dtype=pos.dtype, device=pos.device)
            z = 4.0 * (queries.flatten(0, 1).unsqueeze(1) - pos.flatten(2, 3).unsqueeze(2))
            z = z.sign() * torch.log2(z.abs() + 1.0) / 3.0
            z = z.to(self.rpe_table[0].weight.dtype)
            return rearrange(self.rpe_table(z), "b g m n h -> b (g h) m n")
        return None


def _reference_points(
    x: Tensor, height: int, width: int, version: str, dtype: torch.dtype
) -> Tensor:
    """[height, width, 2] for an input x: kept between calls, since on a GPU making them takes more
    launches than all the rest. Not so while tracing, which must not leave its tensors behind."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return reference_points(height, width, version, dtype=dtype, device=x.device)
    return _kept_reference_points(height, width, version, dtype, x.device)


@functools.lru_cache(maxsize=64)
def _kept_reference_points(
    height: int, width: int, version: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):
        return reference_points(height, width, version, dtype=dtype, device=device)


def _check_arguments(given: dict) -> None:
    for name in ("n_heads", "n_head_channels", "n_groups", "stride", "ksize"):
        if given[name] < 1:
            raise ValueError(f"{name} must be positive, got {given[name]}")
    for name in ("q_size", "kv_size"):
        size = given[name]
        if not isinstance(size, (tuple, list)) or len(size) != 2 or min(size) < 1:
            raise ValueError(f"{name} must be a pair (height, width) of positive sizes, got {size}")
    if given["n_heads"] % given["n_groups"]:
        raise ValueError(
            f"n_groups must divide n_heads {given['n_heads']}, got {given['n_groups']}"
        )
    if given["version"] not in VERSIONS:
        raise ValueError(f"version must be one of {VERSIONS}, got {given['version']!r}")
    if given["log_cpb"] and given["version"] == "dat":
        raise ValueError("log_cpb exists only in version 'dat++', got True with version 'dat'")
