"""Does a module compute published deformable attention? A copy of it shows: see convert."""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dat_cuda._converted import MAP, UNKNOWN, Form, Refusal, Size, become, hooks_of, settings_of
from dat_cuda.reference import VERSIONS

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


@contextmanager
def isolated() -> Iterator[None]:
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


def probe(module: nn.Module) -> tuple[str, Form]:
    """The version of the formula that the module computes, and what it returns."""
    for seed in range(DRAWS):
        try:
            return _probe_once(module, seed)
        except Refusal as error:
            refusal = error
    raise refusal


def _probe_once(module: nn.Module, seed: int) -> tuple[str, Form]:
    twin, sizes, tolerance = _runnable_twin(module, seed)
    agreeing, differences = {}, []
    for version in VERSIONS:
        fused = copy.deepcopy(twin)
        become(fused, settings_of(twin, version))
        form, difference = _compare(twin, fused, sizes, tolerance)
        if difference:
            differences.append(f"{difference} from version {version!r}")
        else:
            agreeing[version] = fused, form
    if not agreeing:
        raise Refusal(f"computes something else: {'; '.join(differences)}")
    if len(agreeing) > 1:
        raise Refusal("cannot be verified: the probe does not tell the versions apart")
    [(version, (fused, form))] = agreeing.items()
    with torch.no_grad():
        for buffer in (*twin.buffers(recurse=False), *fused.buffers(recurse=False)):
            buffer.copy_(~buffer if buffer.dtype == torch.bool else buffer + 1)
    if twin._buffers and _compare(twin, fused, sizes[:1], tolerance)[1]:
        raise Refusal(f"its buffers take part in the result: {', '.join(twin._buffers)}")
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
    raise Refusal(f"cannot be verified: {obstacle}")


def _obstacle(twin: nn.Module, size: Size) -> str:
    """Why the twin cannot be probed at this size; "" if it can."""
    try:
        y = _results(_run(twin, _input(twin, size)))[0]
    except Refusal:
        raise
    except Exception as error:
        return f"{line(error)} (at {_text(size)})"
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
        memo |= {id(registry): OrderedDict() for registry in hooks_of(part).values()}
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
            raise Refusal(f"forward changes {name}, and DAttention would not")
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
        raise Refusal(f"returns a {type(result).__name__}, not a tensor or a tuple of tensors")
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
            except Refusal:
                raise
            except Exception as error:
                difference = f"a run fails with {line(error)}"
            if difference:
                mode = "training" if training else "evaluation"
                return (), f"{difference} (at {_text(size)}, in {mode})"
            forms.append(form)
    if len(set(forms)) > 1:
        raise Refusal("what it returns depends on the mode or on the size of x")
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
    raise Refusal(f"returns a tensor {list(value.shape)} that DAttention has not")


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


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:150]


def _text(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
