"""What a converted module is: see convert."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from dat_cuda.attention import DAttention

Size = tuple[int, int]
# What a module returns: () for y alone, else the kinds of a tuple's values, beginning with "y".
Form = tuple[str | None, ...]
MAP, UNKNOWN = "attention map", "unknown"

PROJECTIONS = ("proj_q", "proj_k", "proj_v", "proj_out")
PARTS = (*PROJECTIONS, "conv_offset", "attn_drop", "proj_drop")


class Refusal(Exception):
    """Why a module is left alone."""


class ConvertedDAttention(DAttention):
    """What `convert` makes of a module: a DAttention that returns what that module returned."""

    returns: Form = ("y", "pos", "reference")

    def forward(self, x: Tensor) -> Any:
        y, pos, reference = super().forward(x)
        if not self.returns:
            return y
        others = {"pos": pos, "reference": reference}
        kinds = self.returns[1:]
        return (y, *(None if kind is None else others[kind].to(x.dtype) for kind in kinds))


def hooks_of(module: nn.Module) -> dict[str, dict]:
    """The module's registries of hooks."""
    return {name: v for name, v in vars(module).items() if "hooks" in name and isinstance(v, dict)}


def settings_of(module: Any, version: str) -> dict[str, Any]:
    """The attributes that DAttention computes with, read off a module of the published make."""
    first = module.conv_offset[0]
    channels = module.n_heads * module.n_head_channels
    settings = {
        "version": version,
        "nc": channels,
        "scale": module.n_head_channels**-0.5,
        "n_group_channels": channels // module.n_groups,
        # The class of 2022 does not keep these.
        "ksize": first.kernel_size[0],
        "padding": first.padding[0],
        "stride": first.stride[0],
    }
    flags = ("use_pe", "dwc_pe", "no_off", "fixed_pe", "log_cpb")
    return settings | {flag: getattr(module, flag, False) for flag in flags}


def become(module: nn.Module, settings: dict[str, Any]) -> None:
    module.__class__ = ConvertedDAttention
    vars(module).update(settings)
    fused = cast(DAttention, module)
    fused.encoding = fused._choose_encoding()
