"""Fused deformable attention (DAT, DAT++) for PyTorch."""

from importlib.util import find_spec

import torch  # noqa: F401  (its libraries must be loaded before the extension)

if find_spec("dat_cuda._C") is None:
    raise ImportError(
        f"dat_cuda was imported from {__path__[0]}, where its extension is not built: start Python "
        "in another folder to get the installed package, or build here with `pip install -e .`"
    )

from dat_cuda import _C, models, reference  # noqa: F401  (loading _C registers the operators)
from dat_cuda.attention import DAttention
from dat_cuda.convert import convert
from dat_cuda.functional import backend, deform_attention, deform_sample

__version__: str = _C.build_info()["version"]
__all__ = [
    "DAttention",
    "backend",
    "convert",
    "deform_attention",
    "deform_sample",
    "models",
    "reference",
]
