"""The pure stages of visual query localization: what they promise, on small arrays, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from opsin.cards import ModelCard
from opsin.errors import IncompatibleModel, InvalidConfig, InvalidImage, InvalidPrompt
from opsin.geometry import ImageTransform
from opsin.regions import RegionEncoder, RegionModel
from opsin.vql import crops
from opsin.vql.candidates import select, selection
from opsin.vql.expansion import expand, sharpness, worth_learning
from opsin.vql.preset import PRESETS, Preset, preset
from opsin.vql.query_tokens import choose, choose_each, deepest
from opsin.vql.sources import AlignedTokenSource, PointTokens, RegionTokenSource, matching, pooled, similarity
from tests.conformance import tiny
from tests.test_segmentation import make as make_segmenter

REN = PRESETS["ren-vql"]
NAN = float("nan")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---- presets


def test_a_preset_by_name_with_other_values():
    chosen = preset("ren-vql", top_k=3, query_factors=[1, 2])
    assert chosen == replace(REN, top_k=3, query_factors=(1.0, 2.0))
    assert preset(chosen) is not REN
    assert preset(chosen, rounds=1).top_k == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"topk": 3}, 'Did you mean "top_k"'), ({"zzz": 3}, "It has name"), ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"), ({"nms": 1.2}, "nms"), ({"top_p": NAN}, "top_p"), ({"query_factors": ()}, "factors"),
        ({"query_factors": (0.5,)}, "at least 1"), ({"video_factors": (math.inf,)}, "finite"),
        ({"video_factors": (2, 2)}, "differ"), ({"video_overlap": 1.0}, "overlap"), ({"crop_margin": 0.9}, "margin"),
        ({"crop_limits": (2, 1)}, "least and the largest"), ({"window": 0}, "window"), ({"rounds": -1}, "rounds"),
        ({"expansion_sharpness": -1}, "sharpness"),
    ],
)  # fmt: skip
def test_a_preset_refuses(values, message):
    with pytest.raises(InvalidConfig, match=message):
        preset("ren-vql", **values)


def test_an_unknown_preset_is_told_with_those_there_are():
    with pytest.raises(InvalidConfig, match="ren-vql"):
        preset("relocate")
    assert isinstance(REN, Preset)


# ---- crops


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_a_crop_holds_its_box_and_leads_back(kind):
    picture = noise(3, 60, 90)
    if kind == "uint8":
        picture = (picture * 255).byte()
    box = torch.tensor([30.5, 20.0, 42.25, 31.0])
    crop = crops.crop_around(picture, box, 2.0)
    assert crop.picture.shape == (3, 60, 90)
    assert crop.picture.is_floating_point()
    assert 0 <= crop.picture.min() <= crop.picture.max() <= 1
    inside = crop.to_crop(box)
    assert (inside >= 0).all()
    assert ((inside[2:] - inside[:2]) / (box[2:] - box[:2])).tolist() == pytest.approx([2, 2])
    torch.testing.assert_close(crop.to_whole(inside), box)
    torch.testing.assert_close(crop.to_whole(crop.to_crop(box.reshape(2, 2))), box.reshape(2, 2))  # two points
    assert crops.crop_around(picture, box, 1).window == (0, 0, 90, 60)


def test_a_constant_stays_constant_and_an_edge_stays_in_its_place():
    picture = torch.zeros(3, 40, 60)
    picture[:, :, 30:] = 1
    crop = crops.crop_around(picture, [20, 10, 40, 30], 2.0)
    edge = crop.to_crop(torch.tensor([30.0, 20.0]))[0]
    assert (crop.picture[:, :, : int(edge) - 3] < 0.01).all()
    assert (crop.picture[:, :, int(edge) + 3 :] > 0.99).all()


@pytest.mark.parametrize(
    "box", [[10, 10, 10, 30], [10, 10, 5, 30], [95, 5, 120, 20], [NAN, 1, 5, 5], [1, 2, 3], [-9, -9, 0, 0]]
)
def test_boxes_that_cannot_be_cropped(box):
    with pytest.raises(InvalidPrompt):
        crops.crop_around(noise(3, 60, 90), box, 2.0)
    with pytest.raises(InvalidPrompt):
        crops.cropping_factor(box, (60, 90))


@pytest.mark.parametrize("factor", [0.5, 0, -1, NAN, math.inf])
def test_factors_that_make_no_crop(factor):
    with pytest.raises(InvalidConfig):
        crops.crop_around(noise(3, 8, 8), [1, 1, 3, 3], factor)
    with pytest.raises(InvalidConfig):
        crops.sliding(noise(3, 8, 8), factor)


def test_a_box_that_reaches_outside_is_cut():
    outside, cut = (crops.crop_window((60, 90), box, 2.0) for box in ([-20, -20, 20, 20], [0, 0, 20, 20]))
    assert outside == cut


def test_equal_crops_come_once():
    picture, box = noise(3, 60, 90), [5, 5, 75, 55]  # too large to be shown more than 1.2 times as large
    assert len(crops.zoom(picture, box, REN.query_factors)) == 2
    assert len(crops.zoom(picture, box, REN.query_factors, compat="published")) == 8
    assert len(crops.zoom(picture, [40, 30, 45, 34], REN.query_factors)) == 8


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3)])
def test_the_smallest_pictures(size):
    assert crops.crop_around(noise(3, *size), [0, 0, 1, 1], 2.75).picture.shape == (3, *size)
    for tile in crops.views(noise(3, *size), (1.0, 2.0)):
        assert tile.picture.shape == (3, *size)


@pytest.mark.parametrize(
    ("size", "factor", "overlap"), [((288, 384), 2, 0), ((288, 512), 2, 0.2), ((100, 101), 3, 0.5)]
)
def test_tiles_reach_the_borders(size, factor, overlap):
    tiles = crops.sliding(torch.zeros(3, *size), factor, overlap)
    seen = torch.zeros(size)
    for tile in tiles:
        x1, y1, x2, y2 = tile.window
        seen[y1:y2, x1:x2] += 1
    assert seen[-1].min() > 0
    assert seen[:, -1].min() > 0
    assert (seen == 0).float().mean() < 0.02
    assert (seen > 1).any() == (overlap > 0)


def test_views_of_a_frame_are_the_frame_and_its_quarters():
    picture = noise(3, 40, 60)
    frame, *quarters = crops.views(picture, REN.video_factors)
    assert frame.picture is picture  # so that its tokens are not computed again
    assert [q.window for q in quarters] == [(0, 0, 30, 20), (30, 0, 60, 20), (0, 20, 30, 40), (30, 20, 60, 40)]
    with pytest.raises(InvalidConfig):
        crops.views(picture, (2.0,), overlap=1.0)


# ---- candidates


def test_one_place_per_frame_in_any_order():
    frames, scores = [7, 3, 3, 7, 3], torch.tensor([0.1, 0.9, 0.9, 0.8, 0.2])
    found = selection(frames, scores, preset=REN)
    assert found.frame_max.rows.tolist() == [1, 3]  # by frame; the first of a tie
    assert found.frame_max.frames.tolist() == [3, 7]
    assert selection(frames, scores, preset=REN, compat="published").frame_max.rows.tolist() == [1, 2, 3]


@pytest.mark.parametrize("gap", ["tie", "missing frame"])
def test_the_query_moment_is_found_by_its_frame(gap):
    scores = torch.tensor([0.9, 0.3, 0.9, 0.3, 0.95, 0.85, 0.75])
    frames = torch.tensor([0, 1, 2, 3, 4, 5, 6]) if gap == "tie" else torch.tensor([0, 1, 3, 4, 5, 6, 7])
    query = 5 if gap == "tie" else 6
    if gap == "tie":
        scores, frames = torch.cat([scores[:1], scores]), torch.cat([frames[:1], frames])
    kept = selection(frames, scores, preset=REN, query_frame=query)
    assert kept.top_p.scores.tolist() == pytest.approx([0.9, 0.9, 0.75])
    published = selection(frames, scores, preset=REN, query_frame=query, compat="published")
    assert published.top_p.scores.tolist() != pytest.approx([0.9, 0.9, 0.75])  # position arithmetic hits another frame


def test_a_query_outside_what_was_searched_suppresses_nothing():
    scores = torch.full((4,), 0.9)
    for query in (None, -3, 9):
        assert len(selection(range(4), scores, preset=REN, query_frame=query).top_p) == 1
    assert len(select(range(4), scores, preset=REN, query_frame=3)) == 0  # all of it is the moment of the query


@pytest.mark.parametrize("compat", [None, "published"])
def test_neighbours_of_a_peak_are_silenced_as_far_as_they_are_high(compat):
    scores = torch.tensor([0.5, 0.75, 0.9, 0.8, 0.6, 0.85, 0.2])
    peaks = selection(range(7), scores, preset=REN, compat=compat).peaks
    assert peaks.rows.tolist() == [0, 2, 4, 5, 6]


def test_the_last_of_equals_stay_among_the_best():
    scores = torch.tensor([0.9, 0.1] * 4)
    chosen = preset("ren-vql", top_k=2)
    assert select(range(8), scores, preset=chosen).tolist() == [4, 6]
    assert select(range(8), scores, preset=chosen, compat="published").tolist() == [0, 2, 4, 6]


def test_what_is_worse_than_the_threshold_goes_unless_it_is_the_best():
    assert select(range(5), torch.tensor([0.9, 0.1, 0.69, 0.1, 0.7]), preset=REN).tolist() == [0, 4]
    assert select(range(3), torch.tensor([0.2, 0.05, 0.1]), preset=REN).tolist() == [0]
    assert select(range(3), torch.tensor([-0.2, -0.05, -0.1]), preset=REN).tolist() == [1]
    assert len(select(range(3), torch.zeros(3), preset=REN)) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_scores_of_any_float(dtype):
    assert select(range(3), torch.tensor([0.5, 0.125, 0.75], dtype=dtype), preset=REN).tolist() == [2]


def test_no_candidates():
    assert len(select([], torch.zeros(0), preset=REN)) == 0
    assert len(select([1, 2], torch.ones(2), preset=REN, mask=torch.tensor([False, False]))) == 0
    assert select([1, 2], torch.tensor([NAN, 0.5]), preset=REN, mask=torch.tensor([False, True])).tolist() == [1]
    with pytest.raises(InvalidPrompt, match="at least one"):
        select([1, 2], torch.zeros(2), preset=REN, compat="published")
    with pytest.raises(InvalidPrompt, match="at least one"):
        select([], torch.zeros(0), preset=REN, compat="published")


@pytest.mark.parametrize(
    ("frames", "scores", "options", "error"),
    [
        ([1], [NAN], {}, InvalidPrompt), ([1], [math.inf], {}, InvalidPrompt), ([1, 2], [0.5], {}, InvalidPrompt),
        ([[1]], [[0.5]], {}, InvalidPrompt), ([1], [0.5], {"mask": torch.ones(2)}, InvalidPrompt),
        ([1], [0.5], {"compat": "original"}, InvalidConfig),
    ],
)  # fmt: skip
def test_scores_that_are_refused(frames, scores, options, error):
    with pytest.raises(error):
        select(frames, torch.tensor(scores), preset=REN, **options)


def test_selection_of_a_long_video_is_quick():
    count = 200_000
    steps = torch.randn(count, generator=torch.Generator().manual_seed(0))
    scores = (steps.cumsum(0) / 100).sin() * 0.4 + 0.5
    found = selection(torch.arange(count), scores, preset=REN).peaks
    assert 10 < len(found) < count / 2


# ---- tokens of the query


def grid(height: int, width: int, count: int = 4) -> torch.Tensor:
    y = (torch.arange(count) + 0.5) * height / count
    x = (torch.arange(count) + 0.5) * width / count
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)


def test_the_deepest_point_inside():
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[6:38, 10:36] = True
    points = grid(40, 60)
    assert points[deepest(mask, points)].tolist() == [22.5, 25.0]
    assert deepest(torch.ones(40, 60), points) == 5  # the border counts where nothing else does
    assert deepest(mask, points[:1]) is None
    assert deepest(torch.zeros(40, 60), points) is None
    assert deepest(mask, points[:0]) is None
    assert deepest(torch.ones(4, 6), torch.tensor([[6.0, 4.0]])) == 0  # on the far border


def test_crops_without_a_token_leave_no_row():
    points, tokens = grid(40, 60), torch.eye(16)
    empty, small, large = torch.zeros(40, 60), torch.zeros(40, 60), torch.zeros(40, 60)
    small[0, 0], large[:, :40] = 1, 1
    found = choose_each([empty, small, large], [PointTokens(points, tokens)] * 3)
    assert found.pictures.tolist() == [2]
    assert found.tokens.shape == (1, 16)
    published = choose_each([empty, small, large], [PointTokens(points, tokens)] * 3, compat="published")
    assert published.pictures.tolist() == [1, 2]
    assert not published.tokens[0].any()
    nothing = choose_each([empty], [PointTokens(points, tokens)])
    assert nothing.tokens.shape == (0, 16)
    assert len(choose_each([], [])) == 0


def test_queries_that_do_not_fit():
    with pytest.raises(IncompatibleModel):
        choose(torch.ones(4, 4), grid(4, 4), torch.ones(3, 2))
    with pytest.raises(InvalidPrompt):
        deepest(torch.ones(1, 4, 4), grid(4, 4))
    with pytest.raises(InvalidPrompt):
        deepest(torch.ones(4, 4), torch.tensor([[NAN, 1.0]]))


# ---- sources


@pytest.fixture(scope="module")
def source():
    backbone = tiny.make("dinov2")
    torch.manual_seed(1)
    card = ModelCard("tiny", "regions", "ren", dim=32, image_size=42, grid_size=4)
    return RegionTokenSource(RegionModel(backbone, RegionEncoder(32, layers=2), card), grid=5, batch=2)


def counted(source: RegionTokenSource) -> tuple[RegionTokenSource, list[int]]:
    """The source with an empty memory, and how many pictures its backbone was shown."""
    fresh = RegionTokenSource(source.model, source.grid, source.size, source.batch)
    shown: list[int] = []
    encode = fresh._recent.compute
    fresh._recent.compute = lambda pictures: shown.append(len(pictures)) or encode(pictures)
    return fresh, shown


def test_region_tokens_are_unit_and_at_points_of_the_picture(source):
    pictures = [noise(3, 50, 80), (noise(3, 30, 20, seed=1) * 255).byte(), noise(3, 50, 80, seed=2)]
    found = source.tokens(pictures)
    for picture, f in zip(pictures, found, strict=True):
        assert f.tokens.shape == (25, source.dim)
        assert len(f) == 25
        torch.testing.assert_close(f.tokens.norm(dim=1), torch.ones(25))
        assert (f.points > 0).all()
        assert (f.points < torch.tensor([picture.shape[2], picture.shape[1]])).all()
    assert source.name == "tiny/grid5@42"
    expected = source.model.encode(pictures[0], points=found[0].points).tokens  # the public verb, asked the same
    torch.testing.assert_close(F.normalize(expected, dim=1), found[0].tokens, atol=1e-5, rtol=0)
    assert source.tokens([]) == []


def test_a_picture_is_encoded_once_for_tokens_and_masks(source):
    fresh, shown = counted(source)
    pictures = [noise(3, 42, 42, seed=i) for i in range(3)]
    fresh.tokens([*pictures, pictures[0]])
    fresh.object_tokens(pictures, [torch.ones(1, 42, 42)] * 3)
    assert sum(shown) == 3
    fresh.tokens([p.clone() for p in pictures])  # other pictures, as far as can be told
    assert sum(shown) == 6
    fresh.tokens([noise(3, 42, 42, seed=i) for i in range(20)])
    assert len(fresh._recent.kept) == 8  # memory is bounded
    assert fresh.tokens(pictures)[2].tokens.allclose(source.tokens(pictures)[2].tokens, atol=1e-6)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_object_tokens_are_means_of_enlarged_features(source, fit):
    model = RegionModel(source.model.backbone, source.model.encoder, replace(source.model.card, fit=fit))
    picture = noise(3, 60, 84)
    masks = torch.stack([noise(60, 84, seed=3) > 0.7, torch.zeros(60, 84) > 0])
    found = RegionTokenSource(model, grid=3).object_tokens([picture], [masks])[0]
    feature_map = model.features(picture)[0]
    features = feature_map.features
    if fit == "pad":  # 30 × 42 in the middle of 42 × 42: what is enlarged is the whole canvas
        enlarged = F.interpolate(features[None], (84, 84), mode="bilinear")[0][:, 12:72]
    else:
        enlarged = F.interpolate(features[None], (60, 84), mode="bilinear")[0]
    expected = F.normalize(enlarged[:, masks[0]].mean(1), dim=0)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)
    assert not found[1].any()


def test_one_mask_of_one_picture(source):
    picture, mask = noise(3, 20, 30), torch.ones(20, 30, dtype=torch.bool)
    assert source.object_token(picture, mask).shape == (32,)
    with pytest.raises(InvalidPrompt, match=r"\(K, 20, 30\)"):
        source.object_token(picture, mask[:5])
    with pytest.raises(InvalidPrompt):
        pooled(torch.ones(2, 3, 3), ImageTransform((4, 4), (3, 3)), torch.ones(4, 4))


def test_attention_looks_somewhere(source):
    picture = noise(3, 30, 40)
    maps = source.attention(picture, torch.tensor([[5.0, 5.0], [35.0, 25.0]]))
    assert maps.shape == (2, 30, 40)
    assert (maps > 0).all()


def test_tokens_in_the_space_of_words():
    segmenter = make_segmenter()
    source = AlignedTokenSource(segmenter, batch=2)
    pictures = [noise(3, 64, 96), noise(3, 32, 32, seed=1), noise(3, 64, 96, seed=2)]
    for picture, found in zip(pictures, source.tokens(pictures), strict=True):
        words = segmenter.encode(picture)[0].words
        torch.testing.assert_close(found.tokens.T.unflatten(1, words.shape[1:]), words, atol=1e-5, rtol=1e-5)
        cell = torch.tensor([picture.shape[2] / words.shape[2], picture.shape[1] / words.shape[1]])
        torch.testing.assert_close(found.points[0], cell / 2)
    phrases = source.words(["red mug", "tap"])
    assert phrases.shape == (2, source.dim)
    torch.testing.assert_close(phrases.norm(dim=1), torch.ones(2))
    assert similarity(found.tokens, phrases).abs().max() <= 1.001
    mean = source.object_token(pictures[0], torch.ones(64, 96, dtype=torch.bool))
    assert mean.shape == (source.dim,)
    with pytest.raises(InvalidPrompt):
        source.words(["mug", " "])


def test_matching_keeps_what_is_above_or_the_best():
    tokens = F.normalize(torch.tensor([[1.0, 0], [1, 1], [0, 1], [-1, 0]]), dim=1)
    assert matching(tokens, torch.tensor([[2.0, 0]]), 0.6).tolist() == [0, 1]
    assert matching(tokens, torch.tensor([[2.0, 0], [0, 1]]), 0.9).tolist() == [0, 2]
    assert matching(tokens, torch.tensor([[1.0, 0]]), 1.5).tolist() == [0]
    assert matching(tokens[:0], torch.tensor([[1.0, 0]]), 0.5).tolist() == []
    assert similarity(torch.zeros(1, 2), torch.ones(1, 2)).item() == 0


@pytest.mark.parametrize(
    ("tokens", "queries", "error"),
    [
        (torch.ones(2, 3), torch.ones(1, 4), IncompatibleModel), (torch.ones(2, 3), torch.ones(0, 3), InvalidPrompt),
        (torch.ones(3), torch.ones(1, 3), IncompatibleModel), (torch.ones(2, 3) * NAN, torch.ones(1, 3), InvalidPrompt),
        (torch.ones(2, 3), torch.ones(1, 3) * NAN, InvalidPrompt),
    ],
)  # fmt: skip
def test_tokens_that_do_not_compare(tokens, queries, error):
    with pytest.raises(error):
        similarity(tokens, queries)


def test_sources_refuse_empty_grids_and_batches(source):
    for options in ({"grid": 0}, {"batch": 0}):
        with pytest.raises(InvalidConfig):
            RegionTokenSource(source.model, **options)
    with pytest.raises(InvalidConfig):
        AlignedTokenSource(make_segmenter(), batch=0)
    with pytest.raises(InvalidImage):
        source.tokens([torch.full((3, 20, 20), NAN)])


# ---- query expansion

QUERIES = torch.tensor([[1.0, 0, 0]])
TRACK = F.normalize(torch.tensor([[1.0, 0.1, 0], [0, 1, 0], [1, 0, 0.2], [1, 0.5, 0], [0, 0, 1], [1, 1, 0]]), dim=1)
MOMENTS = torch.tensor([0, 0, 1, 2, 2, 2])  # two crops of the second frame gave no token


def test_the_token_that_was_selected_is_the_one_that_joins():
    found = expand(QUERIES, TRACK, MOMENTS, torch.tensor([True, True, True]), preset=REN)
    assert torch.equal(found.tokens, TRACK[[0, 2, 3, 5]])
    assert found.moments.tolist() == [0, 1, 2, 2]
    found = expand(QUERIES, TRACK, MOMENTS, torch.tensor([True, False, True]), preset=REN)
    assert found.moments.tolist() == [0, 2, 2]


def test_the_published_expansion_takes_others():
    found = expand(QUERIES, TRACK, MOMENTS, torch.tensor([True] * 3), preset=REN, compat="published")
    assert torch.equal(found.tokens, TRACK[[0, 1, 2, 2]])  # by number of the moment: a stranger, and the same one twice
    assert found.moments.tolist() == [0, 1, 2, 2]


def test_few_tokens_that_differ_stand_for_many():
    found = expand(QUERIES, TRACK.repeat(50, 1), MOMENTS.repeat(50), torch.tensor([True] * 3), preset=REN, most=2)
    assert len(found) == 2
    assert torch.equal(found.tokens, TRACK[[3, 5]])  # not one of them twice
    assert len(expand(QUERIES, TRACK, MOMENTS, torch.tensor([True] * 3), preset=REN, most=0)) == 0
    assert len(expand(QUERIES, TRACK, MOMENTS, torch.tensor([True] * 3), preset=REN, most=99)) == 4


def test_an_expansion_without_anything_to_add():
    nothing = expand(QUERIES, TRACK[:0], MOMENTS[:0], torch.zeros(0, dtype=torch.bool), preset=REN)
    assert nothing.tokens.shape == (0, 3)
    assert len(expand(-QUERIES, TRACK, MOMENTS, torch.tensor([True] * 3), preset=REN)) == 0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"moments": MOMENTS[:2]}, InvalidPrompt), ({"usable": torch.tensor([True])}, InvalidPrompt),
        ({"moments": MOMENTS - 1}, InvalidPrompt), ({"compat": "old"}, InvalidConfig), ({"most": -1}, InvalidConfig),
        ({"tokens": TRACK * NAN}, InvalidPrompt), ({"queries": QUERIES[:0]}, InvalidPrompt),
        ({"usable": torch.ones(9), "compat": "published"}, InvalidPrompt),
    ],
)  # fmt: skip
def test_expansions_that_are_refused(change, error):
    values = {"queries": QUERIES, "tokens": TRACK, "moments": MOMENTS, "usable": torch.tensor([True] * 3)} | change
    with pytest.raises(error):
        expand(**values, preset=REN)


def test_small_or_blurred_boxes_teach_nothing():
    sharp, blurred = noise(3, 40, 40), torch.full((3, 40, 40), 0.4)
    large, small = torch.tensor([5.0, 5, 30, 30]), torch.tensor([5.0, 5, 30, 15])
    assert worth_learning(sharp, large, REN)
    assert not worth_learning(sharp, small, REN)  # 10 pixels are not enough
    assert not worth_learning(blurred, large, REN)
    assert not worth_learning(sharp, large * NAN, REN)


def test_sharpness_of_any_picture():
    picture = (noise(3, 12, 17) * 255).round().byte()
    assert sharpness(picture) == sharpness(picture.float() / 255)
    red = torch.zeros(3, 20, 20, dtype=torch.uint8)
    red[0, ::2] = 255
    assert sharpness(red) > 5 * sharpness(red, compat="published")  # which takes red for blue
    for size in ((1, 1), (1, 9), (9, 1)):
        assert sharpness(noise(3, *size)) >= 0
    with pytest.raises(InvalidImage):
        sharpness(noise(1, 8, 8))
    with pytest.raises(InvalidImage):
        sharpness(torch.zeros(3, 0, 8))
