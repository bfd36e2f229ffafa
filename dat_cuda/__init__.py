"""Fused deformable attention (DAT, DAT++) for PyTorch."""

import torch  # noqa: F401  (its libraries must be loaded before the extension)

from dat_cuda import _C, reference  # noqa: F401  (loading _C registers the operators)
from dat_cuda.attention import DAttention
from dat_cuda.functional import backend, deform_attention, deform_sample

__version__: str = _C.build_info()["version"]
__all__ = ["DAttention", "backend", "deform_attention", "deform_sample", "reference"]
