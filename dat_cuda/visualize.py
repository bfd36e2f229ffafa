"""Pictures of what deformed keys look at. Needs pillow: pip install 'dat_cuda[demo]'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from dat_cuda import picture
from dat_cuda.attention import DAttention
from dat_cuda.reference import query_grid

# Of the published training: mean and standard deviation of ImageNet's channels.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLUMNS = 6

Photograph = Image.Image | str | Path | Tensor


@dataclass
class _Seen:
    """One deformable attention at work on one image: x [1, C, H, W], pos and reference
    [G, Hk, Wk, 2]."""

    layer: DAttention
    x: Tensor
    pos: Tensor
    reference: Tensor


@torch.no_grad()
def plot_keys(
    model: nn.Module,
    image: Photograph,
    *,
    queries: Sequence[tuple[float, float]] = (),
    stages: Sequence[int] | None = None,
    block: int = -1,
    top: int = 24,
    out: str | Path | None = None,
    note: str = "",
) -> Image.Image:
    """Where the keys of a model's deformable attentions lie on an image.

    For one block of each stage, a panel for every group shows the reference points as rings and
    the deformed keys as dots. For every query point, a panel for each of these blocks shows the
    keys that it attends to most, in mean over the heads, as circles whose area is their share.

    Args:
        model: a DAT, or any module that holds dat_cuda.DAttention. It may be in training: it runs
            in eval mode here and is put back.
        image: a PIL image or a path, normalised as the published training does; or a float tensor
            [3, H, W] or [1, 3, H, W] that is given to the model as it is.
        queries: points (y, x) in pixels of the image.
        stages: which stages, counted from 0: blocks whose maps have one size are a stage. By
            default all that have deformable attention.
        block: which of a stage's deformable blocks.
        top: how many keys are circled.
        out: file to write the picture to, as PNG.
        note: said in the legend.

    Returns:
        The picture.

    Raises:
        ValueError: the model has no such attention, or a query is outside the image.
    """
    photograph, x = _photograph(image)
    for y_, x_ in queries:
        if not (0 <= y_ <= photograph.height and 0 <= x_ <= photograph.width):
            raise ValueError(
                f"queries must be (y, x) within {photograph.height} x {photograph.width} pixels, "
                f"got {(y_, x_)}"
            )
    by_stage: dict[torch.Size, list[_Seen]] = {}
    for seen in _run(model, x):
        by_stage.setdefault(seen.x.shape[2:], []).append(seen)
    if not by_stage:
        raise ValueError("model must hold a dat_cuda.DAttention, got none that took part")
    chosen = list(enumerate(by_stage.values()))
    if stages is not None:
        if not set(stages) <= set(range(len(chosen))):
            raise ValueError(f"stages must be below {len(chosen)}, got {list(stages)}")
        chosen = [chosen[stage] for stage in stages]
    panels = []
    for stage, blocks in chosen:
        panels += _group_panels(stage, blocks[block], photograph)
    for number, query in enumerate(queries):
        for stage, blocks in chosen:
            panels.append(_query_panel(stage, blocks[block], photograph, number, query, top))
    legend = "ring: reference point; dot: the key, where its offset takes it"
    if queries:
        legend += "; cross: a query; area of a circle: its attention to a key"
    legend += f"; {note}" if note else ""
    sheet = picture.draw(photograph, panels, min(COLUMNS, len(panels)), legend)
    if out is not None:
        sheet.save(out, format="PNG")
    return sheet


def attention_weights(layer: DAttention, x: Tensor, queries: Tensor) -> Tensor:
    """The weights softmax(q.k * scale + bias) of some queries: [B, heads, Q, N].

    Args:
        layer: a deformable attention; its dropout is left out.
        x: [B, C, H, W], what it is called with.
        queries: [Q], numbers of pixels of x, row by row.
    """
    q_map = layer.proj_q(x)
    sampled, pos, _ = layer._keys(x, layer._offsets(q_map)[0])
    k_map = layer.proj_k(sampled.unsqueeze(2))
    q, k = (t.flatten(2).unflatten(1, (layer.n_heads, -1)) for t in (q_map, k_map))
    scores = torch.einsum("bhcm,bhcn->bhmn", q[..., queries], k) * layer.scale
    if layer.encoding == "rpe":
        height, width = x.shape[2:]
        grid = query_grid(height, width, layer.version, dtype=pos.dtype, device=pos.device)
        away = grid.flatten(0, 1)[queries].unsqueeze(1) - pos.flatten(2, 3).unsqueeze(2)
        table = layer.rpe_table.to(pos.dtype).unflatten(0, (layer.n_groups, -1))
        table = table.expand(len(x), -1, -1, -1, -1).flatten(0, 1)
        bias = F.grid_sample(
            table, (away / 2).flip(-1).flatten(0, 1), mode="bilinear", align_corners=True
        )
        scores = scores + bias.unflatten(0, (len(x), -1)).flatten(1, 2).to(scores.dtype)
    else:
        dense = layer._dense_bias(q_map, pos)
        scores = scores if dense is None else scores + dense[:, :, queries]
    return scores.softmax(dim=-1)


def normalized(image: Image.Image) -> Tensor:
    """[1, 3, H, W]: the image as the published training normalises it."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    x = pixels.view(1, image.height, image.width, 3).movedim(-1, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def _photograph(image: Photograph) -> tuple[Image.Image, Tensor]:
    """The image as it is shown, and [1, 3, H, W] for the model."""
    if isinstance(image, (str, Path)):
        with Image.open(image) as file:
            image = ImageOps.exif_transpose(file)
    if isinstance(image, Image.Image):
        return image.convert("RGB"), normalized(image)
    x = image if image.dim() == 4 else image.unsqueeze(0)
    if x.dim() != 4 or x.shape[:2] != (1, 3) or not x.is_floating_point():
        raise ValueError(
            "image must be a PIL image, a path or a float tensor [3, H, W] or [1, 3, H, W], got "
            f"{image.dtype} {list(image.shape)}"
        )
    low, high = x.amin(), x.amax()
    levels = ((x[0] - low) / (high - low).clamp(min=1e-6) * 255).byte().movedim(0, -1).cpu()
    height, width = levels.shape[:2]
    return Image.frombytes("RGB", (width, height), bytes(levels.flatten().tolist())), x


def _run(model: nn.Module, x: Tensor) -> list[_Seen]:
    """What the model's deformable attentions do with x, in the order in which they run."""
    seen: list[_Seen] = []

    def look(layer: DAttention, inputs: tuple, result: object) -> None:
        features = inputs[0].detach()
        offset, _ = layer._offsets(layer.proj_q(features))
        _, pos, reference = layer._keys(features, offset)
        seen.append(_Seen(layer, features, pos[0], reference[0]))

    modes = {module: module.training for module in model.modules()}
    layers = [module for module in modes if isinstance(module, DAttention)]
    handles = [layer.register_forward_hook(look) for layer in layers]
    try:
        if layers:
            parameter = next(layers[0].parameters())
            model.eval()
            model(x.to(parameter.device, parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return seen


def _pixels(points: Tensor, seen: _Seen, photograph: Image.Image) -> list[list[float]]:
    """[..., 2] in units of the map, -1 and 1 being the centres of its outermost cells -> (y, x) in
    pixels of the photograph. The map may reach beyond it, where the model padded."""
    points = points.float()
    size = points.new_tensor(seen.x.shape[2:])
    cells = (points + 1) / 2 * (size - 1).clamp(min=1) + 0.5
    return (cells * _stride(seen, photograph)).reshape(-1, 2).tolist()


def _stride(seen: _Seen, photograph: Image.Image) -> float:
    """Pixels of the photograph to a cell of the map: a power of two, as models halve."""
    height = seen.x.shape[2]
    return 2.0 ** round(torch.tensor(photograph.height / height).log2().item())


def _stage_name(stage: int, seen: _Seen, photograph: Image.Image) -> str:
    """Counted from 1: of four, by the stride, where the model has a DAT's strides."""
    names = {4.0: 1, 8.0: 2, 16.0: 3, 32.0: 4}
    return f"stage {names.get(_stride(seen, photograph), stage + 1)}"


def _group_panels(stage: int, seen: _Seen, photograph: Image.Image) -> list[picture.Panel]:
    return [
        picture.Panel(
            f"{_stage_name(stage, seen, photograph)}, group {group + 1}",
            reference=_pixels(seen.reference[group], seen, photograph),
            pos=_pixels(seen.pos[group], seen, photograph),
        )
        for group in range(len(seen.pos))
    ]


def _query_panel(
    stage: int,
    seen: _Seen,
    photograph: Image.Image,
    number: int,
    query: tuple[float, float],
    top: int,
) -> picture.Panel:
    height, width = seen.x.shape[2:]
    stride = _stride(seen, photograph)
    row, column = (
        min(int(c // stride), side - 1) for c, side in zip(query, (height, width), strict=True)
    )
    index = torch.tensor([row * width + column], device=seen.x.device)
    weights = attention_weights(seen.layer, seen.x, index)[0, :, 0].float()  # [heads, N]
    per_group = weights.unflatten(0, (len(seen.pos), -1)).sum(1) / len(weights)
    shares, keys = per_group.flatten().topk(min(top, per_group.numel()))
    points = _pixels(seen.pos.flatten(0, 2)[keys], seen, photograph)
    total = f"{shares.sum().item():.0%} of attention"
    return picture.Panel(
        f"query {number + 1}, {_stage_name(stage, seen, photograph)}: {total}",
        attended=list(zip(points, shares.tolist(), strict=True)),
        query=query,
    )
