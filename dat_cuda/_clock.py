"""How long a call keeps the CUDA device busy."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class CudaClock:
    """Milliseconds between two events around a call, with a cold L2 cache.

    The device first sleeps about as long as the call took once, so that everything is enqueued by
    the time it starts: what the CPU takes to enqueue is not measured.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(max(2 * l2, 2**20), dtype=torch.uint8, device="cuda")
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        self.cycles = int(2e9 * min(time.perf_counter() - start, 0.02))

    def __call__(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(self.cycles)
        start.record()
        self.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
