"""The builders in timm's registry: with a double of timm, whose part in it is small, and with timm
itself where it is installed."""

import importlib
import subprocess
import sys

import pytest
import torch

from dat_cuda.models import DAT, _timm, datpp_tiny, export_checkpoint

# Instead of the published sizes, which take seconds.
SMALL = {
    "depths": (1, 1, 1, 1),
    "stage_spec": ("N", "N", "D", "D"),
    "dim_stem": 8,
    "dims": (8, 16, 32, 64),
    "heads": (1, 2, 4, 8),
    "groups": (1, 1, 2, 4),
}
NAMES = {build.__name__ for build in _timm.BUILDERS}

DOUBLE = """
import sys

entries = {}


class Config(dict):
    def to_dict(self):
        return dict(self)


def register_model(entry):
    module = sys.modules[entry.__module__]
    if entry.__name__ not in module.__all__:
        module.__all__.append(entry.__name__)
    entries[entry.__name__] = entry
    return entry


def resolve_pretrained_cfg(name, pretrained_cfg=None, pretrained_cfg_overlay=None):
    return Config(num_classes=1000, **sys.modules[entries[name].__module__].default_cfgs[name])


def create_model(name, pretrained=False, **keywords):
    loading = dict(pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None)
    return entries[name](pretrained=pretrained, **loading, **keywords)
"""
FEATURE_INFO = "class FeatureInfo:\n    def __init__(self, *given): self.given = given\n"


def forget(name):
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(source) makes a timm, yet to be imported, whose models module has that source."""
    for module in list(sys.modules):
        if module.partition(".")[0] == "timm":
            monkeypatch.delitem(sys.modules, module)
    finders = [f for f in sys.meta_path if not isinstance(f, _timm._TimmFinder)]
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        folder = tmp_path / "timm"
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text("from timm.models import create_model\n")
        (folder / "models.py").write_text(source)
        importlib.invalidate_caches()

    yield write
    forget("timm")


def is_waiting():
    return any(isinstance(finder, _timm._TimmFinder) for finder in sys.meta_path)


@pytest.mark.parametrize("first", ["timm", "dat_cuda"])
def test_either_order_of_imports(first, write):
    write(DOUBLE + FEATURE_INFO)
    if first == "timm":
        importlib.import_module("timm")
    _timm.register()
    timm = importlib.import_module("timm")
    assert set(timm.models.entries) == NAMES
    assert not is_waiting()
    # Nothing of the waiting is left in the module.
    assert type(timm.__loader__) is type(timm.models.__loader__)
    assert timm.__spec__.loader is timm.__loader__
    model = timm.create_model("datpp_tiny", num_classes=10, **SMALL)
    assert isinstance(model, DAT) and model.cls_head.out_features == 10
    assert importlib.reload(timm) is timm


def test_looking_for_timm_is_no_import(write):
    write(DOUBLE + FEATURE_INFO)
    _timm.register()
    spec = importlib.util.find_spec("timm")
    assert spec.loader.get_filename("timm") == spec.origin
    assert "timm" not in sys.modules and is_waiting()


def test_timm_is_absent(write, monkeypatch):
    _timm.register()
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("timm")
    assert is_waiting()


def test_timm_fails_and_is_mended(write):
    write("raise RuntimeError('operator torchvision::nms does not exist')")
    _timm.register()
    with pytest.raises(RuntimeError, match="torchvision::nms"):
        importlib.import_module("timm")
    assert "timm" not in sys.modules
    write(DOUBLE + FEATURE_INFO)
    assert set(importlib.import_module("timm").models.entries) == NAMES


@pytest.mark.parametrize("first", ["timm", "dat_cuda"])
def test_old_timm_gives_a_warning(first, write):
    write(DOUBLE)
    if first == "timm":
        importlib.import_module("timm")
    with pytest.warns(UserWarning, match="needs timm 0.9: .*FeatureInfo"):
        _timm.register()
        timm = importlib.import_module("timm")
    assert not timm.models.entries


def test_importing_dat_cuda_registers_but_imports_no_timm(write, tmp_path):
    write(DOUBLE + FEATURE_INFO)
    code = (
        "import sys; import dat_cuda; assert 'timm' not in sys.modules; "
        "import timm; print(sorted(timm.models.entries))"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(sorted(NAMES))


# What timm's tools ask of a model.


def test_features_and_head():
    model = datpp_tiny(**SMALL, num_classes=5).eval()
    x = torch.rand(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    assert torch.equal(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(model.get_classifier()(pooled), model(x))
    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(model(x), pooled)
    model.double().reset_classifier(7)
    assert model(x.double()).shape == (2, 7)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(7, "max")


def test_grad_checkpointing():
    model = datpp_tiny(**SMALL)
    model.set_grad_checkpointing()
    assert model.use_checkpoint == (True,) * 4
    model.set_grad_checkpointing(False)
    assert model.use_checkpoint == (False,) * 4


def test_no_weight_decay():
    model = datpp_tiny(**{**SMALL, "stage_spec": ("L", "N", "D", "D")})
    assert model.no_weight_decay() == {
        "stages.0.attns.0.relative_position_bias_table",
        "stages.2.attns.0.rpe_table",
        "stages.3.attns.0.rpe_table",
    }


# Beside timm itself.


@pytest.fixture(scope="module")
def timm():
    try:
        return importlib.import_module("timm")
    except Exception as error:  # a torchvision for another torch raises anything
        pytest.skip(f"timm cannot be imported: {error}")


def test_list_models(timm):
    assert set(timm.list_models("dat*")) == NAMES
    assert not timm.list_models("dat*", pretrained=True)


def test_timm_imported_first(timm, tmp_path):
    code = "import timm, dat_cuda; print(timm.is_model('datpp_tiny'))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.stdout.strip() == "True", run.stderr


def test_create_model(timm, tmp_path):
    created = timm.create_model(
        "datpp_tiny", num_classes=10, drop_path_rate=0.1, in_chans=3, **SMALL
    )
    path = tmp_path / "weights.pth"
    export_checkpoint(created, path)
    model = timm.create_model("datpp_tiny", num_classes=10, checkpoint_path=str(path), **SMALL)
    assert torch.equal(model.cls_head.weight, created.cls_head.weight)
    assert created.stages[3].drop_path[0].p == pytest.approx(0.1)
    assert model.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 10)


def test_data_config(timm):
    resolve = timm.data.resolve_model_data_config
    config = resolve(timm.create_model("datpp_base_384", **SMALL))
    assert config["input_size"] == (3, 384, 384) and config["mean"] == (0.485, 0.456, 0.406)
    model = timm.create_model("datpp_tiny", img_size=(64, 96), **SMALL)
    assert resolve(model)["input_size"] == (3, 64, 96)
    overlay = {"crop_pct": 1.0, "num_classes": 7}
    model = timm.create_model("datpp_tiny", pretrained_cfg_overlay=overlay, **SMALL)
    assert resolve(model)["crop_pct"] == 1.0 and model.num_classes == 7


@pytest.mark.parametrize(
    ("out_indices", "stages"), [(None, (0, 1, 2, 3)), ((1, -1), (1, 3)), (2, (2, 3))]
)
def test_features_only(timm, out_indices, stages):
    model = timm.create_model("dat_tiny", features_only=True, out_indices=out_indices, **SMALL)
    maps = model.eval()(torch.rand(1, 3, 64, 64))
    assert model.feature_info.channels() == [m.shape[1] for m in maps] == [8 << i for i in stages]
    assert model.feature_info.reduction() == [64 // m.shape[2] for m in maps]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"pretrained": True}, "no weights are hosted for dat_tiny.*load_checkpoint"),
        ({"in_chans": 1}, "in_chans must be 3.*got 1"),
        ({"global_pool": "max"}, "global_pool must be 'avg'"),
        ({"features_only": True, "out_indices": (0, 4)}, "out_indices"),
    ],
)
def test_what_timm_can_ask_in_vain(timm, keywords, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("dat_tiny", **keywords)
