"""``VideoSearch``: encoding once, several questions, the published stages end to end, words, bad questions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from opsin.errors import IncompatibleModel, InvalidConfig, InvalidPrompt, InvalidVideo, ModelUnavailable
from opsin.geometry import box_iou
from opsin.localization import VideoSearch, locate
from opsin.localization.search import default_preset
from opsin.tracking.base import Step
from opsin.video import open_video
from opsin.vql.preset import preset
from opsin.vql.store import TokenStore, identity, open_store
from tests.conformance import sam2_tiny
from tests.test_localization import COUNT, box_at, encoded, film, frames, model, quality, thing  # noqa: F401 - fixtures


@pytest.fixture
def encodings(model, monkeypatch):  # noqa: F811
    """Numbers of pictures that went through the backbone, call by call."""
    counts: list[int] = []
    plain = model.backbone.encode

    def counted(images, **options):
        counts.append(len(images) if isinstance(images, (list, tuple)) else 1)
        return plain(images, **options)

    monkeypatch.setattr(model.backbone, "encode", counted)
    return counts


# ---- encoding once


def test_the_second_question_encodes_no_frame_again(model, frames):  # noqa: F811
    with VideoSearch(frames, model=model, rate=15, tracker="template") as search:
        first = search.locate(image=thing())
        encoded = search.store.encoded
        assert encoded == len(search.store) == 21
        second = search.locate(image=thing())
        assert search.store.encoded == encoded
    alone = locate(frames, image=thing(), model=model, rate=15, tracker="template")
    for track in (second, alone):
        assert torch.equal(track.boxes, first.boxes)
        assert torch.equal(track.timeline, first.timeline)


def test_questions_together_give_what_they_give_alone(model, frames, encodings):  # noqa: F811
    queries = [{"image": thing()}, {"frame": 24, "box": box_at(24)}, {"image": thing(), "before": 20}]
    once = preset("template", rounds=1)
    with VideoSearch(frames, model=model, preset=once, rate=15, tracker="template", keep=False) as search:
        together = search.locate_all(queries)
        assert search.store.encoded == 21, "one pass"
        assert len(search.store) == 0
        alone = [search.locate(**q) for q in queries]
        assert search.locate_all([]) == []
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.timeline, b.timeline)
    assert int(together[2].frames[-1]) < 20


def test_a_cache_outlives_the_search(model, frames, tmp_path):  # noqa: F811
    tracks = [locate(frames, image=thing(), model=model, rate=15, tracker="template", cache=tmp_path) for _ in range(2)]
    assert torch.equal(tracks[0].boxes, tracks[1].boxes)
    with VideoSearch(frames, model=model, rate=15, tracker="template", cache=tmp_path) as search:
        assert len(search.store) == 21
        search.locate(image=thing())
        assert search.store.encoded == 0
    with VideoSearch(frames, model=model, rate=5, tracker="template", cache=tmp_path) as search:
        assert len(search.store) == 0, "another rate is another set of frames"
    with VideoSearch(frames[:30], model=model, rate=15, tracker="template", cache=tmp_path) as search:
        assert len(search.store) == 0, "another video"
    weight = next(model.backbone.parameters())
    weight.add_(1e-3)
    try:
        with VideoSearch(frames, model=model, rate=15, tracker="template", cache=tmp_path) as search:
            assert len(search.store) == 0, "other weights under the same name"
    finally:
        weight.sub_(1e-3)
    with pytest.raises(InvalidConfig, match="a file, a folder or a list"):
        VideoSearch(film(), model=model, cache=tmp_path)


def test_what_is_stored_does_not_depend_on_who_asked_first(model, frames, tmp_path):  # noqa: F811
    def stored(cache, *queries):
        with VideoSearch(frames, model=model, rate=7, tracker="template", cache=cache) as search:
            for query in queries:
                search.locate(**query)
            return [(s.frame, s.tensors["tokens"]) for s in search.store.shots()]

    one = stored(tmp_path / "a", {"frame": 17, "box": box_at(24)}, {"frame": 30, "box": box_at(30)})
    two = stored(tmp_path / "b", {"image": thing()})
    assert [f for f, _ in one] == [f for f, _ in two]
    assert all(torch.allclose(a.float(), b.float(), atol=2e-3) for (_, a), (_, b) in zip(one, two, strict=True))


KILLED = """
import sys, time, torch
from pathlib import Path
from opsin.video import open_video
from opsin.vql.store import open_store
def encode(pictures):
    time.sleep(0.05)
    return [{"mean": p.float().mean((1, 2))} for p in pictures]
reader = open_video(sys.argv[1], fps=30)
for shot in open_store(reader, encode, {}, rate=None, cache=Path(sys.argv[2])).shots():
    pass
"""


def test_a_killed_encoding_goes_on_where_it_was(tmp_path):
    from opsin.images import save_image

    for i in range(150):
        save_image(torch.full((3, 8, 8), i / 150), tmp_path / "film" / f"{i}.png")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "film"), str(tmp_path / "cache")]
    running = subprocess.Popen(command, env={**os.environ, "OPSIN_PROGRESS": "0"})
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/*/00000.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    calls = []

    def encode(pictures):
        calls.extend(pictures)
        return [{"mean": p.float().mean((1, 2))} for p in pictures]

    store = open_store(open_video(tmp_path / "film", fps=30), encode, {}, rate=None, cache=tmp_path / "cache")
    before = len(store)
    assert before >= 32
    shots = list(store.shots())
    assert [s.frame for s in shots] == list(range(150)), "nothing lost, nothing twice"
    assert len(calls) == 150 - before
    assert float(shots[75].tensors["mean"][0]) == pytest.approx(75 / 150 * 255, abs=1)
    assert shots[75].size == (8, 8)


def test_an_interrupted_pass_keeps_what_it_has(tmp_path):
    reader = open_video([np.full((8, 8, 3), i, np.uint8) for i in range(50)], fps=10)
    store = open_store(reader, lambda p: [{"a": x[0, 0, :1]} for x in p], {}, rate=None, cache=tmp_path)
    walk = store.shots()
    for _ in range(6):
        next(walk)
    walk.close()
    assert 6 <= len(store) < 50
    assert [s.frame for s in store.shots(start=2.0, stop=4.0)] == list(range(20, 40))
    assert len({s.frame for s in store.shots()}) == 50


def test_a_store_of_something_else_is_refused(tmp_path):
    reader = open_video([np.zeros((8, 8, 3), np.uint8)], fps=10)
    store = open_store(reader, lambda p: [{"a": x} for x in p], {"model": "one"}, rate=None, cache=tmp_path)
    list(store.shots())
    (store.folder / "store.json").write_text('{"model": "two"}')
    with pytest.raises(IncompatibleModel, match="one video by one model"):
        open_store(reader, lambda p: [], {"model": "one"}, rate=None, cache=tmp_path)
    part = next(store.folder.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(IncompatibleModel, match="Delete it"):
        list(TokenStore(reader, lambda p: [], rate=None, folder=store.folder).shots())


def test_identity_follows_the_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    first = identity(path)
    assert identity(str(path)) == first
    path.write_bytes(b"other")
    assert identity(path) != first


# ---- questions


def test_several_pictures_of_one_object(model, frames):  # noqa: F811
    scenes = [film()[8], film()[25]]
    both = locate(frames, image=scenes, box=[box_at(8), box_at(25)], model=model, rate=10, tracker="template")
    assert int(both.frames[-1]) == pytest.approx(30, abs=1)
    assert quality(both) > 0.5
    crops = locate(frames, image=[thing(), thing()], model=model, rate=10, tracker="template")
    assert int(crops.frames[-1]) == pytest.approx(30, abs=1)
    with pytest.raises(InvalidPrompt, match="a box or a point each"):
        locate(frames, image=scenes, box=[box_at(8)], model=model)
    with pytest.raises(InvalidPrompt, match="at least one image"):
        locate(frames, image=[], model=model)


@pytest.mark.parametrize(
    ("query", "error", "words"),
    [
        ({"words": "a red thing"}, InvalidPrompt, "aligned with text"),
        ({"words": "  "}, InvalidPrompt, "blank"),
        ({"words": "mug", "image": torch.zeros(3, 9, 9)}, InvalidPrompt, "image and words"),
        ({"words": "mug", "box": (1, 1, 5, 5)}, InvalidPrompt, "belongs to a picture"),
        ({"image": torch.zeros(3, 9, 9), "before": 0}, InvalidPrompt, "at least 1"),
        ({"image": torch.zeros(3, 9, 9), "search": "after"}, InvalidConfig, "before"),
        ({"picture": torch.zeros(3, 9, 9)}, InvalidConfig, "picture"),
        ({"frame": 0, "box": (1, 1, 30, 30)}, InvalidVideo, "none before frame 0"),
    ],
)
def test_questions_that_cannot_be(model, frames, query, error, words):  # noqa: F811
    with VideoSearch(frames, model=model, tracker="template") as search, pytest.raises(error, match=words):
        search.locate(**query)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"preset": "ren-vqll"}, InvalidConfig, "ren-vql"),
        ({"tokens": "pixels"}, InvalidConfig, "features"),
        ({"rate": 0}, InvalidConfig, "rate"),
        ({"tracker": "sam2.1-large"}, ModelUnavailable, "sam2.1"),
        ({"model": "codec-tiny"}, IncompatibleModel, "codec-tiny"),
    ],
)
def test_searches_that_cannot_be(model, frames, options, error, words, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error, match=words):
        VideoSearch(frames, **{"model": model, **options})


def test_the_query_is_a_frame_inside_the_search(model, frames):  # noqa: F811
    """As in VQ2D: the crop's frame may lie before the moment from which is looked back; it is no answer itself."""
    track = locate(frames, frame=10, box=box_at(10), before=40, model=model, rate=None, tracker="template")
    assert track.found
    assert 10 not in track.frames.tolist()
    assert (int(track.frames[0]), int(track.frames[-1])) == pytest.approx((22, 30), abs=1)


# ---- the published stages


class Still:
    """A tracker that claims three frames."""

    name = "still"

    def track(self, reader, seed, *, start=0.0, stop=None):
        return [Step(seed.frame + i, seed.time + i / 30, seed.box, seed.score) for i in (0, 1, 2)]


def test_the_published_stages_end_to_end(model, frames):  # noqa: F811
    assert default_preset(model) == "template"
    way = preset("ren-vql", rounds=1, first="last")
    with VideoSearch(frames, model=model, preset=way, tracker="template", rate=15) as search:
        track = search.locate(frame=25, box=box_at(25), search="all")
        encoded = search.store.encoded
        again = search.locate(frame=8, box=box_at(8), search="all")
        assert search.store.encoded == encoded
    assert track.found
    assert track.details["preset"] == "ren-vql"
    assert again.found
    seen = [m for m in track.details["candidates"] if 6 <= m["frame"] < 14 or 22 <= m["frame"] < 31]
    assert seen, "one of the candidates shows the object"


def test_a_second_round_looks_behind_the_first_track(model, frames):  # noqa: F811
    way = preset("ren-vql", second_threshold=-1, second_share=0.0, expansion_sharpness=0.0)
    once = preset(way, rounds=1)
    tracks = {}
    for chosen in (once, way):
        with VideoSearch(frames, model=model, preset=chosen, tracker=Still(), rate=15) as search:
            tracks[chosen.rounds] = search.locate(image=film()[8], box=box_at(8))
    assert tracks[1].details["tracker"] == "still"
    assert tracks[2].details["rounds"] == 2
    assert int(tracks[2].frames[0]) > int(tracks[1].frames[-1])


def test_tokens_thinned_to_one_question_find_the_same(model, frames):  # noqa: F811
    asked = {"frame": 25, "box": box_at(25), "search": "all"}
    tracks = []
    for keep in (True, False):
        with VideoSearch(
            frames, model=model, preset=preset("ren-vql", rounds=1), tracker=Still(), rate=15, keep=keep
        ) as search:
            tracks.append(search.locate(**asked))
    assert torch.equal(tracks[0].timeline, tracks[1].timeline)
    assert float(box_iou(tracks[0].boxes[:1], tracks[1].boxes[:1])) == 1


def test_sam2_gives_masks_and_tracks(model, frames, tmp_path):  # noqa: F811
    """The whole way with SAM 2, tiny and random: masks of the query and of candidates, refinement, track, second round."""
    folder = sam2_tiny.save(tmp_path / "sam2")
    way = preset("ren-vql", threshold=-1, second_threshold=-1, second_share=0.0, expansion_sharpness=0.0)
    with VideoSearch(frames, model=model, preset=way, tracker=f"dir:{folder}", rate=6) as search:
        assert search.engine.masks is search.tracker.masks, "one set of weights"
        track = search.locate(frame=25, box=box_at(25), search="all")
        template = search.locate(image=thing())
    for found in (track, template):
        assert found.found
        assert found.details["tracker"] == f"dir:{folder}"
        assert bool((found.boxes[:, 2:] > found.boxes[:, :2]).all())
    with VideoSearch(frames, model=model, tracker=f"dir:{folder}", rate=6) as search:
        assert search.locate(image=thing(), threshold=-9).details["preset"] == "template"


def test_details_are_json(model, frames):  # noqa: F811
    track = locate(frames, image=thing(), model=model, rate=10, tracker="template")
    data = json.loads(json.dumps(track.to_json()))
    assert data["preset"] == "template"
    assert data["tracker"] == "template"
    assert data["candidates"][-1]["frame"] in range(COUNT)


def test_a_query_that_is_a_whole_frame(model, frames):  # noqa: F811
    """The picture of the object is a frame of the video itself: as large as anything in it can be."""
    with VideoSearch(frames, model=model, rate=10, tracker="template") as search:
        track = search.locate(image=frames[25])
        assert len(track.timeline) == 14
        assert not track.found or bool((track.boxes[:, 2:] > track.boxes[:, :2]).all())


def test_the_published_stages_survive_damage(model, tmp_path):  # noqa: F811
    path = encoded(tmp_path / "damaged.mp4", film(), gop=5)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    low, high = start + int((len(data) - start) * 0.28), start + int((len(data) - start) * 0.32)
    data[low:high] = np.random.default_rng(0).integers(0, 256, high - low, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    way = preset("ren-vql", rounds=1, threshold=-1)
    with VideoSearch(path, model=model, preset=way, tracker="template", rate=10, cache=tmp_path) as search:
        track = search.locate(image=film()[25], box=box_at(25))
    assert track.found
    assert 0 < track.skipped < 20
    numbers = track.frames.tolist()
    assert numbers == list(range(numbers[0], numbers[-1] + 1)), "damage renumbers no frame"


def test_a_video_of_one_frame(model):  # noqa: F811
    track = locate([film()[25]], image=thing(), model=model, tracker="template", threshold=-9)
    assert track.frames.tolist() == [0]
    way = preset("ren-vql", threshold=-1)
    track = locate([film()[25]], image=thing(), model=model, tracker="template", preset=way)
    assert track.frames.tolist() == [0]
