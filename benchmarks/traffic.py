"""What the attention's kernels move and execute, counted on the emulated device.

Counts are exact for the PTX; what follows from them are lower bounds on time from peak rates, with
everything overlapped. The floor is what no kernel can beat: the inputs' and outputs' bytes moved
once, or the formula's products at the full rate.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import common
import torch
import ways

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import emulated  # noqa: E402
from emulated import unavailable  # noqa: E402, F401

import dat_cuda  # noqa: E402

# Bytes and flops a second, from the datasheets (SXM, 80 GB): memory, half precision on tensor
# cores, float32.
RATES = {"a100": (2.04e12, 312e12, 19.5e12), "h100": (3.35e12, 989e12, 67e12)}
# Of the cases of attention.py, those that are emulated in seconds.
NAMES = ("datpp_s_1", "datpp_s_2", "datpp_s_3", "datpp_s_4", "dat_t_3", "det_2")
HEADS = {"det_2": 2}  # of one group: enough for more blocks than an H100 has multiprocessors
CASES = [(name, "bfloat16") for name in NAMES] + [("det_2", "float32")]
RESOURCES = ("issue", "fp32", "shared", "mufu", "tensor", "l1", "l2", "dram")


def case_of(name: str) -> common.Case:
    case = common.CASES[name]
    if heads := HEADS.get(name):
        channels = case.channels // case.heads * heads
        case = dataclasses.replace(case, heads=heads, groups=1, channels=channels)
    return case


@dataclasses.dataclass
class Traffic:
    """One direction of a case on one GPU."""

    name: str
    direction: str  # "forward" or "backward"
    gpu: str
    launches: list
    pairs: int
    compulsory: int  # bytes
    flops: float
    half: bool

    @property
    def key(self) -> str:
        return f"{self.name} {self.direction}"

    @property
    def dram(self) -> float:
        moved = sum(launch.read_bytes + launch.write_bytes for launch in self.launches)
        return moved / self.compulsory

    def _sum(self, *names: str) -> float:
        return sum(launch.summary()[name] for launch in self.launches for name in names)

    @property
    def sectors_per_request(self) -> float:
        return self._sum("ld_sectors", "st_sectors") / self._sum("ldg", "stg", "cp_async")

    @property
    def conflicts(self) -> float:
        """Shared-memory wavefronts over the fewest possible."""
        return self._sum("shared_wavefronts") / self._sum("shared_ideal")

    @property
    def instructions(self) -> float:
        """Of a warp, for every 32 pairs of a query and a key."""
        return sum(launch.warp_insts for launch in self.launches) / (self.pairs / 32)

    @property
    def floor(self) -> float:
        """In microseconds."""
        memory, tensor, float32 = RATES[self.gpu]
        return 1e6 * max(self.compulsory / memory, self.flops / (tensor if self.half else float32))

    def bounds(self) -> dict[str, float]:
        """Microseconds that each resource takes at least; `all`: one launch after the other."""
        found = [launch.bounds(self.gpu) for launch in self.launches]
        total = {name: sum(b[name] for b in found) for name in RESOURCES}
        return total | {"all": sum(b["max_us"] for b in found)}

    @property
    def ratio(self) -> float:
        return self.bounds()["all"] / self.floor


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def measure(name: str, dtype: str, gpu: str, counted: bool = True) -> list[Traffic]:
    """Forward and backward of a case. Without counters only the launches' sizes are known."""
    case = case_of(name)
    tensors, grad_out = ways.inputs(case, common.DTYPES[dtype], "cpu")
    leaves = [t.requires_grad_() for t in tensors]
    with emulated.emulated():
        import ptxemu

        # The 80 GB model, as in RATES.
        ptxemu.GPUS["a100"]["dram"] = RATES["a100"][0] / 1e9
        with ptxemu.session(profile=counted, device=gpu) as session:
            out = dat_cuda.deform_attention(*leaves, heads=case.heads, version=case.version)
            forward = session.launches
            torch.autograd.grad(out, leaves, grad_out)
            backward = session.launches[len(forward) :]
    q, *others, table = tensors
    lse = case.batch * case.heads * case.height * case.width * 4
    grad_table = table.numel() * 4  # summed up in float32
    compulsory = {
        "forward": 2 * q.nbytes + _bytes(*others, table) + lse,
        "backward": 4 * q.nbytes + 2 * _bytes(*others) + _bytes(table) + grad_table + lse,
    }
    flops = case.flops("forward")
    return [
        Traffic(
            f"{name} {dtype}", direction, gpu, launches, case.pairs, compulsory[direction],
            flops * (1 if direction == "forward" else 2.5), dtype != "float32",
        )
        for direction, launches in (("forward", forward), ("backward", backward))
    ]  # fmt: skip


def emulator_faults() -> list[str]:
    """What the emulator is known to execute wrongly, in the PTX of every kernel."""
    text = emulated._build().read_bytes()
    if b".visible .entry" not in text:
        return ["the emulated library's PTX is compressed: build it with --no-compress"]
    found = re.findall(rb"(?:and|or|xor)\.pred[^;]*,\s*-?\d+;", text)
    return [
        f"{instruction.decode()}: the emulator executes logic on predicates wrongly where one is a "
        "number; write the kernel's condition in another way"
        for instruction in sorted(set(found))
    ]
