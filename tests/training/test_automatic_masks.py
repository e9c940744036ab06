"""The SAM 2 mask generator on a tiny random model, and the source that caches its masks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.errors import InvalidDataset
from opsin.masks.store import MaskStore
from opsin.training import automatic_masks as am
from opsin.training.config import RegionTrainingConfig
from tests.training.conftest import blocks, paint

SIDE = 64


class Painter(torch.nn.Module):
    """Answers every point with three masks: the band below it, the band shifted by one pixel, and a wavering one."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.device, self.dtype = self.weight.device, self.weight.dtype
        self.prompt_encoder = SimpleNamespace(input_image_size=SIDE)
        self.batches = []

    def get_image_embeddings(self, pixels):
        assert pixels.shape == (1, 3, SIDE, SIDE)
        return [pixels]

    def forward(self, input_points, input_labels, image_embeddings, multimask_output):
        self.batches.append(input_points.shape[1])
        x = torch.arange(SIDE).float()
        columns = (input_points[0, :, 0, :1] // 16) * 16
        band = torch.where((x >= columns) & (x < columns + 16), 8.0, -8.0)
        shifted = band.roll(1, -1)
        shifted[:, 0] = -8.0
        faint = band / 16  # |logit| below the offset: unstable
        low = torch.stack([band, shifted, faint], 1)[:, :, None].expand(-1, -1, SIDE, -1)
        scores = torch.tensor([0.95, 0.9, 0.99]).expand(len(columns), 3)
        return SimpleNamespace(iou_scores=scores[None], pred_masks=low[None])


def test_filters_and_suppression():
    painter = Painter()
    found = am.AutomaticMasks(painter, am.MaskSettings(8, 20)).generate(torch.rand(3, 40, 50))
    # 64 points in batches of 20 ask for 4 bands: doubles, shifted copies and unstable masks go.
    assert painter.batches == [20, 20, 20, 4]
    bands = found[:, 0].int()
    assert sorted(b.nonzero()[0].item() for b in bands) == [0, 16, 32, 48]
    assert (found.sum((1, 2)) == 16 * SIDE).all()
    strict = am.MaskSettings(8, 20, min_iou=0.995)
    assert am.AutomaticMasks(painter, strict).generate(torch.rand(3, 40, 50)).shape == (0, SIDE, SIDE)


def test_stability_is_the_iou_of_two_cuts():
    logits = torch.tensor([[[3.0, 0.5, -0.5, -3.0]], [[3.0, 3.0, -3.0, -3.0]], [[-3.0] * 4]])
    assert am.stability(logits, 1.0).tolist() == [pytest.approx(1 / 3), 1.0, 0.0]


@pytest.fixture(scope="module")
def tiny_sam():
    import transformers as t

    hiera = t.Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[128, 128],
        blocks_per_stage=[1, 2, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 4],
        window_size_per_stage=[4, 2, 4, 2],
        global_attention_blocks=[4],
    )
    vision = t.Sam2VisionConfig(
        backbone_config=hiera, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=32,
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
    )
    prompt = t.Sam2PromptEncoderConfig(hidden_size=32, image_size=128, patch_size=16)
    decoder = t.Sam2MaskDecoderConfig(hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32)
    torch.manual_seed(0)
    joint = t.Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    return t.Sam2Model(joint).eval()


def test_a_real_sam2_of_tiny_size(tiny_sam):
    settings = am.MaskSettings(4, 6, min_iou=-1e9, min_stability=0.0, nms_threshold=1.0)
    image = torch.rand(3, 50, 70)
    found = am.AutomaticMasks(tiny_sam, settings).generate(image)
    assert found.dtype == torch.bool
    assert found.shape[1:] == (128, 128)
    assert 0 < len(found) <= 4 * 4 * 3
    # One point at a time gives the same masks: batching changes nothing.
    single = am.MaskSettings(4, 1, min_iou=-1e9, min_stability=0.0, nms_threshold=1.0)
    assert torch.equal(am.AutomaticMasks(tiny_sam, single).generate(image), found)


def photographs(folder, count=3):
    folder.mkdir()
    for number in range(count):
        paint(blocks(number)).save(folder / f"{number}.jpg")
    (folder / "broken.jpg").write_bytes(b"no")
    return folder


def test_masks_are_made_once_and_go_on_after_an_interruption(tmp_path):
    frames = am.photographs(photographs(tmp_path / "p"))
    store = MaskStore(tmp_path / "s.masks", {})
    seen = []

    class Generator:
        def generate(self, image):
            seen.append(1)
            if len(seen) == 2:
                raise KeyboardInterrupt
            return torch.ones(1, 8, 8, dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        am.fill(frames, store, Generator)
    assert len(MaskStore(store.path, {})) == 1
    failed = am.fill(frames, MaskStore(store.path, {}), Generator)
    assert list(failed) == ["broken.jpg"]
    assert len(seen) == 4  # the interrupted one again, none of the finished
    again = MaskStore(store.path, {})
    assert am.fill([f for f in frames if f.name != "broken.jpg"], again, lambda: pytest.fail("nothing to do")) == {}


def test_the_source_of_a_folder(tmp_path, tiny_sam):
    tiny_sam.save_pretrained(tmp_path / "sam")
    root = photographs(tmp_path / "p", 2)
    config = RegionTrainingConfig(
        backbone="b",
        out="o",
        train=(f"sam2:{root}",),
        sam2_model=f"dir:{tmp_path / 'sam'}",
        mask_cache=str(tmp_path / "cache"),
        device="cpu",
    )
    # A random model passes no filter: every photograph is then without masks, which is said, not trained on.
    with pytest.raises(InvalidDataset, match="no masks"):
        am.open_cached(config.train[0], config)
    (file,) = (tmp_path / "cache").iterdir()
    assert len(MaskStore(file)) == 2


def test_the_source_of_a_folder_of_videos(tmp_path, monkeypatch):
    from opsin.video import ClipWriter

    (tmp_path / "v").mkdir()
    with ClipWriter(tmp_path / "v/a.mp4", 10, (48, 64)) as writer:
        for number in range(20):
            writer.write(torch.from_numpy(np.array(paint(blocks(number)))).permute(2, 0, 1))
    (tmp_path / "v/b.mp4").write_bytes(b"no")
    Image.new("RGB", (9, 9)).save(tmp_path / "v/c.png")
    painted = lambda *a, **k: am.AutomaticMasks(Painter(), am.MaskSettings(4, 16))  # noqa: E731
    monkeypatch.setattr(am.AutomaticMasks, "from_pretrained", painted)
    train, cache = (f"video:{tmp_path / 'v'}",), str(tmp_path / "cache")
    config = RegionTrainingConfig(backbone="b", out="o", train=train, video_interval=1.0, mask_cache=cache)
    source = am.open_cached(config.train[0], config)
    assert [source.label(i) for i in range(2)] == ["a.mp4#0", "a.mp4#10"]
    assert len(source) <= 3
    sample = source.read(1, 32, np.random.default_rng(0), np.random.default_rng(0))
    assert sample.image.shape == (3, 32, 32)
    assert len(sample.regions) == 4
