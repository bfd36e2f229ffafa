"""The published models by name, with random weights: load_checkpoint loads the published ones.

Every builder takes arguments of DAT that differ, such as num_classes or features_only.
"""

from __future__ import annotations

from typing import Any

from dat_cuda.models.dat import DAT

DAT_2022: dict[str, Any] = {
    "version": "dat",
    "depths": (2, 2, 6, 2),
    "stage_spec": ("LS", "LS", "LD" * 3, "LD"),
    "strides": (-1, -1, 1, 1),
    "offset_range_factor": (-1, -1, 2, 2),
    "use_pes": (False, False, True, True),
}
DEEPER = {"depths": (2, 2, 18, 2), "stage_spec": ("LS", "LS", "LD" * 9, "LD")}

DAT_2023: dict[str, Any] = {
    "version": "dat++",
    "depths": (2, 4, 18, 2),
    "stage_spec": ("ND", "NDND", "ND" * 9, "DD"),
    "strides": (8, 4, 2, 1),
    "offset_range_factor": (-1, -1, -1, -1),
    "use_pes": (True,) * 4,
    "nat_ksizes": (7, 7, 7, 7),
}
PLUS_PLUS = {"use_dwc_mlps": (True,) * 4, "use_lpus": (True,) * 4, "use_conv_patches": True}


def _width(stem: int, groups: tuple[int, ...]) -> dict[str, Any]:
    """Channels double from stage to stage; a head has 32."""
    dims = tuple(stem * 2**i for i in range(4))
    heads = tuple(dim // 32 for dim in dims)
    return {"dim_stem": stem, "dims": dims, "heads": heads, "groups": groups}


def _model(changes: dict[str, Any], *parts: dict[str, Any], **values: Any) -> DAT:
    config = {}
    for part in (*parts, values, changes):
        config.update(part)
    return DAT(**config)


def dat_tiny(**changes: Any) -> DAT:
    """DAT-T (2022), 28.3 M parameters."""
    return _model(changes, DAT_2022, _width(96, (-1, -1, 3, 6)), drop_path_rate=0.2)


def dat_small(**changes: Any) -> DAT:
    """DAT-S (2022), 49.9 M parameters."""
    return _model(changes, DAT_2022, _width(96, (-1, -1, 3, 6)), DEEPER, drop_path_rate=0.3)


def dat_base(**changes: Any) -> DAT:
    """DAT-B (2022), 87.8 M parameters."""
    return _model(changes, DAT_2022, _width(128, (-1, -1, 4, 8)), DEEPER, drop_path_rate=0.5)


def dat_base_384(**changes: Any) -> DAT:
    """DAT-B (2022) for 384 pixels, 88 M parameters."""
    return _model(
        changes,
        DAT_2022,
        _width(128, (-1, -1, 4, 8)),
        DEEPER,
        drop_path_rate=0.5,
        img_size=384,
        window_sizes=(12,) * 4,
    )


def datpp_tiny(**changes: Any) -> DAT:
    """DAT-T++ (2023), 24 M parameters."""
    return _model(changes, DAT_2023, _width(64, (1, 2, 4, 8)), PLUS_PLUS, drop_path_rate=0.2)


def datpp_small(**changes: Any) -> DAT:
    """DAT-S++ (2023), 53 M parameters."""
    return _model(changes, DAT_2023, _width(96, (1, 2, 3, 6)), PLUS_PLUS, drop_path_rate=0.4)


def datpp_base(**changes: Any) -> DAT:
    """DAT-B++ (2023), 93 M parameters."""
    return _model(changes, DAT_2023, _width(128, (2, 4, 8, 16)), PLUS_PLUS, drop_path_rate=0.7)


def datpp_base_384(**changes: Any) -> DAT:
    """DAT-B++ (2023) for 384 pixels, 94 M parameters."""
    return _model(
        changes, DAT_2023, _width(128, (2, 4, 8, 16)), PLUS_PLUS, drop_path_rate=0.6, img_size=384
    )


def datpp_p(**changes: Any) -> DAT:
    """DAT-P (2023): DAT-T++ without the convolutions beside attention, 23 M parameters."""
    return _model(changes, DAT_2023, _width(64, (1, 2, 4, 8)), drop_path_rate=0.2)
