"""Does the installed wheel work beside this torch? One step of both operators, and the command.

Run as `python tests/smoke.py`; it needs nothing but the wheel.
"""

import subprocess
import sys
from pathlib import Path

import torch

import dat_cuda


def step(operators, x, offset, q, table) -> list[torch.Tensor]:
    """Samples keys and values, attends, and returns the outputs and every gradient."""
    inputs = [tensor.clone().requires_grad_() for tensor in (x, offset, q, table)]
    x, offset, q, table = inputs
    sampled, pos = operators.deform_sample(x, offset, groups=2, offset_range_factor=2.0)
    out = operators.deform_attention(q, sampled, sampled.sin(), pos, table, heads=4)
    out.square().sum().backward()
    return [sampled, pos, out, *(tensor.grad for tensor in inputs)]


def main() -> None:
    torch.manual_seed(0)
    x, q = torch.randn(2, 2, 32, 9, 7).unbind()
    inputs = x, torch.randn(4, 2, 4, 3), q, torch.randn(4, 17, 13)
    fused = step(dat_cuda, *inputs)
    expected = step(dat_cuda.reference, *inputs)
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)
    # Elsewhere than in the project's root, where the sources would hide the installed package.
    here = Path(__file__).parent
    subprocess.run([sys.executable, "-m", "dat_cuda", "info"], cwd=here, check=True)
    print(f"dat_cuda {dat_cuda.__version__} agrees with its reference on torch {torch.__version__}")


if __name__ == "__main__":
    main()
