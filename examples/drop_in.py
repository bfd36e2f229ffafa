"""Puts dat_cuda.DAttention in the place of a model's attention and loads the weights it had.

A model written for the published DAttentionBaseline needs two changed lines: the import, and
`version="dat"` where it follows the 2022 code. Here the model is one residual block, and the
checkpoint one that was saved before the change. On the reference backend the module is the
published formula in plain PyTorch, so it stands for the old class.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import dat_cuda
from dat_cuda import DAttention  # was: from models.dat_blocks import DAttentionBaseline


class Block(nn.Module):
    """x + attention(norm(x)), as in the third stage of DAT++-S."""

    def __init__(self, dim: int = 384, heads: int = 12) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, dim)
        self.attn = DAttention(
            (14, 14), (7, 7), heads, dim // heads, 3, 0.0, 0.0, 2, -1.0,
            True, False, False, False, 5, False, version="dat++",
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y, _, _ = self.attn(self.norm(x))
        return x + y


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 384, 14, 14)
    before = Block()
    with dat_cuda.backend("reference"):
        expected = before(x)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "block.pth")
        torch.save(before.state_dict(), checkpoint)
        after = Block()
        after.load_state_dict(torch.load(checkpoint, weights_only=True))  # strict: every key fits

    y = after(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.square().mean().backward()
    print(f"same numbers to {(y - expected).abs().max():.1e}, and gradients for training")


if __name__ == "__main__":
    main()
