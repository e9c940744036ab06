"""Every maker of masks and every tracker keeps the same promises; SAM 2 is what ``transformers`` computes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from opsin.cards import catalogue
from opsin.errors import InvalidCheckpoint, InvalidConfig, InvalidImage, InvalidPrompt, MissingFile, ModelUnavailable
from opsin.geometry import ImageTransform, box_iou, mask_boxes
from opsin.tracking import sam2, sam2_video
from opsin.tracking.base import ObjectMasks, Step, Tracker
from opsin.tracking.descriptors import DenseTokens
from opsin.tracking.masks import largest_component
from opsin.tracking.matching import Example, Template, TokenSpace
from opsin.tracking.sam2 import Sam2Masks, is_available
from opsin.tracking.sam2_video import Sam2Tracker
from opsin.tracking.template import TemplateTracker, TokenMasks
from opsin.video import VideoReader, open_video
from tests.conformance import sam2_tiny
from tests.conformance.sam2_tiny import SIDE

SIZE = (48, 64)
COUNT, SEED = 40, 20  # frames of the film, and the one that tracks start from


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def colours(pictures: Any) -> list[DenseTokens]:
    """Stands for a model: the mean colour of each 4×4 cell, and its complement."""
    found = []
    for picture in pictures:
        pixels = picture.float() / (255 if picture.dtype == torch.uint8 else 1)
        cells = F.adaptive_avg_pool2d(pixels, (pixels.shape[1] // 4, pixels.shape[2] // 4))
        size = (int(pixels.shape[1]), int(pixels.shape[2]))
        found.append(DenseTokens(F.normalize(torch.cat([cells, 1 - cells]), dim=0), ImageTransform(size, size)))
    return found


def box_at(i: int) -> Tensor:
    return torch.tensor([4.0 + i, 8 + i // 2, 16 + i, 20 + i // 2])


def film() -> list[Tensor]:
    """A red square with a green stripe on a still ground of grey and blue."""
    ground = 0.3 + 0.3 * F.interpolate(noise(1, 3, 6, 8, seed=1), SIZE, mode="bilinear")[0]
    frames = []
    for i in range(COUNT):
        frame = ground.clone()
        x1, y1, x2, y2 = box_at(i).int().tolist()
        frame[:, y1:y2, x1:x2] = torch.tensor([0.9, 0.05, 0.05])[:, None, None]
        frame[:, y1 + 4 : y1 + 8, x1:x2] = torch.tensor([0.1, 0.9, 0.1])[:, None, None]
        frames.append((frame * 255).byte())
    return frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sam2_tiny.save(tmp_path_factory.mktemp("sam2"))


@pytest.fixture(scope="module")
def frames() -> list[Tensor]:
    return film()


@pytest.fixture(scope="module")
def reader(frames: list[Tensor]) -> VideoReader:
    return open_video(frames, fps=10)


@pytest.fixture(scope="module")
def template(frames: list[Tensor]) -> Template:
    dense = colours([frames[SEED]])
    background = colours(frames[::8])
    return Template.fit(TokenSpace.fit([*background, *dense]), [Example(dense[0], box_at(SEED))], background)


@pytest.fixture(scope="module")
def makers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], ObjectMasks]]:
    still = sam2_tiny.save(tmp_path_factory.mktemp("still"), "Sam2")
    return {
        "sam2": lambda: Sam2Masks.from_pretrained(still, device="cpu"),
        "sam2 of video": lambda: Sam2Masks.from_pretrained(f"dir:{folder}", device="cpu"),
        "sam2 in bfloat16": lambda: Sam2Masks.from_pretrained(folder, device="cpu", dtype="bfloat16"),
        "of a tracker": lambda: Sam2Tracker.from_pretrained(folder, device="cpu").masks,
        "tokens": lambda: TokenMasks(colours),
    }


MAKERS = ("sam2", "sam2 of video", "sam2 in bfloat16", "of a tracker", "tokens")


# ---- masks


@pytest.mark.parametrize("name", MAKERS)
def test_every_maker_of_masks(makers: dict[str, Callable[[], ObjectMasks]], name: str, frames: list[Tensor]) -> None:
    maker = makers[name]()
    assert isinstance(maker, ObjectMasks)
    assert maker.name
    pictures = [frames[0], noise(3, 40, 40), frames[5].float() / 255, noise(3, 33, 50, seed=3), noise(3, 40, 72)]
    boxes = [box_at(0)[None], torch.tensor([[2, 3, 30, 20], [-9, -9, 99, 99], [30.2, 30.2, 31.4, 33]]),
             torch.zeros(0, 4), torch.tensor([[0.0, 0, 50, 33]]), torch.tensor([[5, 5, 20, 21]])]  # fmt: skip
    found = maker.from_boxes(pictures, boxes)
    assert [tuple(m.shape) for m in found] == [(len(b), *p.shape[1:]) for p, b in zip(pictures, boxes, strict=True)]
    points = [torch.cat([b[:, :2].clamp(min=0), b[:, :2].clamp(min=0) + 1.5]) for b in boxes]
    several = maker.from_points(pictures, points)
    assert len({m.shape[1] for m in several}) == 1
    assert several[0].shape[1] >= 3
    for picture, asked, masks in zip(pictures, points, several, strict=True):
        assert masks.shape[0] == len(asked)
        assert masks.shape[2:] == picture.shape[1:]
    for mask in [m for masks in [*found, *(s.flatten(0, 1) for s in several)] for m in masks]:
        assert mask.dtype == torch.bool
        assert mask.device.type == "cpu"
        assert ndimage.label(mask.numpy(), np.ones((3, 3)))[1] <= 1
    alone = [maker.from_boxes([p], [b])[0] for p, b in zip(pictures, boxes, strict=True)]
    if name != "sam2 in bfloat16":  # whose sums depend on the size of the batch
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    assert maker.from_boxes([], []) == []


@pytest.mark.parametrize("name", ["sam2", "tokens"])
def test_bad_prompts(makers: dict[str, Callable[[], ObjectMasks]], name: str) -> None:
    maker, picture = makers[name](), noise(3, 20, 30)
    for box in ([5.0, 5, 5, 9], [40, 5, 50, 9], [math.nan, 0, 5, 5], [9, 9, 3, 3]):
        with pytest.raises(InvalidPrompt):
            maker.from_boxes([picture], [torch.tensor([box])])
    for point in ([-1.0, 3], [31, 3], [math.inf, 3]):
        with pytest.raises(InvalidPrompt):
            maker.from_points([picture], [torch.tensor([point])])
    with pytest.raises(InvalidPrompt, match="2 pictures, 1 prompts"):
        maker.from_boxes([picture, picture], [torch.tensor([[1.0, 1, 5, 5]])])
    with pytest.raises(InvalidImage):
        maker.from_points([picture[0]], [torch.tensor([[1.0, 1]])])


def test_sam_is_that_of_transformers(folder: Path) -> None:
    """Against a whole forward pass of the image model: box or point, smoothing, finishing."""
    import transformers

    reference = transformers.Sam2Model.from_pretrained(folder).eval()
    masks = Sam2Masks.from_pretrained(folder, device="cpu")
    picture, boxes = (noise(3, 40, 56) * 255).byte(), torch.tensor([[8.0, 6, 30, 33], [20, 10, 50, 40]])

    def expected(array: np.ndarray, **prompt: Any) -> Tensor:
        pixels = F.interpolate(torch.tensor(array)[None], (SIDE, SIDE), mode="bilinear", antialias=True)
        pixels = (pixels - torch.tensor(sam2.MEAN)[:, None, None]) / torch.tensor(sam2.STD)[:, None, None]
        with torch.no_grad():
            logits = reference(pixel_values=pixels, **prompt).pred_masks[0]
        full = F.interpolate(logits, (40, 56), mode="bilinear") > 0
        return torch.stack([torch.stack([largest_component(m) for m in some]) for some in full])

    scale = torch.tensor([SIDE / 56, SIDE / 40])
    plain = (picture.float() / 255).numpy()
    kernel = np.array([1, 2, 1]) / 4
    smooth = ndimage.convolve1d(ndimage.convolve1d(plain, kernel, 1, mode="mirror"), kernel, 2, mode="mirror")
    asked = (boxes * scale.repeat(2) - 0.5)[None]
    want = expected(smooth, input_boxes=asked, multimask_output=False)
    assert 0 < want.float().mean() < 1
    assert torch.equal(masks.from_boxes([picture], [boxes])[0], want[:, 0])
    points = torch.tensor([[12.5, 9.5], [33, 20]])
    want = expected(plain, input_points=((points * scale - 0.5)[None, :, None]), multimask_output=True)
    assert torch.equal(masks.from_points([picture], [points])[0], want)
    decoder = masks.model.mask_decoder
    assert (decoder.dynamic_multimask_stability_delta, decoder.dynamic_multimask_stability_thresh) == (0.05, 0.98)


def test_a_picture_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = Sam2Masks.from_pretrained(folder, device="cpu")
    sizes: list[int] = []
    encode = masks.model.get_image_embeddings
    monkeypatch.setattr(masks.model, "get_image_embeddings", lambda p: (sizes.append(len(p)), encode(p))[1])
    picture, box = noise(3, 30, 30), torch.tensor([[3.0, 3, 20, 20]])
    first = masks.from_boxes([picture, picture], [box, box])
    assert torch.equal(first[0], first[1])
    masks.from_boxes([picture.clone()], [box + 1])
    assert sizes == [1], "known by its content"
    masks.from_points([picture], [box[:, :2]])
    assert sizes == [1, 1], "points ask for the picture as it is"
    picture[:, 5] = 0
    masks.from_boxes([picture], [box])
    assert sizes == [1, 1, 1], "changed in place"
    others = [noise(3, 30, 30, seed=s) for s in range(1, 12)]
    masks.from_boxes(others, [box] * 11)
    assert sizes[3:] == [4, 4, 3], "several at once"
    assert len(masks._seen) == sam2.CACHED
    masks.from_boxes([picture], [box])
    assert sizes[6:] == [1], "the oldest are forgotten"


def test_half_precision_keeps_positions(folder: Path) -> None:
    model = sam2.load_model(folder, "Sam2VideoModel", "cpu", "bfloat16")
    whole = sam2.load_model(folder, "Sam2VideoModel", "cpu", None)
    assert model.dtype == torch.bfloat16
    for part in ("shared_image_embedding", "prompt_encoder.shared_embedding"):
        kept = model.get_submodule(part).positional_embedding
        assert torch.equal(kept, whole.get_submodule(part).positional_embedding)
    cells = whole.get_image_wide_positional_embeddings()
    assert torch.equal(model.get_image_wide_positional_embeddings(), cells.bfloat16())


# ---- trackers


@pytest.mark.parametrize("name", ["sam2", "sam2 in bfloat16", "offloaded", "template"])
def test_every_tracker(name: str, folder: Path, reader: VideoReader, template: Template) -> None:
    tracker: Tracker
    if name == "template":
        tracker = TemplateTracker(template, colours)
    else:
        dtype = "bfloat16" if "bfloat16" in name else None
        tracker = Sam2Tracker.from_pretrained(folder, device="cpu", dtype=dtype, offload=name == "offloaded")
    assert isinstance(tracker, Tracker)
    assert tracker.name
    seed = Step(SEED, SEED / 10, box_at(SEED), 1.0)
    for start, stop, first, last in ((0.0, None, 0, COUNT - 1), (1.05, 3.0, 11, 29), (2.0, 2.05, SEED, SEED)):
        steps = tracker.track(reader, seed, start=start, stop=stop)
        numbers = [s.frame for s in steps]
        assert numbers == list(range(first, last + 1))
        assert [s.time for s in steps] == pytest.approx([n / 10 for n in numbers])
        for s in steps:
            assert s.box.shape == (4,)
            assert not s.box.requires_grad
            assert (s.box[2:] > s.box[:2]).all()
            assert math.isnan(s.score) or 0 < s.score < 2
    for wrong in ({"start": 2.05}, {"stop": 2.0}):
        with pytest.raises(InvalidPrompt, match="starts from"):
            tracker.track(reader, seed, **wrong)
    with pytest.raises(InvalidPrompt, match="box"):
        tracker.track(reader, Step(SEED, SEED / 10, torch.tensor([70.0, 0, 80, 9]), 1.0))


def test_the_template_follows_the_square(reader: VideoReader, template: Template) -> None:
    steps = TemplateTracker(template, colours).track(reader, Step(SEED, SEED / 10, box_at(SEED), 1.0))
    truth = torch.stack([box_at(s.frame) for s in steps])
    overlaps = box_iou(torch.stack([s.box for s in steps]), truth).diagonal()
    assert len(steps) == COUNT
    assert overlaps.mean() > 0.6
    assert overlaps.min() > 0.3


def reference_logits(tracker: Sam2Tracker, frames: list[Tensor], order: range, box: Tensor) -> dict[int, Tensor]:
    """Of the whole video in one session, frames in walking order: what the published tracker does."""
    video = torch.cat([sam2.prepare(frames[i], tracker.model) for i in order])
    session = Sam2VideoInferenceSession(video=video, dtype=tracker.model.dtype)
    corners = box.reshape(2, 2) * torch.tensor([SIDE / SIZE[1], SIDE / SIZE[0]]) - 0.5
    prompt = {"point_coords": corners[None, None], "point_labels": torch.tensor([[[2, 3]]], dtype=torch.int32)}
    session.add_point_inputs(session.obj_id_to_idx(1), 0, prompt)
    session.obj_with_new_inputs = [1]
    outputs = tracker.model.propagate_in_video_iterator(session, start_frame_idx=0)
    return {order[o.frame_idx]: o.pred_masks[0].clone() for o in outputs}


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The mask logits of every frame that a tracker meets from now on."""
    seen: list[Tensor] = []
    full_size = sam2_video.full_size
    monkeypatch.setattr(sam2_video, "full_size", lambda x, size: (seen.append(x.clone()), full_size(x, size))[1])
    return seen


@pytest.mark.parametrize("window", [1, 500])
def test_streaming_is_the_whole_video_at_once(
    window: int, folder: Path, frames: list[Tensor], reader: VideoReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Sam2Tracker.from_pretrained(folder, device="cpu", window=window)
    box, start = box_at(SEED), SEED
    ahead = reference_logits(tracker, frames, range(start, COUNT), box)
    back = reference_logits(tracker, frames, range(start, -1, -1), box)
    seen = recorded(monkeypatch)
    steps = tracker.track(reader, Step(start, start / 10, box, 0.5))
    walked = [*range(start, COUNT)[: window + 1], *range(start - 1, -1, -1)[:window]]
    assert len(seen) == len(walked)
    for number, logits in zip(walked, seen, strict=True):
        want = ahead[number] if number >= start else back[number]
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    spread = torch.stack(list(ahead.values())).std(0).mean()
    assert spread > 0.05, "frames differ, and so do their masks"
    want_box = mask_boxes(sam2.full_size(ahead[start + 1], SIZE))[0]
    assert torch.equal(next(s.box for s in steps if s.frame == start + 1), want_box)


def test_a_session_stays_small(folder: Path, reader: VideoReader, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Sam2Tracker.from_pretrained(folder, device="cpu")
    sessions, held = [], []
    make, advance = tracker._session, tracker._advance
    monkeypatch.setattr(tracker, "_session", lambda *a: sessions.append(make(*a)) or sessions[0])

    def watched(session: Any, *rest: Any) -> Step | None:
        step = advance(session, *rest)
        outputs = session.output_dict_per_obj[0]
        kept = [o for some in outputs.values() for o in some.values()]
        assert not session.processed_frames
        assert not session.cache._vision_features
        assert not any({"high_res_masks", "pred_masks"} & o.keys() for o in kept)
        held.append(len(kept))
        return step

    monkeypatch.setattr(tracker, "_advance", watched)
    tracker.track(reader, Step(0, 0.0, box_at(0), 1.0))
    assert len(held) == COUNT
    assert max(held) == held[-1] == 17, "the seed, and the sixteen frames whose pointers are read"
    assert len(sessions) == 1


def test_a_window_bounds_both_ways(folder: Path, reader: VideoReader) -> None:
    tracker = Sam2Tracker.from_pretrained(folder, device="cpu", window=4)
    steps = tracker.track(reader, Step(SEED, SEED / 10, box_at(SEED), 1.0))
    assert [s.frame for s in steps] == list(range(SEED - 4, SEED + 5))
    with pytest.raises(InvalidConfig, match="window"):
        Sam2Tracker(tracker.model, window=0)


def test_a_track_ends_where_the_mask_is_empty(
    folder: Path, reader: VideoReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Sam2Tracker.from_pretrained(folder, device="cpu")
    calls: list[int] = []
    gone: set[int] = {4, 7}  # calls: the seed, frames ahead, then back
    full_size = sam2_video.full_size

    def sometimes(logits: Tensor, size: tuple[int, int]) -> Tensor:
        calls.append(len(calls))
        return full_size(logits, size) & (calls[-1] not in gone)

    monkeypatch.setattr(sam2_video, "full_size", sometimes)
    seed = Step(SEED, SEED / 10, box_at(SEED), 0.7)
    assert [s.frame for s in tracker.track(reader, seed)] == [SEED - 2, SEED - 1, SEED, SEED + 1, SEED + 2, SEED + 3]
    calls.clear()
    gone.add(0)
    assert tracker.track(reader, seed) == [seed]


def test_frames_that_cannot_be_read_are_bridged(
    folder: Path, tmp_path: Path, frames: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    for i, frame in enumerate(frames[:12]):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:02}.png")
    for broken in (4, 9):
        (tmp_path / f"{broken:02}.png").write_bytes(b"no picture")
    video = open_video(tmp_path, fps=10)
    tracker = Sam2Tracker.from_pretrained(folder, device="cpu")
    steps = tracker.track(video, Step(6, 0.6, box_at(6), 1.0))
    assert [s.frame for s in steps] == list(range(12))
    assert [s.frame for s in steps if math.isnan(s.score)] == [4, 9]
    torch.testing.assert_close(steps[4].box, (steps[3].box + steps[5].box) / 2)
    seen = recorded(monkeypatch)
    tracker.track(video, Step(6, 0.6, box_at(6), 1.0))
    both = list(seen)
    seen.clear()
    tracker.track(video, Step(6, 0.6, box_at(6), 1.0), stop=0.65)
    back = seen[1:]
    assert len(back) == 5
    assert all(torch.equal(a, b) for a, b in zip(both[-5:], back, strict=True)), "neither way knows of the other"
    with pytest.raises(InvalidPrompt, match="frame 4"):
        tracker.track(video, Step(4, 0.4, box_at(4), 1.0))


# ---- weights


def test_weights_on_disk_or_not(folder: Path, tmp_path: Path) -> None:
    assert is_available(folder)
    assert is_available(f"dir:{folder}")
    assert not is_available(tmp_path)
    assert not is_available(tmp_path / "nowhere")
    names = [card.name for card in catalogue().values() if card.kind == "tracker"]
    assert len(names) == 8
    assert sam2.DEFAULT in names
    if not is_available():
        with pytest.raises(ModelUnavailable):
            Sam2Tracker.from_pretrained()
    assert not is_available("hf:nobody/has-this-model")


def test_what_is_no_sam2_is_refused(folder: Path, tmp_path: Path) -> None:
    still = sam2_tiny.save(tmp_path / "still", "Sam2")
    with pytest.raises(InvalidConfig, match='"sam2"'):
        Sam2Tracker.from_pretrained(still, device="cpu")
    with pytest.raises(InvalidConfig, match="opsin-tiny"):
        Sam2Masks.from_pretrained("opsin-tiny")
    with pytest.raises(MissingFile):
        Sam2Masks.from_pretrained(tmp_path)
    broken = shutil.copytree(still, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:2000])
    with pytest.raises(InvalidCheckpoint, match="whole"):
        Sam2Masks.from_pretrained(broken, device="cpu")
    shutil.copy(still / "model.safetensors", broken)
    values = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(values | {"model_type": "sam2_video"}))
    with pytest.raises(InvalidCheckpoint, match="missing"):
        Sam2Tracker.from_pretrained(broken, device="cpu")
    (broken / "config.json").write_text("[")
    with pytest.raises(InvalidCheckpoint, match="JSON"):
        Sam2Masks.from_pretrained(broken, device="cpu")
