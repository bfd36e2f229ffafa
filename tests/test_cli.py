"""The dat-cuda command and the example, run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dat_cuda import __version__, cli, models


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        (sys.executable, *arguments),
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "80"} | environment,
        # Not the project's root, where the sources would hide the installed package.
        cwd=Path(__file__).parent,
    )


def test_info_names_the_build():
    ran = command("-m", "dat_cuda", "info")
    assert ran.returncode == 0, ran.stderr
    facts = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines())
    assert facts["dat_cuda"] == __version__
    assert facts["torch"].startswith(torch.__version__)
    assert {"Python", "compiler", "SIMD", "CUDA", "devices"} <= facts.keys()


def test_import_asks_for_no_gpu():
    ran = command("-c", "import torch, dat_cuda; print(torch.cuda.is_initialized())")
    assert ran.stdout.strip() == "False", ran.stderr


def test_demo_writes_a_picture(tmp_path):
    for package in ("skimage", "PIL", "rich"):
        pytest.importorskip(package)
    from PIL import Image

    out = tmp_path / "keys.png"
    ran = command("-m", "dat_cuda", "demo", "--size", "64", "--threads", "1", "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width > 1000
    lines = [line.split() for line in ran.stdout.splitlines()]
    maps = [line[1] for line in lines if line and line[0] in "1234" and "of" in line]
    assert maps == ["16x16", "8x8", "4x4", "2x2"]
    assert {"reference", "fused"} <= {line[0] for line in lines if line}
    assert "…" not in ran.stdout
    agreement = ran.stdout.split("They agree to ")[1].split()[0].rstrip(".")
    assert float(agreement) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "31"], "--size must be at least 32, got 31"),
        (["--model", "dat_huge"], "--model must be one of dat_base, "),
        (["--weights", "no_such_file.pth"], "--weights must be a file, got no_such_file.pth"),
        (["--threads", "0"], "--threads must be positive, got 0"),
        (["--out", "no/such/folder.png"], "--out must be in a folder that exists"),
    ],
)
def test_demo_refuses_in_one_sentence(arguments, said, capsys):
    assert cli.main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dat-cuda demo: {said}") and error.count("\n") == 1


def test_demo_with_weights(tmp_path, capsys):
    for package in ("skimage", "PIL", "rich"):
        pytest.importorskip(package)
    path, out = tmp_path / "weights.pth", tmp_path / "keys.png"
    models.export_checkpoint(models.datpp_p(num_classes=1000), path)
    arguments = ["demo", "--size", "50", "--model", "datpp_p", "--out", str(out)]
    assert cli.main([*arguments, "--weights", str(path)]) == 0
    assert "Classes: " in capsys.readouterr().out
    path.write_bytes(b"no checkpoint")
    assert cli.main([*arguments, "--weights", str(path)]) == 2
    error = capsys.readouterr().err
    assert "weights.pth" in error and error.startswith("dat-cuda demo: ")


@pytest.mark.parametrize("content", [None, b"no image"])
def test_demo_refuses_what_is_no_image(content, tmp_path, capsys):
    for package in ("skimage", "PIL", "rich"):
        pytest.importorskip(package)
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["demo", str(path)]) == 2
    error = capsys.readouterr().err
    assert "photo.jpg is not a readable image" in error and error.count("\n") == 1


def test_demo_names_the_missing_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    monkeypatch.delitem(sys.modules, "dat_cuda.demo", raising=False)
    monkeypatch.delattr("dat_cuda.demo", raising=False)
    assert cli.main(["demo"]) == 2
    assert "pip install 'dat_cuda[demo]'" in capsys.readouterr().err


def test_drop_in_example():
    ran = command(str(Path(__file__).parents[1] / "examples" / "drop_in.py"))
    assert ran.returncode == 0, ran.stderr
    assert "same numbers" in ran.stdout
