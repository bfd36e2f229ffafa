"""Doubles of the published attention classes, and classes that only look like them.

Written from the formulas in plain PyTorch. The doubles keep what a conversion meets: arguments,
attributes, results, the dtype that positions are computed in, and where the classes fail.
"""

import torch
import torch.nn.functional as F
from torch import nn


class ChannelNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(x.movedim(1, 3)).movedim(3, 1)


def numbers(n, like):
    return torch.arange(n, dtype=like.dtype, device=like.device)


def grid(y, x):
    """[len(y), len(x), 2] in (y, x)."""
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


class Attention(nn.Module):
    """What the classes of both years share."""

    def __init__(
        self, q_size, kv_size, n_heads, n_head_channels, n_groups, attn_drop, proj_drop, stride,
        offset_range_factor, use_pe, dwc_pe, no_off, fixed_pe, ksize, padding,
    ):  # fmt: skip
        super().__init__()
        self.n_heads, self.n_head_channels, self.n_groups = n_heads, n_head_channels, n_groups
        self.use_pe, self.dwc_pe, self.no_off, self.fixed_pe = use_pe, dwc_pe, no_off, fixed_pe
        self.offset_range_factor = offset_range_factor
        self.nc = n_heads * n_head_channels
        self.n_group_channels, self.n_group_heads = self.nc // n_groups, n_heads // n_groups
        self.scale = n_head_channels**-0.5
        (self.q_h, self.q_w), (self.kv_h, self.kv_w) = q_size, kv_size
        channels = self.n_group_channels
        self.conv_offset = nn.Sequential(
            nn.Conv2d(channels, channels, ksize, stride, padding, groups=channels),
            ChannelNorm(channels),
            nn.GELU(),
            nn.Conv2d(channels, 2, 1, bias=False),
        )
        for name in ("proj_q", "proj_k", "proj_v", "proj_out"):
            setattr(self, name, nn.Conv2d(self.nc, self.nc, 1))
        self.proj_drop = nn.Dropout(proj_drop, inplace=True)
        self.attn_drop = nn.Dropout(attn_drop, inplace=True)
        self.rpe_table = None

    def dwc(self):
        return nn.Conv2d(self.nc, self.nc, 3, padding=1, groups=self.nc)

    def table(self, *shape):
        return nn.Parameter(nn.init.trunc_normal_(torch.zeros(self.n_heads, *shape), std=0.01))

    def forward(self, x):
        q = self.proj_q(x)
        offset = self.conv_offset(q.reshape(-1, self.n_group_channels, *q.shape[2:]))
        points = grid(*(self.key_points(n, x) for n in offset.shape[2:]))
        reference = points.expand(len(offset), -1, -1, -1)
        pos = self.bound(offset.permute(0, 2, 3, 1), reference)  # [B * G, Hk, Wk, 2]
        sampled = self.sample(x, pos)
        weights = self.weigh(self.split(q), self.split(self.proj_k(sampled)), self.bias(x, pos))
        out = torch.einsum("bhmn,bhdn->bhdm", weights, self.split(self.proj_v(sampled)))
        out = out.reshape(x.shape)
        if self.dwc_pe and self.rpe_table is not None:
            out = out + self.rpe_table(q)
        y = self.project(out)
        pos, reference = (t.reshape(len(x), -1, *pos.shape[1:]) for t in (pos, reference))
        weights = weights.reshape(len(x), self.n_heads, *x.shape[2:], *pos.shape[2:4])
        return self.results(y, pos, reference, weights)

    def project(self, out):
        return self.proj_drop(self.proj_out(out))

    def results(self, y, pos, reference, weights):
        return y, pos, reference

    def sample(self, x, pos):  # [B, C, 1, N]
        maps = x.reshape(len(pos), self.n_group_channels, *x.shape[2:])
        sampled = F.grid_sample(maps, pos.flip(-1), mode="bilinear", align_corners=True)
        return sampled.reshape(*x.shape[:2], 1, -1)

    def split(self, features):  # [B, h, d, M or N]
        return features.reshape(len(features), self.n_heads, self.n_head_channels, -1)

    def weigh(self, q, k, bias):  # [B, h, M, N]
        scores = torch.einsum("bhdm,bhdn->bhmn", q, k) * self.scale
        return self.attn_drop(F.softmax(scores + bias, dim=-1))

    def distance(self, x, pos):  # [B * G, M, N, 2]
        queries = grid(*(self.query_points(n, x) for n in x.shape[2:]))
        return queries.reshape(1, -1, 1, 2) - pos.reshape(len(pos), 1, -1, 2)

    def table_bias(self, x, pos, size):
        maps = self.rpe_table.expand(len(x), -1, -1, -1)
        maps = maps.reshape(len(pos), self.n_group_heads, *size)
        where = self.distance(x, pos).flip(-1) * 0.5
        bias = F.grid_sample(maps, where, mode="bilinear", align_corners=True)
        return bias.reshape(len(x), self.n_heads, *bias.shape[2:])


class Attention2022(Attention):
    """DAT for classification. It runs with a table at kv_size only."""

    def __init__(
        self, q_size, kv_size, n_heads, n_head_channels, n_groups, attn_drop, proj_drop, stride,
        offset_range_factor, use_pe, dwc_pe, no_off, fixed_pe, stage_idx,
    ):  # fmt: skip
        ksize = (9, 7, 5, 3)[stage_idx]
        super().__init__(
            q_size, kv_size, n_heads, n_head_channels, n_groups, attn_drop, proj_drop, stride,
            offset_range_factor, use_pe, dwc_pe, no_off, fixed_pe, ksize, ksize // 2,
        )  # fmt: skip
        if use_pe and dwc_pe:
            self.rpe_table = self.dwc()
        elif use_pe and fixed_pe:
            self.rpe_table = self.table(self.q_h * self.q_w, self.kv_h * self.kv_w)
        elif use_pe:
            self.rpe_table = self.table(2 * self.kv_h - 1, 2 * self.kv_w - 1)

    def key_points(self, n, like):
        return (numbers(n, like) + 0.5) / n * 2 - 1

    query_points = key_points

    def bound(self, offset, reference):
        if self.offset_range_factor > 0:
            step = torch.tensor([1.0 / n for n in offset.shape[1:3]], device=offset.device)
            offset = offset.tanh() * step * self.offset_range_factor
        if self.no_off:
            offset = offset.fill(0.0)  # fails, as it is published
        pos = offset + reference
        return pos.tanh() if self.offset_range_factor < 0 else pos

    def bias(self, x, pos):
        if self.rpe_table is None or self.dwc_pe:
            return 0.0
        if self.fixed_pe:
            return self.rpe_table.reshape(1, self.n_heads, -1, self.n_sample)  # fails, too
        return self.table_bias(x, pos, [2 * n - 1 for n in x.shape[2:]])


class Attention2023(Attention):
    """DAT++ for classification."""

    def __init__(
        self, q_size, kv_size, n_heads, n_head_channels, n_groups, attn_drop, proj_drop, stride,
        offset_range_factor, use_pe, dwc_pe, no_off, fixed_pe, ksize, log_cpb,
    ):  # fmt: skip
        kv_size = (q_size[0] // stride, q_size[1] // stride)
        padding = 0 if ksize == stride else ksize // 2
        super().__init__(
            q_size, kv_size, n_heads, n_head_channels, n_groups, attn_drop, proj_drop, stride,
            offset_range_factor, use_pe, dwc_pe, no_off, fixed_pe, ksize, padding,
        )  # fmt: skip
        self.stride, self.ksize, self.log_cpb = stride, ksize, log_cpb
        self.conv_offset.requires_grad_(not no_off)
        if not use_pe or no_off:
            return
        if dwc_pe:
            self.rpe_table = self.dwc()
        elif fixed_pe:
            self.rpe_table = self.table(self.q_h * self.q_w, self.kv_h * self.kv_w)
        elif log_cpb:
            last = nn.Linear(32, self.n_group_heads, bias=False)
            self.rpe_table = nn.Sequential(nn.Linear(2, 32), nn.ReLU(inplace=True), last)
        else:
            self.rpe_table = self.table(2 * self.q_h - 1, 2 * self.q_w - 1)

    def key_points(self, n, like):
        return (numbers(n, like) + 0.5) / (n - 1) * 2 - 1

    def query_points(self, n, like):
        return numbers(n, like) / (n - 1) * 2 - 1

    def bound(self, offset, reference):
        if self.offset_range_factor >= 0 and not self.no_off:
            step = torch.tensor([1 / (n - 1.0) for n in offset.shape[1:3]], device=offset.device)
            offset = offset.tanh() * step * self.offset_range_factor
        if self.no_off:
            offset = offset.fill_(0.0)
        pos = offset + reference
        return pos.clamp(-1.0, 1.0) if self.offset_range_factor < 0 else pos

    def sample(self, x, pos):
        if self.no_off:
            return F.avg_pool2d(x, self.stride, self.stride).flatten(2).unsqueeze(2)
        return super().sample(x, pos)

    def bias(self, x, pos):
        if self.rpe_table is None or self.dwc_pe:
            return 0.0
        if self.fixed_pe:
            return self.dense_bias(x[0, 0].numel(), pos[0, ..., 0].numel())
        if self.log_cpb:
            z = 4.0 * self.distance(x, pos)
            bias = self.rpe_table(z.sign() * (z.abs() + 1.0).log2() / 3.0)  # [B * G, M, N, h / G]
            return bias.movedim(3, 1).reshape(len(x), self.n_heads, *z.shape[1:3])
        return self.table_bias(x, pos, self.rpe_table.shape[1:])

    def dense_bias(self, queries, keys):
        return self.rpe_table.reshape(1, self.n_heads, queries, keys)


class Detection2023(Attention2023):
    """DAT++ for detection: returns its attention map, and interpolates a dense bias."""

    def __init__(self, *args, stage_i=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.fp16_enabled = False

    def dense_bias(self, queries, keys):
        size = (queries, keys)
        return F.interpolate(self.rpe_table[None], size=size, mode="bilinear", align_corners=True)

    def results(self, y, pos, reference, weights):
        return y, pos, weights


class Segmentation2023(Detection2023):
    """DAT++ for segmentation."""

    def results(self, y, pos, reference, weights):
        return y, None, None


class YoloAttention(Attention2023):
    """The copy that detectors of the YOLO family use: other arguments, y alone."""

    def __init__(
        self, channel, q_size, n_heads=8, n_groups=4, attn_drop=0.0, proj_drop=0.0, stride=1,
        offset_range_factor=4, use_pe=True, dwc_pe=True, no_off=False, fixed_pe=False, ksize=3,
        log_cpb=False, kv_size=None,
    ):  # fmt: skip
        super().__init__(
            q_size, kv_size, n_heads, channel // n_heads, n_groups, attn_drop, proj_drop, stride,
            offset_range_factor, use_pe, dwc_pe, no_off, fixed_pe, ksize, log_cpb,
        )  # fmt: skip

    def bound(self, offset, reference):
        return super().bound(offset, reference).type(reference.dtype)

    def results(self, y, pos, reference, weights):
        return y


# Look-alikes: the same names, arguments, attributes and keys; another formula.


class TanhBound(Attention2023):
    def bound(self, offset, reference):
        return (offset + reference).tanh()


class UnboundedOffset(YoloAttention):
    """A copy that is about, too."""

    def bound(self, offset, reference):
        return offset + reference


class OtherQueryGrid(Attention2023):
    query_points = Attention2022.key_points


class OtherScale(Attention2023):
    def weigh(self, q, k, bias):
        return super().weigh(1.002 * q, k, bias)


class SwappedAxes(Attention2023):
    def sample(self, x, pos):
        return super().sample(x, pos.flip(-1))


class SumsNotSoftmax(Attention2023):
    def weigh(self, q, k, bias):
        scores = torch.einsum("bhdm,bhdn->bhmn", q, k) * self.scale + bias
        return self.attn_drop(scores / scores.shape[-1])


class EarlyDropout(Attention2023):
    """Drops scores, not probabilities: the same without dropout."""

    def weigh(self, q, k, bias):
        scores = torch.einsum("bhdm,bhdn->bhmn", q, k) * self.scale + bias
        return self.attn_drop(scores).softmax(-1)


class HiddenDropout(Attention2023):
    def weigh(self, q, k, bias):
        return F.dropout(super().weigh(q, k, bias), 0.1, self.training)


class DropsInEvaluation(Attention2023):
    """The same as long as the rate is 0."""

    def weigh(self, q, k, bias):
        return F.dropout(super().weigh(q, k, bias), self.attn_drop.p)


class NeverDropsResults(Attention2023):
    def project(self, out):
        return self.proj_out(out)


class DetachedPositions(Attention2023):
    """The same results, other gradients."""

    def bound(self, offset, reference):
        return super().bound(offset.detach(), reference)


class DetachedInTraining(Attention2023):
    def bound(self, offset, reference):
        return super().bound(offset.detach() if self.training else offset, reference)


class Gated(Attention2023):
    """The same until its gate is trained."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.ones(1))

    def results(self, y, pos, reference, weights):
        return y * self.gate, pos, reference


class GatedByBuffer(Attention2023):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("gate", torch.ones(1))

    def results(self, y, pos, reference, weights):
        return y * self.gate, pos, reference


class KeepsItsMap(Attention2023):
    """For callers that read the attention map from an attribute."""

    def results(self, y, pos, reference, weights):
        self.weights = weights.detach()
        return y, pos, reference


class ReturnsMean(Attention2023):
    def results(self, y, pos, reference, weights):
        return y, pos, weights.mean(1)


class ReturnsDict(Attention2023):
    def results(self, y, pos, reference, weights):
        return {"y": y, "pos": pos}


class ReturnsMore(Attention2023):
    """Something else in training than in evaluation."""

    def results(self, y, pos, reference, weights):
        return (y, pos) if self.training else (y, None)


class ReturnsOtherReference(Attention2023):
    def results(self, y, pos, reference, weights):
        return y, pos, reference * 0.99


class TakesMask(Attention2023):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


class OwnLoading(Attention2023):
    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "old_name", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
