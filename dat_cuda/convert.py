"""convert: DAttention in the place of published deformable attention, in anybody's model.

Names and state_dict keys prove nothing: many classes share them and compute something else. So a
module is judged by what it computes: a copy of it, with random parameters, runs beside a DAttention
made of the same parts, and their results and gradients are compared.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import nn

from dat_cuda._converted import (
    MAP,
    PARTS,
    PROJECTIONS,
    ConvertedDAttention,
    Refusal,
    become,
    hooks_of,
    settings_of,
)
from dat_cuda._probe import isolated, line, probe
from dat_cuda.attention import DAttention

__all__ = ["ConvertedDAttention", "Entry", "Report", "convert"]

# What a class may define without changing how its module is used.
FREE_METHODS = {"__init__", "forward", "__repr__", "__dir__", "extra_repr", "_get_name"}
METHODS = {name for name, value in vars(nn.Module).items() if callable(value)} - FREE_METHODS


@dataclass(frozen=True)
class Entry:
    """A module that was considered, all its names in the model, and what became of it."""

    names: tuple[str, ...]
    class_name: str
    version: str | None  # the version that it is converted to
    reason: str | None  # why it is refused


@dataclass
class Report:
    """What `convert` did or would do. Its length, and so its truth, counts the conversions."""

    model: nn.Module = field(repr=False)
    dry_run: bool
    converted: list[Entry] = field(default_factory=list)
    refused: list[Entry] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.converted)

    def __str__(self) -> str:
        done = "would be converted" if self.dry_run else "converted"
        lines = [f"{len(self.converted)} {done}, {len(self.refused)} left alone"]
        for entry in (*self.converted, *self.refused):
            names = ", ".join(name or "(the model)" for name in entry.names)
            lines.append(f"  {names}: {entry.class_name} {entry.version or entry.reason}")
        return "\n".join(lines)


def convert(
    model: nn.Module,
    *,
    inplace: bool = True,
    dry_run: bool = False,
    attention_maps: Literal["keep", "drop"] = "keep",
) -> Report:
    """Make every module of a model that computes published deformable attention a DAttention.

    Known are the classes of 2022 and 2023, for classification, detection and segmentation, and the
    YOLO-style ones that return y alone, by any name. Each conversion is verified: a copy of the
    module on the CPU, with random parameters, must have the results and gradients of DAttention, in
    training and in evaluation.

    A converted module stays the object it was and only changes its class. So parameters, buffers,
    submodules, hooks, attributes, dtype, device, modes and state_dict keys stay, every reference to
    it stays good (a shared module, an optimizer, a hook's handle), and it returns what it returned:
    y alone, or a tuple with None or with pos and reference in the dtype of x. Only other methods of
    its old class are gone.

    Args:
        model: any module; it may be one to convert itself.
        inplace: convert the model itself, not a deep copy of it.
        dry_run: change nothing, only report.
        attention_maps: "keep" leaves a module alone that returns its attention map, as those for
            detection do, since fused attention has none. "drop" converts it too, to return None
            there: the published backbones do not use the map, but other callers may.

    Returns:
        A Report: `model`, converted; lists `converted` and `refused` of entries with `names`,
        `class_name`, `version` and `reason`; as a str, all of it to read. A module that is a
        DAttention already is in neither list.

    Raises:
        TypeError: model is not a module.
        ValueError: attention_maps is neither of the two.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if attention_maps not in ("keep", "drop"):
        raise ValueError(f"attention_maps must be 'keep' or 'drop', got {attention_maps!r}")
    if not (inplace or dry_run):
        model = copy.deepcopy(model)
    report = Report(model, dry_run)
    changes = []
    for module, names in _candidates(model).items():
        class_name = type(module).__name__
        try:
            settings = _verified_settings(module, drop_maps=attention_maps == "drop")
        except Refusal as refusal:
            report.refused.append(Entry(tuple(names), class_name, None, str(refusal)))
        else:
            report.converted.append(Entry(tuple(names), class_name, settings["version"], None))
            changes.append((module, settings))
    if not dry_run:
        for module, settings in changes:
            become(module, settings)
    return report


def _candidates(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The modules with the parts, or the name, of deformable attention: all the names of each."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in _named_modules(model):
        has_parts = all(hasattr(module, part) for part in (*PROJECTIONS, "conv_offset"))
        has_name = type(module).__name__.startswith("DAttention")
        if (has_parts or has_name) and not isinstance(module, DAttention):
            found.setdefault(module, []).append(name)
    return found


def _named_modules(
    module: nn.Module, name: str = "", above: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name; one that contains itself is not entered again."""
    yield name, module
    above = (*above, module)
    for key, child in module._modules.items():
        if child is not None and child not in above:
            yield from _named_modules(child, f"{name}.{key}" if name else key, above)


def _verified_settings(module: nn.Module, drop_maps: bool) -> dict[str, Any]:
    """What turns the module into a DAttention that computes the same; Refusal if nothing does."""
    _check_make(module)
    try:
        with isolated():
            version, form = probe(module)
            settings = settings_of(module, version)
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(f"cannot be verified: {line(error)}") from error
    if MAP in form and not drop_maps:
        raise Refusal(
            "returns its attention map, which DAttention never has; attention_maps='drop' converts "
            "it to return None instead"
        )
    return settings | {"returns": tuple(None if kind == MAP else kind for kind in form)}


def _check_make(module: Any) -> None:
    """Refuse what a comparison of results would not show."""
    if isinstance(module, torch.jit.ScriptModule):
        raise Refusal("is a TorchScript module")
    missing = [part for part in PARTS if not isinstance(getattr(module, part, None), nn.Module)]
    if missing:
        raise Refusal(f"is not built like deformable attention: has no {', '.join(missing)}")
    own = {**module._parameters, **module._modules}
    extra = {name for name, part in own.items() if part is not None} - {*PARTS, "rpe_table"}
    if extra:
        raise Refusal(f"has parts that DAttention has not: {', '.join(sorted(extra))}")
    if type(module.attn_drop) is not nn.Dropout:
        raise Refusal(f"attn_drop is not a Dropout but a {type(module.attn_drop).__name__}")
    classes = takewhile(lambda kind: kind is not nn.Module, type(module).__mro__)
    methods = {name for kind in classes for name in vars(kind)} & METHODS
    methods |= {name for name in vars(module) if callable(getattr(DAttention, name, None))}
    if methods:
        raise Refusal(f"has methods that a conversion would lose: {', '.join(sorted(methods))}")
    signature = inspect.signature(module.forward)
    if [p.kind for p in signature.parameters.values()] != [inspect.Parameter.POSITIONAL_OR_KEYWORD]:
        raise Refusal(f"forward takes not x alone but {signature}")
    uncalled = ["attn_drop"]
    uncalled += ["conv_offset"] if getattr(module, "no_off", False) else []
    uncalled += ["rpe_table"] if getattr(module, "log_cpb", False) else []
    for name in uncalled:
        part = getattr(module, name, None)
        if isinstance(part, nn.Module) and any(any(hooks_of(m).values()) for m in part.modules()):
            raise Refusal(f"{name} has hooks, and DAttention does not call it as they expect")
