"""The dat-cuda command and the example, run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dat_cuda import __version__, cli


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
    # 12 groups: the table has a line for each of the four stages, none of them cut short.
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert [line[1] for line in lines if line and line[0] in "1234"] == [
        "16x16",
        "8x8",
        "4x4",
        "2x2",
    ]
    assert "…" not in ran.stdout
    agreement = ran.stdout.split("They agree to ")[1].split()[0]
    assert float(agreement) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "100"], "--size must be a positive multiple of 32, got 100"),
        (["--size", "0"], "--size must be a positive multiple of 32, got 0"),
        (["--threads", "0"], "--threads must be positive, got 0"),
        (["--out", "no/such/folder.png"], "--out must be in a folder that exists"),
    ],
)
def test_demo_refuses_in_one_sentence(arguments, said, capsys):
    assert cli.main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dat-cuda demo: {said}") and error.count("\n") == 1


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
