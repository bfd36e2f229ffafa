"""Fixtures: the backend that computes, a seed to repeat a failure with, the golden tensors."""

import random
from pathlib import Path

import pytest
import torch

import dat_cuda

GOLDEN = Path(__file__).parent / "golden"
BACKENDS = ("reference", "cpu")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="repeat a run with the seed that a failure printed")


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


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs the test once with the plain formula and once with each native kernel."""
    if request.param == "reference":
        with dat_cuda.backend("reference"):
            yield request.param
    else:
        yield request.param


@pytest.fixture(params=sorted(path.stem for path in (GOLDEN / "dattention").glob("*.pt")))
def dattention_case(request):
    """One run of the published module in float64, see tests/test_golden.py."""
    return torch.load(GOLDEN / "dattention" / f"{request.param}.pt", weights_only=True)
