"""How much memory a call takes, as the operating system sees it (Linux)."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_Result = TypeVar("_Result")


def _status(field: str) -> int:
    """A size in bytes from /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def release_freed() -> None:
    """Gives back to the kernel what malloc keeps of the freed memory."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def peak_growth(call: Callable[[], _Result]) -> tuple[int, _Result]:
    """(bytes by which the resident set grew at its largest during the call, the call's result).

    Free heap is given back first, so that the call cannot hide in it; then the high-water mark
    VmHWM is reset by writing 5 to /proc/self/clear_refs. Pages and the kernel's per-thread
    counters make it exact to some hundred KiB.

    Raises:
        OSError: the system has no such mark, or does not let it be reset.
    """
    release_freed()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    if _status("VmHWM") - before > 2**20:
        raise OSError("the high-water mark of the resident set cannot be reset")
    result = call()
    return _status("VmHWM") - before, result
