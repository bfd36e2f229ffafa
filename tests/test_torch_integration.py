"""The operators as citizens of torch: autograd, opcheck, compile, export, autocast, devices."""

from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.testing
from operator_cases import (
    VERSIONS,
    AttentionCase,
    SampleCase,
    deterministic_algorithms,
    gradcheck,
    relayout,
    run,
    threads,
)

import dat_cuda
from dat_cuda import DAttention, deform_attention, deform_sample, reference
from dat_cuda.models.mlp import TransformerMLP, TransformerMLPWithConv

OPERATORS = torch.ops.dat_cuda


def sample_case(version="dat++", factor=2.0, dtype=torch.float64, size=(5, 6), keys=(2, 3)):
    return SampleCase(version, factor, dtype, size, keys, 2, 2, "contiguous", 1)


def attention_case(
    version="dat++", bias=("unit", "BhMN"), dtype=torch.float64, size=(2, 3), keys=5, head_dim=2
):
    return AttentionCase(version, bias, dtype, size, keys, head_dim, (2, 1), 1.2, "contiguous", 1)


def wanting_gradients(inputs):
    return {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("factor", (2.0, 0.0, -1.0))
@pytest.mark.parametrize("size", ((5, 6), (1, 4)))
def test_sample_gradcheck(backend, version, factor, size):
    case = sample_case(version, factor, size=size)
    tensors = wanting_gradients(case.inputs()).values()
    gradcheck(backend, lambda x, offset: deform_sample(x, offset, **case.options), tensors)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "change",
    (
        {},
        {"bias": ("small", "1hMN")},
        {"bias": ("large", "B1M1")},
        {"bias": ("flat", "N")},
        {"bias": (None, "hMN")},
        {"bias": ("unit", "B11N"), "keys": 66, "head_dim": 1, "size": (1, 2)},
        {"bias": ("unit", ""), "size": (1, 1)},
    ),
    ids=str,
)
def test_attention_gradcheck(backend, version, change):
    case = attention_case(version, **change)
    given = wanting_gradients(case.inputs())

    def attend(*tensors):
        named = dict(zip(given, tensors, strict=True))
        return deform_attention(**named, scale=0.7, **case.options)

    gradcheck(backend, attend, given.values())


@pytest.mark.parametrize("wanted", ("q", "k", "v", "pos", "rpe_table", "bias"))
def test_gradient_of_one_input_alone(backend, wanted):
    case = attention_case(bias=("unit", "hMN"))
    given, (grad_out,) = case.inputs(), case.grads()
    want = run(deform_attention, given, [grad_out], **case.options)[f"gradient of {wanted}"]
    given[wanted].requires_grad_()
    deform_attention(**given, **case.options).backward(grad_out)
    torch.testing.assert_close(given[wanted].grad, want)


def operator_calls():
    """(operator, its arguments) for all four; those of the backward ones want no gradients."""
    sample = sample_case(dtype=torch.float32)
    x, offset = sample.inputs().values()
    settings = (2, 2.0, "dat++")
    yield OPERATORS.deform_sample_forward, [x, offset], settings
    yield OPERATORS.deform_sample_backward, None, (*sample.grads(), x, offset, *settings)
    q, k, v, pos, table, bias = attention_case(dtype=torch.float32).inputs().values()
    seed = torch.tensor([7])
    for tensors in (
        [q, k, v, pos, table, bias, seed],
        [q, k, v, None, None, None, None],
        [q, k, v, None, None, bias[:1], None],
    ):
        settings = (2, 0.7, 0.3 if tensors[-1] is not None else 0.0, "dat")
        yield OPERATORS.deform_attention_forward, tensors, settings
        out, lse = OPERATORS.deform_attention_forward(*tensors, *settings)
        grads = (torch.randn_like(out), *tensors, out, lse, *settings)
        has_bias = tensors[5] is not None
        yield OPERATORS.deform_attention_backward, None, (*grads, has_bias, False)


@pytest.mark.parametrize("index", range(8))
def test_opcheck(native, index):
    operator, differentiable, rest = list(operator_calls())[index]
    for tensor in differentiable or ():
        if tensor is not None and tensor.is_floating_point():
            tensor.requires_grad_()
    torch.library.opcheck(operator.default, (*(differentiable or ()), *rest))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_results_lie_as_the_inputs(layout):
    """On the CPU, as the fake kernels say."""
    case = attention_case(bias=(None, ""), dtype=torch.float32)
    inputs = {name: relayout(t, layout) for name, t in case.inputs().items() if name in "qkv"}
    given = wanting_gradients(inputs)
    rest = None, None, None, None, 2, 0.7, 0.0, "dat"
    torch.library.opcheck(OPERATORS.deform_attention_forward.default, (*given.values(), *rest))
    out = deform_attention(**given, **case.options)
    grads = torch.autograd.grad(out.sum(), given.values())
    sample = sample_case(dtype=torch.float32)
    x, offset = wanting_gradients(sample.inputs()).values()
    x = relayout(x, layout)
    rest = 2, 2.0, "dat++"
    torch.library.opcheck(OPERATORS.deform_sample_forward.default, (x, offset, *rest))
    sampled, _ = deform_sample(x, offset, **sample.options)
    grad_x = torch.autograd.grad(sampled.sum(), x)
    for t in (out, *grads, sampled, *grad_x):
        assert t.movedim(1, -1).is_contiguous() == (layout == "channels_last")
    changed = deform_sample(x, offset, **sample.options)[0].mul_(2)  # no view that forbids it
    torch.testing.assert_close(torch.autograd.grad(changed.sum(), x), (2 * grad_x[0],))


def both_operators(x, offset, table, bias):
    sampled, pos = deform_sample(x, offset, groups=2, offset_range_factor=2.0)
    return deform_attention(x, sampled, sampled.sin(), pos, table, heads=4, bias=bias)


def module_inputs(batch=2):
    tensors = (
        torch.randn(batch, 16, 7, 5),
        torch.randn(batch * 2, 2, 4, 3),
        torch.randn(4, 13, 9),
        torch.randn(4, 35, 12),
    )
    return [tensor.requires_grad_() for tensor in tensors]


def step(function, tensors):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


@pytest.mark.parametrize(
    "compiler", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow))
)
def test_compile(compiler):
    torch.compiler.reset()
    compiled = torch.compile(both_operators, fullgraph=True, backend=compiler)
    tensors = module_inputs()
    torch.testing.assert_close(step(compiled, tensors), step(both_operators, tensors))


def test_compile_with_a_dynamic_batch():
    torch.compiler.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both_operators, fullgraph=True, backend=frames, dynamic=True)
    counts = []
    for batch in (10, 21, 50):  # sizes that no other dimension has: equal ones would be one symbol
        tensors = module_inputs(batch)
        torch.testing.assert_close(step(compiled, tensors), step(both_operators, tensors))
        counts.append(frames.frame_count)
    assert counts[0] > 0 and counts[0] == counts[-1]


def test_compile_with_dropout():
    torch.compiler.reset()

    def attend(q, k, v):
        return deform_attention(q, k, v, heads=1, dropout_p=0.5)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q, v = torch.zeros(1, 32, 9, 9), torch.eye(32)[None]
    first, second = (compiled(q, torch.zeros_like(v), v) * 32 for _ in range(2))
    assert set(first.unique().round().tolist()) == {0.0, 2.0}
    assert not torch.equal(first, second)


class Both(torch.nn.Module):
    def forward(self, x, offset, table, bias):
        return both_operators(x, offset, table, bias)


def test_export():
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "offset": {0: 2 * batch}, "table": {}, "bias": {}}
    tensors = [tensor.detach() for tensor in module_inputs()]
    program = torch.export.export(Both(), tuple(tensors), dynamic_shapes=shapes)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"dat_cuda.deform_{name}_forward.default" for name in ("sample", "attention")} <= names
    tensors = [tensor.detach() for tensor in module_inputs(6)]
    torch.testing.assert_close(program.module()(*tensors), both_operators(*tensors))


def test_autocast(backend):
    """Features in bfloat16; positions and table stay what they are."""
    case = attention_case(dtype=torch.float32, size=(7, 9), keys=12, head_dim=16)
    given = case.inputs()
    # A shift that bfloat16 would round away, at a slope that makes it count.
    given["pos"] = given["pos"] / 1000 + 0.7
    given["rpe_table"] = given["rpe_table"] * 5
    exact = deform_attention(**given, **case.options)
    given = wanting_gradients(given)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out = deform_attention(**given, **case.options)
        x, offset = sample_case(dtype=torch.float32).inputs().values()
        sampled, pos = deform_sample(x.bfloat16(), offset, groups=2, offset_range_factor=2)
    assert out.dtype == torch.bfloat16
    assert sampled.dtype == torch.bfloat16 and pos.dtype == torch.float32
    rounded = {name: tensor.detach().clone() for name, tensor in given.items()}
    for name in ("q", "k", "v", "bias"):
        rounded[name] = rounded[name].bfloat16()
    assert torch.equal(out, deform_attention(**rounded, **case.options))
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)
    out.sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in given.values())


def test_autocast_leaves_float64_alone(backend):
    case = attention_case()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert deform_attention(**case.inputs(), **case.options).dtype == torch.float64


@pytest.mark.parametrize("name", ("sample", "attention"))
def test_second_derivatives_are_refused(name):
    case = sample_case() if name == "sample" else attention_case()
    given = wanting_gradients(case.inputs())
    outputs = getattr(dat_cuda, f"deform_{name}")(**given, **case.options)
    output = outputs[0] if name == "sample" else outputs
    grads = torch.autograd.grad(output.square().sum(), list(given.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="dat_cuda has no second derivatives"):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), list(given.values()))


@pytest.mark.parametrize("size", (4, 14))  # of few pixels, and of many
@pytest.mark.parametrize("first", ("proj_out", "proj_q", "conv_offset.3", "rpe_table"))
@pytest.mark.parametrize("second", ("proj_v", "proj_out", "rpe_table", "x"))
def test_second_derivatives_of_modules_are_refused(first, second, size):
    module = DAttention((size, size), (2, 2), 4, 8, 2, 0, 0, 2, 2, True, False, False, False, 3)
    x = torch.randn(1, 32, size, size, requires_grad=True)

    def tensor(name):
        if name == "x":
            return x
        return module.rpe_table if name == "rpe_table" else module.get_submodule(name).weight

    loss = module(x)[0].sin().sum()
    (grad,) = torch.autograd.grad(loss, tensor(first), create_graph=True)
    with pytest.raises(RuntimeError, match="dat_cuda has no second derivatives"):
        torch.autograd.grad(loss + grad.square().sum(), tensor(second))


@pytest.mark.parametrize("kind", (TransformerMLP, TransformerMLPWithConv))
def test_second_derivatives_of_mlps_are_refused(kind):
    module, x = kind(8, 2), torch.randn(1, 8, 6, 6, requires_grad=True)
    inputs = {"x": x, **dict(module.named_parameters())}
    last = [name for name in inputs if "linear2" in name and "bias" in name]
    for first in inputs.values():
        loss = module(x).sin().sum()
        (grad,) = torch.autograd.grad(loss, first, create_graph=True)
        for name, second in inputs.items():
            if name not in last:
                with pytest.raises(RuntimeError, match="dat_cuda has no second derivatives"):
                    torch.autograd.grad(loss + grad.square().sum(), second, retain_graph=True)


@pytest.fixture
def reference_calls(monkeypatch):
    """Names of the reference's functions that were called."""
    calls = []

    def spy(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(reference, name, call)

    spy("deform_sample", reference.deform_sample)
    spy("deform_attention", reference.deform_attention)
    return calls


def test_backend_chooses(reference_calls):
    tensors = module_inputs()
    native = both_operators(*tensors)
    assert reference_calls == []
    with dat_cuda.backend("reference"):
        plain = both_operators(*tensors)
        assert reference_calls == ["deform_sample", "deform_attention"]
        with dat_cuda.backend("auto"):
            both_operators(*tensors)
        assert len(reference_calls) == 2
        both_operators(*tensors)
        assert len(reference_calls) == 4
    both_operators(*tensors)
    assert len(reference_calls) == 4
    torch.testing.assert_close(native, plain)


def test_backend_is_restored_after_an_exception(reference_calls):
    with pytest.raises(KeyError), dat_cuda.backend("reference"):
        raise KeyError
    both_operators(*module_inputs())
    assert reference_calls == []


def test_backend_refuses_other_names(reference_calls):
    with pytest.raises(ValueError, match="backend must be .*'auto', 'reference', got 'gpu'"):
        dat_cuda.backend("gpu").__enter__()
    both_operators(*module_inputs())
    assert reference_calls == []


def test_a_device_without_kernels_falls_back(reference_calls):
    tensors = [tensor.detach().to("meta") for tensor in module_inputs()]
    out = both_operators(*tensors)
    assert reference_calls == ["deform_sample", "deform_attention"]
    assert out.device.type == "meta" and out.shape == tensors[0].shape


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize("count", (1, 2, 3))
def test_results_repeat_bit_by_bit(backend, seed, count, dropout_p):
    case = attention_case("dat", ("small", "1hMN"), torch.float32, (13, 17), 70, 20)
    given, grads = case.inputs(), case.grads()
    sample = sample_case(dtype=torch.float32, size=(9, 7), keys=(8, 8))
    x, grads_x = sample.inputs(), sample.grads()

    def once():
        torch.manual_seed(seed)
        attended = run(deform_attention, given, grads, dropout_p=dropout_p, **case.options)
        return {**attended, "sample": run(deform_sample, x, grads_x, **sample.options)}

    # The CPU's kernels are deterministic unasked.
    asked = nullcontext() if backend in ("reference", "cpu") else deterministic_algorithms()
    with threads(count), asked:
        first, *others = (once() for _ in range(5))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)
