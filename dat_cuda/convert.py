"""convert: DAttention in the place of published deformable attention, in anybody's model.

Names and state_dict keys prove nothing: many classes share them and compute something else. So a
module is judged by what it computes: a copy of it, with random parameters, runs beside a DAttention
made of the same parts, and their results and gradients are compared.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .attention import DAttention
from .reference import VERSIONS

__all__ = ["ConvertedDAttention", "Entry", "Report", "convert"]

Size = tuple[int, int]
# What a module returns: () for y alone, else the kinds of a tuple's values, beginning with "y".
Form = tuple[str | None, ...]
MAP, UNKNOWN = "attention map", "unknown"

PROJECTIONS = ("proj_q", "proj_k", "proj_v", "proj_out")
PARTS = (*PROJECTIONS, "conv_offset", "attn_drop", "proj_drop")
# What a class may define without changing how its module is used.
FREE_METHODS = {"__init__", "forward", "__repr__", "__dir__", "extra_repr", "_get_name"}
METHODS = {name for name, value in vars(nn.Module).items() if callable(value)} - FREE_METHODS

# How far results may be apart, relative to a tensor's largest value. The published code holds a
# constant of the offsets in float32 whatever its dtype, which makes up to 1e-5; other formulas make
# 1e-3 and more. Float32 is for what cannot run in float64.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3}
# training, rate of attn_drop, rate of proj_drop: without chance, the rate 1 shows where they act.
MODES = ((False, 1.0, 1.0), (True, 0.0, 0.0), (True, 1.0, 0.0), (True, 0.0, 1.0))
# Rounding may decide on which side of a cell's border or of a ReLU's kink a value falls: there
# gradients jump, and another draw of random numbers must show the agreement.
DRAWS = 3
BATCH = 2
# Scores (image, head, query, key) of a probe that takes little memory and time.
MAX_SCORES = 2**20


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
        except _Refusal as refusal:
            report.refused.append(Entry(tuple(names), class_name, None, str(refusal)))
        else:
            report.converted.append(Entry(tuple(names), class_name, settings["version"], None))
            changes.append((module, settings))
    if not dry_run:
        for module, settings in changes:
            _become(module, settings)
    return report


class _Refusal(Exception):
    """Why a module is left alone."""


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
    """What turns the module into a DAttention that computes the same; _Refusal if nothing does."""
    _check_make(module)
    try:
        with _isolated():
            version, form = _probe(module)
            settings = _settings(module, version)
    except _Refusal:
        raise
    except Exception as error:
        raise _Refusal(f"cannot be verified: {_line(error)}") from error
    if MAP in form and not drop_maps:
        raise _Refusal(
            "returns its attention map, which DAttention never has; attention_maps='drop' converts "
            "it to return None instead"
        )
    return settings | {"returns": tuple(None if kind == MAP else kind for kind in form)}


def _check_make(module: Any) -> None:
    """Refuse what a comparison of results would not show."""
    if isinstance(module, torch.jit.ScriptModule):
        raise _Refusal("is a TorchScript module")
    missing = [part for part in PARTS if not isinstance(getattr(module, part, None), nn.Module)]
    if missing:
        raise _Refusal(f"is not built like deformable attention: has no {', '.join(missing)}")
    own = {**module._parameters, **module._modules}
    extra = {name for name, part in own.items() if part is not None} - {*PARTS, "rpe_table"}
    if extra:
        raise _Refusal(f"has parts that DAttention has not: {', '.join(sorted(extra))}")
    if type(module.attn_drop) is not nn.Dropout:
        raise _Refusal(f"attn_drop is not a Dropout but a {type(module.attn_drop).__name__}")
    classes = takewhile(lambda kind: kind is not nn.Module, type(module).__mro__)
    methods = {name for kind in classes for name in vars(kind)} & METHODS
    methods |= {name for name in vars(module) if callable(getattr(DAttention, name, None))}
    if methods:
        raise _Refusal(f"has methods that a conversion would lose: {', '.join(sorted(methods))}")
    signature = inspect.signature(module.forward)
    if [p.kind for p in signature.parameters.values()] != [inspect.Parameter.POSITIONAL_OR_KEYWORD]:
        raise _Refusal(f"forward takes not x alone but {signature}")
    uncalled = ["attn_drop"]
    uncalled += ["conv_offset"] if getattr(module, "no_off", False) else []
    uncalled += ["rpe_table"] if getattr(module, "log_cpb", False) else []
    for name in uncalled:
        part = getattr(module, name, None)
        if isinstance(part, nn.Module) and any(any(_hooks(m).values()) for m in part.modules()):
            raise _Refusal(f"{name} has hooks, and DAttention does not call it as they expect")


def _hooks(module: nn.Module) -> dict[str, dict]:
    """The module's registries of hooks."""
    return {name: v for name, v in vars(module).items() if "hooks" in name and isinstance(v, dict)}


def _settings(module: Any, version: str) -> dict[str, Any]:
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


def _become(module: nn.Module, settings: dict[str, Any]) -> None:
    module.__class__ = ConvertedDAttention
    vars(module).update(settings)
    fused = cast(DAttention, module)
    fused.encoding = fused._choose_encoding()


# The probe.


@contextmanager
def _isolated() -> Iterator[None]:
    """The same setting for every probe; the caller's, and the random generator, are left alone."""
    # Out of inference mode means with gradients.
    with (
        torch.inference_mode(False),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _probe(module: nn.Module) -> tuple[str, Form]:
    """The version of the formula that the module computes, and what it returns."""
    for seed in range(DRAWS):
        try:
            return _probe_once(module, seed)
        except _Refusal as error:
            refusal = error
    raise refusal


def _probe_once(module: nn.Module, seed: int) -> tuple[str, Form]:
    twin, sizes, tolerance = _runnable_twin(module, seed)
    agreeing, differences = {}, []
    for version in VERSIONS:
        fused = copy.deepcopy(twin)
        _become(fused, _settings(twin, version))
        form, difference = _compare(twin, fused, sizes, tolerance)
        if difference:
            differences.append(f"{difference} from version {version!r}")
        else:
            agreeing[version] = fused, form
    if not agreeing:
        raise _Refusal(f"computes something else: {'; '.join(differences)}")
    if len(agreeing) > 1:
        raise _Refusal("cannot be verified: the probe does not tell the versions apart")
    [(version, (fused, form))] = agreeing.items()
    with torch.no_grad():
        for buffer in (*twin.buffers(recurse=False), *fused.buffers(recurse=False)):
            buffer.copy_(~buffer if buffer.dtype == torch.bool else buffer + 1)
    if twin._buffers and _compare(twin, fused, sizes[:1], tolerance)[1]:
        raise _Refusal(f"its buffers take part in the result: {', '.join(twin._buffers)}")
    return version, form


def _runnable_twin(module: nn.Module, seed: int) -> tuple[Any, list[Size], float]:
    """A twin that runs, the sizes at which it does, and the tolerance.

    A module that only runs at its own size may be too large there for a probe: its twin gets a
    smaller table, and with it another size of its own.
    """
    obstacle = ""
    for dtype, tolerance in TOLERANCES.items():
        for shrink in (False, True):
            twin = _twin(module, dtype, seed)
            if shrink and not _shrink(twin):
                continue
            obstacles = {size: _obstacle(twin, size) for size in _probe_sizes(twin)}
            sizes = [size for size, text in obstacles.items() if not text]
            if sizes:
                return twin, sizes, tolerance
            obstacle = obstacle or next(iter(obstacles.values()))
    raise _Refusal(f"cannot be verified: {obstacle}")


def _obstacle(twin: nn.Module, size: Size) -> str:
    """Why the twin cannot be probed at this size; "" if it can."""
    try:
        y = _results(_run(twin, _input(twin, size)))[0]
    except _Refusal:
        raise
    except Exception as error:
        return f"{_line(error)} (at {_text(size)})"
    return "" if y.isfinite().all() else f"gives nan or infinity (at {_text(size)})"


def _twin(module: nn.Module, dtype: torch.dtype, seed: int) -> Any:
    """A copy on the CPU with random parameters and without hooks: neither the parameters nor what
    hooks refer to is copied."""
    torch.default_generator.manual_seed(seed)
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        floating = tensor.is_floating_point()
        if floating and isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = _draw(tensor.shape, dtype)
        else:
            kept = dtype if floating else tensor.dtype
            memo[id(tensor)] = tensor.detach().to("cpu", kept, copy=True)
    for part in module.modules():
        memo |= {id(registry): OrderedDict() for registry in _hooks(part).values()}
    twin: Any = copy.deepcopy(module, memo)
    # In place, a dropout of what softmax keeps for its backward fails as soon as it drops anything.
    twin.attn_drop.inplace = False
    with torch.no_grad():
        for weight in twin.conv_offset[-1].parameters():
            # A large factor would put all keys outside the map, where they make no difference.
            weight *= 2 / max(2.0, twin.offset_range_factor)
    return twin


def _draw(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """Random numbers that make everything matter: layers keep the variance, vectors and tables are
    of order 1, so that offsets reach their bounds and softmax chooses."""
    fan_in = 1 if len(shape) in (1, 3) else math.prod(shape[1:])
    return nn.Parameter(torch.randn(shape, dtype=dtype) * fan_in**-0.5)


def _shrink(twin: Any) -> bool:
    """Turn the twin into one for the small size, if a table binds it to its own."""
    table = getattr(twin, "rpe_table", None)
    if not isinstance(table, nn.Parameter):
        return False
    stride = twin.conv_offset[0].stride[0]
    height, width = _small_size(stride)
    shape = (2 * height - 1, 2 * width - 1)
    if getattr(twin, "fixed_pe", False):
        shape = (height * width, height // stride * (width // stride))
    twin.rpe_table = _draw((len(table), *shape), table.dtype)
    twin.q_h, twin.q_w = twin.kv_h, twin.kv_w = height, width
    return True


def _small_size(stride: int) -> Size:
    """Not square, and some keys along each axis: one key would be a special case."""
    return stride * max(3, math.ceil(5 / stride)), stride * max(4, math.ceil(7 / stride))


def _probe_sizes(twin: Any) -> list[Size]:
    """The size of its own, that of its table, a small one, and one that stride does not divide:
    those that are cheap."""
    stride = twin.conv_offset[0].stride[0]
    own = getattr(twin, "q_h", 0), getattr(twin, "q_w", 0)
    small = _small_size(stride)
    sizes = {own, small, (small[0] + 1, small[1] + 2)}
    table = getattr(twin, "rpe_table", None)
    if isinstance(table, nn.Parameter):
        sizes.add(((table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2))

    def scores(size: Size) -> int:
        keys = math.ceil(size[0] / stride) * math.ceil(size[1] / stride)
        return BATCH * twin.n_heads * math.prod(size) * keys

    # A dense bias fits every map of as many pixels, but means something at its own size only.
    sizes = {size for size in sizes if size == own or math.prod(size) not in (0, math.prod(own))}
    ordered = sorted(sizes, key=scores)
    return [size for size in ordered if scores(size) <= MAX_SCORES] or ordered[:1]


def _input(twin: Any, size: Size) -> Tensor:
    weight = next(twin.parameters())
    channels = twin.n_heads * twin.n_head_channels
    return torch.randn(BATCH, channels, *size, dtype=weight.dtype, requires_grad=True)


def _run(module: nn.Module, x: Tensor) -> Any:
    """forward(x), with the same random numbers every time."""
    torch.default_generator.manual_seed(0)
    before = _state(module)
    result = module.forward(x)
    for name, (value, mark) in _state(module).items():
        if name not in before or before[name][0] is not value or before[name][1] != mark:
            raise _Refusal(f"forward changes {name}, and DAttention would not")
    return result


def _state(module: nn.Module) -> dict[str, tuple[Any, int | None]]:
    """Every attribute and buffer, with a number that changes when its content does."""
    state = {}
    for name, value in {**vars(module), **module._buffers}.items():
        mark = len(value) if isinstance(value, (list, dict, set)) else None
        state[name] = value, value._version if isinstance(value, Tensor) else mark
    return state


def _results(result: Any) -> tuple[Any, ...]:
    results = (result,) if isinstance(result, Tensor) else result
    if type(results) is not tuple or not all(v is None or isinstance(v, Tensor) for v in results):
        raise _Refusal(f"returns a {type(result).__name__}, not a tensor or a tuple of tensors")
    return results


def _compare(twin: Any, fused: Any, sizes: list[Size], tolerance: float) -> tuple[Form, str]:
    """What twin returns, and the first difference between the two, if any."""
    forms: list[Form] = []
    for size in sizes:
        modes = MODES if size == sizes[0] else MODES[:2]
        for training, attn_drop, proj_drop in modes:
            for module in (twin, fused):
                module.train(training)
                module.attn_drop.p, module.proj_drop.p = attn_drop, proj_drop
            try:
                form, difference = _difference(twin, fused, _input(twin, size), tolerance)
            except _Refusal:
                raise
            except Exception as error:
                difference = f"a run fails with {_line(error)}"
            if difference:
                mode = "training" if training else "evaluation"
                return (), f"{difference} (at {_text(size)}, in {mode})"
            forms.append(form)
    if len(set(forms)) > 1:
        raise _Refusal("what it returns depends on the mode or on the size of x")
    return forms[0], ""


def _difference(twin: Any, fused: Any, x: Tensor, tolerance: float) -> tuple[Form, str]:
    """What twin returns, and what differs between the two, if anything."""
    result = _run(twin, x)
    results = _results(result)
    form: Form = ("y",)
    ours = dict(zip(("y", "pos", "reference"), _run(fused, x), strict=True))
    error = _error(results[0], ours["y"])
    if not error <= tolerance:
        return (), f"y differs by {error:.0e} of its maximum"
    for value in results[1:]:
        form = (*form, _kind(value, ours, form, twin.n_heads, tolerance))
    if UNKNOWN in form:
        return (), "pos or reference differs"

    pairs = [(w, ours[kind]) for kind, w in zip(form, results, strict=True) if kind in ours]
    weights = [torch.randn_like(theirs) for theirs, _ in pairs]
    want = _gradients(twin, x, [theirs for theirs, _ in pairs], weights)
    got = _gradients(fused, x, [own for _, own in pairs], weights)
    # Some gradients are nothing but rounding: that of proj_k.bias, which softmax ignores.
    floor = 1e-2 * max(grad.abs().max().item() for grad in want.values())
    for name, grad in want.items():
        error = _error(grad, got[name], floor)
        if not error <= tolerance:
            return (), f"the gradient of {name} differs by {error:.0e} of its maximum"
    return () if isinstance(result, Tensor) else form, ""


def _kind(value: Any, ours: dict, form: Form, heads: int, tolerance: float) -> str | None:
    """What a result is that follows those of the form."""
    if value is None:
        return None
    y, pos = ours["y"], ours["pos"]
    if value.shape == pos.shape:
        kinds = (kind for kind in ("pos", "reference") if kind not in form)
        return next((kind for kind in kinds if _error(value, ours[kind]) <= tolerance), UNKNOWN)
    if value.numel() == heads * y[:, 0].numel() * pos[0, 0, ..., 0].numel() and value.min() >= 0:
        return MAP
    raise _Refusal(f"returns a tensor {list(value.shape)} that DAttention has not")


def _gradients(module: nn.Module, x: Tensor, results: Any, weights: Any) -> dict[str, Tensor]:
    """Of the weighted sum of the results, with respect to x and every parameter."""
    inputs = {"x": x} | {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = 0 * x.sum()  # has a gradient even if no result has
    for result, weight in zip(results, weights, strict=True):
        total = total + (result * weight).sum()
    return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)


def _error(value: Tensor, other: Tensor, floor: float = 0.0) -> float:
    """The largest difference, relative to the largest value; infinite if the two are no match."""
    if value.shape != other.shape or value.dtype != other.dtype:
        return math.inf
    difference = (value - other).abs().max().item()
    return difference / max(value.abs().max().item(), floor, 1e-30)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:150]


def _text(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
