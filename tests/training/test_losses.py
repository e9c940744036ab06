"""What the published goldens do not hold: null prompts, empty batches, the semantic term."""

from __future__ import annotations

import pytest
import torch

from opsin.errors import InvalidConfig
from opsin.training import losses


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def naive_contrastive(first, second, ids_1, ids_2, temperature, published):
    means = []
    for a, b, i, j in zip(first, second, ids_1, ids_2, strict=True):
        unit = torch.nn.functional.normalize(torch.cat([a, b]), dim=-1)
        ids = torch.cat([i, j]).tolist()
        weight = (unit @ unit.T / temperature).exp()
        values = []
        for k, name in enumerate(ids):
            others = [n for n in range(len(ids)) if n != k]
            same = [n for n in others if ids[n] == name and (published or name >= 0)]
            if same:
                values.append(-(weight[k, same].sum() / weight[k, others].sum()).log())
        if values:
            means.append(torch.stack(values).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize("published", [False, True])
def test_contrastive_equals_a_loop(published):
    first, second = tokens(3, 6, 8), tokens(3, 6, 8, seed=1)
    ids_1 = torch.tensor([[0, 0, 1, -1, -1, 2], [0, 1, 2, 3, 4, 5], [-1] * 6])
    ids_2 = torch.tensor([[0, 1, 1, -2, -2, 5], [9, 8, 7, 7, 6, 6], [-2] * 6])
    mine = losses.contrastive_loss(first, second, ids_1, ids_2, compat="published" if published else None)
    assert torch.allclose(mine, naive_contrastive(first, second, ids_1, ids_2, 0.1, published), atol=1e-6)
    mine.backward()
    assert first.grad.isfinite().all()


def test_null_prompts_are_neither_anchors_nor_positives_by_default():
    first, second = tokens(1, 4, 8), tokens(1, 4, 8, seed=1)
    nobody = torch.full((1, 4), -1)
    assert losses.contrastive_loss(first, second, nobody, nobody - 1) == 0
    assert losses.contrastive_loss(first, second, nobody, nobody - 1, compat="published") > 0


def test_feature_loss_without_a_covered_prompt_is_zero_and_has_finite_gradients():
    first, second = tokens(2, 4, 8), tokens(2, 4, 8, seed=1)
    nothing = torch.zeros(2, 4)
    loss = losses.feature_loss(first, second, first.detach(), second.detach(), nothing, nothing)
    loss.backward()
    assert loss == 0
    assert first.grad.isfinite().all()


def test_region_targets_average_larger_masks_to_the_grid():
    features = torch.arange(8.0).reshape(2, 2, 2)
    masks = torch.zeros(1, 4, 4)
    masks[0, :2, :3] = 1  # one whole patch and half of the next
    expected = (features[:, 0, 0] + 0.5 * features[:, 0, 1]) / 1.5
    assert torch.allclose(losses.region_targets(features, masks)[0], expected)


def test_region_means_join_the_prompts_of_a_region():
    rows = tokens(2, 4, 3)
    ids = torch.tensor([[0, 0, 1, -1], [0, 2, 2, 2]])
    categories = torch.tensor([[5, 5, -1, -1], [7, 5, 5, 5]])
    means, kinds, images = losses.region_means(rows, ids, categories)
    assert kinds.tolist() == [5, 7, 5]
    assert images.tolist() == [0, 1, 1]
    assert torch.allclose(means, torch.stack([rows[0, :2].mean(0), rows[1, 0], rows[1, 1:].mean(0)]))


def test_semantic_loss_looks_across_images_only():
    rows = tokens(5, 8)
    kinds, images = torch.tensor([1, 1, 2, 2, 3]), torch.tensor([0, 1, 0, 0, 1])
    unit = torch.nn.functional.normalize(rows, dim=-1)
    logits = unit @ unit.T / 0.1
    # 0 and 1 are one category in two images; 2 and 3 are in one image, so they have no positive.
    expected = [-(logits[a, b] - logits[a, [c for c in range(5) if c != a]].logsumexp(0)) for a, b in ((0, 1), (1, 0))]
    loss = losses.semantic_loss(rows, kinds, images)
    assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-6)
    loss.backward()
    assert rows.grad.isfinite().all()


@pytest.mark.parametrize("count", [0, 1])
def test_semantic_loss_of_too_few_regions_is_zero(count):
    rows = tokens(count, 8)
    loss = losses.semantic_loss(rows, torch.zeros(count).long(), torch.zeros(count).long())
    loss.backward()
    assert loss == 0


def test_unknown_compat():
    rows, ids = tokens(3, 8), torch.arange(3)
    with pytest.raises(InvalidConfig, match="compat"):
        losses.contrastive_loss(rows, rows, ids, ids, compat="publised")
