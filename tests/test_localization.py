"""Localization: every stage alone, and the whole way on small films with a tiny random backbone."""

from __future__ import annotations

import itertools
import json
import math
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opsin.errors import InvalidConfig, InvalidImage, InvalidPrompt, InvalidVideo
from opsin.geometry import ImageTransform, box_iou
from opsin.localization import locate, query_picture, render, save_track
from opsin.localization.query import paste
from opsin.localization.template_finder import calibration_frames
from opsin.tracking import follow as tr
from opsin.tracking import matching as mt
from opsin.tracking.descriptors import DenseTokens
from opsin.video import ClipWriter, VideoFrame, VideoReader, open_video
from opsin.vql import timeline as tl

SIZE = (96, 128)
COUNT = 40
SEEN = ((6, 14), (22, 31))  # half-open spans of frames that show the object


def thing() -> torch.Tensor:
    """A chequered red and blue object ``(3, 24, 30)``."""
    picture = torch.zeros(3, 24, 30)
    picture[0, :, :15], picture[2, :, 15:] = 0.9, 0.9
    picture[1, 6:18, 8:22] = 0.8
    return picture


def box_at(i: int) -> tuple[int, int, int, int]:
    x, y = 10 + 2 * i, 20 + i
    return x, y, x + 30, y + 24


def film(present=SEEN) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ground = torch.nn.functional.interpolate(torch.rand((1, 3, 12, 16), generator=generator), SIZE, mode="bilinear")[0]
    ground = ground * 0.4 + 0.3
    frames = []
    for i in range(COUNT):
        frame = ground.roll(i, 2).clone()
        if any(a <= i < b for a, b in present):
            x1, y1, x2, y2 = box_at(i)
            frame[:, y1:y2, x1:x2] = thing()
        frames.append(frame)
    return frames


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import ResNetBackbone, ResNetConfig

    from opsin import backbones
    from opsin.cards import ModelCard
    from opsin.regions import RegionModel
    from opsin.regions.encoder import RegionEncoder

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage1", "stage2"]
    )
    folder = tmp_path_factory.mktemp("model")
    ResNetBackbone(config).save_pretrained(folder / "backbone")
    preprocessing = {"size": {"height": 128, "width": 128}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "backbone" / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    backbone = backbones.load(f"dir:{folder / 'backbone'}", device="cpu")
    card = ModelCard(
        name="tiny",
        kind="regions",
        family="ren",
        source="",
        dim=backbone.dim,
        backbone="backbone",
        grid_size=8,
        image_size=128,
    )
    made = RegionModel(backbone, RegionEncoder(backbone.dim, layers=1), card)
    made.save_pretrained(folder, embed_backbone=True)
    made.folder = folder
    return made


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """The film as a list of PNGs, ten per second when opened as a folder with ``fps=10``."""
    folder = tmp_path_factory.mktemp("film")
    for i, frame in enumerate(film()):
        render.to_picture(frame).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(COUNT)]


# ---- stages


def test_median_filter_removes_a_spike_and_keeps_a_step():
    assert tl.median_filter(torch.tensor([0.0, 0, 9, 0, 0, 5, 5, 5])).tolist() == [0, 0, 0, 0, 0, 5, 5, 5]
    assert tl.median_filter(torch.tensor([3.0])).tolist() == [3]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100, 1000])
def test_thinning_spreads_evenly_and_holds_few(count):
    kept = tl.thinned(range(count), 8)
    assert len(kept) <= 8
    assert len(kept) >= min(count, 4)
    assert len({b - a for a, b in itertools.pairwise(kept)}) <= 1
    assert not kept or kept[-1] >= (count - 1) * 0.6


def test_part_means_agree_with_slices():
    maps = torch.rand(3, 12, 16)
    box = torch.tensor([[3, 2, 9, 8]])
    means = mt.part_means(mt.running_sum(maps), box)
    assert means.shape == (1, 5, 3)
    outer = maps[:, 0:10, 1:11].sum((1, 2)) - maps[:, 2:8, 3:9].sum((1, 2))
    assert torch.allclose(means[0, 4], outer / 64, atol=1e-5), "the surroundings, two cells wide"
    for part, (y, x) in enumerate(((2, 3), (2, 6), (5, 3), (5, 6))):
        assert torch.allclose(means[0, part], maps[:, y : y + 3, x : x + 3].mean((1, 2)), atol=1e-5)


def test_windows_stay_inside_and_cells_are_whole():
    windows = mt.window_grid((10, 20), [(4, 3), (20, 10)])
    assert windows[:, :2].min() >= 0
    assert windows[:, 2].max() <= 20
    assert windows[:, 3].max() <= 10
    assert mt.whole_cells(torch.tensor([18.7, -3.0, 25.0, 1.0]), (10, 20)).tolist() == [14, 0, 20, 4]
    assert mt.whole_cells(torch.tensor([0.1, 0.1, 0.2, 0.2]), (1, 1)).tolist() == [0, 0, 1, 1]


def test_cells_and_pixels_are_inverse():
    dense = DenseTokens(torch.zeros(4, 8, 16), ImageTransform((100, 50), (64, 128), (2.0, 0.5), (14.0, 7.0)))
    boxes = torch.tensor([[5.0, 10.0, 45.0, 90.0]])
    assert torch.allclose(dense.to_pixels(dense.to_cells(boxes)), boxes, atol=1e-4)
    assert dense.to_cells(torch.tensor([0.0, 0.0, 50.0, 100.0])).tolist() == pytest.approx(
        [14 / 8, 7 / 8, 114 / 8, 57 / 8]
    )


def test_a_template_finds_its_object_on_a_new_background():
    generator = torch.Generator().manual_seed(1)
    token = torch.randn(16, 1, 1, generator=generator)

    def scene(x: int, y: int) -> DenseTokens:
        tokens = torch.randn(16, 24, 32, generator=generator)
        tokens[:, y : y + 6, x : x + 8] += 3 * token
        return DenseTokens(torch.nn.functional.normalize(tokens, dim=0), ImageTransform((240, 320), (240, 320)))

    empty = [
        DenseTokens(
            torch.nn.functional.normalize(torch.randn(16, 24, 32, generator=generator), dim=0), scene(0, 0).transform
        )
        for _ in range(3)
    ]
    example = mt.Example(scene(4, 5), torch.tensor([40.0, 50, 120, 110]))
    template = mt.Template.fit(mt.TokenSpace.fit([example.dense, *empty]), [example], empty)
    sides = torch.tensor([[80.0, 60.0], [40.0, 30.0], [120.0, 90.0]])
    found = template.best(scene(20, 12), sides)
    truth = torch.tensor([[200.0, 120, 280, 180]])
    assert float(box_iou(found.box[None], truth)) > 0.7
    absent = template.best(DenseTokens(empty[0].tokens.flip(1), empty[0].transform), sides)
    assert found.score > absent.score + 0.3
    near = template.best(scene(20, 12), sides, torch.tensor([0.0, 0, 100, 100]))
    centre = (near.box[:2] + near.box[2:]) / 2
    assert (centre <= 105).all(), "the search stays near"


def test_paste_draws_the_crop_where_it_says():
    picture, box = paste(thing(), torch.full((3, 60, 80), 0.5), 1.0, torch.Generator().manual_seed(3))
    x1, y1, x2, y2 = (int(v) for v in box)
    assert (x2 - x1, y2 - y1) == (30, 24)
    assert torch.allclose(picture[:, y1:y2, x1:x2], thing(), atol=1e-5)
    _, small = paste(torch.zeros(3, 500, 20), torch.zeros(3, 60, 80), 1.0, torch.Generator())
    assert small[3] - small[1] <= 48, "a crop larger than the frame is made to fit"


def steps_of(scores, boxes=None):
    frames = [VideoFrame(i + 1, (i + 1) / 10, torch.zeros(3, 50, 50, dtype=torch.uint8)) for i in range(len(scores))]
    asked = []

    def measure(chunk):
        def find(frame):
            def answer(sides, near):
                asked.append(near)
                box = boxes[frame.index - 1] if boxes else torch.tensor([10.0, 10, 20, 20])
                return mt.Found(box, scores[frame.index - 1], scores[frame.index - 1])

            return answer

        return [find(f) for f in chunk]

    start = tr.Step(0, 0.0, torch.tensor([10.0, 10, 20, 20]), 1.0)
    return tr.follow([frames[:3], frames[3:]], measure, start, 0.5, torch.tensor([10.0, 10.0])), asked


def test_following_bridges_a_short_loss_and_stops_at_a_long_one():
    steps, _ = steps_of([0.9, 0.9, 0.1, 0.2, 0.9, 0.1, 0.1, 0.1, 0.1, 0.9])
    assert [s.frame for s in steps] == [1, 2, 3, 4, 5]
    assert [math.isnan(s.score) for s in steps] == [False, False, True, True, False]
    steps, _ = steps_of([0.9, 0.1])
    assert [s.frame for s in steps] == [1], "what is lost at the end of the video is not claimed"


def test_following_ends_at_a_cut_unless_the_object_is_plain_behind_it():
    def walked(score):
        box = torch.tensor([10.0, 10, 20, 20])
        shades = [60, 65, 60, 200, 205, 200]
        frames = [
            VideoFrame(i + 1, (i + 1) / 10, torch.full((3, 50, 50), v, dtype=torch.uint8)) for i, v in enumerate(shades)
        ]
        scores = [0.9, 0.9, 0.9, score, score, score]

        def measure(chunk):
            return [lambda sides, near, s=scores[f.index - 1]: mt.Found(box, s, s) for f in chunk]

        start = tr.Step(0, 0.0, box, 1.0)
        seen = tr.glance(frames[0].image)
        steps = tr.follow([frames[:4], frames[4:]], measure, start, 0.4, torch.tensor([10.0, 10]), seen)
        return [s.frame for s in steps]

    assert walked(0.6) == [1, 2, 3], "enough without a cut, not behind one"
    assert walked(0.9) == [1, 2, 3, 4, 5, 6]


def test_join_is_contiguous_and_interpolates_unreadable_frames():
    def step(n, x):
        return tr.Step(n, n / 10, torch.tensor([x, 0.0, x + 10, 10]), 0.8)

    steps = tr.join([step(4, 4.0), step(3, 3.0)], step(5, 5.0), [step(8, 8.0)])
    assert [s.frame for s in steps] == [3, 4, 5, 6, 7, 8]
    assert [float(s.box[0]) for s in steps] == pytest.approx([3, 4, 5, 6, 7, 8])
    assert [s.time for s in steps] == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7, 0.8])


def test_walking_backwards_meets_every_frame_once():
    reader = open_video([np.full((8, 8, 3), i, np.uint8) for i in range(25)], fps=10)
    walked = [f.index for chunk in tr.backwards(reader, 2.0) for f in chunk]
    assert walked == list(range(19, -1, -1))
    walked = [f.index for chunk in tr.forwards(reader, 2.0, None) for f in chunk]
    assert walked == [21, 22, 23, 24]


# ---- the whole way


def quality(track) -> float:
    truth = torch.tensor([box_at(i) for i in track.frames.tolist()], dtype=torch.float32)
    return float(box_iou(track.boxes, truth).diagonal().mean())


def test_the_last_occurrence_is_found_and_followed(model, frames):
    track = locate(frames, image=thing(), model=model, rate=10)
    assert track.found
    assert (int(track.frames[0]), int(track.frames[-1])) == pytest.approx((22, 30), abs=1)
    assert track.frames.tolist() == list(range(int(track.frames[0]), int(track.frames[-1]) + 1))
    assert quality(track) > 0.5
    assert track.size == SIZE
    assert track.timeline[:, 0].diff().min() > 0


def test_a_box_in_a_frame_searches_what_came_before(model, frames):
    track = locate(frames, frame=24, box=box_at(24), model=model, rate=None)
    assert track.found
    assert int(track.frames[-1]) == 23, "the frames right before the query's own"
    earlier = locate(frames, frame=22, box=box_at(22), model=model, rate=None)
    assert (int(earlier.frames[0]), int(earlier.frames[-1])) == pytest.approx((6, 13), abs=1)
    everywhere = locate(frames, frame=8, box=box_at(8), model=model, rate=None, search="all")
    assert int(everywhere.frames[-1]) == pytest.approx(30, abs=1)


def test_an_absent_object_is_not_found_and_the_best_score_is_told(model, frames, tmp_path):
    with ClipWriter(tmp_path / "empty.mp4", 10, SIZE) as clip:
        for frame in film(present=()):
            clip.write(frame)
    present = locate(frames, image=thing(), model=model, rate=10)
    absent = locate(tmp_path / "empty.mp4", image=thing(), model=model, threshold=0.0)
    between = (present.score + absent.score) / 2  # a random backbone has no calibrated score
    assert absent.score < present.score - 0.1
    assert locate(frames, image=thing(), model=model, rate=10, threshold=between).found
    track = locate(tmp_path / "empty.mp4", image=thing(), model=model, threshold=between)
    assert not track.found
    assert len(track) == 0
    assert track.score == pytest.approx(float(track.timeline[:, 1].max()))
    assert render.contact_sheet(tmp_path / "empty.mp4", track, tmp_path / "sheet.png").exists()


def test_a_live_source_is_searched_for_its_duration(model, frames):
    class Camera(VideoReader):
        name, fps, size, live = "camera:test", 10.0, SIZE, True

        def _decode(self, start, index):
            yield from ((i, 5 + i / 10, film_frames[i]) for i in range(COUNT))

        def _image(self, raw):
            return (raw * 255).to(torch.uint8)

    film_frames = film()
    track = locate(Camera(), image=thing(), model=model, rate=10, duration=1.8)
    assert (int(track.frames[0]), int(track.frames[-1])) == pytest.approx((6, 13), abs=1)
    assert track.times.tolist() == pytest.approx([n / 10 for n in track.frames.tolist()], abs=1e-3)
    assert track.video == "camera:test"
    assert quality(track) > 0.5
    assert int(locate(Camera(), image=thing(), model=model, rate=10, duration=99).frames[-1]) == pytest.approx(
        30, abs=1
    )
    with pytest.raises(InvalidConfig, match="duration"):
        locate(Camera(), image=thing(), model=model)


def test_a_duration_bounds_the_search_of_a_file(model, frames):
    reader = open_video(frames, fps=10)
    track = locate(reader, image=thing(), model=model, rate=10, duration=1.8)
    assert int(track.frames[-1]) == pytest.approx(13, abs=1)
    assert float(track.timeline[-1, 0]) < 1.8
    cut = locate(reader, image=thing(), model=model, rate=10, duration=2.6)
    assert int(cut.frames[-1]) == 25, "the track ends where the search does"
    asked = locate(reader, frame=24, box=box_at(24), model=model, rate=10, duration=1.8)
    assert int(asked.frames[-1]) == pytest.approx(13, abs=1), "the earlier of the query's frame and the duration"
    with pytest.raises(InvalidConfig, match="duration"):
        locate(reader, image=thing(), model=model, duration=0)


def encoded(path, frames, times=None, rotation=0, gop=12):
    """The film as an mp4 that a player shows upright, ten frames per second or at ``times``."""
    turned = [np.ascontiguousarray(np.rot90(f.permute(1, 2, 0).numpy(), -rotation // 90)) for f in frames]
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=10, options={"crf": "12", "g": str(gop), "sc_threshold": "0"})
        stream.height, stream.width, stream.pix_fmt = *turned[0].shape[:2], "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i, image in enumerate(turned):
            picture = av.VideoFrame.from_ndarray((image * 255).round().astype(np.uint8), format="rgb24")
            picture.pts, picture.time_base = round((times[i] if times else i / 10) * 1000), Fraction(1, 1000)
            output.mux(stream.encode(picture))
        output.mux(stream.encode())
    return path


def test_variable_frame_rate_and_rotation(model, tmp_path):
    times = np.cumsum([0.0, *np.random.default_rng(0).uniform(0.02, 0.4, COUNT - 1)]).tolist()
    path = encoded(tmp_path / "phone.mp4", film(), times, rotation=90)
    track = locate(path, image=thing(), model=model, rate=None)
    assert track.size == SIZE, "boxes and sizes are those of the upright picture"
    assert (int(track.frames[0]), int(track.frames[-1])) == pytest.approx((22, 30), abs=1)
    assert track.times.tolist() == pytest.approx([times[n] for n in track.frames.tolist()], abs=2e-3)
    assert quality(track) > 0.5


def test_a_header_that_claims_days_costs_nothing(model, tmp_path):
    path = encoded(tmp_path / "lying.mkv", film())
    honest = locate(path, image=thing(), model=model, rate=10)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # Matroska's duration: a double of 8 bytes, in milliseconds
    data[at : at + 8] = struct.pack(">d", 1e12)
    path.write_bytes(data)
    with open_video(path) as reader:
        assert reader.duration > 86_400
        assert len(calibration_frames(reader, None)) == 5, "one a second: seeking by the claim finds none"
    lied = locate(path, image=thing(), model=model, rate=10)
    assert int(lied.frames[-1]) == pytest.approx(int(honest.frames[-1]), abs=1)


def test_a_damaged_or_cut_off_file_is_searched_as_far_as_it_goes(model, tmp_path):
    path = encoded(tmp_path / "damaged.mp4", film(), gop=5)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    low, high = start + int((len(data) - start) * 0.28), start + int((len(data) - start) * 0.32)
    data[low:high] = np.random.default_rng(0).integers(0, 256, high - low, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    track = locate(path, image=thing(), model=model, rate=10)
    assert 0 < track.skipped < 20
    assert int(track.frames[-1]) == pytest.approx(30, abs=1), "damage renumbers no frame"
    whole = encoded(tmp_path / "whole.ts", film(), gop=5).read_bytes()
    (tmp_path / "cut.ts").write_bytes(whole[: int(len(whole) * 0.6)])
    cut = locate(tmp_path / "cut.ts", image=thing(), model=model, rate=10)
    assert cut.found
    assert float(cut.timeline[-1, 0]) < 3


def test_locating_twice_gives_the_same_bits(model, frames):
    a, b = (locate(frames, image=thing(), model=model, rate=5) for _ in range(2))
    assert torch.equal(a.boxes, b.boxes)
    assert torch.equal(a.timeline, b.timeline)


def test_frames_of_mixed_sizes(model, frames, tmp_path):
    mixed = []
    for i, path in enumerate(frames):
        picture = Image.open(path)
        mixed.append(np.asarray(picture.resize((160, 100)) if i < 10 else picture))
    track = locate(mixed, image=thing(), model=model, rate=10)
    assert int(track.frames[-1]) == pytest.approx(30, abs=1)
    small_first = [np.asarray(Image.open(frames[0]).resize((40, 30))), *(np.asarray(Image.open(p)) for p in frames[1:])]
    found = locate(small_first, image=thing(), model=model, rate=10)
    assert int(found.frames[-1]) == pytest.approx(30, abs=1)
    assert float(found.boxes[:, 2].max()) > 40, "boxes are of their own frame's size"
    render.annotated_clip(mixed, track, tmp_path / "mixed.mp4", around=None)
    assert len(list(open_video(tmp_path / "mixed.mp4").frames())) == COUNT


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({}, "none"),
        ({"frame": 3, "image": "x.png"}, "image and frame"),
        ({"frame": 3}, "alone"),
        ({"frame": 3, "box": (5, 5, 5, 9)}, "at least one pixel"),
        ({"frame": 3, "box": (500, 500, 600, 600)}, "at least one pixel"),
        ({"frame": 3, "box": (5, 5, 20, 20), "point": (6, 6)}, "both"),
        ({"frame": 400, "box": (5, 5, 20, 20)}, "frame 400"),
        ({"image": torch.zeros(3, 1, 9)}, "2 pixels"),
        ({"image": torch.zeros(3, 1, 1)}, "2 pixels"),
        ({"image": torch.zeros(3, 40, 40), "box": (50, 50, 60, 60)}, "at least one pixel"),
        ({"image": torch.zeros(3, 40, 40), "box": (20, 20, 10, 30)}, "at least one pixel"),
        ({"image": torch.zeros(3, 40, 40), "box": (-30, 5, -10, 30)}, "at least one pixel"),
        ({"image": torch.zeros(3, 40, 40), "box": (float("nan"), 5, 10, 30)}, "finite"),
        ({"image": torch.zeros(3, 40, 40), "box": (5, 10, 30)}, "four"),
        ({"image": torch.zeros(3, 40, 40), "point": (41, 5)}, "inside"),
    ],
)
def test_queries_that_cannot_be(model, frames, query, words):
    with pytest.raises(InvalidPrompt, match=words):
        locate(frames, model=model, **query)


def test_other_bad_input(model, frames, tmp_path):
    (tmp_path / "crop.png").write_bytes(b"")
    with pytest.raises(InvalidImage):
        locate(frames, image=tmp_path / "crop.png", model=model)
    with pytest.raises(InvalidConfig, match="search"):
        locate(frames, image=thing(), model=model, search="after")
    with pytest.raises(InvalidConfig, match="rate"):
        locate(frames, image=thing(), model=model, rate=-1)
    with pytest.raises(InvalidVideo, match="none before frame 0"):
        locate(frames, frame=0, box=(5, 5, 20, 20), model=model)


def test_what_is_written(model, frames, tmp_path):
    track = locate(frames, image=thing(), model=model, rate=10)
    data = json.loads(save_track(track, tmp_path / "track.json").read_text())
    assert [row["frame"] for row in data["track"]] == track.frames.tolist()
    assert len(data["timeline"]) == len(track.timeline)
    render.annotated_clip(frames, track, tmp_path / "clip.mp4", around=0.1)
    shown = list(open_video(tmp_path / "clip.mp4").frames())
    assert len(track) <= len(shown) < COUNT
    sheet = render.contact_sheet(frames, track, tmp_path / "sheet.png", query=thing())
    assert Image.open(sheet).size[0] > 900
    plain = render.to_picture(film()[25])
    drawn = plain.copy()
    render.draw_box(drawn, box_at(25), "")
    assert drawn.tobytes() != plain.tobytes()
    assert query_picture(frames, frame=25, box=box_at(25)).shape == (3, 24, 30)


def test_a_frame_that_was_not_measured_has_no_score_in_json(model, frames, tmp_path):
    damaged = [np.asarray(Image.open(p)) for p in frames]
    (tmp_path / "bad.png").write_bytes(b"damaged")
    sources = [tmp_path / "bad.png" if i == 26 else a for i, a in enumerate(damaged)]
    track = locate(sources, image=thing(), model=model, rate=10)
    data = json.loads(save_track(track, tmp_path / "track.json").read_text())
    rows = {row["frame"]: row for row in data["track"]}
    assert rows[26]["score"] is None
    assert rows[26]["box"][0] == pytest.approx((rows[25]["box"][0] + rows[27]["box"][0]) / 2, abs=2)
    assert rows[25]["score"] > 0
    assert data["skipped_frames"] == 1


@pytest.mark.parametrize("tokens", ["pred", "proj", "both"])
def test_region_tokens_can_be_what_is_compared(tokens):
    grey = torch.linspace(0.3, 0.6, SIZE[1]).expand(3, *SIZE)
    frames = [grey.clone() for _ in range(9)]
    for frame in frames[3:6]:
        frame[:, 30:54, 40:70] = thing()
    pictures = [(frame.permute(1, 2, 0).numpy() * 255).astype(np.uint8) for frame in frames]
    scores = locate(pictures, image=thing(), tokens=tokens, rate=None, device="cpu").timeline[:, 1]
    assert scores[3:6].min() > max(scores[:2].max(), scores[7:].max())
    with pytest.raises(InvalidConfig, match="tokens"):
        locate(pictures, image=thing(), tokens="words", device="cpu")
