"""The training example: it learns, and gives one curve however it is run."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dat_cuda

for needed in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(needed, reason=f"the example needs {needed}")

SCRIPT = Path(__file__).parents[1] / "examples" / "train_digits.py"
# 33 does not divide the images, and 2 processes do not divide a batch of 29 images.
FEW = ("--images", "175", "--epochs", "4", "--batch-size", "33", "--lr", "2e-3", "--device", "cpu")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def train(example, folder: Path, *options: str, backend: str = "auto"):
    """The model and the history of a run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_digits.py", *FEW, "--out", str(folder), *options])
        args = example.parse_arguments()
    example.start(args)
    with dat_cuda.backend(backend):
        return example.train(args, example.load_data(args), folder / "auto.pt")


@pytest.fixture(scope="module")
def whole(example, tmp_path_factory):
    """One run of all epochs."""
    return train(example, tmp_path_factory.mktemp("whole"))


def curve(history: list) -> torch.Tensor:
    """[epochs, 3]: losses and accuracy."""
    columns = ("loss", "test loss", "test accuracy")
    return torch.tensor([[record[name] for name in columns] for record in history]).double()


def test_learns(whole):
    loss, test_loss, accuracy = curve(whole[1]).T
    assert loss[-1] < 0.8 * loss[0]
    assert test_loss[-1] < 0.7 * test_loss[0]
    assert accuracy[-1] > 0.5


def test_reference_gives_the_same_curve(example, whole, tmp_path):
    _, history = train(example, tmp_path, backend="reference")
    torch.testing.assert_close(curve(history), curve(whole[1]), rtol=1e-4, atol=1e-6)


def test_resumed_run_is_the_same_to_the_bit(example, whole, tmp_path, monkeypatch):
    save = example.save_checkpoint

    def interrupted(path, parts, args, history):
        if len(history) == 3:
            raise KeyboardInterrupt
        save(path, parts, args, history)

    monkeypatch.setattr(example, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(example, tmp_path)
    monkeypatch.undo()
    net, history = train(example, tmp_path, "--resume")
    assert torch.equal(curve(history), curve(whole[1]))
    for name, weight in whole[0].state_dict().items():
        assert torch.equal(net.state_dict()[name], weight), name


def test_resume_refuses_other_settings(example, tmp_path):
    train(example, tmp_path, "--images", "64", "--epochs", "1")
    with pytest.raises(SystemExit, match="--seed 0, this is 1"):
        train(example, tmp_path, "--images", "64", "--epochs", "1", "--seed", "1", "--resume")


def test_amp_learns(example, tmp_path):
    loss, _, _ = curve(train(example, tmp_path, "--amp")[1]).T
    assert loss[-1] < 0.8 * loss[0]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_two_processes_give_the_same_curve(whole, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    run(*torchrun, "--nproc-per-node", "2", str(SCRIPT), *FEW, "--out", str(tmp_path))
    history = torch.load(tmp_path / "auto.pt", weights_only=True)["history"]
    torch.testing.assert_close(curve(history), curve(whole[1]), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compare_prints_both_curves_and_draws(tmp_path):
    few = ("--images", "64", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path))
    printed = run(sys.executable, str(SCRIPT), "--compare", *few).stdout
    assert "loss of auto  of reference" in printed
    assert "auto: " in printed and "reference: " in printed
    for picture in ("loss.png", "keys.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_missing_package_is_named():
    code = (
        "import runpy, sys; sys.modules['sklearn'] = None; "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    command = sys.executable, "-c", code
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert ran.returncode == 1
    assert ran.stderr.startswith("this example needs sklearn")
    assert "pip install 'dat_cuda[examples]'" in ran.stderr


def run(*command: str) -> subprocess.CompletedProcess:
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert ran.returncode == 0, ran.stderr
    return ran
