"""python -m dat_cuda, the same as the dat-cuda command."""

import sys

from dat_cuda.cli import main

sys.exit(main())
