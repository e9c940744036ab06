"""Boxes, masks and run lengths against slow, obvious computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opsin import geometry
from opsin.errors import InvalidPrompt


def boxes(count, seed=0):
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) * 20
    return torch.cat([corners.amin(1), corners.amax(1) + 0.5], -1)


def test_iou_against_pixels():
    a = torch.tensor([[0.0, 0, 4, 4], [2, 2, 6, 6], [0, 0, 0, 0]])
    found = geometry.box_iou(a, a)
    assert found[0, 1] == pytest.approx(4 / 28)
    assert found[0, 0] == 1
    assert found[2, 2] == 0


def test_nms_against_a_loop():
    rows, scores = boxes(60), torch.rand(60, generator=torch.Generator().manual_seed(1))
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(geometry.box_iou(rows[i : i + 1], rows[j : j + 1]) <= 0.3 for j in kept):
            kept.append(i)
    assert geometry.box_nms(rows, scores, 0.3).tolist() == kept
    assert len(geometry.box_nms(torch.zeros(0, 4), torch.zeros(0), 0.5)) == 0


def test_mask_boxes():
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 1:3, 2:7] = True
    masks[1, 5, 7] = True
    assert geometry.mask_boxes(masks).tolist() == [[2, 1, 7, 3], [7, 5, 8, 6], [0, 0, 0, 0]]


@pytest.mark.parametrize("fill", [0.0, 0.3, 1.0])
def test_run_lengths_round_trip(fill):
    mask = torch.rand(9, 11, generator=torch.Generator().manual_seed(0)) < fill
    coded = geometry.RunLengthMask.encode(mask)
    assert torch.equal(coded.decode(), mask)
    assert coded.area == int(mask.sum())


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 5), (5, 5, 2, 2), (50, 50, 60, 60), (-9, -9, -1, -1), (0, 0, np.nan, 4), (1, 2, 3)]
)
def test_bad_boxes(box):
    with pytest.raises(InvalidPrompt):
        geometry.check_box(box, (20, 30))


def test_boxes_are_cut_to_the_image():
    assert geometry.check_box((-5, -5, 40, 10), (20, 30)) == (0, 0, 30, 10)


@pytest.mark.parametrize(
    "points", [torch.tensor([[31.0, 5]]), torch.tensor([[-1.0, 5]]), torch.zeros(3), torch.tensor([[np.nan, 1]])]
)
def test_bad_points(points):
    with pytest.raises(InvalidPrompt):
        geometry.check_points(points, (20, 30))
