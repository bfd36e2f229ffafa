"""Where a picture shows keys, and the attention that its circles stand for."""

import pytest
import torch
from near import assert_near
from torch import nn

import dat_cuda
from dat_cuda import DAttention
from dat_cuda.models import DAT

pytest.importorskip("PIL")
from PIL import Image  # noqa: E402

from dat_cuda import picture, visualize  # noqa: E402

ENCODINGS = {
    "table": {"use_pe": True},
    "none": {"use_pe": False},
    "fixed": {"use_pe": True, "fixed_pe": True},
    "depthwise": {"use_pe": True, "dwc_pe": True},
    "log": {"use_pe": True, "log_cpb": True},
    "no offsets": {"use_pe": True, "no_off": True},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("version", ["dat", "dat++"])
def test_weights_are_those_of_the_layer(encoding, version):
    if encoding == "log" and version == "dat":
        pytest.skip("version 'dat' has no log_cpb")
    options = {"dwc_pe": False, "no_off": False, "fixed_pe": False, **ENCODINGS[encoding]}
    layer = DAttention(
        (8, 6), (4, 3), 4, 3, 2, attn_drop=0.0, proj_drop=0.0, stride=2,
        offset_range_factor=2.0, ksize=3, version=version, **options,
    ).double()  # fmt: skip
    for key, parameter in layer.named_parameters():
        if key.startswith("rpe_table"):
            nn.init.normal_(parameter)
    x = torch.randn(2, 12, 8, 6, dtype=torch.double)
    queries = torch.tensor([0, 7, 47, 23])
    weights = visualize.attention_weights(layer, x, queries)
    assert_near("sum", weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-12)
    before = []
    layer.proj_out.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    with dat_cuda.backend("reference"):
        layer(x)
    sampled, _, _ = layer._keys(x, layer._offsets(layer.proj_q(x))[0])
    v = layer.proj_v(sampled.unsqueeze(2)).flatten(2).unflatten(1, (4, 3))
    out = torch.einsum("bhmn,bhcn->bhcm", weights, v).flatten(1, 2)
    if encoding == "depthwise":
        out = out + layer.rpe_table(layer.proj_q(x)).flatten(2)[..., queries]
    assert_near("output", out, before[0].flatten(2)[..., queries], 1e-12)


class OneLayer(nn.Module):
    """A stem of stride 4 and a deformable attention whose keys are where one says."""

    def __init__(self, pos):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.attention = DAttention(
            (16, 12), (2, 2), 2, 2, 1, attn_drop=0.0, proj_drop=0.0, stride=8,
            offset_range_factor=-1.0, use_pe=False, dwc_pe=False, no_off=False, fixed_pe=False,
            ksize=9,
        )  # fmt: skip
        keys = self.attention._keys
        self.attention._keys = lambda x, o: (keys(x, o)[0], pos, keys(x, o)[2])

    def forward(self, x):
        return self.attention(self.stem(x))


def test_keys_are_drawn_where_they_are(monkeypatch):
    """Pixel (row, column) of a map of stride 4 covers pixels from 4 row to 4 row + 4."""
    cells = torch.tensor([[0.0, 0.0], [0.0, 11.0], [15.0, 0.0], [7.5, 5.5]])
    pos = (cells / torch.tensor([15.0, 11.0]) * 2 - 1).view(1, 1, 2, 2, 2)
    panels = []
    draw = picture.draw
    monkeypatch.setattr(picture, "draw", lambda *a: panels.extend(a[1]) or draw(*a))
    image = Image.new("RGB", (48, 64), (200, 100, 50))
    model = OneLayer(pos).train()
    sheet = visualize.plot_keys(model, image, queries=[(63.0, 1.0)], top=3)
    assert model.training and model.attention.training and not model.attention._forward_hooks
    assert sheet.width > 600
    groups, query = panels
    expected = [[2, 2], [2, 46], [62, 2], [32, 24]]
    torch.testing.assert_close(torch.tensor(groups.pos), torch.tensor(expected).float())
    assert query.query == (63.0, 1.0) and len(query.attended) == 3
    shares = [share for _, share in query.attended]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 1
    x = model.eval().stem(visualize.normalized(image))
    weights = visualize.attention_weights(model.attention, x, torch.tensor([15 * 12])).mean(1)
    assert shares == pytest.approx(weights.flatten().topk(3).values.tolist())


def test_dots_and_circles_are_in_the_picture():
    image = Image.new("RGB", (100, 50), (90, 90, 90))
    panel = picture.Panel("a", reference=[(10, 20)], pos=[(25, 50)])
    other = picture.Panel("b", attended=[((10, 20), 0.8), ((40, 80), 0.2)], query=(25, 50))
    drawn = [picture._panel(image, p, 600, 300) for p in (panel, other)]

    def pixel(sheet, y, x):
        inner = 600 / picture.ROOM, 300 / picture.ROOM
        corner = (600 - inner[0]) / 2, (300 - inner[1]) / 2
        return sheet.getpixel((corner[0] + x / 100 * inner[0], corner[1] + y / 50 * inner[1]))

    plain = pixel(drawn[0], 45, 10)
    assert pixel(drawn[0], 25, 50) == picture._hue((10, 20), (50, 100))
    assert pixel(drawn[1], 25, 50) == picture.WHITE
    amber = pixel(drawn[1], 10, 20), pixel(drawn[1], 40, 80)
    assert all(red > plain[0] + 40 and blue < plain[2] for red, _, blue in amber)
    # The circle of four times the attention has twice the radius.
    counts = []
    for left, right in ((0, 300), (300, 600)):
        part = drawn[1].crop((left, 0, right, 300)).get_flattened_data()
        counts.append(sum(red > green + 25 for red, green, _ in part))
    assert counts[0] / counts[1] == pytest.approx(4, rel=0.35)


def test_plot_of_a_whole_model(tmp_path):
    config = {
        "dim_stem": 8, "dims": (8, 16, 32, 64), "heads": (1, 2, 4, 8), "groups": (1, 1, 2, 4),
        "depths": (1, 1, 2, 1), "stage_spec": ("N", "D", "ND", "D"), "strides": (8, 4, 2, 1),
        "offset_range_factor": (-1,) * 4, "use_pes": (True,) * 4, "num_classes": 3,
    }  # fmt: skip
    model = DAT(**config).half().float()
    out = tmp_path / "keys.png"
    x = torch.randn(3, 70, 90)
    with pytest.raises(ValueError, match="queries must be"):
        visualize.plot_keys(model, x, queries=[(71.0, 5.0)])
    with pytest.raises(ValueError, match="stages must be below 3"):
        visualize.plot_keys(model, x, stages=[3])
    with pytest.raises(ValueError, match="must hold a dat_cuda.DAttention"):
        visualize.plot_keys(nn.Conv2d(3, 3, 1), x)
    with pytest.raises(ValueError, match="image must be"):
        visualize.plot_keys(model, torch.zeros(2, 3, 8, 8))
    visualize.plot_keys(model, x, queries=[(35.0, 89.0)], out=out)
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
    only = visualize.plot_keys(model, x, stages=[1])
    assert only.width < sheet.width
