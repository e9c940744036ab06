"""RADSeg+'s refinement: where prompts lie, what is kept, odd sizes, bounded memory; and loading SAM's decoder."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from opsin.errors import (
    IncompatibleModel,
    InputError,
    InvalidCheckpoint,
    InvalidConfig,
    InvalidPrompt,
    ModelUnavailable,
)
from opsin.geometry import box_iou, mask_boxes
from opsin.segmentation import sam
from opsin.segmentation.refine import ClassMaps, find_regions, frame, refine
from opsin.segmentation.sam import SamDecoder

SIZES = {
    "features": 24, "dim": 32, "mask_channels": 8, "mlp": 48, "layers": 2, "downsample": 2, "masks": 4, "iou_depth": 3,
    "iou_dim": 32,
}  # fmt: skip


class BoxDecoder:
    """Stands in for SAM: the mask of an object is its box; IoU by the number of the object, 1 unless stated."""

    def __init__(self, iou=(), grow=0.0):
        self.iou, self.grow, self.prompts = iou, grow, []

    def decode(self, embedding, points, boxes, masks=None, *, mask_index=None, batch_size=4, compat=None):
        self.prompts.append((points, boxes, masks, mask_index))
        centres = (torch.arange(256) + 0.5) * 4
        x1, y1, x2, y2 = (boxes + boxes.new_tensor([-1, -1, 1, 1]) * self.grow).float().T[..., None]
        # a signed distance to the edge, as SAM's logits are: linear, so that bilinear enlarging keeps it
        across = torch.minimum(centres - x1, x2 - centres)[:, None, :]
        down = torch.minimum(centres - y1, y2 - centres)[:, :, None]
        iou = torch.tensor([*self.iou, *[1.0] * (len(points) - len(self.iou))])[: len(points)]
        return torch.minimum(across, down), iou


def scene(size, boxes, classes=3, sure=0.8):
    """Class 0 everywhere, class 1, 2, … in boxes ``(x1, y1, x2, y2)``, with probability ``sure``."""
    labels = torch.zeros(size, dtype=torch.int64)
    for number, (x1, y1, x2, y2) in enumerate(boxes, 1):
        labels[y1:y2, x1:x2] = number % classes if classes > 1 else 0
    probabilities = torch.full((classes, *size), (1 - sure) / max(1, classes - 1))
    return labels, probabilities.scatter_(0, labels[None], sure)


@pytest.fixture(scope="module")
def decoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = SamDecoder(**SIZES).eval().requires_grad_(False)
    made.prompt_encoder.shared_embedding.positional_embedding.data /= 64
    return made


@pytest.fixture(scope="module")
def embedding(decoder):
    return decoder.embed(torch.randn(1, 24, 44, 64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("box", [(40, 240, 100, 297), (300, 11, 437, 90), (0, 0, 51, 300), (201, 133, 272, 204)])
def test_a_square_is_prompted_exactly_where_the_frame_shows_it(box):
    labels, probabilities = scene((300, 437), [box])
    for compat, limit in ((None, 0.51), ("published", 30)):
        fed = frame((300, 437), compat=compat)
        shown = F.interpolate((labels == 1)[None, None].double(), fed, mode="bilinear")[0, 0] > 0.5
        where = mask_boxes(shown[None])[0].double()
        found = find_regions(labels, probabilities, fed, compat=compat)
        prompt = found.boxes[found.classes == 1]
        assert prompt.shape == (1, 4)
        error = float((prompt[0] - where).abs().max())
        assert error <= limit, f"{compat}: {error}"
        if compat is None:
            scale = torch.tensor([1024 / 437, 704 / 300] * 2, dtype=torch.float64)
            torch.testing.assert_close(prompt[0], torch.tensor(box, dtype=torch.float64) * scale)
            x, y = found.points[found.classes == 1][0].floor().long().tolist()
            assert shown[y, x]
        elif box[3] > 200:  # the lower the object, the more
            assert error > 10


def test_the_published_rule_is_off_by_its_rounding():
    labels, probabilities = scene((300, 437), [(40, 240, 100, 298)])
    found = find_regions(labels, probabilities, frame((300, 437), compat="published"), compat="published")
    bottom = float(found.boxes[found.classes == 1][0, 3])
    assert 10 < bottom - 298 * 688 / 300 < 17


def test_masks_come_back_to_the_pixels_they_belong_to():
    box = (120, 180, 300, 290)
    labels, probabilities = scene((300, 437), [box])
    overlap = {}
    for compat in (None, "published"):
        found = refine(labels, probabilities, torch.zeros(1), BoxDecoder(iou=(0.0,)), compat=compat)
        assert found.accepted.tolist() == [False, True]
        mask = mask_boxes(((found.labels == 1) & found.refined)[None]).double()
        overlap[compat] = float(box_iou(mask, torch.tensor([box], dtype=torch.float64)))
    assert overlap[None] > 0.99 > 0.93 > overlap["published"]


def test_scores_labels_and_out_agree():
    labels, probabilities = scene((120, 160), [(10, 10, 60, 60), (80, 50, 150, 110)])
    out = torch.full_like(probabilities, torch.nan)
    found = refine(labels, probabilities, torch.zeros(1), BoxDecoder(iou=(0.0,)), out=out)
    assert torch.equal(found.labels, out.argmax(0))
    assert torch.equal(found.scores, out.amax(0))
    assert found.refined.any()
    assert torch.equal(found.scores[~found.refined], torch.full_like(found.scores, 0.8)[~found.refined])
    assert bool((found.scores[found.refined] <= 0.8).all())
    assert bool((found.scores[found.refined] < 0.8).any())
    assert torch.equal(labels, scene((120, 160), [(10, 10, 60, 60), (80, 50, 150, 110)])[0]), "the input is not touched"


def test_a_doubted_region_keeps_its_labels():
    labels, probabilities = scene((120, 160), [(10, 10, 60, 60), (60, 10, 120, 60)])
    grown = {"iou": (0.0, 1.0, 0.0), "grow": 90.0}  # the mask of class 1 reaches into the doubted class 2
    kept = refine(labels, probabilities, torch.zeros(1), BoxDecoder(**grown))
    assert torch.equal(kept.labels, labels)
    assert bool((kept.refined == (labels == 1)).all())
    lost = refine(labels, probabilities, torch.zeros(1), BoxDecoder(**grown), compat="published")
    assert bool((lost.labels[labels == 2] == 1).any())


@pytest.mark.parametrize("compat", [None, "published"])
def test_nothing_accepted_leaves_everything_as_it_was(compat):
    labels, probabilities = scene((100, 90), [(10, 10, 60, 60)])
    out = torch.empty_like(probabilities)
    found = refine(labels, probabilities, torch.zeros(1), BoxDecoder(iou=(0.9, 0.1)), compat=compat, out=out)
    assert found.accepted.tolist() == [False, False], "0.9 is not above 0.9"
    assert torch.equal(found.labels, labels)
    assert torch.equal(out, probabilities)
    assert not found.refined.any()
    assert bool((found.scores == 0.8).all())


@pytest.mark.parametrize("compat", [None, "published"])
@pytest.mark.parametrize("min_area", [10**6, 225])
def test_no_region(compat, min_area):
    labels, probabilities = scene((100, 90), [(10, 10, 60, 60)])
    if min_area == 225:
        labels = torch.full_like(labels, -1)  # every class absent
    found = refine(labels, probabilities, torch.zeros(1), BoxDecoder(), compat=compat, min_area=min_area)
    assert len(found.regions) == 0
    assert found.iou.shape == (0,)
    assert found.regions.boxes.shape == (0, 4)
    assert torch.equal(found.labels, labels)
    assert not found.refined.any()
    assert bool((found.scores == (0.8 if min_area > 225 else 0)).all())


def test_unknown_pixels_stay_unknown():
    labels, probabilities = scene((120, 160), [(10, 10, 70, 70)])
    labels[30:50, 30:50] = -1
    labels[:, 150:] = -1
    found = refine(labels, probabilities, torch.zeros(1), BoxDecoder())
    assert torch.equal(found.labels == -1, labels == -1)
    assert not found.refined[labels == -1].any()
    assert bool((found.scores[labels == -1] == 0).all())


def test_pixels_below_the_threshold_belong_to_no_region():
    labels, probabilities = scene((120, 160), [(10, 10, 70, 70)], sure=0.4)
    assert find_regions(labels, probabilities, (768, 1024)).classes.tolist() == [0, 1]
    assert len(find_regions(labels, probabilities, (768, 1024), coarse_threshold=0.45)) == 0
    assert len(find_regions(labels, probabilities, (768, 1024), coarse_threshold=0.0)) == 2


def test_regions_touch_at_corners_and_small_ones_are_left_out():
    labels, probabilities = scene((100, 100), [])
    labels[10:40, 10:40] = labels[40:70, 40:70] = 1  # one region, by its corners
    labels[80:99, 80:99] = 1  # 361 pixels
    probabilities.fill_(0.2).scatter_(0, labels[None], 0.8)
    found = find_regions(labels, probabilities, (1024, 1024))
    assert found.areas[found.classes == 1].tolist() == [1800]
    assert find_regions(labels, probabilities, (1024, 1024), min_area=90).areas.tolist()[1:] == [1800, 361]


def test_the_point_is_the_middle_of_the_most_probable_pixels():
    labels, probabilities = scene((100, 100), [(20, 20, 80, 80)])
    probabilities[1, 40:61, 60:71] = 0.95
    found = find_regions(labels, probabilities, (1024, 1024))
    x, y = (found.points[1] / 10.24).tolist()
    assert abs(x - 65.5) < 1e-6
    assert 40 <= y <= 61
    noisy = probabilities + 1e-6 * torch.rand(probabilities.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.points, find_regions(labels, noisy, (1024, 1024)).points), "rounding does not move it"


@pytest.mark.parametrize("compat", [None, "published"])
@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1), (5, 2000), (2, 3), (300, 437)])
@pytest.mark.parametrize("classes", [1, 3])
def test_odd_sizes(size, classes, compat, decoder, embedding):
    labels, probabilities = scene(size, [(0, 0, size[1] // 2, size[0])], classes, sure=1.0 if classes == 1 else 0.8)
    found = refine(labels, probabilities, embedding, decoder, min_area=0, iou=-1e9, compat=compat)
    assert found.labels.shape == size
    assert found.accepted.all()
    assert len(found.regions) >= 1
    assert bool(((found.labels >= 0) & (found.labels < classes)).all())
    assert bool(torch.isfinite(found.scores).all())
    fed = frame(size, compat=compat)
    assert max(fed) == 1024
    assert min(fed) >= 16
    assert fed[0] % 16 == fed[1] % 16 == 0


def test_many_classes_in_little_memory_equal_all_maps_at_once(decoder, embedding):
    generator = torch.Generator().manual_seed(3)
    grid = (torch.randn(150, 12, 16, generator=generator) * 3).softmax(0)
    maps = ClassMaps(grid, (192, 256))
    full = torch.stack([maps[i] for i in range(150)])
    labels = full.argmax(0)
    labels[:20, :20] = -1
    for compat in (None, "published"):
        options = {"min_area": 80, "iou": 0.0, "compat": compat}
        one, two = (refine(labels, p, embedding, decoder, **options) for p in (maps, full))
        assert len(one.regions) > 5
        assert torch.equal(one.labels, two.labels)
        assert torch.equal(one.scores, two.scores)


def test_batches_do_not_change_the_answer(decoder, embedding):
    boxes = [(10, 10, 60, 60), (80, 50, 150, 110), (10, 70, 70, 118)]
    labels, probabilities = scene((120, 160), boxes, classes=4)
    alone, together = (
        refine(labels, probabilities, embedding, decoder, iou=-1e9, batch_size=size) for size in (1, 16)
    )
    torch.testing.assert_close(alone.iou, together.iou, atol=1e-5, rtol=1e-5)
    assert (alone.labels != together.labels).float().mean() < 1e-3


def test_bad_input(decoder, embedding):
    labels, probabilities = scene((20, 30), [])
    for bad in (
        {"labels": labels[:-1]}, {"labels": labels.float()}, {"labels": labels - 2}, {"labels": labels + 3},
        {"probabilities": probabilities[:0]}, {"probabilities": probabilities.half()}, {"out": probabilities[:2]},
    ):  # fmt: skip
        with pytest.raises(InputError):
            refine(**{"labels": labels, "probabilities": probabilities, **bad}, embedding=embedding, decoder=decoder)
    with pytest.raises(InvalidConfig):
        refine(labels, probabilities, embedding, decoder, compat="other")
    with pytest.raises(InputError):
        frame((0, 5))
    with pytest.raises(IncompatibleModel):
        decoder.embed(torch.zeros(1, 24, 65, 64))
    with pytest.raises(IncompatibleModel):
        decoder.embed(torch.zeros(1, 25, 64, 64))
    with pytest.raises(InvalidPrompt):
        decoder.decode(embedding, torch.zeros(2, 2), torch.zeros(3, 4))
    with pytest.raises(InvalidPrompt):
        decoder.decode(embedding, torch.zeros(2, 2), torch.zeros(2, 4), torch.zeros(1, 1, 256, 256))


PUBLISHED = {
    r"neck\.conv1": "image_encoder.neck.0", r"neck\.layer_norm1": "image_encoder.neck.1",
    r"neck\.conv2": "image_encoder.neck.2", r"neck\.layer_norm2": "image_encoder.neck.3",
    r"shared_embedding\.positional_embedding": "pe_layer.positional_encoding_gaussian_matrix",
    r"\.point_embed\.": ".point_embeddings.", r"mask_embed\.conv1": "mask_downscaling.0",
    r"mask_embed\.layer_norm1": "mask_downscaling.1", r"mask_embed\.conv2": "mask_downscaling.3",
    r"mask_embed\.layer_norm2": "mask_downscaling.4", r"mask_embed\.conv3": "mask_downscaling.6",
    r"upscale_conv1": "output_upscaling.0", r"upscale_layer_norm": "output_upscaling.1",
    r"upscale_conv2": "output_upscaling.3", r"\.layer_norm": ".norm", r"(mlps\.\d|head)\.layers\.0\.": r"\1.layers.1.",
    r"\.proj_in\.": ".layers.0.", r"(mlps\.\d|head)\.proj_out\.": r"\1.layers.2.",
}  # fmt: skip


def published_names(state):
    """The tensors of a `SamDecoder` under the names of segment-anything."""
    renamed = {}
    for name, value in state.items():
        for ours, theirs in PUBLISHED.items():
            name = re.sub(ours, theirs, name)
        renamed[name] = value
    return renamed


@pytest.fixture(scope="module")
def whole_model():
    """A SAM of `transformers`, with its trunk."""
    from transformers import SamConfig, SamModel

    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            "hidden_size": 24, "output_channels": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 24,
            "num_pos_feats": 16, "global_attn_indexes": [0],
        },
        prompt_encoder_config={"hidden_size": 32, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 48, "iou_head_hidden_dim": 32, "num_attention_heads": 8},
    )  # fmt: skip
    model = SamModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.shared_image_embedding.positional_embedding.normal_()
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(model.shared_image_embedding.positional_embedding)
    return model


def ask(decoder, embedding):
    points, boxes = torch.tensor([[300.5, 200.5]]), torch.tensor([[100.5, 50.5, 700.5, 600.5]])
    with torch.no_grad():
        return decoder.decode(embedding, points, boxes)


def test_loading_reads_only_the_decoder_and_agrees_with_transformers(tmp_path, whole_model):
    whole_model.save_pretrained(tmp_path)
    made = sam.load(f"dir:{tmp_path}", device="cpu")
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in whole_model.parameters()) / 2
    features = torch.randn(1, 24, 64, 64, generator=torch.Generator().manual_seed(0))
    embedding = made.embed(features)
    with torch.no_grad():
        torch.testing.assert_close(embedding, whole_model.vision_encoder.neck(features.permute(0, 2, 3, 1)))
        wanted = whole_model(
            image_embeddings=embedding, input_points=torch.tensor([[[[300.0, 200.0]]]]),
            input_boxes=torch.tensor([[[100.0, 50.0, 700.0, 600.0]]]), multimask_output=False,
        )  # fmt: skip
    logits, iou = ask(made, embedding)
    torch.testing.assert_close(logits, wanted.pred_masks[0, :, 0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(iou, wanted.iou_scores[0, :, 0], atol=1e-3, rtol=1e-3)


def test_the_published_file_gives_the_same_decoder(tmp_path, decoder, embedding):
    state = published_names(decoder.state_dict())
    assert "mask_decoder.iou_prediction_head.layers.2.weight" in state
    torch.save({**state, "image_encoder.pos_embed": torch.zeros(3)}, tmp_path / "sam_vit_h.pth")
    made = sam.load(tmp_path / "sam_vit_h.pth", device="cpu")
    for key, value in decoder.state_dict().items():
        assert torch.equal(made.state_dict()[key], value), key
    assert all(torch.equal(a, b) for a, b in zip(ask(made, embedding), ask(decoder, embedding), strict=True))


def test_what_is_not_a_sam(tmp_path, decoder):
    state = published_names(decoder.state_dict())
    with pytest.raises(InvalidCheckpoint, match="mask_tokens"):
        SamDecoder.from_state_dict({k: v for k, v in state.items() if "mask_tokens" not in k})
    with pytest.raises(InvalidCheckpoint, match="not_a_point"):
        SamDecoder.from_state_dict({k: v for k, v in state.items() if "not_a_point" not in k})
    with pytest.raises(InvalidCheckpoint, match="no_mask_embed"):
        SamDecoder.from_state_dict({**state, "prompt_encoder.no_mask_embed.weight": torch.zeros(1, 7)})
    with pytest.raises(InvalidCheckpoint):
        SamDecoder.from_state_dict({"weight": torch.zeros(3)})
    (tmp_path / "sam.pth").write_bytes(b"<html>")
    with pytest.raises(InvalidCheckpoint):
        sam.load(tmp_path / "sam.pth")
    with pytest.raises(ModelUnavailable, match="sam-vit-huge"):
        sam.load()


def test_half_precision_does_not_move_prompts(decoder, embedding):
    low = SamDecoder.from_state_dict(decoder.state_dict()).to(torch.bfloat16)
    assert low.prompt_encoder.shared_embedding.positional_embedding.dtype == torch.float32
    torch.testing.assert_close(low._image_positions(), decoder._image_positions())
    logits, _ = ask(low, embedding)
    assert logits.dtype == torch.bfloat16
    exact, _ = ask(decoder, embedding)
    assert float((logits.float() - exact).abs().mean()) < 0.05 * float(exact.abs().mean())
    double = SamDecoder.from_state_dict(decoder.state_dict()).double()
    assert ask(double, embedding.double())[0].dtype == torch.float64


def test_nothing_is_bound_to_a_device(decoder):
    meta = SamDecoder.from_state_dict(decoder.state_dict()).to("meta")
    embedding = meta.embed(torch.zeros(2, 24, 64, 64, device="meta"))
    logits, iou = meta.decode(
        embedding[:1], torch.zeros(3, 2), torch.zeros(3, 4), torch.zeros(3, 1, 256, 256, device="meta"), batch_size=2
    )
    assert logits.device.type == iou.device.type == "meta"
    assert logits.shape == (3, 256, 256)
    assert embedding.shape == (2, 32, 64, 64)


@pytest.mark.slow
def test_sixty_regions_of_a_large_image_stay_below_one_gigabyte():
    """With a decoder of full size, and 150 classes."""
    program = """
import resource, torch
from opsin.segmentation.prediction import decide
from opsin.segmentation.refine import ClassMaps, refine
from opsin.segmentation.sam import SamDecoder
decoder = SamDecoder(features=1280, dim=256, mask_channels=16, mlp=2048, layers=2, downsample=2, masks=4, iou_depth=3,
                     iou_dim=256).eval()
generator = torch.Generator().manual_seed(0)
grid = torch.randn(150, 64, 128, generator=generator) * 0.1
for k in range(60):
    row, column = divmod(k, 10)
    grid[k % 50, 2 + row * 10:9 + row * 10, 2 + column * 12:11 + column * 12] += 8
grid[149] += 4
grid = grid.softmax(0)
found = decide(grid, (1024, 2048))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
embedding = torch.randn(1, 256, 64, 64, generator=generator)
done = refine(found.labels, ClassMaps(grid, (1024, 2048)), embedding, decoder, iou=-1e9)
print(len(done.regions), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) >= 60
    assert int(out[1]) < 1024 * 1024, "KiB above what was there before"
