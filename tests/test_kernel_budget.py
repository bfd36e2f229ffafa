"""The kernels keep within benchmarks/kernel_budget.json: one case and one file, for quickness."""

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def kernel_budget(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import kernel_budget

    return kernel_budget


def require(module):
    if reason := module.unavailable():
        (pytest.fail if os.environ.get("DAT_REQUIRE_EMULATED") == "1" else pytest.skip)(reason)


def test_every_number_is_there(kernel_budget):
    budget = kernel_budget.load()
    for name, dtype in kernel_budget.traffic.CASES:
        for direction in ("forward", "backward"):
            assert budget["cases"][f"{name} {dtype} {direction}"].keys() == {"dram", "a100", "h100"}
    for kernel, limits in budget["kernels"].items():
        assert limits.keys() == {"sm_80", "sm_90", "sm_120"}, kernel
        for numbers in limits.values():
            assert 0 < numbers["registers"] <= 255 and numbers["spills"] >= 0


def test_what_exceeds_its_limit_is_named(kernel_budget):
    limits = {"a kernel": {"sm_80": {"registers": 100, "spills": 0}}}
    found = {"a kernel": {"sm_80": {"registers": 101, "spills": 0}}}
    assert kernel_budget.exceeded(limits, limits) == []
    ((name, number, limit),) = kernel_budget.exceeded(found, limits)
    assert (name, number, limit) == ("a kernel sm_80 registers", 101, "budget 100")
    found = {"another": {"sm_80": {"registers": 1, "spills": 0}}}
    assert len(kernel_budget.exceeded(found, limits)) == 2
    assert kernel_budget.exceeded(found, limits, "bar") == []


def test_registers_come_in_units(kernel_budget):
    def held(architecture, registers, threads, shared):
        kernel = kernel_budget.machine_code.Kernel("", "", architecture, registers, 0, 0)
        return kernel.blocks_at_once(threads, shared)

    # 4 warps, 128 registers: 4 warps in each quarter; 129 round up to 136, which leaves 3.
    assert [held("80", registers, 128, 0) for registers in (128, 129, 168, 169)] == [4, 3, 3, 2]
    # 7 warps of 144 registers: 12 warps fit, so one block, though 2 * 7 * 32 * 144 < 65536.
    assert held("80", 144, 224, 0) == 1
    assert [held(name, 32, 128, 40_000) for name in ("80", "90", "120")] == [4, 5, 2]


@pytest.fixture
def budget(kernel_budget):
    require(kernel_budget.machine_code)
    limits = kernel_budget.load()
    if limits["compiler"] != kernel_budget.compiler():
        pytest.skip(f"the budget is of {limits['compiler']}")
    return limits


def test_emulated_traffic(kernel_budget, budget):
    require(kernel_budget.traffic)
    for part in kernel_budget.traffic.measure("datpp_s_4", "bfloat16", "h100"):
        found = {part.key: {"dram": part.dram, "h100": part.ratio}}
        assert kernel_budget.exceeded(found, budget["cases"]) == []


def test_emulated_kernels_run_as_on_hardware(kernel_budget):
    require(kernel_budget.traffic)
    assert kernel_budget.traffic.emulator_faults() == []


@pytest.mark.slow
def test_machine_code(kernel_budget, budget):
    found, too_few = kernel_budget.static("attention_forward_bf16", ["90"])
    assert found and kernel_budget.exceeded(found, budget["kernels"]) == [] == too_few
