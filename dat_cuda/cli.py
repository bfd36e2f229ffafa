"""The dat-cuda command."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch

from dat_cuda import _C, models

BUILDERS = [name for name in models.__all__ if name.startswith("dat")]


def main(argv: list[str] | None = None) -> int:
    """Runs the command; the exit status is 2 after a mistake of the user's, said in one line."""
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except UserError as error:
        print(f"dat-cuda {options.command}: {error}", file=sys.stderr)
        return 2


class UserError(Exception):
    """What the user can put right, in one sentence."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dat-cuda", description="Fused deformable attention (DAT, DAT++) for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="what was built, and what this machine uses of it")
    info.set_defaults(run=_info)
    doctor = commands.add_parser(
        "doctor", help="do all kernels compute what they should here, and how fast on a GPU"
    )
    doctor.set_defaults(run=_doctor)
    demo = commands.add_parser(
        "demo", help="a whole DAT on a photograph: agreement, speed, memory and a picture"
    )
    demo.add_argument("image", nargs="?", type=Path, help="a photograph (default: one is included)")
    demo.add_argument("--out", type=Path, default=Path("dat-demo.png"), metavar="FILE")
    demo.add_argument("--size", type=int, default=224, help="side in pixels (default 224)")
    demo.add_argument("--model", default="datpp_tiny", metavar="NAME", help="a builder of models")
    demo.add_argument("--weights", type=Path, metavar="FILE", help="a published checkpoint")
    demo.add_argument("--threads", type=int, help="CPU threads (default: what torch chooses)")
    demo.set_defaults(run=_demo)
    return parser


def _info(options: argparse.Namespace) -> int:
    build = _C.build_info()
    if build["cuda"] is None:
        cuda = "not built: CUDA tensors go through the reference"
    else:
        cuda = f"{build['cuda']} for {', '.join(build['architectures'])}"
    lines = {
        "dat_cuda": build["version"],
        "Python": platform.python_version(),
        "torch": f"{torch.__version__} (built against {build['torch']})",
        "compiler": build["compiler"],
        "SIMD": f"{_C.simd()} (built: {', '.join(build['simd'])})",
        "CUDA": cuda,
        "devices": "; ".join(_devices()),
    }
    for name, text in lines.items():
        print(f"{name:<10}{text}")
    return 0


def _devices() -> list[str]:
    found = [f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"cuda:{index} ({torch.cuda.get_device_name(index)}, {major}.{minor})")
    return found


def _doctor(options: argparse.Namespace) -> int:
    from dat_cuda import doctor

    return doctor.run()


def _demo(options: argparse.Namespace) -> int:
    if options.threads is not None:
        if options.threads < 1:
            raise UserError(f"--threads must be positive, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.size < 32:
        raise UserError(f"--size must be at least 32, got {options.size}")
    if options.model not in BUILDERS:
        raise UserError(f"--model must be one of {', '.join(BUILDERS)}, got {options.model}")
    if not options.out.parent.is_dir():
        raise UserError(f"--out must be in a folder that exists, got {options.out}")
    try:
        from dat_cuda import demo
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is missing; pip install 'dat_cuda[demo]' brings what the demo needs"
        ) from None
    try:
        photograph = demo.photograph(options.image)
    except (OSError, ValueError) as error:
        raise UserError(f"{options.image} is not a readable image: {error}") from None
    if options.weights is not None and not options.weights.is_file():
        raise UserError(f"--weights must be a file, got {options.weights}")
    try:
        demo.run(photograph, options.size, options.out, options.model, options.weights)
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{options.out} cannot be written: {error}") from None
    return 0
