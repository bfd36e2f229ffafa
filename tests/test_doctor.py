"""dat-cuda doctor: what it says where all is right, and where it is not."""

import pytest
import torch

from dat_cuda import cli, doctor, functional


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(doctor, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(doctor, "HEAD_DIMS", (32,))


def test_every_way_of_the_bias_is_right(few, native):
    assert doctor.validate("cuda" if native == "cuda" else "cpu") == []


def test_without_a_gpu(few, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "no_gpu", lambda: "torch finds no GPU")
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "torch finds no GPU: the CUDA kernels were not checked, and nothing was timed" in said
    assert "deform_attention  bfloat16  9       0" in said and "is right" in said


def test_wrong_numbers(few, monkeypatch, capsys):
    def wrong(q, *others, heads, **options):
        out = fused(q, *others, heads=heads, **options)
        return out + (0.1 if q.shape[3] == 13 else 0)

    def refused(*args, **options):
        raise RuntimeError("launch failed\nsome more")

    fused = functional.deform_attention
    monkeypatch.setattr(functional, "deform_attention", wrong)
    monkeypatch.setattr(functional, "deform_sample", refused)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "deform_attention bfloat16, head_dim 32, bias far: output 0 is off by" in said
    assert "deform_sample bfloat16, offset float32, channels last: launch failed\n" in said
    assert "bias unit" not in said and "is right" not in said


def test_times(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "STAGES", ((7, 64, 4, 2),))
    doctor.time_operators(
        "cpu", lambda call: lambda: float(call() is not None), images=1, repeats=2
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    sample, attention = ["deform_sample", "7x7"], ["deform_attention", "7x7"]
    assert lines == [
        [*sample, "forward", "1.000", "1.000", "-", "1.0"],
        [*sample, "forward+backward", "1.000", "1.000", "-", "1.0"],
        [*attention, "forward", "1.000", "1.000", "1.000", "1.0"],
        [*attention, "forward+backward", "1.000", "1.000", "1.000", "1.0"],
    ]
