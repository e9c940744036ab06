"""Region models: prompts, grouping, extents, remembering, checkpoints, and what bad input gets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import opsin
from opsin import backbones
from opsin.cards import ModelCard, find
from opsin.errors import (
    IncompatibleModel,
    InvalidCheckpoint,
    InvalidConfig,
    InvalidPrompt,
    MissingFile,
    UnsupportedSize,
)
from opsin.geometry import ImageTransform
from opsin.regions import RegionEncoder, RegionModel, TransferModel, aggregate, convert_published, extent, prompts
from opsin.regions.encoder import fourier_positions, grid_centres

DIM = 32
VIT = {
    "model_type": "vit", "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "image_size": 48, "patch_size": 8,
}  # fmt: skip


def make_model(fit="stretch", grouping="components"):
    torch.manual_seed(0)
    backbone = backbones.from_config(VIT, device="cpu")
    card = ModelCard(
        name="test", kind="regions", family="ren", backbone=backbone.name, dim=DIM, image_size=48, grid_size=6,
        threshold=0.8, fit=fit, grouping=grouping, bfloat16=False,
    )  # fmt: skip
    return RegionModel(backbone, RegionEncoder(DIM).eval(), card)


@pytest.fixture(scope="module")
def model():
    return make_model()


def picture(height=40, width=60, seed=0):
    """Four flat squares with a little noise: superpixels and regions are obvious."""
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 0.05
    image = torch.zeros(3, height, width)
    image[0, : height // 2] = 0.8
    image[1, :, width // 2 :] = 0.7
    return (image + noise).clamp(0, 1)


@pytest.mark.parametrize("kind", ["slic", "grid"])
@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_encode_one(kind, fit):
    image = picture()
    regions = make_model(fit).encode(image, prompts=kind, with_masks=True)
    assert 0 < len(regions) <= 36
    assert regions.tokens.shape == (len(regions), DIM)
    x1, y1, x2, y2 = regions.boxes.unbind(-1)
    assert bool(((x1 >= 0) & (y1 >= 0) & (x2 <= 60) & (y2 <= 40) & (x2 > x1) & (y2 > y1)).all())
    assert bool((regions.points >= 0).all() and (regions.points <= torch.tensor((60, 40))).all())
    masks = regions.dense_masks()
    assert masks.shape == (len(regions), 40, 60)
    if kind == "slic":
        assert torch.equal(masks.sum(0), torch.ones(40, 60, dtype=torch.long)), "superpixel regions partition the image"
        for point, mask in zip(regions.points.tolist(), masks, strict=True):
            assert mask[int(point[1]), int(point[0])], "the representative point lies in its region"


def test_a_batch_of_mixed_sizes_equals_single_images(model):
    batch = [picture(), picture(64, 32, 1), picture(9, 100, 2), picture(1, 1, 3)]
    together = model.encode(batch, batch_size=3, with_masks=True)
    assert together.sizes == ((40, 60), (64, 32), (9, 100), (1, 1))
    for image, table in zip(batch, together.images(), strict=True):
        alone = model.encode(image, with_masks=True)
        torch.testing.assert_close(table.tokens, alone.tokens, atol=1e-5, rtol=1e-5)
        assert torch.equal(table.boxes, alone.boxes)
        assert table.masks == alone.masks


def test_own_prompts_keep_their_order(model):
    image = picture()
    points = [[10.5, 5.25], [50, 30], [3, 39]]
    regions = model.encode(image, points=points)
    torch.testing.assert_close(regions.points, torch.tensor(points))
    flipped = model.encode(image, points=points[::-1])
    torch.testing.assert_close(regions.tokens, flipped.tokens.flip(0))
    boxes = model.encode(image, boxes=[[2, 3, 30, 20], [10, 10, 59, 39]])
    assert boxes.boxes.tolist() == [[2, 3, 30, 20], [10, 10, 59, 39]]
    assert boxes.counts.tolist() == [9, 9]
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 5:15, 5:25] = True
    masks[1, 30, 40] = True
    found = model.encode(image, masks=masks, with_masks=True)
    assert torch.equal(found.dense_masks(), masks)
    assert found.boxes.tolist() == [[5, 5, 25, 15], [40, 30, 41, 31]]


def test_prompts_per_image(model):
    batch = [picture(), picture(64, 32, 1)]
    regions = model.encode(batch, points=[[[1, 1], [2, 2]], [[30, 60]]])
    assert regions.image_index.tolist() == [0, 0, 1]
    with pytest.raises(InvalidPrompt, match="per image"):
        model.encode(batch, points=[[[1, 1]]])


@pytest.mark.parametrize(
    "asked",
    [
        {"points": [[61.0, 5.0]]}, {"points": [[-1.0, 5.0]]}, {"boxes": [[5, 5, 5, 9]]}, {"boxes": [[70, 70, 90, 90]]},
        {"masks": torch.zeros(1, 40, 60)}, {"masks": torch.ones(1, 10, 10)},
        {"points": [[1, 1]], "boxes": [[0, 0, 9, 9]]},
    ],
)  # fmt: skip
def test_bad_prompts(model, asked):
    with pytest.raises(InvalidPrompt):
        model.encode(picture(), **asked)


@pytest.mark.parametrize(
    "options", [{"prompts": "dots"}, {"threshold": 2.0}, {"grouping": "magic"}, {"token": "raw"}, {"compat": "theirs"}]
)
def test_bad_options(model, options):
    with pytest.raises(InvalidConfig):
        model.encode(picture(), **options)


def test_remembering_an_image_changes_nothing(model):
    image = picture()
    features = model.features(image)
    memory = model.memory(features[0])
    asked = [torch.tensor([[5.0, 5.0], [50.0, 30.0]])]
    again = model.encode_features(features, points=asked, memories=[memory])
    torch.testing.assert_close(again.tokens, model.encode(image, points=asked[0]).tokens)


def test_features_of_another_backbone_are_refused(model):
    features = replace(model.features(picture())[0], model="another")
    with pytest.raises(IncompatibleModel):
        model.memory(features)


def test_prompt_chunks_change_nothing():
    torch.manual_seed(0)
    encoder, features = RegionEncoder(DIM).eval(), torch.rand(2, DIM, 5, 7)
    points = torch.rand(2, 11, 2)
    whole = encoder(features, points)
    encoder.prompt_chunk = 3
    torch.testing.assert_close(encoder(features, points).proj_tokens, whole.proj_tokens)
    with pytest.raises(UnsupportedSize):
        encoder(torch.rand(1, DIM + 1, 5, 5), points[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_encoder_follows_dtype_and_device(dtype):
    encoder = RegionEncoder(DIM).to(dtype)
    output = encoder(torch.rand(1, DIM, 3, 4, dtype=dtype), torch.rand(1, 5, 2))
    assert output.pred_tokens.dtype == dtype
    ghost = RegionEncoder(DIM).to("meta")
    assert ghost(torch.rand(1, DIM, 3, 4, device="meta"), torch.rand(1, 5, 2, device="meta")).pred_tokens.is_meta


def test_a_mask_limits_what_its_prompts_see(model):
    image = picture()
    mask = torch.zeros(1, 40, 60, dtype=torch.bool)
    mask[0, :20, :30] = True
    features = model.features(image)
    values = features[0].features.clone()
    values[:, -1, -1] += 5  # a patch outside of the mask
    changed = [replace(features[0], features=values)]
    seen = model.encode_features(features, masks=[mask]).tokens
    torch.testing.assert_close(model.encode_features(changed, masks=[mask]).tokens, seen)
    point = [torch.tensor([[5.0, 5.0]])]
    free = model.encode_features(features, points=point).tokens
    assert not torch.allclose(model.encode_features(changed, points=point).tokens, free, atol=1e-4)


def test_the_pooling_start_looks_around_the_prompt():
    torch.manual_seed(0)
    encoder = RegionEncoder(256).start_as_pooling().eval()
    features = torch.rand(1, 256, 16, 16)
    with torch.no_grad():
        attention = encoder.attention(encoder.memory(features), torch.tensor([[[0.22, 0.53], [0.84, 0.28]]])).softmax(
            -1
        )
    assert attention[0].mean(0).argmax(-1).tolist() == [8 * 16 + 3, 4 * 16 + 13]


def test_positions_of_sub_pixel_points_lie_between_cells():
    cells = fourier_positions(grid_centres((1, 2)), 64)
    between = fourier_positions(torch.tensor([[0.5, 0.5]]), 64)
    assert not torch.allclose(between[0], cells[0], atol=1e-2)


def test_grouping_methods():
    angles = torch.linspace(0, torch.pi, 60)
    chain = torch.stack([angles.cos(), angles.sin()], -1)
    assert len(aggregate.group(chain, threshold=0.99)) == 1, "single linkage chains"
    assert len(aggregate.group(chain, threshold=0.99, method="average")) > 5, "average linkage does not"
    assert len(aggregate.group(torch.zeros(0, 4), threshold=0.5)) == 0
    assert len(aggregate.group(torch.rand(1, 4), threshold=0.5, method="average")) == 1
    with pytest.raises(InvalidPrompt):
        aggregate.group(torch.eye(5), threshold=0.5, compat="published")


def test_components_against_scipy():
    from scipy.sparse.csgraph import connected_components

    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.nn.functional.normalize(torch.randn(80, 5, generator=draw), dim=-1)
        labels = aggregate.connected_components(tokens, 0.9).numpy()
        _, wanted = connected_components((tokens @ tokens.T >= 0.9).numpy(), directed=False)
        assert len(set(zip(labels, wanted, strict=True))) == len(set(wanted)) == len(set(labels))


def test_small_groups_stay_unless_asked(model):
    tokens = torch.eye(6)
    assert len(aggregate.group(tokens, threshold=0.5)) == 6
    groups = aggregate.group(torch.cat([tokens, tokens[:1], tokens[:1]]), threshold=0.5, min_size=2)
    assert groups.labels.tolist() == [0, -1, -1, -1, -1, -1, 0, 0]
    nothing = model.encode(picture(), threshold=1.0, min_size=1000)
    assert len(nothing) == 0
    assert nothing.to_numpy()["tokens"].shape == (0, DIM)


def test_run_lengths_of_a_label_map():
    labels = np.random.default_rng(0).integers(-1, 4, (13, 17))
    masks = extent.label_run_lengths(labels, 5)
    for region, mask in enumerate(masks):
        np.testing.assert_array_equal(mask.decode().numpy(), labels == region)
    boxes = extent.label_boxes(labels, 5)
    assert boxes[4].tolist() == [0, 0, 0, 0]


def test_superpixels_are_deterministic_and_hold_their_points():
    first, second = prompts.slic(picture(), 20), prompts.slic(picture(), 20)
    assert torch.equal(first.labels, second.labels)
    rows, cols = first.points[:, 1].long(), first.points[:, 0].long()
    assert first.labels[rows, cols].tolist() == list(range(len(first.points)))


def test_mask_prompts_lie_inside():
    mask = torch.zeros(30, 30, dtype=torch.bool)
    mask[2:28, 2:6] = True
    mask[24:28, 2:28] = True
    points = prompts.mask_prompts(mask).long()
    assert mask[points[:, 1], points[:, 0]].all()
    assert 1 < len(points) <= 16
    with pytest.raises(InvalidPrompt):
        prompts.mask_prompts(torch.zeros(4, 4))


def test_queries(model):
    image = picture()
    assert model.query(image).tokens.shape == (1, DIM)
    by_box = model.query(image, box=(0, 0, 30, 20))
    assert by_box.model == model.name
    with pytest.raises(InvalidPrompt):
        model.query(image, box=(0, 0, 30, 20), point=(1, 1))
    with pytest.raises(InvalidPrompt):
        model.query(image, box=(100, 100, 120, 120))


@pytest.mark.parametrize("embed", [True, False])
def test_save_and_load(model, tmp_path, embed):
    if not embed:  # a reference to a folder of its own
        model.backbone.save_pretrained(tmp_path / "vit")
    folder = model.save_pretrained(tmp_path / "model", embed_backbone=embed)
    if not embed:
        text = (folder / "card.json").read_text().replace('"untrained"', f'"dir:{tmp_path}/vit"')
        (folder / "card.json").write_text(text)
    again = opsin.load(f"dir:{folder}", device="cpu")
    assert not embed or again.backbone.name == "test/backbone", "no path of the maker's machine"
    torch.testing.assert_close(again.encode(picture()).tokens, model.encode(picture()).tokens)


def published_checkpoint(path, dim=768, **changes):
    torch.manual_seed(1)
    state = RegionEncoder(dim).state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    content = {
        "epoch": 3, "iter_count": 7, "best_val_loss": torch.tensor(0.5), "region_encoder_state": state | changes,
        "optimizer_state": optimizer,
    }  # fmt: skip
    torch.save(content, path)
    return state


def test_a_published_checkpoint_is_converted_once(tmp_path):
    state = published_checkpoint(tmp_path / "checkpoint.pth")
    card = find("ren-dino-b8")
    folder = convert_published(tmp_path / "checkpoint.pth", card, tmp_path / "converted")
    from safetensors.torch import load_file

    saved = load_file(folder / "regions.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[k], state[k]) for k in state)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 82e6, "no optimiser state"
    assert ModelCard.load(folder / "card.json").backbone == "dino-b8"


def test_checkpoints_that_are_none(tmp_path):
    card = find("ren-dino-b8")
    path = tmp_path / "checkpoint.pth"
    with pytest.raises(MissingFile):
        convert_published(path, card)
    for content in (
        b"",
        b"<!DOCTYPE html><html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        b"PK\x03\x04junk",
    ):
        path.write_bytes(content)
        with pytest.raises(InvalidCheckpoint):
            convert_published(path, card)
    torch.save({"model": {}}, path)
    with pytest.raises(InvalidCheckpoint, match="region_encoder_state"):
        convert_published(path, card)
    published_checkpoint(path, out_proj=torch.zeros(3))
    with pytest.raises(InvalidCheckpoint, match="out_proj"):
        convert_published(path, card)
    published_checkpoint(path, dim=64)
    with pytest.raises(InvalidCheckpoint):
        RegionModel.from_pretrained(path)
    whole = tmp_path / "whole.pth"
    published_checkpoint(whole)
    path.write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(InvalidCheckpoint):
        convert_published(path, card)


def test_encoder_and_backbone_must_fit(model):
    with pytest.raises(IncompatibleModel):
        RegionModel(model.backbone, RegionEncoder(64), model.card)


def test_a_backbone_is_no_region_model():
    with pytest.raises(InvalidConfig, match="region model"):
        opsin.load("dinov2-s14")


def siglip_backbone():
    torch.manual_seed(0)
    config = {
        "model_type": "siglip_vision_model", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    return backbones.from_config(config, device="cpu")


@pytest.mark.parametrize("compat", [None, "published"])
@pytest.mark.parametrize("target", ["siglip", "vit"])
def test_tokens_of_another_encoder(model, compat, target):
    other = siglip_backbone() if target == "siglip" else backbones.from_config(VIT | {"hidden_size": 16}, device="cpu")
    transfer = TransferModel(model, other, model.card)
    batch = [picture(), picture(64, 32, 1)]
    regions = transfer.encode(batch, compat=compat, threshold=0.5)
    assert regions.dim == other.dim
    assert len(regions) == len(regions.tokens) > 0
    assert bool(torch.isfinite(regions.tokens).all())
    alone = transfer.encode(batch[1], compat=compat, threshold=0.5)
    torch.testing.assert_close(regions.image(1).tokens, alone.tokens, atol=1e-5, rtol=1e-4)


def test_area_weights_share_out_the_patches():
    from opsin.regions.extent import mask_weights

    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :, :3] = True
    masks[1, :, 3:] = True
    weights = mask_weights(masks, ImageTransform((8, 8), (8, 8)), (2, 2))
    assert weights.reshape(2, 2, 2)[0].tolist() == [[0.75, 0], [0.75, 0]]
    torch.testing.assert_close(weights.sum(0), torch.ones(4))
    with pytest.raises(InvalidConfig, match="compat"):
        mask_weights(masks, ImageTransform((8, 8), (8, 8)), (2, 2), compat="publised")
