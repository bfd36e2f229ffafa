"""The blocks and whole models: against tensors made by running the published code in float64,
against formulas written as loops, and what holds for them beyond that."""

import copy
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from near import assert_near
from torch import nn

import dat_cuda
from dat_cuda import _rss, models
from dat_cuda.models import DAT, blocks, mlp

GOLDEN = Path(__file__).parent / "golden"
# Relative to a tensor's largest value. In float32 a gradient passes through dozens of layers.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
MILLIONS = {
    **{"dat_tiny": 28.3, "dat_small": 49.7, "dat_base": 87.9, "dat_base_384": 88.2},
    **{"datpp_tiny": 24.0, "datpp_small": 53.1, "datpp_base": 93.7, "datpp_base_384": 94.1},
    "datpp_p": 22.8,
}
MINI = {
    "img_size": 64,
    "num_classes": 5,
    "dim_stem": 16,
    "dims": (16, 32, 64, 128),
    "heads": (1, 2, 4, 8),
    "groups": (1, 1, 2, 4),
    "depths": (2, 2, 2, 2),
    "stage_spec": ("ND", "LD", "SD", "DD"),
    "strides": (8, 4, 2, 1),
    "offset_range_factor": (-1, -1, 2, 2),
    "use_pes": (True,) * 4,
    "window_sizes": (7, 7, 4, 2),
    "nat_ksizes": (5, 5, 3, 3),
    "use_dwc_mlps": (True, False, True, True),
    "use_lpus": (True,) * 4,
    "use_conv_patches": True,
}


def cases(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


BLOCKS = {**cases("blocks"), **cases("neighborhood")}
MODELS = cases("models")


def made(name):
    if name in MODELS:
        version = "dat" if name == "dat_mini" else "dat++"
        return DAT(**MODELS[name]["config"], version=version)
    config = dict(BLOCKS[name]["config"])
    return getattr(blocks, config.pop("kind"))(**config)


def outputs(module, x):
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


def check_golden(name, case, dtype, channels_last):
    module = made(name)
    module.load_state_dict(case["state_dict"], strict=True)
    module.to(dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = case["input"].to(dtype).contiguous(memory_format=layout).detach().requires_grad_()
    y = outputs(module, x)
    y.backward(case["grad_output"].to(dtype))
    assert y.dtype == dtype
    assert_near("output", y.detach(), case["output"], TOLERANCE[dtype])
    assert_near("grad_input", x.grad, case["grad_input"], TOLERANCE[dtype])
    grads = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
    assert grads.keys() == case["grad_params"].keys()
    for key, grad in grads.items():
        expected = case["grad_params"][key]
        # The gradient of a bias of keys is zero but for rounding.
        near = key.replace("proj_k.bias", "proj_k.weight")
        scale = max(expected.abs().max().item(), case["grad_params"][near].abs().max().item())
        assert_near(key, grad, expected, TOLERANCE[dtype], scale)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_golden_block(backend, name, dtype, channels_last):
    check_golden(name, BLOCKS[name], dtype, channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_golden_model(backend, name, dtype):
    check_golden(name, MODELS[name], dtype, channels_last=False)


@pytest.mark.parametrize("name", [*BLOCKS, *MODELS])
def test_state_dict_keys_and_order(name):
    case = MODELS.get(name) or BLOCKS[name]
    assert list(made(name).state_dict()) == list(case["state_dict"])


@pytest.mark.parametrize("name", MILLIONS)
def test_number_of_parameters(name):
    with torch.device("meta"):
        model = getattr(models, name)()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(MILLIONS[name], abs=0.06)


@pytest.mark.parametrize(
    "name", [n if "base" not in n else pytest.param(n, marks=pytest.mark.slow) for n in MILLIONS]
)
def test_builder_runs_forward_and_backward(name):
    model = getattr(models, name)(num_classes=7)
    size = 384 if name.endswith("384") else 224
    logits = model(torch.randn(1, 3, size, size))
    assert logits.shape == (1, 7)
    logits.square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), key


def randomized(model):
    """With offsets and position tables that are not close to zero."""
    for key, p in model.named_parameters():
        if key.endswith(("rpe_table", "rpb", "relative_position_bias_table")):
            nn.init.normal_(p, std=0.5)
        if key.endswith("conv_offset.3.weight"):
            nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("name", ["dat_tiny", "datpp_tiny"])
def test_fused_is_reference(name):
    model = getattr(models, name)(img_size=96, drop_path_rate=0.0, num_classes=11)
    model = randomized(model).double()
    x = torch.randn(1, 3, 96, 112, dtype=torch.double)
    grad = torch.randn(1, 11, dtype=torch.double)
    results = {}
    for backend in ("auto", "reference"):
        with dat_cuda.backend(backend):
            logits, positions, _ = model(x, return_positions=True)
            grads = torch.autograd.grad(logits, list(model.parameters()), grad)
        results[backend] = (
            logits,
            *[p for stage in positions for p in stage if p is not None],
            *grads,
        )
    for fused, reference in zip(*results.values(), strict=True):
        assert_near("result", fused, reference, 1e-7, max(1e-3, reference.abs().max().item()))


def brute_neighborhood(module, x):
    """Loops over pixels and their neighbours; x [B, C, H, W] no smaller than the neighbourhood."""
    k, d = module.kernel_size, module.dilation
    height, width = x.shape[2:]
    qkv = module.qkv(x.permute(0, 2, 3, 1)).unflatten(3, (3, module.num_heads, -1))
    q, keys, values = qkv.unbind(3)

    def near(i, length):
        """Neighbours of i along an axis: pixels as far from each other as the dilation says."""
        alike = list(range(i % d, length, d))
        place = alike.index(i)
        begin = min(max(place - k // 2, 0), len(alike) - k)
        return [(alike[n], n - place + k - 1) for n in range(begin, begin + k)]

    out = torch.empty_like(q)
    for i, j in itertools.product(range(height), range(width)):
        pairs = list(itertools.product(near(i, height), near(j, width)))
        y, x_ = [a for (a, _), _ in pairs], [b for _, (b, _) in pairs]
        scores = torch.einsum("bhc,bnhc->bhn", q[:, i, j], keys[:, y, x_]) * module.scale
        if module.rpb is not None:
            scores = scores + module.rpb[:, [a for (_, a), _ in pairs], [b for _, (_, b) in pairs]]
        out[:, i, j] = torch.einsum("bhn,bnhc->bhc", scores.softmax(-1), values[:, y, x_])
    return module.proj(out.flatten(3)).permute(0, 3, 1, 2)


NEIGHBORHOODS = [
    # size, kernel, dilation, options
    ((14, 14), 7, 1, {}),
    ((15, 23), 7, 1, {}),
    ((29, 33), 3, 1, {"rel_pos_bias": False}),
    ((17, 40), 5, 2, {"qkv_bias": False, "qk_scale": 0.3}),
    ((9, 16), 1, 1, {}),
    ((21, 9), 3, 3, {}),
    ((26, 7), 7, 1, {}),
]


@pytest.mark.parametrize("size, kernel, dilation, options", NEIGHBORHOODS)
def test_neighborhood_is_its_loops(backend, size, kernel, dilation, options):
    module = blocks.NeighborhoodAttention2D(8, kernel, 2, dilation=dilation, **options).double()
    if module.rpb is not None:
        nn.init.normal_(module.rpb)
    x = torch.randn(2, 8, *size, dtype=torch.double, requires_grad=True)
    grad = torch.randn(2, 8, *size, dtype=torch.double)
    leaves = [x, *module.parameters()]
    y, expected = module(x)[0], brute_neighborhood(module, x)
    assert_near("output", y.detach(), expected.detach(), 1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        assert_near("gradient", ours, theirs, 1e-11)


def test_neighborhood_does_not_copy_keys_for_every_query():
    module = blocks.NeighborhoodAttention2D(64, 7, 2)
    x = torch.randn(1, 64, 112, 112, requires_grad=True)
    outputs(module, x).sum().backward()
    peak, _ = _rss.peak_growth(lambda: outputs(module, x).sum().backward())
    qkv = 112 * 112 * 192 * 4
    copies = 49 * qkv * 2 // 3
    assert peak < copies / 3


def brute_windows(module, x, shift):
    """Windows as a mask over all pairs of pixels of the padded map."""
    window_h, window_w = module.window_size
    height, width = x.shape[2:]
    x = nn.functional.pad(x, (0, -width % window_w, 0, -height % window_h)).permute(0, 2, 3, 1)
    rows, columns = x.shape[1:3]
    y, x_ = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x_ = y.flatten(), x_.flatten()
    place_y, place_x = (y - shift) % rows, (x_ - shift) % columns  # after the roll
    window = place_y // window_h * columns + place_x // window_w
    side = 3 * wrapped(place_y, rows, shift) + wrapped(place_x, columns, shift)
    together = window[:, None] == window
    apart = together & (side[:, None] != side)
    index = (place_y[:, None] - place_y + window_h - 1) * (2 * window_w - 1)
    index = index + place_x[:, None] - place_x + window_w - 1
    table = module.relative_position_bias_table
    bias = table[index.clamp(0, len(table) - 1)].movedim(2, 0)
    q, k, v = module.proj_qkv(x.flatten(1, 2)).unflatten(2, (3, module.heads, -1)).unbind(2)
    scores = torch.einsum("bmhc,bnhc->bhmn", q, k) * q.shape[-1] ** -0.5 + bias - 100.0 * apart
    weights = scores.masked_fill(~together, -torch.inf).softmax(-1)
    y = module.proj_out(torch.einsum("bhmn,bnhc->bmhc", weights, v).flatten(2))
    return y.unflatten(1, (rows, columns))[:, :height, :width].permute(0, 3, 1, 2)


def wrapped(place, length, shift):
    return (place >= length - shift).int() if shift else torch.zeros_like(place)


@pytest.mark.parametrize("size", [(8, 12), (9, 14), (3, 5), (4, 4)])
@pytest.mark.parametrize("window, shift", [(4, 0), (4, 2), ((3, 4), 0), ((3, 4), 2), (5, 4)])
def test_windows_are_a_mask(backend, size, window, shift):
    if shift:
        module = blocks.ShiftWindowAttention(8, 2, window, shift_size=shift, fmap_size=8)
    else:
        module = blocks.LocalAttention(8, 2, window)
    module.double()
    nn.init.normal_(module.relative_position_bias_table)
    x = torch.randn(2, 8, *size, dtype=torch.double, requires_grad=True)
    grad = torch.randn(2, 8, *size, dtype=torch.double)
    leaves = [x, *module.parameters()]
    y, expected = module(x)[0], brute_windows(module, x, shift)
    assert_near("output", y.detach(), expected.detach(), 1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        assert_near("gradient", ours, theirs, 1e-11)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("version", ["dat", "dat++"])
@pytest.mark.parametrize("size", [(64, 64), (70, 101), (33, 32)])
def test_maps_of_any_size(version, size, conv):
    config = {**MINI, "use_conv_patches": conv, "version": version}
    model = DAT(**config, features_only=True, out_indices=(0, 2, 3)).eval()
    maps, positions, references = model(torch.randn(2, 3, *size), return_positions=True)
    for i, y in zip((0, 2, 3), maps, strict=True):
        assert y.shape == (2, MINI["dims"][i], *(-(-side // 2 ** (2 + i)) for side in size))
    assert [len(stage) for stage in positions] == list(MINI["depths"])
    for stage, spec, groups in zip(positions, MINI["stage_spec"], MINI["groups"], strict=True):
        for pos, letter in zip(stage, spec, strict=True):
            assert (pos is not None) == (letter == "D")
            assert pos is None or pos.shape[:2] == (2, groups)
    assert [[p is None for p in stage] for stage in references] == [
        [p is None for p in stage] for stage in positions
    ]


def test_positions_are_those_of_the_blocks():
    model = DAT(**MINI).eval()
    seen = []
    for module in model.modules():
        if isinstance(module, dat_cuda.DAttention):
            module.register_forward_hook(lambda _, __, result: seen.append(result[1:]))
    x = torch.randn(2, 3, 64, 64)
    logits, positions, references = model(x, return_positions=True)
    torch.testing.assert_close(logits, model(x), rtol=0, atol=0)
    found = zip(itertools.chain(*positions), itertools.chain(*references), strict=True)
    found = [(pos, ref) for pos, ref in found if pos is not None]
    assert len(found) == 5
    for (pos, ref), (want_pos, want_ref) in zip(found, seen[:5], strict=True):
        assert pos is want_pos and ref is want_ref


def test_checkpointing_gives_the_same_gradients():
    config = {**MINI, "drop_rate": 0.1, "attn_drop_rate": 0.2, "drop_path_rate": 0.3}
    plain = randomized(DAT(**config))
    again = copy.deepcopy(plain)
    again.use_checkpoint = (True, False, True, True)
    x, seed = torch.randn(2, 3, 64, 64), torch.randint(2**31, ()).item()
    grads = []
    for model in (plain, again):
        torch.manual_seed(seed)
        grads.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * a.abs().max().item())


def test_checkpointing_keeps_fewer_activations():
    def saved(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            model(x)
        return sum(sizes)

    x = torch.randn(1, 3, 64, 64)
    assert saved(DAT(**MINI, use_checkpoint=True)) < saved(DAT(**MINI)) / 5


@pytest.mark.parametrize("frozen", [-1, 0, 2, 4])
def test_frozen_stages(frozen):
    model = DAT(**MINI, features_only=True, frozen_stages=frozen, drop_path_rate=0.5).train()
    sum(y.sum() for y in model(torch.randn(2, 3, 64, 64))).backward()
    parts = [("patch_proj.", 0), *((f"stages.{i}.", i + 1) for i in range(4))]
    for prefix, first in parts:
        is_frozen = frozen >= first
        grads = [p.grad for key, p in model.named_parameters() if key.startswith(prefix)]
        assert all((grad is None) == is_frozen for grad in grads), prefix
        assert model.get_submodule(prefix[:-1]).training != is_frozen
    assert model.norms[0].norm.weight.grad is not None


def test_drop_path():
    branch = blocks.DropPath(0.25)
    x = torch.randn(4000, 3, 2, 2)
    kept = (branch(x) / x).flatten(1)
    assert ((kept == 0) | (kept - 4 / 3).abs().lt(1e-5)).all()
    assert (kept.max(1).values - kept.min(1).values).max() < 1e-5
    assert (kept[:, 0] > 0).float().mean().item() == pytest.approx(0.75, abs=0.05)
    assert branch.eval()(x) is x


YAML = """
MODEL:
  TYPE: dat
  DAT:
    img_size: 64
    num_classes: 6
    dim_stem: 16
    dims: [16, 32, 64, 128]
    depths: [2, 2, 2, 2]
    stage_spec: [[L, S], [L, S], [L, D], [L, D]]
    heads: [1, 2, 4, 8]
    window_sizes: [4, 4, 4, 2]
    groups: [-1, -1, 2, 4]
    use_pes: [False, False, True, True]
    strides: [-1, -1, 1, 1]
    offset_range_factor: [-1, -1, 2, 2]
    sr_ratios: [-1, -1, 1, 1]
"""


def test_from_config(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(YAML)
    model = DAT.from_config(path)
    assert model.version == "dat" and model(torch.randn(1, 3, 64, 64)).shape == (1, 6)
    path.write_text(YAML + "    ksizes: [9, 7, 5, 3]\n    nat_ksizes: [7, 7, 7, 7]\n")
    assert DAT.from_config(str(path), num_classes=3).version == "dat++"
    assert DAT.from_config(path, version="dat").version == "dat"
    path.write_text("MODEL:\n  SWIN: {}\n")
    with pytest.raises(ValueError, match=r"MODEL\.DAT"):
        DAT.from_config(path)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"ksize": 3}, TypeError, "no argument ksize"),
        ({"dims": (16, 32, 64)}, ValueError, "dims must have 4 entries"),
        ({"stage_spec": ("ND", "LD", "SD", "DDD")}, ValueError, "stage_spec must have"),
        ({"stage_spec": ("QD", "LD", "SD", "DD")}, ValueError, "letters L, S, D, N, P and X"),
        ({"stage_spec": ("XD", "LD", "XD", "DD")}, ValueError, "window_sizes must be odd"),
        ({"heads": (3, 2, 4, 8)}, ValueError, "heads must divide dims"),
        ({"version": "dat+"}, ValueError, "version must be one of"),
        ({"frozen_stages": 5}, ValueError, "frozen_stages must be from -1 to 4"),
        ({"out_indices": (4,)}, ValueError, "out_indices must be from 0 to 3"),
    ],
)
def test_wrong_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        DAT(**{**MINI, **changes})


def test_published_keywords_without_effect():
    published = {"heads_q": [6, 12, 24, 48], "nqs": [2, 2, 2, 2], "lower_lr_kvs": {}}
    assert DAT(**MINI, **published)(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_wrong_images():
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, H, W\], got \[2, 1, 8"):
        DAT(**MINI)(torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize("spec", ["PX", "XP"])
def test_other_blocks(spec):
    model = DAT(
        **{**MINI, "stage_spec": (spec,) * 4, "sr_ratios": (4, 2, 2, 1), "window_sizes": (7,) * 4}
    )
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_half_precision_and_autocast():
    model = randomized(DAT(**MINI)).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
        mixed.square().sum().backward()
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    for result in (mixed, half):
        assert result.dtype == torch.bfloat16
        # Dozens of layers, each with errors of 2^-9 of its values.
        assert_near("logits", result.detach(), expected.detach().double(), 0.15)


@pytest.mark.slow
def test_compile():
    model = randomized(DAT(**MINI)).eval()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_layer_scale_and_shared_random_state():
    model = DAT(**{**MINI, "layer_scale_values": (0.5, -1, 1e-5, 1.0)})
    scales = [m for m in model.modules() if isinstance(m, blocks.LayerScale)]
    assert len(scales) == 12
    x = torch.randn(2, 16, 3, 3)
    expected = x * 0.5
    torch.testing.assert_close(scales[0](x), expected)
    in_place = blocks.LayerScale(16, inplace=True, init_values=0.5)
    with torch.no_grad():
        assert in_place(x) is x
    torch.testing.assert_close(x, expected)


MLPS = {
    "mlp": blocks.TransformerMLP,
    "mlp with conv": blocks.TransformerMLPWithConv,
    "mlp with conv, dat": partial(blocks.TransformerMLPWithConv, version="dat"),
}


@pytest.mark.parametrize("made", MLPS.values(), ids=MLPS)
def test_mlp_in_pieces(made, monkeypatch):
    """Whole images, rows of them and single rows give what plain PyTorch gives."""
    module = made(24, 3).double()
    x = torch.randn(5, 24, 9, 11, dtype=torch.double, requires_grad=True)
    grad = torch.randn(5, 24, 9, 11, dtype=torch.double)
    leaves = [x, *module.parameters()]
    results = []
    for backend, piece in ("reference", 0), ("auto", mlp.PIECE), ("auto", 20_000), ("auto", 100):
        monkeypatch.setattr(mlp, "PIECE", piece)
        with dat_cuda.backend(backend):
            with torch.no_grad():
                inferred = module(x)
            y = module(x)
            results.append([inferred, y, *torch.autograd.grad(y, leaves, grad)])
    for plain, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("made", MLPS.values(), ids=MLPS)
def test_mlp_keeps_one_hidden_map(made):
    module = made(16, 4)
    kept = {}

    def keep(x):
        if x.numel() > 2 * 16 * 24 * 24:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        module(torch.randn(2, 16, 24, 24, requires_grad=True))
    assert len(kept) == 1


@pytest.mark.parametrize("made", MLPS.values(), ids=MLPS)
def test_mlp_runs_what_users_put_into_it(made):
    """Dropout and hooks are not skipped."""
    module = made(16, 4, 0.5).train()
    x = torch.randn(2, 16, 5, 5)
    assert not torch.equal(module(x), module(x))
    expected = module.eval()(x)
    calls = []
    first = next(m for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
    first.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(module(x), expected)
    assert calls
