"""load_checkpoint and export_checkpoint, with the golden models' published state dicts as files."""

import pickle
import re
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from torch import nn

from dat_cuda import DAttention
from dat_cuda.models import DAT, blocks, export_checkpoint, load_checkpoint

GOLDEN_MODELS = torch.load(GOLDEN / "models.pt", weights_only=True)
NAMES = list(GOLDEN_MODELS)
WINDOW_TABLE = "stages.0.attns.0.relative_position_bias_table"


def golden_model(name, **changes):
    version = "dat" if name == "dat_mini" else "dat++"
    return DAT(**{**GOLDEN_MODELS[name]["config"], "version": version, **changes})


def golden_state(name="dat_mini"):
    return dict(GOLDEN_MODELS[name]["state_dict"])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


@contextmanager
def unchanged(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def assert_holds(model, state):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def assert_only_loaded(report, names):
    assert report.loaded == list(names)
    assert not any((report.resized, report.kept, report.zeroed))
    assert not any((report.missing, report.unexpected, report.not_loaded))


# What a file looks like.

LAYOUTS = {
    "classification": lambda state: {"model": state, "epoch": 299, "optimizer": {"state": {}}},
    "bare": lambda state: state,
    "parallel": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    "compiled": lambda state: {"model": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
    "stages compiled": lambda state: {
        k.replace("s.", "s._orig_mod.", 1): v for k, v in state.items()
    },
    "detection": lambda state: {"state_dict": {f"backbone.{k}": v for k, v in state.items()}},
    "half": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_file(name, layout, path):
    state = golden_state(name)
    torch.save(LAYOUTS[layout](state), path)
    model = golden_model(name)
    report = load_checkpoint(model, path, strict=True)
    assert_only_loaded(report, state)
    rounded = LAYOUTS["half"](state) if layout == "half" else state
    assert_holds(model, {k: v.to(state[k].dtype) for k, v in rounded.items()})


def test_detector_and_its_backbone(path):
    state = golden_state()
    file = {f"backbone.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": {**file, "neck.weight": torch.ones(3)}, "meta": {"epoch": 12}}, path)
    detector = nn.Module()
    detector.backbone = golden_model("dat_mini")
    assert load_checkpoint(detector, path).loaded == list(file)
    assert_holds(detector.backbone, state)
    backbone = golden_model("dat_mini")
    assert load_checkpoint(backbone, path).unexpected == ["neck.weight"]
    assert_holds(backbone, state)


def test_section_with_another_name_is_no_guess(path):
    torch.save({"model_ema": golden_state(), "epoch": 1}, path)
    model = golden_model("dat_mini")
    with unchanged(model), pytest.raises(ValueError, match=r"\['model_ema', 'epoch'\]"):
        load_checkpoint(model, path)
    content = torch.load(path, weights_only=True)
    load_checkpoint(model, content["model_ema"], strict=True)
    assert_holds(model, golden_state())


def test_layer_scale_of_detection():
    model = golden_model("datpp_mini", layer_scale_values=[0.1] * 4)
    state = {name: torch.rand_like(tensor) for name, tensor in model.state_dict().items()}
    named_gamma = {
        re.sub(r"(layer_scales\.\d+)\.weight", r"\1.gamma", k): v for k, v in state.items()
    }
    assert named_gamma.keys() != state.keys()
    load_checkpoint(model, named_gamma, strict=True)
    assert_holds(model, state)


def test_model_on_meta_device():
    with torch.device("meta"):
        model = golden_model("dat_mini")
    with pytest.raises(ValueError, match="to_empty"):
        load_checkpoint(model, golden_state())
    model = model.to_empty(device="cpu")
    load_checkpoint(model, golden_state(), strict=True)
    assert_holds(model, golden_state())


# Another resolution.


def published_resize(name, value, target):
    """The rule of the published load_pretrained, for square windows."""
    if name.endswith("rpe_table"):
        return F.interpolate(value[None], target.shape[1:], mode="bicubic")[0]
    old, new = (round(len(table) ** 0.5) for table in (value, target))
    square = value.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    return F.interpolate(square, (new, new), mode="bicubic").reshape(-1, new * new).t()


@pytest.mark.parametrize("name", NAMES)
def test_other_resolution(name):
    state = golden_state(name)
    config = GOLDEN_MODELS[name]["config"]
    size, windows = config["img_size"] * 3 // 2, [2 * side for side in config["window_sizes"]]
    model = golden_model(name, img_size=size, window_sizes=windows)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_checkpoint(model, state, strict=True)

    tables = {n for n in state if n.endswith(("relative_position_bias_table", "rpe_table"))}
    assert report.resized == {
        n: (state[n].shape, own[n].shape) for n in state if n in tables and len(own[n].shape) > 1
    }
    buffers = {n for n in state if n.endswith(("relative_position_index", "attn_mask"))}
    assert set(report.kept) == buffers
    for n, tensor in model.state_dict().items():
        if n in tables:
            torch.testing.assert_close(tensor, published_resize(n, state[n], tensor))
        else:
            assert torch.equal(tensor, own[n] if n in buffers else state[n]), n
    assert model(torch.rand(1, 3, size, size)).isfinite().all()


def slopes(height, width):
    """[2, height, width]: head 0 rises by 1 along y from end to end, head 1 along x."""
    y, x = (torch.linspace(0, 1, side) for side in (height, width))
    return torch.stack([y[:, None].expand(-1, width), x.expand(height, -1)])


def assert_are_slopes(maps):
    for axis in (0, 1):
        along = maps[axis].movedim(axis, 0)
        torch.testing.assert_close(along, along[:, :1].expand_as(along), msg="varies across")
        assert (along.diff(dim=0) > 0).all()


@pytest.mark.parametrize(
    ("old", "new"),
    [((7, 7), (4, 9)), ((4, 8), (6, 12)), ((8, 4), (6, 3)), ((2, 26), (1, 13))],
    ids=str,
)
def test_windows_that_are_not_square(old, new):
    """A square window, or one of the new one's proportions, is recognised by its number of rows."""
    block = blocks.LocalAttention(8, 2, new)
    source = blocks.LocalAttention(8, 2, old).state_dict()
    sides = [tuple(2 * side - 1 for side in window) for window in (old, new)]
    source["relative_position_bias_table"] = slopes(*sides[0]).flatten(1).t()
    report = load_checkpoint(block, source, strict=True)
    assert list(report.resized) == ["relative_position_bias_table"]
    assert_are_slopes(block.relative_position_bias_table.t().unflatten(1, sides[1]))
    assert report.kept == ["relative_position_index"]
    assert block(torch.rand(1, 8, 13, 17))[0].isfinite().all()


def test_window_of_as_many_pixels_keeps_its_index():
    """6 x 6 and 4 x 9 pixels have indices of one shape, but 6 x 6 has the larger table."""
    block = blocks.LocalAttention(8, 2, (4, 9))
    source = blocks.LocalAttention(8, 2, 6)
    assert source.relative_position_index.shape == block.relative_position_index.shape
    index = block.relative_position_index.clone()
    load_checkpoint(block, source.state_dict())
    assert torch.equal(block.relative_position_index, index)


def test_window_that_nothing_is_known_of():
    block = blocks.LocalAttention(8, 2, 4)
    source = blocks.LocalAttention(8, 2, (3, 5)).state_dict()
    report = load_checkpoint(block, source)
    assert list(report.not_loaded) == ["relative_position_bias_table"]
    assert "45 rows" in report.not_loaded["relative_position_bias_table"]


def attention(q_size, **changes):
    flags = {"use_pe": True, "dwc_pe": False, "no_off": False, "fixed_pe": False, **changes}
    return DAttention(q_size, q_size, 2, 4, 1, 0.0, 0.0, 1, -1, ksize=3, **flags)


def test_maps_that_are_not_square():
    module, source = attention((6, 10)), attention((5, 3)).state_dict()
    source["rpe_table"] = slopes(9, 5)
    report = load_checkpoint(module, source, strict=True)
    assert report.resized == {"rpe_table": ((2, 9, 5), (2, 11, 19))}
    assert_are_slopes(module.rpe_table)


def test_half_precision_is_interpolated_in_float32():
    module, source = attention((6, 10)), attention((5, 3)).half().state_dict()
    load_checkpoint(module, source, strict=True)
    expected = published_resize("rpe_table", source["rpe_table"].float(), module.rpe_table)
    torch.testing.assert_close(module.rpe_table.detach(), expected)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (attention((3, 3), fixed_pe=True), attention((5, 5), fixed_pe=True)),
        (attention((4, 4)), attention((6, 6), fixed_pe=True)),
    ],
    ids=["dense", "table from dense"],
)
def test_dense_table_is_not_resized(module, source):
    table = module.rpe_table.clone()
    report = load_checkpoint(module, source.state_dict())
    assert "fixed_pe" in report.not_loaded["rpe_table"] and not report.resized
    assert torch.equal(module.rpe_table, table)


def test_convolution_in_the_place_of_a_table():
    report = load_checkpoint(attention((4, 4), dwc_pe=True), attention((4, 4)).state_dict())
    assert report.missing == ["rpe_table.weight", "rpe_table.bias"]
    assert report.unexpected == ["rpe_table"]


# Neighbourhood attention.


def test_file_without_the_bias_of_neighbourhoods():
    module = blocks.NeighborhoodAttention2D(8, 3, 2)
    source = blocks.NeighborhoodAttention2D(8, 3, 2, rel_pos_bias=False)
    report = load_checkpoint(module, source.state_dict(), strict=True)
    assert report.zeroed == ["rpb"]
    x = torch.rand(1, 8, 6, 6)
    torch.testing.assert_close(module(x)[0], source(x)[0])


def test_one_bias_of_neighbourhoods_is_missing():
    state = golden_state("datpp_mini")
    del state["stages.1.attns.0.rpb"]
    report = load_checkpoint(golden_model("datpp_mini"), state)
    assert report.missing == ["stages.1.attns.0.rpb"] and not report.zeroed


def test_other_neighbourhood_is_not_resized():
    module = blocks.NeighborhoodAttention2D(8, 3, 2)
    source = blocks.NeighborhoodAttention2D(8, 5, 2)
    report = load_checkpoint(module, source.state_dict())
    assert report.not_loaded == {
        "rpb": "has shape [2, 9, 9] in the file and [2, 5, 5] in the model"
    }


# The class head.


def test_classes_choose_rows_of_the_head():
    state = golden_state()
    rows = [7, 2, 2, 0]
    for classes in (rows, torch.tensor(rows)):
        model = golden_model("dat_mini", num_classes=4)
        assert_only_loaded(load_checkpoint(model, state, classes=classes, strict=True), state)
        assert torch.equal(model.cls_head.weight, state["cls_head.weight"][rows])
        assert torch.equal(model.cls_head.bias, state["cls_head.bias"][rows])


def test_other_head_is_not_loaded():
    model = golden_model("dat_mini", num_classes=4)
    head = model.cls_head.weight.clone()
    report = load_checkpoint(model, golden_state())
    assert list(report.not_loaded) == ["cls_head.weight", "cls_head.bias"]
    assert "`classes`" in report.not_loaded["cls_head.weight"]
    assert torch.equal(model.cls_head.weight, head)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([0, 1, 2], "one index for each of the model's 4 classes, got .3."),
        ([0.0, 1.0, 2.0, 3.0], "torch.float32"),
        ([0, 1, 2, 10], "0 to 9, got 0 to 10"),
        ([0, 1, 2, -1], "0 to 9, got -1 to 2"),
    ],
)
def test_classes_that_do_not_fit(classes, message):
    model = golden_model("dat_mini", num_classes=4)
    with unchanged(model), pytest.raises(ValueError, match=message):
        load_checkpoint(model, golden_state(), classes=classes)


def test_classes_without_a_head():
    model = golden_model("dat_mini", features_only=True)
    with unchanged(model), pytest.raises(ValueError, match="needs a cls_head"):
        load_checkpoint(model, golden_state(), classes=[0])


def test_backbone_of_a_classifier():
    report = load_checkpoint(golden_model("dat_mini", features_only=True), golden_state())
    assert report.unexpected == [n for n in golden_state() if n.startswith("cls_")]
    assert report.missing == [f"norms.{i}.norm.{n}" for i in range(4) for n in ("weight", "bias")]


# Files that must not be loaded.


class Config(dict):
    """As the configuration objects in files that the published training code saves."""


class Harmful:
    def __reduce__(self):
        return (print, ("harmful",))


def damaged(content, damage):
    def write(path):
        torch.save(content, path)
        path.write_bytes(damage(path.read_bytes()))

    return write


def flip_a_weight(data):
    place = data.index(golden_state()["cls_head.bias"].numpy().tobytes())
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


BAD_FILES = {
    "empty": (lambda path: path.touch(), "is damaged"),
    "text": (lambda path: path.write_text("404: Not Found"), "is damaged"),
    "half": (damaged(golden_state(), lambda data: data[: len(data) // 2]), "is damaged"),
    "last byte": (damaged(golden_state(), lambda data: data[:-1]), "is damaged"),
    "flipped": (damaged(golden_state(), flip_a_weight), "is damaged"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Harmful(), 2)), "is damaged"),
    "harmful": (lambda path: torch.save({"model": Harmful()}, path), "objects of .*print"),
    "config": (
        lambda path: torch.save({"model": golden_state(), "config": Config(a=1)}, path),
        r"objects of [\w.]*Config .* torch.save\({'model'",
    ),
    "list": (lambda path: torch.save([torch.ones(3)], path), "state_dict.*got a list"),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), r"got the keys \['epoch'\]"),
    "foreign": (
        lambda path: torch.save({"model": {"conv1.weight": torch.ones(3, 2)}}, path),
        r"nothing that fits DAT: .*conv1.weight \[3, 2\].*patch_proj.0.weight \[8, 3, 4, 4\]",
    ),
    "nothing": (lambda path: torch.save({"model": {}}, path), "it has 0 names"),
    "no fit": (
        lambda path: torch.save({"patch_proj.0.bias": torch.ones(3, 2)}, path),
        r"patch_proj.0.bias \[3, 2\]",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case, path, capsys):
    write, message = BAD_FILES[case]
    write(path)
    model = golden_model("dat_mini")
    with unchanged(model), pytest.raises(ValueError, match=message) as error:
        load_checkpoint(model, path)
    assert str(path) in str(error.value)
    assert capsys.readouterr().out == ""


def test_file_without_checksums(path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(golden_state(), path)
    finally:
        torch.serialization.set_crc32_options(before)
    load_checkpoint(golden_model("dat_mini"), path, strict=True)


def test_file_that_cannot_be_opened(tmp_path):
    model = golden_model("dat_mini")
    for path, error in ((tmp_path / "none.pth", FileNotFoundError), (tmp_path, OSError)):
        with unchanged(model), pytest.raises(error):
            load_checkpoint(model, path)


@pytest.mark.parametrize(
    "value", [3, torch.ones(8, dtype=torch.uint8), torch.ones(8).to_sparse(), torch.ones(8, 1)]
)
def test_value_that_is_no_weight(value):
    model = golden_model("dat_mini")
    bias = model.patch_proj[0].bias.clone()
    report = load_checkpoint(model, {**golden_state(), "patch_proj.0.bias": value})
    assert list(report.not_loaded) == ["patch_proj.0.bias"]
    assert torch.equal(model.patch_proj[0].bias, bias)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("cls_norm.norm.bias"),
        lambda state: state.update(more=torch.ones(1)),
        lambda state: state.update({"cls_norm.norm.bias": torch.ones(1)}),
    ],
    ids=["missing", "unexpected", "not loaded"],
)
def test_strict(change):
    state = golden_state()
    change(state)
    model = golden_model("dat_mini")
    with unchanged(model), pytest.raises(ValueError, match=r"strict(.|\n)* 1 (miss|unex|not)"):
        load_checkpoint(model, state, strict=True)
    load_checkpoint(model, state)
    assert torch.equal(model.cls_norm.norm.weight, state["cls_norm.norm.weight"])


def test_report_is_readable(path):
    state = golden_state()
    del state["cls_norm.norm.bias"]
    state |= {"neck": torch.ones(2), "cls_head.bias": torch.ones(11)}
    state |= {f"roi_head.{i}": torch.ones(1) for i in range(30)}
    torch.save({"model": state}, path)
    model = golden_model("dat_mini", window_sizes=[8, 4, 2, 2])
    lines = str(load_checkpoint(model, path)).splitlines()
    assert lines[0] == (
        f"{path}['model']: {len(state) - 37} loaded, 2 resized, 3 kept, 0 set to zero, 1 missing, "
        "31 unexpected, 1 not loaded"
    )
    assert f"  resized      {WINDOW_TABLE}: [49, 1] -> [225, 1]" in lines
    assert "  missing      cls_norm.norm.bias" in lines
    assert lines[-3:] == [
        "  unexpected   roi_head.18",
        "  unexpected   and 11 more",
        "  not loaded   cls_head.bias: has shape [11] in the file and [10] in the model; with "
        "`classes` rows of it can be chosen",
    ]


# Writing.

WRAPPED = {
    "plain": lambda model: model,
    "compiled": torch.compile,
    "parallel": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrap", WRAPPED)
def test_export_round_trip(name, wrap, path):
    model = WRAPPED[wrap](golden_model(name))
    assert_only_loaded(load_checkpoint(model, golden_state(name), strict=True), model.state_dict())
    export_checkpoint(model, path)
    content = torch.load(path, weights_only=True)
    assert list(content) == ["model"]
    # The published code loads strictly what has its names, shapes and dtypes.
    assert list(content["model"]) == list(golden_state(name))
    for key, tensor in golden_state(name).items():
        assert torch.equal(content["model"][key], tensor)
        assert content["model"][key].dtype == tensor.dtype
    again = golden_model(name)
    load_checkpoint(again, path, strict=True)
    assert_holds(again, golden_state(name))


def test_exported_views_are_compact_and_contiguous(path):
    model = nn.Linear(20, 10, bias=False)
    model.weight.data = torch.rand(1000, 10)[:20].t()
    export_checkpoint(model, path)
    weight = torch.load(path, weights_only=True)["model"]["weight"]
    assert weight.is_contiguous() and torch.equal(weight, model.weight)
    assert path.stat().st_size < 5000
