"""The benchmarks measure what they say: a tiny case through the whole harness."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dat_cuda import doctor

FOLDER = Path(__file__).parents[1] / "benchmarks"
ROW = {
    "case": str,
    "shape": dict,
    "dtype": str,
    "device": str,
    "direction": str,
    "implementation": str,
    "status": str,
    "ms": float,
    "spread": float,
    "samples": list,
    "gemm_gflops": float,
    "errors": dict,
    "reference_errors": dict,
    "extra_bytes": int,
    "outputs_bytes": int,
    "machine": dict,
}
MACHINE = {"cpu", "cores", "threads", "simd", "torch_simd", "device", "torch", "commit", "dirty"}


def measured(script: str, folder: Path, *options: str) -> tuple[dict, str, str]:
    """(the JSON, the Markdown, what was printed) of a run at the tiny case."""
    files = folder / "result.json", folder / "result.md"
    command = (sys.executable, FOLDER / script, "--cases", "tiny", "--threads", "1")
    few = ("--repeats", "3", "--json", files[0], "--markdown", files[1])
    ran = subprocess.run((*command, *few, *options), capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(files[0].read_text()), files[1].read_text(), ran.stdout


def check_rows(result: dict) -> None:
    assert result["machine"].keys() >= MACHINE
    for row in result["rows"]:
        assert row["status"] == "ok", row
        for field, kind in ROW.items():
            assert isinstance(row[field], kind), (field, row[field])
        assert row["machine"] == result["machine"]
        assert row["ms"] > 0 and row["extra_bytes"] >= 0 and row["outputs_bytes"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_plain_ways(dtype, tmp_path):
    result, text, printed = measured(
        "attention.py", tmp_path, "--impl", "fused,reference,sdpa", "--dtype", dtype
    )
    check_rows(result)
    assert len(result["rows"]) == 6
    for entry in result["summary"]:
        assert entry["best_other"] in ("reference", "sdpa") and entry["speedup"] > 0
        assert entry["bars"]["memory"]["met"]
    assert printed.startswith(result["machine"]["cpu"])
    assert text.count("| tiny |") == 8


@pytest.mark.slow
def test_attention_compiled_ways(tmp_path):
    result, _, _ = measured(
        "attention.py", tmp_path, "--impl", "compiled,flex", "--no-memory", "--direction", "forward"
    )
    assert [row["status"] for row in result["rows"]] == ["ok", "ok"], result["rows"]
    assert all(row["gemm_fraction"] > 0 for row in result["rows"])


def test_module(tmp_path):
    result, _, _ = measured("module.py", tmp_path, "--batch", "3")
    check_rows(result)
    assert all(row["shape"]["batch"] == 3 for row in result["rows"])
    assert [row["implementation"] for row in result["rows"]] == ["fused", "reference"] * 2


def test_cuda_needs_a_gpu():
    if doctor.no_gpu() is None:
        pytest.skip("there is one")
    command = (sys.executable, FOLDER / "attention.py", "--device", "cuda")
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr == f"--device cuda: {doctor.no_gpu()}\n"


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import common

    return common


def test_rule_of_correctness(common):
    right = {"out": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    good = common.worst({"out": torch.tensor([1.0, -2.0 + 1e-6])}, right, None)
    bad = common.worst({"out": torch.tensor([1.0, -2.0 + 1e-3])}, right, None)
    nan = common.worst({"out": torch.tensor([float("nan"), -2.0])}, right, None)
    assert not common.violations(good, {"out": 1e-6}, torch.float32)
    assert common.violations(bad, {"out": 1e-6}, torch.float32)
    assert common.violations(nan, {"out": 1e-6}, torch.float32)


def test_cases_are_those_of_the_models(common):
    for case in common.CASES.values():
        assert case.channels % case.heads == 0 and case.heads % case.groups == 0
        padding = case.ksize // 2
        sides = zip((case.height, case.width), (case.key_height, case.key_width), strict=True)
        for queries, keys in sides:
            assert (queries + 2 * padding - case.ksize) // case.stride + 1 == keys
    assert len(common.DEFAULT_CASES) == 8
