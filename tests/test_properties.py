"""What must hold of the operators for any input, tried on what hypothesis draws."""

import functools
import os

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from operator_cases import AttentionCase, SampleCase, assert_as_accurate, run, run_in_float64

from dat_cuda import deform_attention, deform_sample, reference

# The backend stays the same over all examples of a test: that is what its fixture is for.
settings.register_profile(
    "default",
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

EMULATED_EXAMPLES = 5

FLOATS = st.sampled_from((torch.float64, torch.float32))
DTYPES = st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16))
VERSIONS = st.sampled_from(("dat", "dat++"))
LAYOUTS = st.sampled_from(("contiguous", "channels_last", "transposed", "sliced"))


def for_all(**drawn):
    """given(), with fewer examples on the emulated device, which is slow."""

    def decorate(test):
        many = given(**drawn)(test)
        few = settings(max_examples=EMULATED_EXAMPLES)(given(**drawn)(test))

        @functools.wraps(many)
        def run(**fixtures):
            (few if "emulated" in fixtures.values() else many)(**fixtures)

        return run

    return decorate


def sizes(largest):
    return st.tuples(st.integers(1, largest), st.integers(1, largest))


@st.composite
def seeded(draw, case):
    """A case, and torch seeded so that hypothesis can repeat and shrink it."""
    drawn = draw(case)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return drawn


def sample_cases(dtypes=DTYPES, factors=(3.0, 0.0, -1.0)):
    return seeded(
        st.builds(
            SampleCase,
            version=VERSIONS,
            factor=st.sampled_from(factors),
            dtype=dtypes,
            size=sizes(20),
            keys=sizes(9),
            channels=st.integers(1, 20),
            groups=st.integers(1, 3),
            layout=LAYOUTS,
            threads=st.just(1),
            accurate=st.booleans(),
        )
    )


def attention_cases(dtypes=DTYPES, tables=(None, "unit", "small", "large", "flat"), dense=True):
    dims = st.sampled_from((None, "N", "hMN", "B1M1", "BhMN")) if dense else st.none()
    return seeded(
        st.builds(
            AttentionCase,
            version=VERSIONS,
            bias=st.tuples(st.sampled_from(tables), dims),
            dtype=dtypes,
            size=sizes(24),
            keys=st.integers(1, 140),
            head_dim=st.integers(1, 40),
            heads=st.tuples(st.integers(1, 3), st.integers(1, 2)).map(
                lambda drawn: (drawn[0] * drawn[1], drawn[1])
            ),
            reach=st.floats(0.1, 3.0),
            layout=LAYOUTS,
            threads=st.just(1),
            accurate=st.booleans(),
        ).filter(lambda case: case.is_comparable)
    )


def attend(case, inputs, **changes):
    return deform_attention(**(inputs | changes), **case.options)


def assert_same(case, actual, expected):
    """Equal but for rounding in the dtype that is computed in."""
    units = 8 * case.units(actual.numel())
    scale = max(1.0, expected.abs().max().item())
    tolerance = units * torch.finfo(case.dtype).eps * scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@for_all(case=sample_cases())
def test_sample_is_the_reference(native, case):
    inputs, grads = case.inputs(), case.grads()
    exact = run_in_float64(reference.deform_sample, inputs, grads, **case.options)
    same = run(reference.deform_sample, inputs, grads, **case.options)
    assert_as_accurate(case, run(deform_sample, inputs, grads, **case.options), same, exact)


@for_all(case=attention_cases())
def test_attention_is_the_reference(native, case):
    inputs, grads = case.inputs(), case.grads()
    exact = run_in_float64(reference.deform_attention, inputs, grads, **case.options)
    same = run(reference.deform_attention, inputs, grads, **case.options)
    assert_as_accurate(case, run(deform_attention, inputs, grads, **case.options), same, exact)


@for_all(case=attention_cases(FLOATS))
def test_order_of_keys_does_not_matter(backend, case):
    inputs = case.inputs()
    order = torch.randperm(case.keys)
    shuffled = {name: inputs[name][..., order] for name in ("k", "v")}
    if "pos" in inputs:
        shuffled["pos"] = inputs["pos"][:, :, order]
    if "bias" in inputs and inputs["bias"].shape[-1] > 1:
        shuffled["bias"] = inputs["bias"][..., order]
    assert_same(case, attend(case, inputs, **shuffled), attend(case, inputs))


@for_all(case=attention_cases(FLOATS), shift=st.floats(-20, 20))
def test_a_constant_in_the_bias_does_not_matter(backend, case, shift):
    inputs = case.inputs()
    bias = inputs.get("bias", torch.zeros(1, dtype=case.dtype))
    shifted = attend(case, inputs, bias=bias + shift)
    torch.testing.assert_close(
        shifted, attend(case, inputs), rtol=0, atol=1e-3 if case.dtype == torch.float32 else 1e-11
    )


@for_all(case=attention_cases(FLOATS), scale=st.floats(-4, 4))
def test_output_is_linear_in_v(backend, case, scale):
    inputs = case.inputs()
    other = torch.randn(inputs["v"].shape, dtype=case.dtype)
    combined = attend(case, inputs, v=inputs["v"] * scale + other)
    assert_same(case, combined, attend(case, inputs) * scale + attend(case, inputs, v=other))


@for_all(case=attention_cases(FLOATS))
def test_weights_sum_to_one(backend, case):
    inputs = case.inputs()
    constant = torch.randn(inputs["v"].shape[:2], dtype=case.dtype)
    out = attend(case, inputs, v=constant[..., None].expand(inputs["v"].shape))
    assert_same(case, out, constant[..., None, None].expand_as(out))


@for_all(case=attention_cases(FLOATS), image=st.integers(0, 1))
def test_images_do_not_mix(backend, case, image):
    inputs = case.inputs()
    alone = {
        name: tensor[image : image + 1] if name in ("q", "k", "v", "pos") else tensor
        for name, tensor in inputs.items()
    }
    if "bias" in inputs and inputs["bias"].dim() == 4 and inputs["bias"].shape[0] > 1:
        alone["bias"] = inputs["bias"][image : image + 1]
    assert_same(case, attend(case, alone), attend(case, inputs)[image : image + 1])


@for_all(case=attention_cases(FLOATS, tables=("unit", "small", "large", "flat"), dense=False))
def test_the_table_acts_as_the_dense_bias_it_stands_for(backend, case):
    """Linear in the table: the part that is made dense by hand adds to the one that is not."""
    inputs = case.inputs()
    pos = inputs["pos"]
    first, second = inputs["rpe_table"], torch.randn(inputs["rpe_table"].shape, dtype=pos.dtype)
    dense = reference._table_bias(second.double(), pos.double(), *case.size, case.version)
    out = attend(case, inputs, bias=dense.to(case.dtype))
    assert_same(case, out, attend(case, inputs, rpe_table=first + second))


@for_all(case=sample_cases(FLOATS), value=st.floats(-5, 5))
def test_a_constant_map_gives_its_constant_inside(backend, case, value):
    inputs = case.inputs()
    x = torch.full_like(inputs["x"], value)
    sampled, pos = deform_sample(x, inputs["offset"], **case.options)
    inside = (pos.abs() <= 1).all(-1).repeat_interleave(case.channels, 1)
    # Outside, taps beyond the map pull towards zero.
    expected = torch.where(inside, x.new_tensor(value), sampled.clamp(-abs(value), abs(value)))
    assert_same(case, sampled, expected)


@for_all(case=sample_cases(FLOATS, factors=(0.0,)))
def test_pixels_are_met_exactly(backend, case):
    """Offsets that bring the keys onto pixels: version dat with factor 0 has no bound."""
    options = case.options | {"version": "dat"}
    height, width = case.size
    rows, columns = (
        torch.randint(n, (2, case.groups, case.keys[0] * case.keys[1])) for n in case.size
    )
    at = torch.stack(
        [i.to(case.dtype) * 2 / max(n - 1, 1) - 1 for i, n in ((rows, height), (columns, width))],
        -1,
    )
    points = reference.reference_points(*case.keys, "dat", dtype=case.dtype).view(1, 1, -1, 2)
    offset = (at - points).movedim(-1, 2).reshape(2 * case.groups, 2, *case.keys)
    x = case.inputs()["x"]
    sampled, pos = deform_sample(x, offset, **options)
    torch.testing.assert_close(pos, at)
    cell = (rows * width + columns).repeat_interleave(case.channels, 1)
    # Off by the rounding of a coordinate, times the difference to the neighbour.
    assert_same(case, sampled, x.flatten(2).gather(2, cell))


@for_all(case=sample_cases(FLOATS), scale=st.floats(-4, 4))
def test_sample_is_linear_in_x(backend, case, scale):
    inputs = case.inputs()
    other = torch.randn(inputs["x"].shape, dtype=case.dtype)

    def sample(x):
        return deform_sample(x, inputs["offset"], **case.options)[0]

    combined = sample(inputs["x"] * scale + other)
    assert_same(case, combined, sample(inputs["x"]) * scale + sample(other))
