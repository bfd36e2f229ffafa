"""The builders as entries of timm's model registry, in whichever order the two are imported.

timm takes seconds to import, so that nothing here imports it: it is waited for.
"""

from __future__ import annotations

import importlib.abc
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from dat_cuda.models import builders
from dat_cuda.models.dat import DAT, STAGES
from dat_cuda.models.windows import pair

BUILDERS = (
    builders.dat_tiny,
    builders.dat_small,
    builders.dat_base,
    builders.dat_base_384,
    builders.datpp_tiny,
    builders.datpp_small,
    builders.datpp_base,
    builders.datpp_base_384,
    builders.datpp_p,
)
# timm reads from the module of an entry what it knows of the model, and adds to its __all__.
__all__: list[str] = []
default_cfgs = {
    build.__name__: {
        "input_size": (3, 384, 384) if build.__name__.endswith("384") else (3, 224, 224),
        "pool_size": (12, 12) if build.__name__.endswith("384") else (7, 7),
        "first_conv": "patch_proj.0",
        "classifier": "cls_head",
    }
    for build in BUILDERS
}
# Of timm's keywords for loading weights: there are none to load.
WITHOUT_EFFECT = ("cache_dir", "pretrained_model_args")


def register() -> None:
    """Make timm.create_model know the builders: now if timm is imported, or else once it is."""
    if sys.modules.get("timm"):
        _register()
    else:
        sys.meta_path.insert(0, _TimmFinder())


def _register() -> None:
    try:
        # All that _create needs, too: timm has it from 0.9.
        from timm.models import FeatureInfo, register_model, resolve_pretrained_cfg  # noqa: F401

        for build in BUILDERS:
            register_model(_entry(build))
    except Exception as error:  # must break neither package
        warnings.warn(
            f"dat_cuda's models are not registered with timm, which needs timm 0.9: {error}",
            stacklevel=2,
        )


def _entry(build: Callable[..., DAT]) -> Callable[..., DAT]:
    """A builder with the keywords of timm.create_model."""

    def create(pretrained: bool = False, **keywords: Any) -> DAT:
        if pretrained:
            raise ValueError(
                f"pretrained must be False: no weights are hosted for {build.__name__}. Download "
                "the published file and use dat_cuda.models.load_checkpoint(model, path)"
            )
        return _create(build, **keywords)

    create.__name__ = create.__qualname__ = build.__name__
    create.__doc__ = build.__doc__
    return create


def _create(
    build: Callable[..., DAT],
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    in_chans: int = 3,
    global_pool: str = "avg",
    device: Any = None,
    dtype: Any = None,
    **changes: Any,
) -> DAT:
    from timm.models import FeatureInfo, resolve_pretrained_cfg

    if in_chans != 3:
        raise ValueError(f"in_chans must be 3: {build.__name__} takes RGB images, got {in_chans}")
    if global_pool != "avg":
        raise ValueError(f"global_pool must be 'avg', got {global_pool!r}")
    for keyword in WITHOUT_EFFECT:
        changes.pop(keyword, None)
    cfg = resolve_pretrained_cfg(
        build.__name__, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay
    ).to_dict()
    if "img_size" in changes:
        cfg["input_size"] = (3, *pair(changes["img_size"]))
    changes.setdefault("num_classes", cfg["num_classes"])
    changes["out_indices"] = _stage_indices(changes.get("out_indices", STAGES))
    model: Any = build(**changes).to(device=device, dtype=dtype)

    model.pretrained_cfg = model.default_cfg = cfg
    dims = [
        model.down_projs[0][0].in_channels,
        *(down[0].out_channels for down in model.down_projs),
    ]
    stride = changes.get("patch_size", 4)
    model.feature_info = [
        {"num_chs": dim, "reduction": stride * 2**i, "module": f"stages.{i}"}
        for i, dim in enumerate(dims)
    ]
    if model.features_only:
        model.feature_info = FeatureInfo(model.feature_info, changes["out_indices"])
    return model


def _stage_indices(out_indices: int | Sequence[int]) -> tuple[int, ...]:
    """timm's out_indices, the last so many or numbers that may count from the end, from 0."""
    if isinstance(out_indices, int):
        out_indices = range(-out_indices, 0)
    return tuple(i + STAGES if i < 0 else i for i in out_indices)


class _TimmFinder(importlib.abc.MetaPathFinder):
    """Finds timm as the other finders do, and registers the builders when it has been imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _TimmLoader(spec.loader, self)
                    return spec
        return None


class _TimmLoader(importlib.abc.Loader):
    """The loader that it is given, and afterwards the registration."""

    def __init__(self, loader: Any, finder: _TimmFinder) -> None:
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module is to know its own loader only.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)  # where that fails, the finder waits for the next attempt
        # A new list, since another thread may be going through the old one.
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self.finder]
        _register()
