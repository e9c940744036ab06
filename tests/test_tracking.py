"""Tracking without further weights, masks from tokens, and the small tools that trackers share."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from opsin.errors import InvalidConfig, InvalidPrompt
from opsin.geometry import ImageTransform, box_iou
from opsin.tracking.base import Step, pairs
from opsin.tracking.descriptors import DenseTokens, dense_tokens
from opsin.tracking.follow import backwards, check_seed
from opsin.tracking.masks import component_at, largest_component, published_box
from opsin.tracking.matching import Example, Template, TokenSpace
from opsin.tracking.template import TemplateTracker, TokenMasks
from opsin.video import open_video


def mask_of(*rows: str) -> Tensor:
    return torch.tensor([[c == "#" for c in row] for row in rows])


# ---- tools


def test_largest_component_is_one_piece_and_the_first_of_equals():
    mask = mask_of("##...", "...#.", "#..#.", ".#.#.")
    assert torch.equal(largest_component(mask), mask_of(".....", "...#.", "...#.", "...#."))
    assert torch.equal(largest_component(mask[:, :3]), mask_of("##.", "...", "...", "..."))
    assert largest_component(mask[2:, :2]).tolist() == [[True, False], [False, True]], "corners touch"
    assert largest_component(mask.float() * 3).dtype == torch.bool
    assert not largest_component(torch.zeros(3, 4, dtype=torch.bool)).any()
    assert largest_component(torch.ones(0, 4)).shape == (0, 4)
    with pytest.raises(InvalidPrompt, match=r"\(H, W\)"):
        largest_component(mask[None])


def test_component_at_a_point():
    mask = mask_of("##..#", "##..#")
    assert component_at(mask, torch.tensor([4.5, 1.0])).sum() == 2
    assert component_at(mask, torch.tensor([5.0, 2.0])).sum() == 2, "the far corner belongs to the last pixel"
    assert not component_at(mask, torch.tensor([2.5, 0.5])).any()


def test_published_box_is_a_pixel_short():
    assert published_box(mask_of(".....", ".###.", ".###.")) == (1, 1, 2, 1)
    with pytest.raises(InvalidPrompt, match="empty"):
        published_box(torch.zeros(3, 3))


def test_a_seed_lies_in_its_video():
    seed = Step(3, 0.3, torch.tensor([1.0, 1, 9, 9]), 1.0)
    check_seed(seed, (10, 10), 0.3, None)
    for start, stop in ((0.31, None), (0.0, 0.3)):
        with pytest.raises(InvalidPrompt, match="starts from"):
            check_seed(seed, (10, 10), start, stop)
    for box in ([9.0, 9, 1, 1], [11, 0, 20, 5], [math.nan, 0, 5, 5], [1, 2, 3]):
        with pytest.raises(InvalidPrompt, match="box"):
            check_seed(Step(3, 0.3, torch.tensor(box), 1.0), (10, 10), 0.0, None)


def test_walking_backwards_stops_where_it_is_told():
    reader = open_video([np.full((8, 8, 3), i, np.uint8) for i in range(40)], fps=10)
    assert [f.index for chunk in backwards(reader, 2.5, 1.2) for f in chunk] == list(range(24, 11, -1))
    assert list(backwards(reader, 2.5, 2.5)) == []


def test_each_picture_has_its_prompts():
    pictures = [torch.zeros(3, 4, 5), torch.zeros(3, 6, 7)]
    assert [size for size, _ in pairs(pictures, pictures)] == [(4, 5), (6, 7)]
    with pytest.raises(InvalidPrompt):
        pairs(pictures, pictures[:1])


# ---- masks from tokens


def scene(size: tuple[int, int] = (60, 80)) -> tuple[Tensor, Tensor]:
    """Tokens on a grid of 12 × 16: three kinds of ground, an L-shaped object and another of the same kind."""
    labels = torch.zeros(12, 16, dtype=torch.long)
    labels[:, 8:] = 1
    labels[8:, :] = 2
    labels[2:7, 3:5] = 3
    labels[5:7, 3:9] = 3
    labels[1:3, 12:14] = 3
    return torch.eye(4)[labels].permute(2, 0, 1), labels


def of_scene(pictures: object, size: tuple[int, int] = (60, 80)) -> list[DenseTokens]:
    return [DenseTokens(scene()[0], ImageTransform(size, size)) for _ in pictures]  # type: ignore[attr-defined]


def big(labels: Tensor) -> Tensor:
    return labels.repeat_interleave(5, 0).repeat_interleave(5, 1)


def iou(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_token_masks_from_points_and_boxes():
    picture, truth = torch.zeros(3, 60, 80), big(scene()[1]) == 3
    object_ = component_at(truth, torch.tensor([17.0, 12.0]))
    masks = TokenMasks(of_scene)
    found = masks.from_points([picture], [torch.tensor([[17.0, 12], [64, 9], [5, 50]])])[0]
    assert found.shape == (3, 3, 60, 80)
    assert max(iou(m, object_) for m in found[0]) > 0.8
    assert max(iou(m, truth & ~object_) for m in found[1]) > 0.6, "only the piece at the point"
    assert not (found[2] & truth).any(), "the ground is not the object"
    areas = found.flatten(2).sum(-1)
    assert (areas.diff(dim=1) <= 0).all(), "from the whole to a part"
    (boxed,) = masks.from_boxes([picture], [torch.tensor([[15.0, 10, 45, 35]])])[0]
    assert iou(boxed, object_) > 0.5
    outside = torch.ones_like(boxed)
    outside[10:35, 15:45] = False
    assert not (boxed & outside).any(), "within the box"


def test_token_masks_at_the_borders():
    picture = torch.zeros(3, 60, 80)
    masks = TokenMasks(of_scene, shares=[0.5])
    found = masks.from_points([picture], [torch.tensor([[0.0, 0], [80, 60], [80, 0]])])[0]
    assert found.shape == (3, 1, 60, 80)
    assert [bool(m[0, y, x]) for m, (y, x) in zip(found, [(0, 0), (59, 79), (0, 79)], strict=True)] == [True] * 3
    whole = masks.from_boxes([picture], [torch.tensor([[0.0, 0, 80, 60]])])[0]
    assert whole.any(), "a box of the whole picture has no ring"
    tiny = masks.from_boxes([picture], [torch.tensor([[20.2, 20.2, 21.4, 21.4]])])[0]
    assert tiny.sum() <= 4
    for shares in ([], [1.0], [-1.0, 0.5]):
        with pytest.raises(InvalidConfig):
            TokenMasks(of_scene, shares=shares)


# ---- tracking by a template


def test_a_hopeless_seed_stays_alone():
    reader = open_video([np.zeros((60, 80, 3), np.uint8)] * 4, fps=10)
    box = torch.tensor([15.0, 10, 45, 35])
    dense = of_scene([0])
    template = Template.fit(TokenSpace.fit(dense), [Example(dense[0], box)], dense)
    for score in (0.0, -0.2, math.nan):
        seed = Step(1, 0.1, box, score)
        assert TemplateTracker(template, of_scene).track(reader, seed) == [seed]
    for keep in (0.0, 1.1, math.nan):
        with pytest.raises(InvalidConfig):
            TemplateTracker(template, of_scene, keep=keep)


@pytest.mark.slow
def test_a_mug_on_real_video(data_dir: Path):
    """Boxes drawn by hand around the mug, its handle included; it is held and hardly moves while it is filled."""
    from opsin.regions import RegionModel

    path = data_dir / "sam2_videos/04_coffee.mp4"
    if not path.is_file():
        pytest.skip("the video is absent")
    encode = partial(dense_tokens, RegionModel.from_pretrained("opsin-tiny", device="cpu"), size=96, kind="features")
    with open_video(path) as reader:
        frame, box = reader.read_frame(30), torch.tensor([758.0, 350, 946, 540])
        background = encode([f.image for f in reader.frames(rate=1.0)])
        dense = encode([frame.image])
        template = Template.fit(TokenSpace.fit([*background, *dense]), [Example(dense[0], box)], background)
        seed = Step(30, frame.time, box, 1.0)
        steps = TemplateTracker(template, encode).track(reader, seed, start=0.5, stop=2.5)
        assert [s.frame for s in steps] == list(range(15, 75))
        by_hand = {15: [785, 365, 945, 550], 74: [750, 360, 950, 550]}
        for s in steps:
            if s.frame in by_hand:
                assert box_iou(s.box[None], torch.tensor([by_hand[s.frame]]).float()) > 0.5
        masks = TokenMasks(encode)
        mug = masks.from_boxes([frame.image], [box[None]])[0][0]
        blue = (frame.image[2].int() - frame.image[0].int()) > 60  # the only thing that is so blue
        assert iou(mug, largest_component(blue)) > 0.6
        middle = masks.from_points([frame.image], [torch.tensor([[835.0, 450]])])[0][0, 1]
        assert iou(middle, largest_component(blue)) > 0.5
