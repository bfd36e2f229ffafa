"""DAttention as a module: shapes, resolutions, encodings, modes, transforms and refusals."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dat_cuda import DAttention

DEFAULTS = {
    "q_size": (8, 6),
    "kv_size": (4, 3),
    "n_heads": 4,
    "n_head_channels": 8,
    "n_groups": 2,
    "attn_drop": 0.0,
    "proj_drop": 0.0,
    "stride": 2,
    "offset_range_factor": -1,
    "use_pe": True,
    "dwc_pe": False,
    "no_off": False,
    "fixed_pe": False,
    "ksize": 3,
    "log_cpb": False,
    "version": "dat++",
}
VARIANTS = {
    "rpe": {},
    "rpe-dat": {"version": "dat", "offset_range_factor": 2},
    "none": {"use_pe": False},
    "fixed": {"fixed_pe": True},
    "log_cpb": {"log_cpb": True},
    "dwc": {"dwc_pe": True},
    "no_off": {"no_off": True},
    "no_off-dat": {"no_off": True, "version": "dat"},
}


def make(**changes):
    return DAttention(**(DEFAULTS | changes))


def rand(*shape):
    return torch.randn(*(shape or (2, 32, 8, 6)))


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


class PublishedShapes(nn.Module):
    """The published module's parameters, in its order of creation, and nothing else."""

    def __init__(self, channels, group_channels, ksize, stride, rpe_table):
        super().__init__()
        norm = nn.Module()
        norm.norm = nn.LayerNorm(group_channels)
        self.conv_offset = nn.Sequential(
            nn.Conv2d(group_channels, group_channels, ksize, stride, groups=group_channels),
            norm,
            nn.GELU(),
            nn.Conv2d(group_channels, 2, 1, bias=False),
        )
        for name in ("proj_q", "proj_k", "proj_v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))
        self.rpe_table = rpe_table()


def table(*shape):
    return lambda: nn.Parameter(nn.init.trunc_normal_(torch.zeros(4, *shape), std=0.01))


PUBLISHED_TABLES = {
    "rpe": table(15, 11),
    "rpe-dat": table(7, 5),
    "none": lambda: None,
    "fixed": table(48, 12),
    "log_cpb": lambda: nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2, bias=False)),
    "dwc": lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32),
    "no_off": lambda: None,
    "no_off-dat": table(7, 5),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_published_checkpoint_and_initialisation(name, seed):
    torch.manual_seed(seed)
    published = PublishedShapes(32, 16, 3, 2, PUBLISHED_TABLES[name])
    torch.manual_seed(seed)
    module = make(**VARIANTS[name])
    for key, value in published.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key

    with torch.no_grad():
        for parameter in published.parameters():
            parameter.normal_()
    file = io.BytesIO()
    torch.save(published.state_dict(), file)
    file.seek(0)
    module.load_state_dict(torch.load(file, weights_only=True), strict=True)
    published.load_state_dict(module.state_dict(), strict=True)


def test_table_initialisation():
    values = make(q_size=(56, 56)).rpe_table
    assert values.shape == (4, 111, 111)
    assert 0.0095 < values.std() < 0.0105 and values.abs().max() > 0.03


def test_returns(backend, variant):
    y, pos, reference = make(**variant)(rand())
    assert y.shape == (2, 32, 8, 6)
    assert pos.shape == reference.shape == (2, 2, 4, 3, 2)
    assert not reference.requires_grad
    assert pos.requires_grad == (not variant.get("no_off", False))


@pytest.mark.parametrize("size", ((16, 12), (5, 9), (1, 1), (1, 7), (13, 2)))
@pytest.mark.parametrize("version", ("dat", "dat++"))
@pytest.mark.parametrize("encoding", ({}, {"dwc_pe": True}, {"use_pe": False}))
def test_run_time_resolution(backend, size, version, encoding):
    module = make(version=version, **encoding)
    x = rand(2, 32, *size).requires_grad_()
    y, pos, _ = module(x)
    assert y.shape == x.shape
    assert pos.shape == (2, 2, (size[0] + 1) // 2, (size[1] + 1) // 2, 2)
    y.square().mean().backward()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("version", "ksize", "keys"),
    (("dat++", 2, (4, 3)), ("dat++", 3, (4, 3)), ("dat", 2, (5, 4)), ("dat", 5, (4, 3))),
)
def test_offset_padding(version, ksize, keys):
    # In "dat++" a kernel as large as its stride tiles the map: nothing is padded.
    module = make(version=version, ksize=ksize)
    assert module(rand())[1].shape[2:4] == keys == module._key_size(8, 6)


def test_fixed_bias_is_for_one_size(backend):
    module = make(fixed_pe=True)
    # Transposed, the map has as many queries and keys: the bias would fit and be wrong.
    with pytest.raises(ValueError, match="8 x 6, the q_size .* got 6 x 8"):
        module(rand(2, 32, 6, 8))


@pytest.mark.parametrize("version", ("dat", "dat++"))
def test_no_off_keys(backend, version):
    module = make(no_off=True, version=version).double()
    assert not any(p.requires_grad for p in module.conv_offset.parameters())
    x = rand().double()
    y, pos, reference = module(x)
    if version == "dat":
        assert torch.equal(pos, reference)
    else:
        assert torch.equal(pos, reference.clamp(-1, 1))
        assert module.rpe_table is None
        keys = nn.functional.avg_pool2d(x, 2)
        q, k, v = module.proj_q(x), module.proj_k(keys), module.proj_v(keys)
        q, k, v = (t.reshape(2, 4, 8, -1).transpose(2, 3) for t in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        want = module.proj_out(out.transpose(2, 3).reshape(2, 32, 8, 6))
        torch.testing.assert_close(y, want)
    y.sum().backward()
    assert all(p.grad is None for p in module.conv_offset.parameters())


def test_dwc_adds_convolution_of_q(backend):
    module = make(dwc_pe=True).double()
    x = rand().double()
    with_conv = module(x)[0]
    extra = module.rpe_table(module.proj_q(x))
    nn.init.zeros_(module.rpe_table.weight)
    nn.init.zeros_(module.rpe_table.bias)
    projected = nn.functional.conv2d(extra, module.proj_out.weight)
    torch.testing.assert_close(with_conv, module(x)[0] + projected)


@pytest.mark.parametrize("which", ("attn_drop", "proj_drop"))
def test_dropout_only_in_training(backend, which):
    module, x = make(**{which: 0.5}), rand()
    assert not torch.equal(module(x)[0], module(x)[0])
    torch.manual_seed(1)
    first = module(x)[0]
    torch.manual_seed(1)
    assert torch.equal(module(x)[0], first)
    module.eval()
    plain = make().eval()
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(x)[0], plain(x)[0])


def test_empty_batch(backend, variant):
    y, pos, _ = make(**variant)(rand(0, 32, 8, 6))
    assert y.shape == (0, 32, 8, 6) and pos.shape == (0, 2, 4, 3, 2)


def test_channels_last_and_strided_input(backend, variant):
    module, x = make(**variant), rand()
    want = module(x)[0]
    views = (x.contiguous(memory_format=torch.channels_last), x.repeat(1, 1, 1, 2)[..., :6])
    for view in views:
        torch.testing.assert_close(module(view)[0], want)


@pytest.mark.parametrize("copier", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies(backend, variant, copier):
    module, x = make(**variant), rand()
    module(x)[0].sum().backward()
    assert torch.equal(copier(module)(x)[0], module(x)[0])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_module(backend, variant, dtype):
    module, x = make(**variant), rand().to(dtype)
    want, want_pos, _ = copy.deepcopy(module.to(dtype)).double()(x.double())
    y, pos, reference = module(x)
    assert y.dtype == dtype and pos.dtype == reference.dtype == torch.float32
    # Half a dozen layers, each rounding to dtype; 8 bits of margin are left in float16.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(pos.double(), want_pos, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
    y.float().square().mean().backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == dtype and torch.isfinite(parameter.grad).all(), name


def test_autocast(backend, variant):
    module, x = make(**variant), rand().requires_grad_()
    want = module(x)[0]
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y, pos, _ = module(x)
        loss = y.float().square().mean()
    loss.backward()
    assert y.dtype == torch.bfloat16 and pos.dtype == torch.float32
    assert x.grad.dtype == torch.float32 and torch.isfinite(x.grad).all()
    torch.testing.assert_close(y.float(), want, rtol=0, atol=0.05 * want.abs().max().item())


def compiled_matches(module, inductor):
    x = rand().requires_grad_()
    compiled = torch.compile(
        module, fullgraph=True, backend="inductor" if inductor else "aot_eager"
    )
    results = []
    for function in (module, compiled):
        module.zero_grad()
        x.grad = None
        y, pos, _ = function(x)
        (y.square().mean() + pos.square().sum()).backward()
        grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        results.append([y.detach(), pos.detach(), x.grad.clone(), *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compile_traces_whole(backend, variant):
    torch.compiler.reset()
    compiled_matches(make(**variant), inductor=False)


@pytest.mark.slow
def test_compile(backend):
    torch.compiler.reset()
    compiled_matches(make(), inductor=True)


@pytest.mark.slow
def test_export(backend, variant):
    module = make(**variant).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (rand(),), dynamic_shapes=({0: batch},))
    x = rand(3, 32, 8, 6)
    for got, want in zip(program.module()(x), module(x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"n_groups": 3}, "n_groups must divide n_heads 4, got 3"),
        ({"n_groups": 0}, "n_groups must be positive, got 0"),
        ({"stride": 0}, "stride must be positive, got 0"),
        ({"ksize": 0}, "ksize must be positive, got 0"),
        ({"q_size": 8}, r"q_size must be a pair \(height, width\)"),
        ({"kv_size": (4, 0)}, r"kv_size must be a pair \(height, width\)"),
        ({"version": "dat3"}, "version must be one of .* got 'dat3'"),
        ({"version": "dat", "log_cpb": True}, "log_cpb exists only in version 'dat\\+\\+'"),
        ({"attn_drop": 1.5}, "dropout probability"),
        ({"fixed_pe": True, "q_size": (7, 6)}, r"fixed_pe needs .* \(3, 3\).* make \(4, 3\)"),
        ({"fixed_pe": True, "version": "dat", "kv_size": (8, 6)}, r"fixed_pe needs .* \(8, 6\)"),
    ),
)
def test_refuses_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("shape", ((32, 8, 6), (2, 31, 8, 6)))
def test_refuses_input(shape):
    with pytest.raises(ValueError, match=r"x must have shape \[B, 32, H, W\], got"):
        make()(rand(*shape))


def test_six_operators_do_it_all():
    """In inference, beside the offset network and what only makes views: on a GPU every operator
    would be a launch."""
    module = make().eval()
    module.conv_offset.requires_grad_(False)
    x = rand()
    inside = False
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            # Dropout does nothing in inference.
            if not (inside or function.is_view or "dropout" in str(function)):
                calls.append(str(function))
            return result

    def enter(*_):
        nonlocal inside
        inside = not inside

    module.conv_offset.register_forward_pre_hook(enter)
    module.conv_offset.register_forward_hook(enter)
    with torch.inference_mode():
        module(x)
        with Count():
            module(x)
    assert len(calls) == 6 and sum(name.startswith("dat_cuda") for name in calls) == 2, calls
