"""Fixtures: the backend that computes, a seed to repeat a failure with, the golden tensors."""

import random
from contextlib import contextmanager, nullcontext
from pathlib import Path

import emulated
import pytest
import torch

import dat_cuda

GOLDEN = Path(__file__).parent / "golden"
NATIVE = ("cpu", "emulated", "cuda")
# Scores of an attention case that is small enough to check for races.
RACE_PAIRS = 20_000


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="repeat a run with the seed that a failure printed")
    parser.addoption(
        "--race",
        metavar="SEEDS",
        help="emulate with race checks, under each of these orders of warps, such as 0,1,2; "
        "leaves out the large cases",
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--race"):
        return
    kept, left_out = [], []
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        (left_out if getattr(case, "pairs", 0) > RACE_PAIRS else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds, as compiling does")


@pytest.fixture(autouse=True)
def seed(request):
    """A fresh seed for every test, so that the suite's inputs differ from run to run."""
    value = request.config.getoption("--seed")
    value = random.SystemRandom().randrange(2**31) if value is None else value
    request.node.user_properties.append(("seed", value))
    torch.manual_seed(value)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        for name, value in item.user_properties:
            report.sections.append((name, f"--{name}={value}"))
    return report


@contextmanager
def gpu():
    """New tensors are on the GPU, where float32 is not rounded to TF32."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    if "cuda" not in dat_cuda.functional.NATIVE_DEVICES:
        pytest.skip("dat_cuda was built without CUDA")
    with torch.device("cuda"), torch.backends.cudnn.flags(allow_tf32=False):
        yield


CONTEXTS = {
    "reference": lambda: dat_cuda.backend("reference"),
    "cpu": nullcontext,
    "emulated": emulated.emulated,
    "cuda": gpu,
}


def pytest_generate_tests(metafunc):
    """A test with the fixture `native` runs with each native kernel, one with `backend` with the
    plain formula too. Compiling is slow, and nothing of it depends on the emulated device."""
    seeds = metafunc.config.getoption("--race")
    is_slow = metafunc.definition.get_closest_marker("slow")
    for fixture, names in (("native", NATIVE), ("backend", ("reference", *NATIVE))):
        if fixture not in metafunc.fixturenames:
            continue
        choices = {name: (name,) for name in names if not (is_slow and name == "emulated")}
        if seeds and choices.pop("emulated", None):
            choices |= {f"emulated-race{i}": ("emulated", int(i)) for i in seeds.split(",")}
        metafunc.parametrize(fixture, choices.values(), ids=choices, indirect=True)


@pytest.fixture
def backend(request):
    """The name of what computes in this test, which runs once for each."""
    name, *options = request.param
    with CONTEXTS[name](*options):
        yield name


native = backend


@pytest.fixture(params=sorted(path.stem for path in (GOLDEN / "dattention").glob("*.pt")))
def dattention_case(request):
    """One run of the published module in float64, see tests/test_golden.py."""
    path = GOLDEN / "dattention" / f"{request.param}.pt"
    return torch.load(path, weights_only=True, map_location=torch.get_default_device())
