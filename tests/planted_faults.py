"""Would the emulated tests notice? Plants faults in copies of the CUDA sources, one at a time.

Each copy's attention_forward_bf16.cu, or attention_backward_bf16.cu, is compiled for the emulated
device, linked with the other objects as they are, and runs small cases with race checks and exact
bounds: a report or a wrong result is expected, and neither from the unmodified sources.

    python tests/planted_faults.py [word of a fault's name]

exits with 1 if any fault goes unnoticed.
"""

import functools
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import emulated
import torch
from operator_cases import poisoned_memory

import dat_cuda
from dat_cuda import doctor, reference

# What is wrong: the file, and its text without and with the fault.
FAULTS = {
    "a barrier is missing": (
        "csrc/kernels/attention_forward.cuh",
        "__syncthreads();\n      T* out =",
        "T* out =",
    ),
    "a bound is off by one": (
        "csrc/kernels/stage.cuh",
        "inside = first + n < keys;",
        "inside = first + n <= keys;",
    ),
    "copies are not waited for": (
        "csrc/kernels/attention_tiles.cuh",
        "wait_for_copies<0>();",
        "",
    ),
    "a block too few": (
        "csrc/cuda/attention_forward.cuh",
        "plan.splits * shape.heads * shape.batch,",
        "plan.splits * shape.heads * shape.batch - 1,",
    ),
    "a warp too few": (
        "csrc/cuda/attention_forward.cuh",
        "plan.rows * plan.columns / E::kStack,",
        "plan.rows * plan.columns / E::kStack - 32,",
    ),
    "a warp too many": (
        "csrc/cuda/attention_forward.cuh",
        "plan.rows * plan.columns / E::kStack,",
        "plan.rows * plan.columns / E::kStack + 32,",
    ),
    "the softmax's reference stays": (
        "csrc/kernels/attention_forward.cuh",
        "if (!tries && !softmax.settled(sum)) {",
        "if (tries > 1) {",
    ),
    "backward: a barrier is missing": (
        "csrc/kernels/attention_backward_keys.cuh",
        "make_grad_q(k, tile, origin);\n      __syncthreads();",
        "make_grad_q(k, tile, origin);",
    ),
    "backward: the turns do not wait": (
        "csrc/kernels/attention_backward_keys.cuh",
        "    __syncthreads();\n    if (part != turn) continue;",
        "    if (part != turn) continue;",
    ),
    "backward: the first sums, not the last": (
        "csrc/kernels/attention_backward_keys.cuh",
        "== count - 1;",
        "== 0;",
    ),
    "backward: a block too few": (
        "csrc/cuda/attention_backward.cuh",
        "key_blocks(shape, plan), kKeyWarps",
        "key_blocks(shape, plan) - 1, kKeyWarps",
    ),
    "backward: the walk does not wait": (
        "csrc/kernels/attention_backward_columns.cuh",
        "window, far, k, v);\n    __syncthreads();",
        "window, far, k, v);",
    ),
    "backward: the walk is not waited for": (
        "csrc/kernels/attention_backward_columns.cuh",
        "const bool last = __syncthreads_or(threadIdx.x == 0 && grad_q.arrives_last());",
        "if (threadIdx.x == 0) *starts.start = grad_q.arrives_last();\n"
        "    const bool last = *starts.start;",
    ),
    "backward: a part is not waited for": (
        "csrc/kernels/attention_backward_columns.cuh",
        "    __syncthreads();\n    if (!last",
        "    if (!last",
    ),
    "backward: a window's bound is off": (
        "csrc/kernels/column_window.cuh",
        "y >= 0 && x >= 0",
        "y >= -2 && x >= 0",
    ),
    "backward: a warp too few": (
        "csrc/cuda/attention_backward.cuh",
        "key_blocks(shape, plan), kKeyWarps * kWarp,",
        "key_blocks(shape, plan), kKeyWarps * kWarp - 32,",
    ),
}
NOTICED = 3
healthy = functools.cache(emulated._build)


def planted(name: str, folder: Path) -> Path:
    """A library with the fault, in the folder."""
    import ptxemu.build

    file, text, fault = FAULTS[name]
    direction = "backward" if name.startswith("backward") else "forward"
    unit = folder / "csrc" / "cuda" / f"attention_{direction}_bf16.cu"
    shutil.copytree(emulated.PROJECT / "csrc", folder / "csrc")
    for source in (folder / "csrc" / "cuda").glob("*.cu"):
        if source != unit:
            source.unlink()
    whole = (folder / file).read_text()
    if whole.count(text) != 1:
        raise LookupError(f"{file} has {text!r} {whole.count(text)} times: say anew where to fail")
    (folder / file).write_text(whole.replace(text, fault))

    toolchain = emulated.dat_toolchain
    ninja = emulated.EmulatedNinja(
        folder, folder / "build", "", toolchain.require_torch(), toolchain.find_nvcc()
    )
    ninja.add_cuda_sources(emulated.cuda_flags())
    others = healthy().parent.rglob("*.o")
    ninja.objects += [path for path in others if path.name != ninja.objects[0].name]
    shim, library = ptxemu.build.shim(), folder / "faulty.so"
    ninja.link(library, f"-L{shim}", "-lptxemu_cudart", f"-Wl,-rpath,{shim}")
    ninja.run()
    return library


def noticed(library: Path) -> str | None:
    """What goes wrong with this library, in one line."""
    run = subprocess.run(
        [sys.executable, "-m", "ptxemu", "exec", sys.executable, __file__, "--run", library],
        env=emulated.environment(),
        capture_output=True,
        text=True,
    )
    if run.returncode not in (0, NOTICED):
        raise RuntimeError(f"the cases end with {run.returncode}:\n{run.stdout}{run.stderr}")
    where = r"^\[launch .*? smem \d+\] |, PTX line .*"
    return re.sub(where, "", run.stdout.splitlines()[-1]) if run.returncode else None


def run_cases(library: str) -> int:
    import ptxemu.device

    ptxemu.device.load()
    emulated._build = lambda early: library
    doctor.BIASES["few"] = doctor.BiasKind(size=(14, 14), keys=25, table=(27, 27))
    torch.manual_seed(0)
    # Wide copies and two loads of keys; narrow ones, with keys that the window does not hold; all
    # keys at once; a small map; scores whose exponentials are 0. One multiprocessor: blocks of
    # several warps; 108: several blocks of a split.
    biases = ("unit", "far", "few", "slope, a small map", "dense")
    for bias, count in itertools.product(biases, (1, 108)):
        case = doctor.attention_check(torch.bfloat16, 32, bias, "cpu")
        if bias == "dense":
            case.inputs["bias"].sub_(200)
        exact = case.results(reference, torch.float64)
        try:
            with (
                emulated.emulated(race_seed=0),
                emulated.multiprocessors(count),
                poisoned_memory(deterministic=False),
            ):
                found = case.results(dat_cuda)
        except (RuntimeError, ptxemu.PtxError) as error:
            print(str(error).splitlines()[0])
            return NOTICED
        for name, right in exact.items():
            error = (found[name].double() - right).abs().max() / right.abs().max()
            if not error < 0.05:
                print(f"{name} is off by {error:.2g}")
                return NOTICED
    return 0


def main(word: str = "") -> int:
    if reason := emulated.unavailable():
        sys.exit(f"no fault can be planted: {reason}")
    rows, failed = [("nothing is wrong", noticed(healthy()))], 0
    for name in (name for name in FAULTS if word in name):
        with tempfile.TemporaryDirectory() as folder:
            rows.append((name, noticed(planted(name, Path(folder)))))
    for i, (name, report) in enumerate(rows):
        failed |= (report is None) == (i > 0)
        print(f"{name:<40}{report or 'not noticed'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(run_cases(sys.argv[2]) if sys.argv[1:2] == ["--run"] else main(*sys.argv[1:]))
