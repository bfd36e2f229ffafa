"""The whole models: DAT (2022) and DAT++ (2023), as classifier and as backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dat_cuda.models.blocks import LayerNormProxy
from dat_cuda.models.stage import TransformerStage
from dat_cuda.models.windows import Pair, pair
from dat_cuda.reference import VERSIONS

STAGES = 4
Positions = list[list[Tensor | None]]
# Keywords of the published code that nothing here depends on.
WITHOUT_EFFECT = {
    *("heads_q", "ns_per_pts", "ksize_qnas", "nqs", "qna_activation", "deform_groups"),
    *("local_orf", "local_kv_sizes", "offset_pes", "use_cmt_mlps", "init_cfg", "lower_lr_kvs"),
}
BY_STAGE: tuple[str, ...] = (
    *("dims", "depths", "stage_spec", "heads", "window_sizes", "groups", "use_pes", "dwc_pes"),
    *("sr_ratios", "strides", "offset_range_factor", "no_offs", "fixed_pes", "use_dwc_mlps"),
    *("use_lpus", "ksizes", "nat_ksizes", "layer_scale_values", "log_cpb"),
)


class DAT(nn.Module):
    """DAT (version "dat", CVPR 2022) or DAT++ (version "dat++", 2023), four stages of blocks.

    Arguments with one value for each stage take lists of four. Names and `state_dict` keys are the
    published ones; keywords of the published code that have no effect here are accepted.

    Args:
        img_size: side of the images, or (height, width), that the position tables are made for;
            images of any size run.
        patch_size: stride of the stem: 4, for maps of strides 4, 8, 16, 32.
        num_classes: outputs of the head; 0: no head, the pooled features.
        expansion: width of the MLPs over that of the blocks.
        dim_stem, dims: channels of the stem and of the stages.
        depths, stage_spec: number of blocks, and their letters: L windows, S shifted windows,
            D deformable, N neighbourhood, P pyramid, X ConvNeXt-like.
        heads, window_sizes, sr_ratios, nat_ksizes: of the attention in L, S, D, N; in L, S, X; in
            P; in N.
        groups, strides, offset_range_factor, ksizes, use_pes, dwc_pes, no_offs, fixed_pes, log_cpb:
            of the deformable blocks, see dat_cuda.DAttention.
        use_dwc_mlps, use_lpus, use_conv_patches, layer_scale_values: MLPs with a depthwise
            convolution; a 3x3 depthwise convolution before each block; overlapping convolutions
            between stages; the first value of the factors on residual branches, none where <= 0.
        drop_rate, attn_drop_rate, drop_path_rate: dropout of projections and MLPs, of attention
            weights, of residual branches (the rate of the last block; it grows from 0).
        version: of the deformable blocks, of the MLPs with convolution and of the stem.
        features_only: give the stages' maps in place of logits, each through a LayerNorm of its own
            (`norms`, as in the published detection code), and have no head.
        out_indices: which stages' maps.
        use_checkpoint: compute a stage again in backward instead of keeping its activations; for
            all stages or one value each.
        frozen_stages: freeze the stem (0) and the first so many stages: no gradients, and eval mode
            also while the rest trains. -1: nothing.

    Forward: images [B, 3, H, W] -> logits [B, num_classes], or, with features_only, a list of maps
    [B, dims[i], ceil(H / 4 / 2^i), ceil(W / 4 / 2^i)]. With return_positions=True it gives
    (that, positions, references): for every stage a list with, for every block, key positions
    [B, G, Hk, Wk, 2] in (y, x) and the points that they are offset from, None where there are none.

    Raises:
        ValueError: arguments that cannot work.
        TypeError: a keyword that neither this nor the published code knows.
    """

    def __init__(
        self,
        img_size: int | Pair = 224,
        patch_size: int = 4,
        num_classes: int = 1000,
        expansion: int = 4,
        dim_stem: int = 96,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        stage_spec: Sequence[Sequence[str]] = (("L", "D"), ("L", "D"), ("L", "D") * 3, ("L", "D")),
        heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (7, 7, 7, 7),
        groups: Sequence[int] = (-1, -1, 3, 6),
        use_pes: Sequence[bool] = (False,) * 4,
        dwc_pes: Sequence[bool] = (False,) * 4,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        strides: Sequence[int] = (-1,) * 4,
        offset_range_factor: Sequence[float] = (1, 2, 3, 4),
        no_offs: Sequence[bool] = (False,) * 4,
        fixed_pes: Sequence[bool] = (False,) * 4,
        use_dwc_mlps: Sequence[bool] = (False,) * 4,
        use_lpus: Sequence[bool] = (False,) * 4,
        use_conv_patches: bool = False,
        ksizes: Sequence[int] = (9, 7, 5, 3),
        nat_ksizes: Sequence[int] = (3, 3, 3, 3),
        layer_scale_values: Sequence[float] = (-1,) * 4,
        log_cpb: Sequence[bool] = (False,) * 4,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        *,
        version: str = "dat++",
        features_only: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        use_checkpoint: bool | Sequence[bool] = False,
        frozen_stages: int = -1,
        **published: Any,
    ) -> None:
        super().__init__()
        _check_keywords(published)
        _check_arguments(locals())
        self.version = version
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        # Convolutions that do not overlap need padding to cover a map of any size.
        self.paddings = (1, 1) if use_conv_patches else (patch_size, 2)
        self.features_only = features_only
        self.out_indices = tuple(out_indices)
        self.use_checkpoint = (
            (use_checkpoint,) * STAGES
            if isinstance(use_checkpoint, bool)
            else tuple(use_checkpoint)
        )
        self.frozen_stages = frozen_stages
        self.patch_proj = _stem(dim_stem, patch_size, use_conv_patches, version)
        sizes = _map_sizes(pair(img_size), patch_size)
        blocks_before = [sum(depths[:i]) for i in range(STAGES)]
        last = max(sum(depths) - 1, 1)
        self.stages = nn.ModuleList()
        for i in range(STAGES):
            attn = {
                "heads": heads[i],
                "attn_drop": attn_drop_rate,
                "window_size": window_sizes[i],
                "sr_ratio": sr_ratios[i],
                "nat_ksize": nat_ksizes[i],
                "n_groups": groups[i],
                "stride": strides[i],
                "offset_range_factor": offset_range_factor[i],
                "use_pe": use_pes[i],
                "dwc_pe": dwc_pes[i],
                "no_off": no_offs[i],
                "fixed_pe": fixed_pes[i],
                "ksize": ksizes[i],
                "log_cpb": log_cpb[i],
            }
            self.stages.append(
                TransformerStage(
                    sizes[i],
                    dim_stem if i == 0 else dims[i - 1] * 2,
                    dims[i],
                    stage_spec[i],
                    [drop_path_rate * (blocks_before[i] + d) / last for d in range(depths[i])],
                    attn=attn,
                    expansion=expansion,
                    drop_rate=drop_rate,
                    use_dwc_mlp=use_dwc_mlps[i],
                    use_lpu=use_lpus[i],
                    layer_scale_value=layer_scale_values[i],
                    version=version,
                )
            )
        self.down_projs = nn.ModuleList(
            _between(dims[i], dims[i + 1], use_conv_patches) for i in range(STAGES - 1)
        )
        if features_only:
            self.norms = nn.ModuleList(
                LayerNormProxy(dims[i]) if i in self.out_indices else nn.Identity()
                for i in range(STAGES)
            )
        else:
            self.cls_norm = LayerNormProxy(dims[-1])
            self.cls_head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self._freeze()

    @classmethod
    def from_config(cls, path: str | Path, **changes: Any) -> DAT:
        """The model of a published YAML file (its section MODEL.DAT), with `changes`.

        Where neither gives a `version`, it is "dat++" if the file has a keyword that only the code
        of 2023 knows, and else "dat". Needs PyYAML.

        Raises:
            ValueError: the file has no such section.
        """
        try:
            import yaml
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "DAT.from_config needs PyYAML: pip install pyyaml", name="yaml"
            ) from None
        content = yaml.safe_load(Path(path).read_text())
        try:
            config = dict(content["MODEL"]["DAT"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path} must have a section MODEL.DAT with the keywords of the model, as the "
                "published configurations do"
            ) from None
        is_new = config.keys() & {"ksizes", "nat_ksizes", "use_lpus", "layer_scale_values"}
        return cls(**{"version": "dat++" if is_new else "dat", **config, **changes})

    def forward(self, x: Tensor, return_positions: bool = False) -> Any:
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"images must have shape [B, 3, H, W], got {list(x.shape)}")
        maps, positions, references = self._run(x)
        if self.features_only:
            result: Any = [self.norms[i](maps[i]) for i in self.out_indices]
        else:
            result = self.forward_head(self.cls_norm(maps[-1]))
        return (result, positions, references) if return_positions else result

    def _run(self, x: Tensor) -> tuple[list[Tensor], Positions, Positions]:
        """The maps that the stages give, and what their deformable blocks do."""
        maps, positions, references = [], [], []
        x = self.patch_proj(_pad_to(x, self.paddings[0]))
        for i, stage in enumerate(self.stages):
            if self.use_checkpoint[i] and self.training and torch.is_grad_enabled():
                x, position, reference = checkpoint(stage, x, use_reentrant=False)
            else:
                x, position, reference = stage(x)
            maps.append(x)
            positions.append(position)
            references.append(reference)
            if i < STAGES - 1:
                x = self.down_projs[i](_pad_to(x, self.paddings[1]))
        return maps, positions, references

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        stages = self.frozen_stages
        return [self.patch_proj, *self.stages[:stages], *self.down_projs[: max(stages - 1, 0)]]

    def _freeze(self) -> None:
        for module in self._frozen():
            module.requires_grad_(False)
            module.eval()

    def train(self, mode: bool = True) -> DAT:
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of the names of parameters that the published training does not decay."""
        return {"relative_position_bias_table", "rpe_table"}

    # What timm's tools ask of a model.

    def no_weight_decay(self) -> set[str]:
        """Names of those parameters."""
        keywords = self.no_weight_decay_keywords()
        return {name for name, _ in self.named_parameters() if any(k in name for k in keywords)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Sets use_checkpoint for all stages."""
        self.use_checkpoint = (enable,) * STAGES

    def forward_features(self, x: Tensor) -> Tensor:
        """images [B, 3, H, W] -> the last stage's map, normalised where there is a head."""
        last = self._run(x)[0][-1]
        return last if self.features_only else self.cls_norm(last)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """x, a map of forward_features -> logits, or what the head computes them from."""
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return pooled if pre_logits else self.cls_head(pooled)

    def get_classifier(self) -> nn.Module:
        return self.cls_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head; 0 classes: none. global_pool can only be "avg"."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg', got {global_pool!r}")
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.cls_head = head.to(self.cls_norm.norm.weight)


def _stem(dim: int, patch_size: int, overlapping: bool, version: str) -> nn.Sequential:
    if not overlapping:
        return nn.Sequential(nn.Conv2d(3, dim, patch_size, patch_size), LayerNormProxy(dim))
    if version == "dat":
        return nn.Sequential(nn.Conv2d(3, dim, 7, patch_size, 3), LayerNormProxy(dim))
    half = patch_size // 2
    return nn.Sequential(
        nn.Conv2d(3, dim // 2, 3, half, 1),
        LayerNormProxy(dim // 2),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, half, 1),
        LayerNormProxy(dim),
    )


def _between(dim_in: int, dim_out: int, overlapping: bool) -> nn.Sequential:
    size, padding = (3, 1) if overlapping else (2, 0)
    conv = nn.Conv2d(dim_in, dim_out, size, 2, padding, bias=False)
    return nn.Sequential(conv, LayerNormProxy(dim_out))


def _map_sizes(size: Pair, patch_size: int) -> list[Pair]:
    """(height, width) of every stage's map."""
    height, width = (-(-side // patch_size) for side in size)
    return [(-(-height // 2**i), -(-width // 2**i)) for i in range(STAGES)]


def _pad_to(x: Tensor, multiple: int) -> Tensor:
    """x [B, C, H, W] with zeros below and on the right."""
    below, right = (-side % multiple for side in x.shape[2:])
    return F.pad(x, (0, right, 0, below)) if below or right else x


def _check_keywords(published: dict[str, Any]) -> None:
    unknown = published.keys() - WITHOUT_EFFECT
    if unknown:
        raise TypeError(f"DAT has no argument {', '.join(sorted(unknown))}")


def _check_arguments(given: dict[str, Any]) -> None:
    if given["version"] not in VERSIONS:
        raise ValueError(f"version must be one of {VERSIONS}, got {given['version']!r}")
    by_stage = BY_STAGE
    if not isinstance(given["use_checkpoint"], bool):
        by_stage += ("use_checkpoint",)
    for name in by_stage:
        if len(given[name]) != STAGES:
            raise ValueError(f"{name} must have {STAGES} entries, got {list(given[name])}")
    for depth, spec in zip(given["depths"], given["stage_spec"], strict=True):
        if len(spec) != depth:
            raise ValueError(f"stage_spec must have depths' {depth} letters, got {list(spec)}")
        unknown = set(spec) - set("LSDNPX")
        if unknown:
            raise ValueError(
                f"stage_spec must consist of the letters L, S, D, N, P and X, got {min(unknown)!r}"
            )
    for spec, window in zip(given["stage_spec"], given["window_sizes"], strict=True):
        if "X" in spec and window % 2 == 0:
            raise ValueError(f"window_sizes must be odd where there are X blocks, got {window}")
    for dim, heads in zip(given["dims"], given["heads"], strict=True):
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dims: got {heads} heads for {dim} channels")
    for name, values, lowest, highest in (
        ("out_indices", given["out_indices"], 0, STAGES - 1),
        ("frozen_stages", [given["frozen_stages"]], -1, STAGES),
    ):
        if not all(lowest <= value <= highest for value in values):
            raise ValueError(f"{name} must be from {lowest} to {highest}, got {given[name]}")
