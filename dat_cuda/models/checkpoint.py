"""Checkpoints in the published layout: loading them into models of any resolution, writing them."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_cuda.models.windows import Pair, pair

__all__ = ["LoadReport", "export_checkpoint", "load_checkpoint"]

Path = str | os.PathLike[str]
Shape = tuple[int, ...]

SECTIONS = ("model", "state_dict")  # where the code for classification and for detection saves
BACKBONE = "backbone."
# Names that torch.compile, activation checkpointing and FSDP put between a module and its parts.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
WINDOW_TABLE = "relative_position_bias_table"
# Buffers that a window block computes from its sizes.
COMPUTED = ("relative_position_index", "attn_mask")
LISTED = 20  # names of one kind in a report's text


@dataclass
class LoadReport:
    """What load_checkpoint did with every name; str() makes it a text to read.

    Attributes:
        source: the file, and its section that held the weights.
        loaded: copied as they are, or the rows of the class head that `classes` chose.
        resized: interpolated tables: (shape in the file, shape in the model).
        kept: buffers that the model computes from its sizes, and that the file has otherwise or not
            at all.
        zeroed: biases `rpb` of neighbourhood attention, for a file whose model had none.
        missing: in the model and not in the file; unchanged.
        unexpected: in the file and not in the model.
        not_loaded: in both, but the file's does not fit: the reason. Unchanged.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    zeroed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    not_loaded: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        groups = {
            "resized": [f"{k}: {list(a)} -> {list(b)}" for k, (a, b) in self.resized.items()],
            "kept": self.kept,
            "set to zero": self.zeroed,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "not loaded": [f"{name}: {reason}" for name, reason in self.not_loaded.items()],
        }
        counts = [f"{len(self.loaded)} loaded"]
        counts += [f"{len(names)} {outcome}" for outcome, names in groups.items()]
        lines = [f"{self.source}: {', '.join(counts)}"]
        for outcome, names in groups.items():
            lines += [f"  {outcome:11}  {name}" for name in names[:LISTED]]
            if len(names) > LISTED:
                lines.append(f"  {outcome:11}  and {len(names) - LISTED} more")
        return "\n".join(lines)


class _Misfit(Exception):
    """Why a tensor of the file cannot be that of the model."""


@torch.no_grad()
def load_checkpoint(
    model: nn.Module,
    path: Path | Mapping[str, Any],
    *,
    classes: Sequence[int] | Tensor | None = None,
    strict: bool = False,
) -> LoadReport:
    """Load published weights, for classification or detection, into a model of any resolution.

    The weights are under "model", under "state_dict", or bare. Names are matched without what
    wrappers such as DistributedDataParallel and torch.compile add, and without `backbone.` where
    only the file has it; `gamma` of a LayerScale is its `weight`. Where shapes differ

        relative_position_bias_table    bicubic interpolation of the map that its rows make up
        rpe_table                       bicubic interpolation
        relative_position_index, ...    the model keeps its own
        anything else                   not loaded; nor is a dense table of fixed_pe, which has one
                                        entry for each query and key of one resolution

    Biases `rpb` of neighbourhood attention become zeros if the file has none at all: the newest
    published code has no such bias. Weights take the model's dtype and device.

    Args:
        model: a DAT, or any module with its names.
        path: a file of torch.save, or the mapping that torch.load made of one.
        classes: for each class of the model its row in the file's `cls_head`, as the published list
            that maps ImageNet-22k to ImageNet-1k. Without it a head of other size is not loaded.
        strict: fail where anything is missing, unexpected or not loaded.

    Returns:
        A LoadReport: print it, since a file that fits only in part is no error.

    Raises:
        OSError: a file that cannot be opened.
        ValueError: a file that is damaged, holds more than weights or nothing that fits the model;
            `classes` that do not fit; what `strict` forbids. The model is then unchanged.
    """
    source = "the mapping" if isinstance(path, Mapping) else os.fspath(path)
    content = path if isinstance(path, Mapping) else _read(path)
    source, weights = _weights(content, source)
    state = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("model must have memory: call model.to_empty(device=...) before loading")
    ours, theirs = _published_names(state), _published_names(weights)
    if not any(name.startswith(BACKBONE) for name in ours):
        theirs = _published_names(weights, without=BACKBONE)
    targets = {name: state[key] for name, key in ours.items()}
    found = {name: weights[key] for name, key in theirs.items()}
    if classes is not None:
        _remap_head(found, targets, classes)

    report = LoadReport(source)
    report.unexpected = [key for name, key in theirs.items() if name not in ours]
    tensors = _match(model, ours, targets, found, report)
    if not report.loaded and not report.resized:
        raise ValueError(
            f"{source} holds nothing that fits {type(model).__name__}: it has "
            f"{_examples(weights)}, and the model has {_examples(state)}"
        )
    if strict and (report.missing or report.unexpected or report.not_loaded):
        raise ValueError(f"strict: the model and the file must have the same names\n{report}")
    model.load_state_dict(tensors, strict=False)
    return report


def export_checkpoint(model: nn.Module, path: Path) -> None:
    """Write a model's weights as the published code does, {"model": state_dict}, for that code and
    for load_checkpoint.

    Names are the published ones, also of a model that is wrapped or compiled; every buffer is
    there. The tensors lie on the CPU, in the model's dtype.
    """
    state = model.state_dict()
    copies = {
        # A copy, since a view would bring all its storage into the file.
        name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, key in _published_names(state).items()
        if isinstance(tensor := state[key], Tensor)
    }
    torch.save({"model": copies}, path)


def _read(path: Path) -> Any:
    with open(path, "rb"):
        pass  # a file that cannot be opened says so itself
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_sums(path)
    except Exception as error:  # of any type: what damage causes depends on the place
        refused = _refused_classes(path)
        if refused:
            raise ValueError(
                f"{path} holds objects of {', '.join(refused)} beside weights. They are not loaded "
                "since a file that brings objects can run any code. If you trust its source, save "
                "its weights alone, where these classes are installed: torch.save({'model': "
                "torch.load(path, weights_only=False)['model']}, new_path)"
            ) from None
        raise ValueError(
            f"{path} is damaged, or no file of torch.save: compare its size and checksum with its "
            "source's"
        ) from error
    return content


def _check_sums(path: Path) -> None:
    """Raises BadZipFile where a record is not what was written: torch.load does not look."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        for record in file.infolist():
            if record.CRC:  # torch.save can be told to write 0
                with file.open(record) as data:
                    while data.read(2**20):
                        pass


def _refused_classes(path: Path) -> list[str]:
    """What in a file torch.load refuses, where it can tell."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a damaged file, or one from before torch 1.6
        return []


def _weights(content: Any, source: str) -> tuple[str, dict[str, Any]]:
    """The state_dict in what a file held, and where it was."""
    sections = dict(content) if isinstance(content, Mapping) else {}
    for section in SECTIONS:
        if isinstance(sections.get(section), Mapping):
            return f"{source}[{section!r}]", {str(k): v for k, v in sections[section].items()}
    if any(isinstance(value, Tensor) for value in sections.values()):
        return source, {str(k): v for k, v in sections.items()}
    got = f"the keys {list(sections)[:LISTED]}" if sections else f"a {type(content).__name__}"
    raise ValueError(
        f"{source} must hold a state_dict, under 'model', under 'state_dict' or bare, got {got}; "
        "weights under another key can be given themselves, as a mapping in the place of path"
    )


def _published_names(keys: Iterable[str], without: str = "") -> dict[str, str]:
    """From the published name to the key. `without` is a prefix to remove from all that have it."""
    keys = list(keys)
    names = {_published_name(key).removeprefix(without): key for key in keys}
    return names if len(names) == len(keys) else {key: key for key in keys}


def _published_name(key: str) -> str:
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    while parts[:1] == ["module"]:  # DataParallel and its like
        parts = parts[1:]
    # What classification calls weight is gamma in the code for detection.
    return re.sub(r"\b(layer_scales\.\d+)\.gamma$", r"\1.weight", ".".join(parts))


def _match(
    model: nn.Module,
    ours: dict[str, str],
    targets: dict[str, Tensor],
    found: dict[str, Any],
    report: LoadReport,
) -> dict[str, Tensor]:
    """What to load, by the model's keys; the report gets an entry for each of them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    has_rpb = any(re.search(r"\brpb$", name) for name in found)
    tensors = {}
    for name, key in ours.items():
        leaf = name.rpartition(".")[2]
        block = name.removesuffix(leaf)
        # Such a buffer belongs to a window, so to a table of its size.
        belonging = (name, block + WINDOW_TABLE) if leaf in COMPUTED else ()
        if any(_shape(found.get(part)) != _shape(targets.get(part)) for part in belonging):
            report.kept.append(key)
        elif name in found:
            owner = modules.get(key.rpartition(".")[0], model)
            try:
                tensors[key] = _fit(name, found[name], targets[name], owner)
            except _Misfit as misfit:
                report.not_loaded[key] = str(misfit)
            else:
                if tensors[key] is found[name]:
                    report.loaded.append(key)
                else:
                    report.resized[key] = (_shape(found[name]), _shape(targets[name]))
        elif leaf == "rpb" and not has_rpb and f"{block}qkv.weight" in found:
            tensors[key] = torch.zeros_like(targets[name])
            report.zeroed.append(key)
        else:
            report.missing.append(key)
    return tensors


def _shape(value: Any) -> Shape:
    return tuple(getattr(value, "shape", ()))


def _fit(name: str, value: Any, target: Tensor, owner: nn.Module) -> Tensor:
    """The file's value, interpolated where that makes it fit."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        raise _Misfit("is no dense tensor in the file")
    if value.is_floating_point() != target.is_floating_point():
        raise _Misfit(f"is {value.dtype} in the file and {target.dtype} in the model")
    if value.shape == target.shape:
        return value
    leaf = name.rpartition(".")[2]
    if leaf == WINDOW_TABLE and value.dim() == 2 and value.shape[1] == target.shape[1]:
        return _resize_window_table(value, target, pair(getattr(owner, "window_size", 1)))
    if leaf == "rpe_table" and value.dim() == target.dim() == 3 and len(value) == len(target):
        if getattr(owner, "fixed_pe", False) or not all(side % 2 for side in value.shape[1:]):
            raise _Misfit("a dense table of fixed_pe belongs to one resolution")
        return _interpolate(value, tuple(target.shape[1:]))
    reason = f"has shape {list(value.shape)} in the file and {list(target.shape)} in the model"
    if name.startswith("cls_head.") and value.shape[1:] == target.shape[1:]:
        reason += "; with `classes` rows of it can be chosen"
    raise _Misfit(reason)


def _resize_window_table(table: Tensor, target: Tensor, window: Pair) -> Tensor:
    """table [rows in the file, heads] -> [rows in the model, heads], for a model's window."""
    old, new = (_window_map(len(t), window) for t in (table, target))
    if old is None or new is None:
        raise _Misfit(f"{len(table)} rows make no map of a square window, or of one like {window}")
    maps = table.t().unflatten(1, old)
    return _interpolate(maps, new).flatten(1).t()


def _window_map(rows: int, like: Pair) -> Pair | None:
    """(2 h - 1, 2 w - 1), the sides of a table, for a window h x w of given proportions or else a
    square one."""
    for height, width in (like, (1, 1)):
        divisor = math.gcd(height, width)
        for factor in range(1, rows + 1):
            sides = 2 * factor * height // divisor - 1, 2 * factor * width // divisor - 1
            if sides[0] * sides[1] == rows:
                return sides
    return None


def _interpolate(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """maps [heads, h, w] -> [heads, *size], bicubic as the published code does it."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return F.interpolate(maps.unsqueeze(0), size, mode="bicubic").squeeze(0)


def _remap_head(
    found: dict[str, Any], targets: dict[str, Tensor], classes: Sequence[int] | Tensor
) -> None:
    """Puts the chosen rows in the place of the file's cls_head."""
    rows = torch.as_tensor(classes, device="cpu")
    names = [name for name in ("cls_head.weight", "cls_head.bias") if name in targets]
    if not names or not all(isinstance(found.get(name), Tensor) for name in names):
        raise ValueError("classes needs a cls_head in the file and in the model")
    wanted, given = len(targets[names[0]]), len(found[names[0]])
    if rows.dim() != 1 or rows.is_floating_point() or len(rows) != wanted:
        raise ValueError(
            f"classes must have one index for each of the model's {wanted} classes, got "
            f"{list(rows.shape)} of {rows.dtype}"
        )
    if not ((rows >= 0) & (rows < given)).all():
        raise ValueError(
            f"classes must be rows of the file's head, 0 to {given - 1}, got {int(rows.min())} to "
            f"{int(rows.max())}"
        )
    for name in names:
        found[name] = found[name][rows.long()]


def _examples(state: Mapping[str, Any]) -> str:
    shapes = [f"{name} {list(_shape(value))}" for name, value in state.items()]
    return f"{len(shapes)} names ({', '.join([*shapes[:3], '...'])})"
