"""Interleaved timing on the CPU and on CUDA devices."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from common import DTYPES

from dat_cuda import _clock, _rss


def keep_freed_memory() -> None:
    """Make malloc keep what is freed.

    glibc returns every large block to the kernel at once, and faulting its pages in again can take
    longer than the arithmetic. That is what a program meets that sets nothing, and part of the
    price of ways that need gigabytes; with this, the arithmetic alone is compared.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # names of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def gemm(device: str, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A large square product and its flops: the rate the machine can reach.

    On the CPU in float32: not every machine has fast products in half precision.
    """
    on_cuda = device == "cuda"
    n = 8192 if on_cuda else 2048
    shape = {"device": device, "dtype": dtype if on_cuda else torch.float32}
    a, b, c = (torch.rand(n, n, **shape) for _ in range(3))
    return lambda: torch.mm(a, b, out=c), 2.0 * n**3


class _CpuClock:
    """Milliseconds a call: after one that warms the caches, short calls are repeated."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        self.warm_up = seconds < 0.2
        self.calls = max(1, min(50, int(0.02 / max(seconds, 1e-6))))

    def __call__(self) -> float:
        if self.warm_up:
            self.call()
        start = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        return (time.perf_counter() - start) * 1e3 / self.calls


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: str,
    budget: float,
    repeats: int,
    most: str = "fused",
) -> dict[str, list[float]]:
    """Milliseconds of each call, in rounds of one sample each, so that drift hits all alike.

    Every round starts with another call. Calls must have run before: one more run of each sets
    its clock. There are `repeats` rounds, fewer where they would take more than `budget` seconds,
    but at least 3; `most` gets at least 5 samples.
    """
    clocks = {
        name: _clock.CudaClock(call) if device == "cuda" else _CpuClock(call)
        for name, call in calls.items()
    }
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget
    for done in range(max(3, repeats)):
        if done >= 3 and time.perf_counter() > end:
            break
        for name in names[done % len(names) :] + names[: done % len(names)]:
            samples[name].append(clocks[name]())
    while most in calls and len(samples[most]) < 5:
        samples[most].append(clocks[most]())
    return samples


def time_rows(
    rows: Sequence[dict[str, object]],
    calls: Mapping[str, Callable[[], object]],
    flops: float | None,
    *,
    device: str,
    budget: float,
    repeats: int,
) -> None:
    """Times the calls, named as the rows' implementations, beside the GEMM; fills the rows in."""
    product, product_flops = gemm(device, DTYPES[rows[0]["dtype"]])
    product()
    samples = interleaved(calls | {"gemm": product}, device=device, budget=budget, repeats=repeats)
    rate = product_flops / median_and_spread(samples["gemm"])[0]
    for row in rows:
        taken = samples.get(row["implementation"])
        if taken:
            row["ms"], row["spread"] = median_and_spread(taken)
            row["samples"], row["gemm_gflops"] = taken, rate / 1e6
            row["gemm_fraction"] = flops / row["ms"] / rate if flops else None
    _rss.release_freed()  # for the processes that measure memory


def median_and_spread(samples: Sequence[float]) -> tuple[float, float]:
    """The median and the interquartile range relative to it."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, (high - low) / middle
