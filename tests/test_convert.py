"""convert: what it converts, what it leaves alone and why, and that nothing else changes."""

import copy
import pickle
import re
import warnings

import published
import pytest
import torch
from operator_cases import threads
from torch import nn

from dat_cuda import DAttention
from dat_cuda.convert import ConvertedDAttention, convert

DEFAULTS = {
    "q_size": (8, 6), "kv_size": (8, 6), "n_heads": 4, "n_head_channels": 8, "n_groups": 2,
    "attn_drop": 0.0, "proj_drop": 0.0, "offset_range_factor": -1, "use_pe": True,
    "dwc_pe": False, "no_off": False, "fixed_pe": False,
}  # fmt: skip
DEFAULTS_2022 = DEFAULTS | {"stride": 1, "stage_idx": 3}
DEFAULTS_2023 = DEFAULTS | {"stride": 2, "ksize": 3, "log_cpb": False}
DEFAULTS_YOLO = {"channel": 32, "q_size": (8, 6)}


@pytest.fixture(autouse=True)
def one_thread():
    """Beside other work, threads only wait for each other over problems as small as these."""
    with threads(1):
        yield


def make(cls=published.Attention2023, **changes):
    defaults = DEFAULTS_2023
    if issubclass(cls, published.YoloAttention):
        defaults = DEFAULTS_YOLO
    elif issubclass(cls, published.Attention2022):
        defaults = DEFAULTS_2022
    module = cls(**(defaults | changes))
    for parameter in module.parameters():
        # As they are initialised, tables would hardly matter.
        nn.init.normal_(parameter, std=0.5 if parameter.dim() in (1, 3) else 0.2)
    return module


def rand(*size, dtype=torch.float32):
    return torch.randn(2, 32, *(size or (8, 6)), dtype=dtype)


def flat(result):
    return (result,) if isinstance(result, torch.Tensor) else result


def assert_same(converted, original, x):
    """Results in the module's own dtype; gradients in float64, for where rounding moves a position
    over the border of a cell they jump."""
    for got, want in zip(flat(converted(x)), flat(original(x)), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert_near("result", got, want, 1e-4)
    got, want = (gradients(copy.deepcopy(module).double(), x) for module in (converted, original))
    floor = 1e-2 * max(grad.abs().max() for grad in want.values() if grad is not None)
    for name, grad in want.items():
        if grad is not None:
            assert_near(f"the gradient of {name}", got[name], grad, 1e-4, floor)


def gradients(module, x):
    """With respect to x and all parameters."""
    x = x.double().requires_grad_()
    module.zero_grad()
    results = flat(module(x))
    sum(value.square().sum() for value in results if value is not None).backward()
    return {name: p.grad for name, p in module.named_parameters()} | {"x": x.grad}


def assert_near(name, got, want, tolerance, floor=0.0):
    assert got.shape == want.shape and got.dtype == want.dtype, name
    error = (got - want).abs().max().item()
    assert error <= tolerance * max(want.abs().max().item(), floor), f"{name}: error {error:.1e}"


def refusal(module, **options):
    """The reason, once it is sure that nothing was done."""
    kind, model = type(module), nn.Sequential(module)
    report = convert(model, **options)
    [entry] = report.refused
    assert type(model[0]) is kind and not report.converted
    assert entry.names == ("0",) and entry.class_name == kind.__name__ and entry.version is None
    assert "0: " + kind.__name__ in str(report) and entry.reason in str(report)
    return entry.reason


# What is converted.

CASES = {
    "rpe": {},
    "factor": {"offset_range_factor": 2},
    "factor-0": {"offset_range_factor": 0},
    "large-factor": {"offset_range_factor": 20},
    "none": {"use_pe": False},
    "dwc": {"dwc_pe": True},
    "one-head": {"n_heads": 1, "n_head_channels": 32, "n_groups": 1},
    "odd-size": {"q_size": (7, 9), "kv_size": (7, 9)},
}
CASES_2023 = CASES | {
    "fixed": {"fixed_pe": True},
    "log_cpb": {"log_cpb": True},
    "no_off": {"no_off": True},
    "tiling-kernel": {"ksize": 2},
    "coarse": {"q_size": (32, 48), "stride": 8, "ksize": 9},
}
CASES_YOLO = {
    "defaults": {},
    "rpe": {"dwc_pe": False},
    "coarse": {"dwc_pe": False, "stride": 4, "q_size": (16, 20)},
    "log_cpb": {"dwc_pe": False, "log_cpb": True, "n_groups": 1},
}
ALL_CASES = [
    *((published.Attention2022, "dat", case) for case in CASES.items()),
    *((published.Attention2023, "dat++", case) for case in CASES_2023.items()),
    *((published.YoloAttention, "dat++", case) for case in CASES_YOLO.items()),
    *((published.Segmentation2023, "dat++", case) for case in CASES.items()),
]


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize(
    ("cls", "version", "case"),
    ALL_CASES,
    ids=[f"{cls.__name__}-{name}" for cls, _, (name, _) in ALL_CASES],
)
def test_converts(cls, version, case, training):
    module = make(cls, **case[1]).train(training)
    original = copy.deepcopy(module)
    size = case[1].get("q_size", (8, 6))

    report = convert(module)
    [entry] = report.converted
    assert entry.version == version and entry.names == ("",) and not report.refused
    assert report.model is module and isinstance(module, DAttention)
    assert module.version == version and module.training is training
    assert_same(module, original, rand(*size))


def test_converts_on_every_backend(backend):
    module = make()
    original = copy.deepcopy(module)
    assert convert(module)
    x = rand()
    assert next(module.parameters()).device == x.device
    assert_same(module, original, x)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize(
    "cls",
    (
        published.Attention2022,
        published.Attention2023,
        published.Segmentation2023,
        published.YoloAttention,
    ),
)
def test_half(cls, dtype):
    module = make(cls).to(dtype)
    x = rand(dtype=dtype)
    kinds = [value is not None and value.dtype for value in flat(copy.deepcopy(module)(x))]
    exact = flat(copy.deepcopy(module).double()(x.double()))

    assert convert(module)
    assert {p.dtype for p in module.parameters()} == {dtype}
    results = flat(module(x))
    assert [value is not None and value.dtype for value in results] == kinds
    # As in test_module.py: half a dozen layers, each rounding.
    tolerance = 8 * torch.finfo(dtype).eps
    for got, want in zip(results, exact, strict=True):
        if want is not None:
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rate", ("attn_drop", "proj_drop"))
def test_dropout_only_in_training(rate):
    module, x = make(**{rate: 0.5}), rand()
    plain = make()
    plain.load_state_dict(module.state_dict())
    assert convert(module)
    assert not torch.equal(module(x)[0], module(x)[0])
    assert_near("y", module.eval()(x)[0], plain(x)[0], 1e-4)


@pytest.mark.parametrize("cls", (published.Attention2022, published.Attention2023))
def test_a_large_module_is_verified_cheaply(cls):
    scores = []

    class Watched(cls):
        def weigh(self, q, k, bias):
            scores.append(q.shape[0] * q.shape[1] * q.shape[3] * k.shape[3])
            return super().weigh(q, k, bias)

    # That of 2022 runs at no other size: 22 million scores an image.
    module = make(Watched, q_size=(48, 49), kv_size=(48, 49), stride=1)
    assert convert(module)
    assert scores and max(scores) <= 2**20
    assert module.rpe_table.shape == (4, 95, 97) and (module.q_h, module.q_w) == (48, 49)


def test_one_key():
    """Where an axis has one key, the published code divides by zero."""
    nan = make(q_size=(1, 8))
    assert nan(rand(1, 8))[0].isnan().any()
    failing = make(q_size=(6, 6), stride=6, offset_range_factor=2)
    with pytest.raises(ZeroDivisionError):
        failing(rand(6, 6))
    for module in (nan, failing):
        # Another size shows the formula.
        original = copy.deepcopy(module)
        assert convert(module)
        assert module(rand(module.q_h, module.q_w))[0].isfinite().all()
        assert_same(module, original, rand(12, 18))

    # With its position clamped, what it computes is defined, but differs.
    module = make(q_size=(6, 6), stride=6)
    assert module(rand(6, 6))[0].isfinite().all()
    assert re.search(r"differs? .*\(at 6 x 6", refusal(module))


class InFloat32(published.Attention2023):
    def forward(self, x):
        return super().forward(x.float())


def test_a_module_for_float32_alone():
    module = make(InFloat32)
    original = copy.deepcopy(module)
    assert convert(module)
    x = rand()
    assert_near("y", module(x)[0], original(x)[0], 1e-4)


# What is left alone.

LOOK_ALIKES = {
    published.TanhBound: r"computes something else: y differs .* 'dat'; y differs .* 'dat\+\+'",
    published.UnboundedOffset: "y differs",
    published.OtherQueryGrid: "y differs",
    published.OtherScale: "y differs",
    published.SwappedAxes: "y differs",
    published.SumsNotSoftmax: "y differs",
    published.EarlyDropout: r"y differs .* in training\) from version 'dat\+\+'",
    published.HiddenDropout: r"y differs .* in training\) from version 'dat\+\+'",
    published.DropsInEvaluation: r"y differs .* in evaluation\) from version 'dat\+\+'",
    published.NeverDropsResults: r"y differs .* in training\) from version 'dat\+\+'",
    published.DetachedPositions: r"the gradient of .* in evaluation\) from version 'dat\+\+'",
    published.DetachedInTraining: r"the gradient of .* in training\) from version 'dat\+\+'",
    published.Gated: "has parts that DAttention has not: gate",
    published.GatedByBuffer: "its buffers take part in the result: gate",
    published.KeepsItsMap: "forward changes weights",
    published.ReturnsMean: r"returns a tensor \[2, 8, 6, 4, 3\] that DAttention has not",
    published.ReturnsDict: "returns a dict",
    published.ReturnsMore: "what it returns depends on the mode",
    published.ReturnsOtherReference: "pos or reference differs",
    published.TakesMask: r"forward takes not x alone but \(x, mask=None\)",
    published.OwnLoading: "methods that a conversion would lose: _load_from_state_dict",
}


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("cls", LOOK_ALIKES, ids=lambda cls: cls.__name__)
def test_look_alikes(cls, training):
    assert re.search(LOOK_ALIKES[cls], refusal(make(cls).train(training)))


@pytest.mark.parametrize(
    ("cls", "changes", "reason"),
    (
        (published.Attention2022, {"no_off": True}, "cannot be verified: .* no attribute 'fill'"),
        (published.Attention2022, {"fixed_pe": True}, "cannot be verified: .* 'n_sample'"),
        # Elsewhere than at q_size it interpolates the dense bias.
        (published.Detection2023, {"fixed_pe": True}, "x must be 8 x 6, the q_size .* got 7 x 10"),
    ),
)
def test_what_fails_or_does_more(cls, changes, reason):
    assert re.search(reason, refusal(make(cls, **changes), attention_maps="drop"))


def test_attention_maps():
    module = make(published.Detection2023)
    assert "attention_maps='drop'" in refusal(module)
    original = copy.deepcopy(module)
    assert convert(module, attention_maps="drop")
    x = rand()
    y, pos, weights = original(x)
    assert weights.shape == (2, 4, 8, 6, 4, 3)
    got = module(x)
    assert len(got) == 3 and got[2] is None
    assert_near("y", got[0], y, 1e-4)
    assert_near("pos", got[1], pos, 1e-4)


def test_other_parts():
    class DAttention(nn.Module):  # one of the many
        pass

    assert re.search("has no proj_q, proj_k", refusal(DAttention()))
    module = make()
    module.attn_drop = nn.Dropout2d(0.1)
    assert re.search("attn_drop is not a Dropout but a Dropout2d", refusal(module))
    module = make()
    del module.n_heads
    assert re.search("cannot be verified: .* no attribute 'n_heads'", refusal(module))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        scripted = torch.jit.trace(make(published.YoloAttention), rand())
    assert refusal(scripted) == "is a TorchScript module"
    report = convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.MultiheadAttention(8, 2)))
    assert not report and not report.refused


def test_versions_that_cannot_be_told_apart():
    class Far(nn.Module):
        def forward(self, x):
            return x + 100.0

    # tanh and clamp both give 1.
    module = make(published.YoloAttention, offset_range_factor=-1, use_pe=False)
    module.conv_offset.append(Far())
    assert "does not tell the versions apart" in refusal(module)


def test_replaced_forward():
    module = make()
    published_forward = module.forward
    module.forward = lambda x: published_forward(x)
    assert re.search("would lose: forward", refusal(module))


@pytest.mark.parametrize("changes", ({}, {"no_off": True}, {"log_cpb": True}))
def test_hooks_that_would_not_be_called(changes):
    for part in ("attn_drop", "conv_offset", "rpe_table"):
        module = make(**changes)
        part_module = getattr(module, part)
        uncalled = part == "attn_drop" or (part, changes) in (
            ("conv_offset", {"no_off": True}),
            ("rpe_table", {"log_cpb": True}),
        )
        if not isinstance(part_module, nn.Module):
            continue
        part_module.register_forward_hook(lambda *_: None)
        if uncalled:
            assert re.search(f"{part} has hooks", refusal(module))
        else:
            assert convert(module)


# What stays as it is.


class Net(nn.Module):
    """One attention module in two places, others in containers, a list that hides one."""

    def __init__(self):
        super().__init__()
        self.first = make(published.Segmentation2023)
        self.again = self.first
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": make(published.YoloAttention)})])
        self.look_alike = make(published.TanhBound)
        self.head = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        x = self.first(x)[0] + x
        x = self.again(x)[0] + x
        x = self.blocks[0]["attn"](x) + x
        return self.head(self.look_alike(x)[0])


def test_model():
    model, x = Net(), rand()
    original = copy.deepcopy(model)
    report = convert(model)
    assert [entry.names for entry in report.converted] == [
        ("first", "again"),
        ("blocks.0.attn",),
    ]
    assert [entry.names for entry in report.refused] == [("look_alike",)]
    assert model.first is model.again and isinstance(model.first, ConvertedDAttention)
    assert len(report) == 2 and bool(report)
    assert_same(model, original, x)
    text = str(report)
    for part in ("2 converted, 1 left alone", "first, again: Segmentation2023 dat++",
                 "blocks.0.attn: YoloAttention", "look_alike: TanhBound computes"):  # fmt: skip
        assert part in text

    # Once more: there is nothing left to do.
    report = convert(model)
    assert not report and len(report.refused) == 1


def test_copy_and_dry_run_leave_the_model_alone():
    model = Net()
    kinds = [type(module) for module in model.modules()]
    report = convert(model, inplace=False)
    assert report.model is not model and len(report) == 2
    assert isinstance(report.model.first, DAttention) and report.model.first is report.model.again
    x = rand()
    assert_near("y", report.model(x), model(x), 1e-4)

    dry = convert(model, dry_run=True)
    assert dry.model is model and dry.converted == report.converted
    assert "2 would be converted" in str(dry)
    assert [type(module) for module in model.modules()] == kinds


def test_nothing_else_changes():
    model = Net()
    model.first.proj_q.requires_grad_(False)
    model.first.register_buffer("steps", torch.tensor(7))
    model.first.register_buffer("means", torch.ones(3), persistent=False)
    model.first.note = "mine"
    model.first.register_parameter("nothing", None)
    model.blocks.eval()
    model.blocks[0]["attn"].attn_drop.train()
    model(rand()).sum().backward()

    def facts():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        yield [(name, id(t), t._version, t.requires_grad, id(t.grad)) for name, t in tensors]
        yield list(model.state_dict())
        yield [(name, module.training) for name, module in model.named_modules()]
        yield torch.get_rng_state().tolist()
        yield torch.get_default_dtype(), torch.is_grad_enabled()

    before, values = list(facts()), copy.deepcopy(model.state_dict())
    assert len(convert(model)) == 2
    assert list(facts()) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert model.first.note == "mine"


def test_warnings_of_the_module_are_its_own():
    class Warns(published.Attention2023):
        def forward(self, x):
            warnings.warn("deprecated", stacklevel=1)
            return super().forward(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert(make(Warns))


def test_optimizer_goes_on():
    models = [Net(), None]
    models[1] = copy.deepcopy(models[0])
    optimizers = [torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9) for model in models]
    for step in range(4):
        x = rand()
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        if step == 1:
            assert convert(models[0])
    x = rand()
    assert_near("y", models[0](x), models[1](x), 1e-3)


def test_hooks_stay():
    model, x, calls = Net(), rand(), []

    def called(name):
        return lambda *_: calls.append(name)

    attention = model.blocks[0]["attn"]
    handles = [
        attention.register_forward_pre_hook(called("pre")),
        attention.register_forward_hook(called("forward")),
        attention.register_full_backward_hook(called("backward")),
        attention.register_state_dict_pre_hook(called("state")),
        attention.proj_k.register_forward_hook(called("proj_k")),
        attention.conv_offset.register_forward_hook(called("conv_offset")),
    ]
    assert convert(model) and not calls
    model(x).sum().backward()
    assert sorted(calls) == ["backward", "conv_offset", "forward", "pre", "proj_k"]
    model.state_dict()
    assert calls.pop() == "state"
    calls.clear()
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert not calls


def test_hooks_that_hold_the_world():
    """Neither what hooks refer to is copied, nor what they are."""

    class World:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def hook(self, *_):
            pass

    module = make()
    module.register_forward_hook(World().hook)
    module.proj_q.register_forward_pre_hook(World().hook)
    assert convert(module)


@pytest.mark.parametrize("copier", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies_and_checkpoints(copier):
    module, x = make(), rand()
    checkpoint = copy.deepcopy(module.state_dict())
    assert convert(module)
    assert list(module.state_dict()) == list(checkpoint)
    again = copier(module)
    nn.init.zeros_(again.rpe_table)
    again.load_state_dict(checkpoint, strict=True)
    make().load_state_dict(again.state_dict(), strict=True)
    assert torch.equal(again(x)[0], module(x)[0]) and len(again(x)) == 3


@pytest.mark.parametrize(
    "state",
    (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.device("meta"),
    ),
    ids=("no_grad", "inference_mode", "autocast", "meta"),
)
def test_in_any_state(state):
    with state:
        assert convert(make())
        assert convert(make(published.Attention2022))
        assert convert(make(InFloat32))
        assert refusal(make(published.TanhBound))


class LowRank(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Conv2d(32, 2, 1), nn.Conv2d(2, 32, 1)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


PARTS = {
    "weight_norm": lambda conv: nn.utils.parametrizations.weight_norm(conv),
    "spectral_norm": lambda conv: nn.utils.parametrizations.spectral_norm(conv),
    "low-rank": LowRank,
    "batch-norm": lambda conv: nn.Sequential(conv, nn.BatchNorm2d(32)),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parts_of_the_users_own(part):
    module = make()
    module.proj_q, module.proj_k = part(module.proj_q), part(module.proj_k)
    original = copy.deepcopy(module)
    assert convert(module)
    for name, value in module.state_dict().items():
        assert torch.equal(value, original.state_dict()[name]), name
    assert_same(module, original, rand())


@pytest.mark.slow
@pytest.mark.parametrize("compile_first", (True, False))
def test_compiled_model(compile_first):
    torch.compiler.reset()
    model, x = nn.Sequential(make(published.YoloAttention)), rand()
    want = model(x)
    if compile_first:
        compiled = torch.compile(model, backend="aot_eager")
        compiled(x)
        assert convert(compiled).converted[0].names == ("_orig_mod.0",)
    else:
        assert convert(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_near("y", compiled(x), want, 1e-4)


def test_a_model_that_contains_itself():
    model = Net()
    model.blocks[0]["owner"] = model
    assert len(convert(model)) == 2


@pytest.mark.parametrize("model", (None, [], published.Attention2023))
def test_refuses_model(model):
    with pytest.raises(
        TypeError, match=r"model must be a torch.nn.Module, got (NoneType|list|type)"
    ):
        convert(model)


def test_refuses_option():
    with pytest.raises(ValueError, match="attention_maps must be 'keep' or 'drop', got 'none'"):
        convert(Net(), attention_maps="none")
