"""Views keep image and regions together; regions of prompts and soft masks equal plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opsin.masks.maps import RegionMaps, regions_at, soft_masks
from opsin.training.views import Augmentation, draw_view, make_views, recolour, sampling_grid

SIZE = 64


def quarters() -> torch.Tensor:
    """A label map of nine squares."""
    band = torch.arange(SIZE) * 3 // SIZE
    return (band[:, None] * 3 + band).to(torch.int16)


def draw(seed: int, **options: float):
    return draw_view(np.random.default_rng(seed), SIZE, Augmentation(**{"jitter": 0.0, **options}))


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_the_image_shows_the_region_that_the_map_names(seed, published):
    labels = quarters()
    image = ((labels + 1).float() / 10).expand(3, -1, -1)
    view = draw(seed)
    (seen,), (maps,) = make_views(image[None], [labels[None]], [view], published=published)
    shown = (seen[0] * 10).round().long() - 1
    flat = torch.stack([seen[0].roll(s, d) for s in (-1, 1) for d in (0, 1)]).sub(seen[0]).abs().amax(0) < 1e-3
    inside = (maps[0] >= 0) & flat  # away from edges, where colours mix
    assert inside.float().mean() > 0.2
    assert (shown[inside] == maps[0][inside]).all()
    outside = (maps[0] < 0) & flat & (shown < 0)
    assert published or ((maps[0] < 0) & flat).sum() == outside.sum()


def test_views_differ_and_repeat():
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert {draw(s).flip for s in range(20)} == {True, False}


def test_the_identity_view_changes_nothing():
    view = draw(0, flip=0.0, rotation=0.0, shear=0.0, crop=1.0)
    image, labels = torch.rand(1, 3, SIZE, SIZE), quarters()[None]
    seen, (maps,) = make_views(image, [labels], [view])
    assert torch.allclose(seen, image, atol=1e-5)
    assert torch.equal(maps, labels)


def test_a_crop_enlarges_its_window():
    view = draw(3, flip=0.0, rotation=0.0, shear=0.0)
    grid = sampling_grid(view, SIZE)
    assert torch.allclose(grid[0, 0], torch.tensor(view.corner) + 0.5 * view.side / SIZE, atol=1e-4)
    assert torch.allclose(grid[-1, -1], torch.tensor(view.corner) + view.side - 0.5 * view.side / SIZE, atol=1e-4)


def test_published_regions_lose_their_edge():
    view = draw(5, rotation=0.0, shear=0.0, flip=0.0, crop=0.4)
    image, labels = torch.rand(1, 3, SIZE, SIZE), quarters()[None]
    ours, published = (make_views(image, [labels], [view], published=p)[1][0] for p in (False, True))
    assert (published >= 0).sum() < (ours >= 0).sum()
    assert torch.equal(published[published >= 0], ours[published >= 0])


def test_colour_changes_stay_in_range_and_leave_grey_grey():
    views = [draw_view(np.random.default_rng(s), 16, Augmentation()) for s in range(4)]
    images = torch.rand(4, 3, 16, 16)
    changed = recolour(images.clone(), views)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert not torch.allclose(changed, images, atol=0.05)
    grey = recolour(torch.full((4, 3, 16, 16), 0.5), views)
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-6)


def nested(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    masks = np.zeros((12, 32, 32), bool)
    for mask in masks:
        (y, x), (h, w) = rng.integers(0, 24, 2), rng.integers(1, 24, 2)
        mask[y : y + h, x : x + w] = True
    return masks


@pytest.mark.parametrize("seed", range(5))
def test_regions_of_prompts_and_soft_masks_equal_a_loop(seed):
    masks = nested(seed)
    maps = RegionMaps.from_masks(masks)
    assert torch.equal(maps.masks(), torch.from_numpy(masks))
    pixels = torch.from_numpy(np.random.default_rng(seed).choice(1024, 200, replace=False))
    found = regions_at(maps.layers, pixels, len(maps))
    areas = masks.sum((1, 2))
    for pixel, region in zip(pixels.tolist(), found.tolist(), strict=True):
        covering = sorted((i for i in range(12) if masks[i].flat[pixel]), key=lambda i: areas[i])
        assert region == (covering[len(covering) // 2] if covering else -1)
    soft = soft_masks(maps.layers, found, len(maps), (8, 8))
    for region, mask in zip(found.tolist(), soft, strict=True):
        plain = masks[region].reshape(8, 4, 8, 4).mean((1, 3)) if region >= 0 else np.zeros((8, 8))
        assert np.allclose(mask.numpy(), plain)
