"""Peak memory of one call beyond its outputs.

On the CPU the call runs in a process of its own, forked from a server that has only imported
torch and this package. The process warms the code up at a tiny shape (ways that compile must
compile at the real one), makes its inputs, gives free heap back to the kernel (malloc_trim),
resets the high-water mark of its resident set (5 into /proc/self/clear_refs), makes the call
once and reads the mark (VmHWM): the peak is the mark minus the resident set before the call.
So scratch that any library allocates counts, not only tensors. Where the mark cannot be reset,
the peak is what the call adds to the process's own maximum (ru_maxrss), a lower bound.
Pages and per-thread counters make it exact to some hundred KiB.

On CUDA it is torch.cuda.max_memory_allocated minus what was allocated before the call.
"""

from __future__ import annotations

import multiprocessing
import platform
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from dat_cuda import _rss

Call = Callable[[], object]


def _tensors(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in _tensors(part)] if isinstance(result, tuple) else []


def _own_maximum() -> int:
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_cpu(warm_up: Call, call: Call) -> tuple[int, object]:
    torch.ones(1 << 20).exp_()  # starts the thread pool
    warm_up()
    try:
        return _rss.peak_growth(call)
    except OSError:
        before = _own_maximum()
        result = call()
        return _own_maximum() - before, result


def peak_cuda(warm_up: Call, call: Call) -> tuple[int, int]:
    """(peak bytes beyond the outputs, bytes of the outputs) of one call on the CUDA device."""
    warm_up()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = sum(t.nbytes for t in _tensors(call()))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - outputs, outputs


def _child(pipe: Connection, threads: int, build: Callable[..., tuple[Call, Call]], *args) -> None:
    torch.set_num_threads(threads)
    try:
        peak, result = _peak_cpu(*build(*args))
        outputs = sum(t.nbytes for t in _tensors(result))
        pipe.send((max(0, peak - outputs), outputs))
    except Exception as error:  # the row says why; the run goes on
        pipe.send(f"{type(error).__name__}: {error}")


def peak_cpu(build: Callable[..., tuple[Call, Call]], *args) -> tuple[int, int]:
    """(peak bytes beyond the outputs, bytes of the outputs) of a call in a fresh process.

    `build(*args)` returns the warm-up and the call; it and args must pickle. Raises RuntimeError
    with the message of the process that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "ways"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, torch.get_num_threads(), build, *args))
    child.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the measuring process died with code {child.exitcode}") from None
    child.join()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def fill(row: dict[str, object], build: Callable[..., tuple[Call, Call]], *args) -> None:
    """Writes what a call needs into its row, or why that could not be measured."""
    try:
        on_cuda = row["device"] == "cuda"
        peak = peak_cuda(*build(*args)) if on_cuda else peak_cpu(build, *args)
        row["extra_bytes"], row["outputs_bytes"] = peak
    except RuntimeError as error:
        row["memory_reason"] = str(error)
