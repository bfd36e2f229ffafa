"""Inputs of the two operators for their tests, and the rule by which results are compared.

Results are held to dat_cuda.reference in float64. What a dtype costs is measured, not guessed: see
`assert_as_accurate`.
"""

import random
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from unittest import mock

import naive
import torch

from dat_cuda import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
VERSIONS = ("dat", "dat++")
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "shifted", "expanded")

BATCH = 2

# Gradients of positions jump at cell borders: tests stay this far (in cells) away from them, which
# is more than float32 coordinates on maps of some dozen cells are off by.
MARGIN = 1e-3


def pairwise(**axes):
    """Combinations of values of all axes, in which every pair of values of two axes occurs."""
    choose = random.Random(0)
    names = list(axes)
    pairs = [
        {(a, x), (b, y)}
        for a, b in combinations(range(len(names)), 2)
        for x, y in product(range(len(axes[names[a]])), range(len(axes[names[b]])))
    ]
    missing = {frozenset(pair) for pair in pairs}
    rows = []
    while missing:
        wanted = dict(min(missing, key=sorted))
        rows_tried = []
        for _ in range(20):
            row = [wanted.get(i, choose.randrange(len(axes[name]))) for i, name in enumerate(names)]
            found = missing & {frozenset(pair) for pair in combinations(enumerate(row), 2)}
            rows_tried.append((len(found), row, found))
        _, row, found = max(rows_tried, key=lambda tried: tried[0])
        missing -= found
        rows.append({name: axes[name][value] for name, value in zip(names, row, strict=True)})
    return rows


def describe(case):
    """A test's name from its case."""
    words = (getattr(case, name) for name in case.__dataclass_fields__)
    return "-".join(
        "x".join(map(str, word)) if isinstance(word, tuple) else str(word).removeprefix("torch.")
        for word in words
    )


def coordinate_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def relayout(tensor, layout):
    """The same values with other strides; memory in between holds NaN. `expanded` keeps only the
    first values along the first dimension."""
    if layout == "channels_last" and tensor.dim() > 2:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]
    if layout == "shifted":
        nan = tensor.new_full((1,), torch.nan)
        return torch.cat((nan, tensor.flatten()))[1:].view(tensor.shape)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor.contiguous()


def redraw(draw, bad):
    """draw(), with values that are bad(values) drawn again."""
    values = draw()
    for _ in range(1000):
        again = bad(values)
        if not again.any():
            return values
        values = torch.where(again, draw(), values)
    raise AssertionError("no positions away from cell borders")


def near_border(coordinate):
    return (coordinate - coordinate.round()).abs() < MARGIN


@dataclass(frozen=True)
class SampleCase:
    version: str
    factor: float
    dtype: torch.dtype
    size: tuple
    keys: tuple
    channels: int  # of a group
    groups: int
    layout: str
    threads: int
    accurate: bool = True  # the offset has the dtype that is computed in, not that of x

    @property
    def options(self):
        return {
            "groups": self.groups,
            "offset_range_factor": self.factor,
            "version": self.version,
        }

    def inputs(self):
        x = torch.randn(BATCH, self.groups * self.channels, *self.size).to(self.dtype)
        shape = (BATCH * self.groups, 2, *self.keys)
        offset = redraw(lambda: torch.randn(shape).to(self.dtype), self._near)
        if self.accurate:
            offset = offset.to(coordinate_dtype(self.dtype))
        return {"x": relayout(x, self.layout), "offset": relayout(offset, self.layout)}

    def grads(self):
        keys = self.keys[0] * self.keys[1]
        grad_sampled = torch.randn(BATCH, self.groups * self.channels, keys).to(self.dtype)
        grad_pos = torch.randn(BATCH, self.groups, keys, 2, dtype=coordinate_dtype(self.dtype))
        return [relayout(grad, self.layout) for grad in (grad_sampled, grad_pos)]

    def units(self, results):
        """See assert_as_accurate."""
        terms = BATCH * self.groups * self.channels * self.keys[0] * self.keys[1] / results
        return terms**0.5 + max(self.size) * max(1, self.factor)

    def _near(self, offset):
        """Whether an offset brings its key near the border of a cell, where that matters."""
        offset = offset.double().requires_grad_()
        x = torch.zeros(offset.shape[0] // self.groups, self.groups, *self.size).double()
        _, pos = reference.deform_sample(x, offset, **self.options)
        (slope,) = torch.autograd.grad(pos.sum(), offset)
        pos = pos.detach().movedim(-1, 2).reshape(offset.shape)
        cells = torch.tensor(self.size).view(2, 1, 1) - 1
        at_clamp = (pos.abs() - 1).abs() < MARGIN
        near = near_border((pos + 1) / 2 * cells) & (cells > 0) | at_clamp
        return near & (slope != 0)


@dataclass(frozen=True)
class AttentionCase:
    version: str
    bias: tuple  # kind of table, dimensions of the dense bias
    dtype: torch.dtype
    size: tuple
    keys: int
    head_dim: int
    heads: tuple  # heads, groups
    reach: float  # of the positions
    layout: str
    threads: int
    accurate: bool = True  # the table has the dtype that is computed in, not that of q
    deterministic: bool = False

    @property
    def options(self):
        return {"heads": self.heads[0], "version": self.version}

    @property
    def table(self):
        """Size of the table: one cell a query step for dat++, fewer, more, or one cell wide."""
        height, width = self.size
        kinds = {
            "unit": (2 * height - 1, 2 * width - 1),
            "small": (6, 5),
            "large": (6 * height + 3, 9 * width + 1),
            "flat": (1, 2 * width + 2),
        }
        return kinds.get(self.bias[0])

    @property
    def cancels(self):
        """Whether a table or a bias is the same for all keys: the softmax ignores it, and its
        gradient is nothing but rounding."""
        return self.table == (1, 1) or (self.bias[1] or "N").endswith("1")

    @property
    def is_comparable(self):
        """Not so in half precision if nothing but rounding is there to compare."""
        return self.dtype.itemsize > 2 or not self.cancels

    def inputs(self):
        heads, groups = self.heads
        channels, accurate = heads * self.head_dim, coordinate_dtype(self.dtype)
        q = torch.randn(BATCH, channels, *self.size).to(self.dtype)
        k, v = torch.randn(2, BATCH, channels, self.keys).to(self.dtype).unbind()
        given = {"q": q, "k": k, "v": v}
        if self.table:
            shape = (BATCH, groups, self.keys, 2)
            given["pos"] = redraw(
                lambda: (torch.rand(shape, dtype=accurate) * 2 - 1) * self.reach, self._near
            )
            table = torch.randn(heads, *self.table, dtype=accurate)
            given["rpe_table"] = table if self.accurate else table.to(self.dtype)
        if self.bias[1] is not None:
            sizes = {"B": BATCH, "h": heads, "M": self.size[0] * self.size[1], "N": self.keys}
            shape = [sizes.get(letter, 1) for letter in self.bias[1]]
            given["bias"] = torch.randn(shape).to(self.dtype)
        return {name: relayout(tensor, self.layout) for name, tensor in given.items()}

    def grads(self):
        grad_out = torch.randn(BATCH, self.heads[0] * self.head_dim, *self.size).to(self.dtype)
        return [relayout(grad_out, self.layout)]

    @property
    def pairs(self):
        """Number of scores."""
        return BATCH * self.heads[0] * self.size[0] * self.size[1] * self.keys

    def units(self, results):
        """See assert_as_accurate."""
        cells = max(self.table or (0,)) * max(1, self.reach)
        # What is left of a sum that cancels are its terms' roundings: they are sums over channels.
        terms = self.pairs / results * (self.head_dim if self.cancels else 1)
        return terms**0.5 + self.head_dim**0.5 + cells

    def _near(self, pos):
        near = []
        for axis, (cells, length) in enumerate(zip(self.table, self.size, strict=True)):
            grid = [naive.query_point(i, length, self.version) for i in range(length)]
            grid = torch.tensor(grid, dtype=torch.float64)
            t = (cells - 1) / 4 * (grid - pos[..., axis, None].double() + 2)
            near.append(near_border(t).any(-1) & (cells > 1))
        return torch.stack(near, -1)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def poisoned_memory(deterministic=True):
    """New tensors hold NaN, so that an element nobody writes shows. It is what torch does for
    deterministic algorithms; the operators may be made to think that they need not be."""
    name = "are_deterministic_algorithms_enabled"
    with deterministic_algorithms(), mock.patch.object(torch, name, lambda: deterministic):
        assert torch.empty(8).isnan().all()
        yield


def gradcheck(backend, function, tensors, fast=False):
    """CUDA's gradients may be summed up in any order. The emulated device is slow."""
    fast = fast or backend == "emulated"
    torch.autograd.gradcheck(function, tuple(tensors), nondet_tol=1e-12, fast_mode=fast)


def run(operator, inputs, grads, **options):
    """Outputs and gradients of an operator, by name; the inputs keep their strides."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = operator(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return results | {f"gradient of {name}": grad for name, grad in zip(leaves, found, strict=True)}


def run_in_float64(operator, inputs, grads, **options):
    inputs = {name: tensor.double() for name, tensor in inputs.items()}
    return run(operator, inputs, [grad.double() for grad in grads], **options)


def assert_as_accurate(case, actual, same_dtype, exact):
    """|actual - exact| <= 2 |same_dtype - exact| + tiny, in the largest norm, for every result.

    `tiny` is there for results so few, or so exact, that the reference's own error is small by
    chance. It is one rounding of an output to its dtype, for gradients another of the output that
    they are computed from, and a few units in the last place of the dtype computed in for each cell
    of the longest axis (coordinates are that large) and for the root of the number of terms that a
    result sums up (their roundings are a random walk).
    """
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        want, same = exact[name], same_dtype[name]
        assert value.shape == want.shape and value.dtype == same.dtype, name
        assert torch.isfinite(value).all(), name
        units = 4 * case.units(value.numel()) * torch.finfo(coordinate_dtype(case.dtype)).eps
        is_output = name.startswith("output")
        roundings = torch.finfo(value.dtype if is_output else case.dtype).eps * (2 - is_output)
        tiny = (units + roundings) * max(1.0, want.abs().max().item())
        error = (value.double() - want).abs().max().item()
        allowed = 2 * (same.double() - want).abs().max().item() + tiny
        assert error <= allowed, f"{name} is off by {error:.3g}, allowed {allowed:.3g}"
