"""Trains a small DAT++ on the 1,797 handwritten digits of scikit-learn, on a CPU or a GPU.

    python examples/train_digits.py                         trains, and draws curves and keys
    python examples/train_digits.py --backend reference     the same curve, from plain PyTorch
    python examples/train_digits.py --compare               both, one after the other
    python examples/train_digits.py --resume                goes on after an interruption
    torchrun --nproc-per-node 2 examples/train_digits.py    the same again, with DDP

Needs `pip install 'dat_cuda[examples]'`. For so small a model processes use cores better than
threads, so each has one thread, unless --threads allows more.

All that is random follows from the seed and the epoch, for the whole data set at once: a run that
is resumed or shared among processes sees the same images, and has no generators to save.
"""

import argparse
import copy
import math
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dat_cuda
from dat_cuda.models import DAT, datpp_tiny
from dat_cuda.visualize import plot_keys

try:
    from matplotlib.figure import Figure
    from rich.progress import track
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    sys.exit(f"this example needs {error.name}: pip install 'dat_cuda[examples]'")

BACKENDS = ("auto", "reference")
SIDE = 64  # of the images that the model sees: its stages have maps of 16, 8, 4 and 2 pixels
Data = tuple[Tensor, Tensor, Tensor, Tensor]
History = list[dict[str, float]]
# What a resumed run must share with the one that was interrupted.
SETTINGS = ("epochs", "batch_size", "lr", "seed", "images", "amp")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--backend", choices=BACKENDS, default="auto", help="what computes deformable attention")
    add("--compare", action="store_true", help="train with both back ends, one after the other")
    add("--epochs", type=int, default=16)
    add("--batch-size", type=int, default=64, help="images in a step, of all processes together")
    add("--lr", type=float, default=1e-3, help="highest learning rate")
    add("--seed", type=int, default=0, help="of weights, order and augmentation; not of the split")
    add("--images", type=int, help="train on only so many images, for a quick look")
    add("--amp", action="store_true", help="bfloat16, or float16 on GPUs without it")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where torch finds it")
    add("--threads", type=int, default=1, help="of each process, on a CPU (default 1)")
    add("--out", type=Path, default=Path("dat-digits"), help="folder of checkpoints and pictures")
    add("--resume", action="store_true", help="continue from the checkpoint in that folder")
    args = parser.parse_args()
    args.rank, args.world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if args.epochs < 1 or args.batch_size < 2 * args.world:
        parser.error("--epochs must be 1 or more, --batch-size 2 or more for each process")
    return args


def start(args: argparse.Namespace) -> None:
    """Sets up device, threads and, under torchrun, the processes, of which the first one speaks."""
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.device, args.half = torch.device(kind), torch.bfloat16
    if kind == "cuda":
        args.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(args.device)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            args.half = torch.float16
    torch.set_num_threads(args.threads)
    if args.world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        # Depthwise weights' gradients come in strides that differ only where sizes are 1.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    if args.rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    args.out.mkdir(parents=True, exist_ok=True)


def load_data(args: argparse.Namespace) -> Data:
    """Training images [N, 1, 8, 8] from 0 to 1 with labels [N], and the same for testing: always
    the same quarter, with equal shares of every digit."""
    x, y = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    x, test_x = (torch.tensor(t / 16, dtype=torch.float32).view(-1, 1, 8, 8) for t in (x, test_x))
    parts = x[: args.images], torch.tensor(y)[: args.images], test_x, torch.tensor(test_y)
    return tuple(part.to(args.device) for part in parts)


def draw_epoch(seed: int, epoch: int, count: int) -> tuple[Tensor, Tensor]:
    """An order [N] of the images, and what happens to each: affine maps [N, 2, 3] that turn by up
    to 10 degrees, scale by up to 10% and shift by up to 5%."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(count, generator=generator)
    turn, size, y, x = 2 * torch.rand(4, count, generator=generator) - 1
    angle, scale = math.radians(10) * turn, 1 + 0.1 * size
    sin, cos = scale * angle.sin(), scale * angle.cos()
    return order, torch.stack([cos, -sin, 0.1 * x, sin, cos, 0.1 * y], 1).view(count, 2, 3)


def prepare(digits: Tensor, maps: Tensor | None = None) -> Tensor:
    """The images [N, 3, SIDE, SIDE] that the model sees of digits [N, 1, 8, 8]."""
    if maps is None:
        maps = torch.eye(2, 3).expand(len(digits), 2, 3)
    grid = F.affine_grid(maps.to(digits), [len(digits), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(digits, grid, align_corners=False).expand(-1, 3, -1, -1)


def make_model(seed: int) -> DAT:
    """DAT-T++ with a quarter of its channels and fewer blocks, N(eighbourhood) and D(eformable).

    Offsets reach as far as the next key. That and dropping no paths keep runs comparable: rounding
    does not grow into another curve.
    """
    torch.manual_seed(seed)
    return datpp_tiny(
        img_size=SIDE,
        num_classes=10,
        dim_stem=16,
        dims=(16, 32, 64, 128),
        depths=(1, 2, 2, 1),
        stage_spec=("D", "ND", "ND", "D"),
        heads=(1, 2, 4, 8),
        groups=(1, 1, 2, 4),
        strides=(2, 1, 1, 1),
        offset_range_factor=(2,) * 4,
        nat_ksizes=(5, 5, 3, 3),
        drop_path_rate=0.0,
    )


def make_optimizer(net: DAT) -> torch.optim.Optimizer:
    """AdamW that decays the weights of layers, but not biases, norms and position tables."""
    tables = net.no_weight_decay_keywords()
    decayed, kept = [], []
    for name, parameter in net.named_parameters():
        is_weight = parameter.dim() > 1 and not any(table in name for table in tables)
        (decayed if is_weight else kept).append(parameter)
    return torch.optim.AdamW([{"params": decayed}, {"params": kept, "weight_decay": 0.0}])


def train(args: argparse.Namespace, data: Data, checkpoint: Path) -> tuple[DAT, History]:
    """The trained model, and for every epoch its losses, accuracy and seconds."""
    images, labels, *test = data
    net = make_model(args.seed).to(args.device)
    model = DistributedDataParallel(net) if args.world > 1 else net
    batches = math.ceil(len(images) / args.batch_size)
    optimizer = make_optimizer(net)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=args.lr,
        total_steps=args.epochs * batches,
        pct_start=0.15,
        cycle_momentum=False,
    )
    needs_scaler = args.amp and args.half == torch.float16
    scaler = torch.amp.GradScaler(args.device.type, enabled=needs_scaler)
    parts = {"model": net, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history = load_checkpoint(checkpoint, parts, args) if args.resume else []

    for epoch in range(len(history), args.epochs):
        begin = time.perf_counter()
        order, maps = draw_epoch(args.seed, epoch, len(images))
        total = torch.zeros((), device=args.device)
        title, quiet = f"epoch {epoch + 1:2}/{args.epochs}", not sys.stdout.isatty()
        for batch in track(order.tensor_split(batches), title, transient=True, disable=quiet):
            share = batch[args.rank :: args.world]
            with torch.autocast(args.device.type, args.half, enabled=args.amp):
                logits = model(prepare(images[share], maps[share]))
            loss = F.cross_entropy(logits, labels[share], label_smoothing=0.1, reduction="sum")
            # DDP averages over processes, whose shares of a batch may differ by one image.
            scaler.scale(loss * args.world / len(batch)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
            total += loss.detach()
        if args.world > 1:
            dist.all_reduce(total)
        loss, (test_loss, accuracy) = total.item() / len(images), evaluate(net, *test)
        seconds = time.perf_counter() - begin
        history.append({"loss": loss, "test loss": test_loss, "test accuracy": accuracy})
        history[-1]["seconds"] = seconds
        numbers = f"loss {loss:.4f}  test loss {test_loss:.4f}  test accuracy {accuracy:.2%}"
        print(f"{title}  {numbers}  {seconds:.1f} s", flush=True)
        if args.rank == 0:
            save_checkpoint(checkpoint, parts, args, history)
    return net, history


@torch.no_grad()
def evaluate(net: DAT, digits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss and accuracy, of all images in every process: there are few."""
    net.eval()
    logits = torch.cat([net(prepare(part)) for part in digits.split(150)])
    net.train()
    accuracy = (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels).item(), accuracy.item()


def save_checkpoint(path: Path, parts: dict, args: argparse.Namespace, history: History) -> None:
    """Replaces the file at once, so that an interruption cannot leave half of one."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    states = {name: part.state_dict() for name, part in parts.items()}
    unfinished = path.with_suffix(".unfinished")
    torch.save({"settings": settings, "history": history, **states}, unfinished)
    unfinished.replace(path)


def load_checkpoint(path: Path, parts: dict, args: argparse.Namespace) -> History:
    """The history so far; the parts get the states that they had."""
    if not path.exists():
        print(f"there is no {path} yet: training starts at the first epoch")
        return []
    checkpoint = torch.load(path, weights_only=True, map_location=args.device)
    for name, value in checkpoint["settings"].items():
        if getattr(args, name) != value:
            option = "--" + name.replace("_", "-")
            sys.exit(f"{path} was made with {option} {value}, this is {getattr(args, name)}")
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    print(f"resumed from {path}, after epoch {len(checkpoint['history'])}")
    return checkpoint["history"]


def time_backends(net: DAT, data: Data, args: argparse.Namespace) -> list[float]:
    """Median milliseconds of forward and backward, the back ends in turns on a copy of the net."""
    net = copy.deepcopy(net)
    images, labels = prepare(data[0][: args.batch_size]), data[1][: args.batch_size]
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for backend in BACKENDS * 11:
        begin = time.perf_counter()
        with dat_cuda.backend(backend):
            with torch.autocast(args.device.type, args.half, enabled=args.amp):
                logits = net(images)
            F.cross_entropy(logits, labels).backward()
        if images.is_cuda:
            torch.cuda.synchronize()
        times[backend].append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(times[backend][1:]) for backend in BACKENDS]


def draw_curves(histories: dict[str, History], path: Path) -> None:
    figure = Figure((9, 3.6), layout="constrained")
    panels = (("loss", "test loss"), ("test accuracy",))
    for axes, names in zip(figure.subplots(1, 2), panels, strict=True):
        for (backend, history), style in zip(histories.items(), ("-", "k:"), strict=False):
            for name in names:
                values = [record[name] for record in history]
                axes.plot(range(1, len(values) + 1), values, style, label=f"{name}, {backend}")
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_arguments()
    start(args)
    data = load_data(args)
    histories = {}
    for backend in BACKENDS if args.compare else (args.backend,):
        with dat_cuda.backend(backend):
            net, histories[backend] = train(args, data, args.out / f"{backend}.pt")

    if args.compare:
        print("epoch  loss of auto  of reference  accuracy of auto  of reference")
        for epoch, (a, r) in enumerate(zip(*histories.values(), strict=True), 1):
            losses = f"{a['loss']:12.4f}  {r['loss']:12.4f}"
            print(f"{epoch:5}  {losses}  {a['test accuracy']:16.2%}  {r['test accuracy']:12.2%}")
    for backend, history in histories.items():
        seconds = sum(record["seconds"] for record in history)
        accuracy = history[-1]["test accuracy"]
        print(f"{backend}: {accuracy:.2%} after {len(history)} epochs in {seconds:.1f} s")
    auto, reference = time_backends(net, data, args)
    times = f"auto {auto:.0f} ms, reference {reference:.0f} ms, {reference / auto:.2f} times"
    print(f"forward and backward of {args.batch_size} images: {times}")
    if args.rank == 0:
        draw_curves(histories, args.out / "loss.png")
        plot_keys(net, prepare(data[2][:1]), out=args.out / "keys.png")
        print(f"see {args.out / 'loss.png'} and {args.out / 'keys.png'}")
    if args.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
