"""DAT and DAT++ as whole models, their blocks, and their checkpoints."""

from dat_cuda.models import _timm
from dat_cuda.models.builders import (
    dat_base,
    dat_base_384,
    dat_small,
    dat_tiny,
    datpp_base,
    datpp_base_384,
    datpp_p,
    datpp_small,
    datpp_tiny,
)
from dat_cuda.models.checkpoint import export_checkpoint, load_checkpoint
from dat_cuda.models.dat import DAT

__all__ = [
    "DAT",
    "dat_base",
    "dat_base_384",
    "dat_small",
    "dat_tiny",
    "datpp_base",
    "datpp_base_384",
    "datpp_p",
    "datpp_small",
    "datpp_tiny",
    "export_checkpoint",
    "load_checkpoint",
]

_timm.register()
