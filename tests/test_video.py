"""Reading and writing video: real files, made here with PyAV, sound and broken."""

from __future__ import annotations

import threading
import wave
from contextlib import ExitStack, suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opsin.errors import InvalidConfig, InvalidPrompt, InvalidVideo, MissingFile, UnsupportedSize
from opsin.video import ClipWriter, VideoReader, open_video

SIZE = (48, 64)


def shade(i: int) -> int:
    return 40 + (i * 3) % 180


def write_video(path, count=60, *, times=None, rotation=0, gop=10, container="mp4", options=None, size=SIZE) -> Path:
    """A clip whose frame ``i`` is grey of ``shade(i)`` with a red corner, with B-frames, 30 per second."""
    with av.open(str(path), "w", format=container, options=options or {}) as output:
        settings = {"g": str(gop), "bf": "2", "crf": "10", "sc_threshold": "0"}
        stream = output.add_stream("libx264", rate=30, options=settings)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 90_000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(count):
            image = np.full((*size, 3), shade(i), np.uint8)
            image[:8, :8] = (255, 0, 0)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = round((times[i] if times else i / 30) * 90_000)
            frame.time_base = Fraction(1, 90_000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return Path(path)


def shown(frame) -> int:
    """The frame number that the picture itself tells."""
    return round((float(frame.image[1, 30:, 30:].float().mean()) - 40) / 3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4")


def test_every_frame_once_in_order_with_its_time(clip):
    with open_video(clip) as reader:
        frames = list(reader.frames())
        assert [f.index for f in frames] == list(range(60)) == [shown(f) for f in frames]
        assert [f.time for f in frames] == pytest.approx([i / 30 for i in range(60)], abs=1e-4)
        assert (reader.fps, reader.duration, reader.size, reader.skipped) == (30, pytest.approx(2), SIZE, 0)
        assert frames[0].image.dtype == torch.uint8
        assert frames[0].image[:, 2, 2].tolist() == pytest.approx([255, 0, 0], abs=12)


def test_seeking_gives_exactly_the_streamed_frame(clip):
    streamed = list(open_video(clip).frames())
    for index in (59, 0, 7, 41, 33, 58):
        with open_video(clip) as fresh:  # no knowledge from an earlier pass
            frame = fresh.read_frame(index)
        assert frame.index == index
        assert frame.time == pytest.approx(streamed[index].time)
        assert torch.equal(frame.image, streamed[index].image)


def test_spans_indices_and_rates(clip):
    reader = open_video(clip)
    assert [f.index for f in reader.frames(start=1.2, stop=1.4)] == [36, 37, 38, 39, 40, 41]
    assert [f.index for f in reader.frames(indices=[52, 5, 50])] == [5, 50, 52]
    assert [f.index for f in reader.frames(rate=5)] == [*range(0, 60, 6), 59]  # the last is nearest to the tick at 2 s
    assert len(list(reader.frames(rate=1000))) == 60
    sevenths = [f.time for f in reader.frames(rate=7)][:14]
    assert sevenths == pytest.approx([k / 7 for k in range(14)], abs=0.5 / 30 + 1e-3)
    errors = np.array(sevenths) - np.arange(len(sevenths)) / 7
    assert abs(errors.mean()) < 0.005, "sampling is not late or early on average"
    assert list(reader.frames(indices=[])) == []
    with pytest.raises(InvalidConfig, match="rate"):
        next(reader.frames(rate=0))


def test_variable_frame_rate_keeps_the_true_times(tmp_path):
    times = [0.0]
    for gap in np.random.default_rng(0).uniform(0.01, 0.12, 49):
        times.append(times[-1] + float(gap))
    reader = open_video(write_video(tmp_path / "vfr.mp4", 50, times=times))
    assert [f.time for f in reader.frames()] == pytest.approx(times, abs=1e-4)
    for tick, frame in enumerate(reader.frames(rate=4)):
        nearest = min(abs(t - tick / 4) for t in times)
        assert abs(frame.time - tick / 4) == pytest.approx(nearest, abs=1e-4)


@pytest.mark.parametrize(("rotation", "corner"), [(90, (1, 0)), (-90, (0, 1)), (180, (1, 1))])
def test_rotation_is_applied(tmp_path, rotation, corner):
    reader = open_video(write_video(tmp_path / "turned.mp4", 4, rotation=rotation))
    frame = reader.read_frame(0)
    assert frame.size == reader.size == (SIZE if rotation == 180 else SIZE[::-1])
    row, col = (frame.size[0] - 3 if corner[0] else 2), (frame.size[1] - 3 if corner[1] else 2)
    assert frame.image[0, row, col] > 200
    assert frame.image[1, row, col] < 60, "the red corner lies where a player would show it"


def test_the_matrix_of_a_phone_turns_clockwise(tmp_path):
    path = write_video(tmp_path / "phone.mp4", 4)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 32 + 4  # version/flags, times and ids, layer/volume
    unit, zero, one = (65536).to_bytes(4, "big", signed=True), bytes(4), (1 << 30).to_bytes(4, "big")
    assert bytes(data[matrix : matrix + 4]) == unit
    minus = (-65536).to_bytes(4, "big", signed=True)
    data[matrix : matrix + 36] = zero + unit + zero + minus + zero + zero + zero + zero + one
    path.write_bytes(data)
    frame = open_video(path).read_frame(0)
    assert frame.size == SIZE[::-1]
    assert frame.image[0, 2, -3] > 200
    assert frame.image[1, 2, -3] < 60, "the top-left corner is shown at the top right"


def test_garbage_in_the_middle_is_skipped_and_counted(tmp_path):
    path = write_video(tmp_path / "damaged.mp4", 200, gop=20)
    data = bytearray(path.read_bytes())
    low, high = int(len(data) * 0.4), int(len(data) * 0.45)
    data[low:high] = np.random.default_rng(1).integers(0, 256, high - low, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    with open_video(path) as reader:
        frames = list(reader.frames())
        assert frames[-1].index == 199, "the rest of the video is read"
        assert 0 < reader.skipped < 40
        assert len(frames) + reader.skipped == 200
        late = [f for f in frames if f.index >= 140]
        assert [shown(f) % 60 for f in late] == [f.index % 60 for f in late], "damage renumbers no frame"
        assert torch.equal(reader.read_frame(190).image, frames[-10].image)


def test_a_file_cut_off_in_the_middle_gives_what_is_there(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", 200, options={"movflags": "faststart"}).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: int(len(whole) * 0.6)])
    reader = open_video(tmp_path / "cut.mp4")  # the header still claims 200 frames
    frames = list(reader.frames())
    assert 20 < len(frames) < 199
    assert [f.index for f in frames] == list(range(len(frames)))
    with pytest.raises(InvalidPrompt, match="frame 199"):
        reader.read_frame(199)


def test_a_lying_header_is_not_believed(tmp_path):
    path = write_video(tmp_path / "lying.mp4", 30)
    data = bytearray(path.read_bytes())
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
        at = data.index(box) + offset
        data[at : at + 4] = (1_000_000_000).to_bytes(4, "big")  # a duration of days
    path.write_bytes(data)
    assert len(list(open_video(path).frames())) == 30


@pytest.mark.parametrize("name", ["empty.mp4", "text.txt", "page.mp4", "sound.wav", "headless.mp4", "noise.mkv"])
def test_what_is_no_video_says_so(tmp_path, clip, name):
    path = tmp_path / name
    if name == "sound.wav":
        with wave.open(str(path), "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(bytes(8000))
    else:
        whole = clip.read_bytes()
        path.write_bytes({
            "empty.mp4": b"", "text.txt": b"hello world\n" * 99, "page.mp4": b"<html>404</html>",
            "headless.mp4": whole[: len(whole) // 2],
            "noise.mkv": np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes(),
        }[name])  # fmt: skip
    with pytest.raises(InvalidVideo, match=name) as caught:
        open_video(path)
    assert caught.value.rule
    if name == "sound.wav":
        assert "audio" in str(caught.value)


def test_missing_sources(tmp_path):
    with pytest.raises(MissingFile, match="nowhere"):
        open_video(tmp_path / "nowhere.mp4")
    with pytest.raises(InvalidVideo, match="no image"):
        open_video(tmp_path)
    with pytest.raises(InvalidVideo):
        open_video("camera:97")
    with pytest.raises(InvalidVideo):
        open_video("http://127.0.0.1:9/clip.mp4")
    with pytest.raises(InvalidVideo, match="int"):
        open_video(3)


def test_huge_frames_are_refused(clip, monkeypatch):
    monkeypatch.setattr("opsin.video.MAX_PIXELS", 1000)
    with pytest.raises(InvalidVideo, match="64×48"):
        open_video(clip)


@pytest.mark.parametrize("index", [-1, 60, 10**9])
def test_a_frame_beyond_the_end(clip, index):
    with pytest.raises(InvalidPrompt, match=f"frame {index}"):
        open_video(clip).read_frame(index)


def test_a_folder_of_frames_of_mixed_sizes_in_natural_order(tmp_path):
    for i in range(12):
        Image.new("RGB", (20 + i, 10 + i), (i * 10, 0, 0)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "frame5.png").write_bytes(b"not a picture")
    with open_video(tmp_path, fps=10) as reader:
        frames = list(reader.frames())
        assert [f.index for f in frames] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
        assert [f.size for f in frames][-2:] == [(20, 30), (21, 31)]
        assert [int(f.image[0, 0, 0]) for f in frames] == [f.index * 10 for f in frames]
        assert [f.time for f in frames][:3] == pytest.approx([0, 0.1, 0.2])
        assert (reader.skipped, reader.duration, reader.size) == (1, pytest.approx(1.2), (10, 20))
        assert reader.read_frame(11).size == (21, 31)
        with pytest.raises(InvalidPrompt):
            reader.read_frame(5)


def test_a_stream_may_change_its_size(tmp_path):
    small = write_video(tmp_path / "small.ts", 20, container="mpegts").read_bytes()
    large = write_video(tmp_path / "large.ts", 20, container="mpegts", size=(96, 128)).read_bytes()
    (tmp_path / "both.ts").write_bytes(small + large)
    with open_video(tmp_path / "both.ts") as reader:
        sizes = [f.size for f in reader.frames()]
    assert reader.size == SIZE
    assert sizes[:18] == [SIZE] * 18
    assert sizes[-18:] == [(96, 128)] * 18


def test_arrays_are_a_video_too():
    arrays = [np.full((8, 9, 3), i, np.uint8) for i in range(5)]
    reader = open_video(arrays)
    assert [int(f.image[1, 4, 4]) for f in reader.frames()] == list(range(5))
    assert reader.size == (8, 9)


def test_writing_a_clip_keeps_pictures_and_times(tmp_path):
    path = tmp_path / "new" / "clip.mp4"
    times = [i * i / 100 for i in range(12)]
    with ClipWriter(path, 25, (33, 47)) as clip:
        for i, at in enumerate(times):
            clip.write(torch.full((3, 33, 47), i / 12), at)
        assert not path.exists(), "nothing under the name before it is complete"
    reader = open_video(path)
    frames = list(reader.frames())
    assert reader.size == (34, 48), "odd sides are padded to even ones"
    assert [f.time for f in frames] == pytest.approx(times, abs=1e-4)
    assert [float(f.image.float().mean()) for f in frames] == pytest.approx([i / 12 * 255 for i in range(12)], abs=3)


def test_an_interrupted_clip_leaves_nothing(tmp_path):
    def interrupted():
        with ClipWriter(tmp_path / "clip.mp4", 25, (32, 32)) as clip:
            clip.write(torch.zeros(3, 32, 32))
            clip.write(torch.zeros(3, 16, 16))

    with pytest.raises(UnsupportedSize, match=r"\(3, 32, 32\)"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_memory_does_not_grow_with_length(tmp_path):
    import tracemalloc

    peaks = []
    for count in (100, 1500):
        reader = open_video(write_video(tmp_path / f"{count}.mp4", count))
        tracemalloc.start()
        total = sum(1 for _ in reader.frames())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == count
    assert peaks[1] < 1.5 * peaks[0] + 100_000


@pytest.fixture
def stream():
    """``stream(data) -> URL`` of a server that sends ``data`` without a length and from the start, whoever asks."""
    with ExitStack() as stack:

        def serve(data: bytes) -> str:
            class Handler(BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(200)
                    self.end_headers()
                    with suppress(OSError):
                        self.wfile.write(data)

                def log_message(self, *words):
                    pass

            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}/live"

        yield serve


def test_a_stream_without_an_end_is_live_and_read_once(tmp_path, stream):
    path = write_video(tmp_path / "clip.ts", container="mpegts")
    assert not open_video(path).live
    with open_video(stream(path.read_bytes())) as reader:
        assert reader.live
        assert reader.duration is None
        assert [f.index for f in reader.frames()] == list(range(60)), "the frame that told the size is not lost"
        assert list(reader.frames()) == []


def test_a_live_source_is_recorded_for_its_duration(tmp_path, stream):
    from opsin.localization import recorded

    path = write_video(tmp_path / "clip.ts", container="mpegts")
    url = stream(path.read_bytes())
    with recorded(url, 1.0) as reader:
        frames = list(reader.frames())
        assert [f.index for f in frames] == list(range(30))
        assert [shown(f) for f in frames] == pytest.approx(range(30), abs=1)
        assert [f.time for f in frames] == pytest.approx([i / 30 for i in range(30)], abs=1e-3)
        assert reader.name == url
        assert [f.index for f in reader.frames(start=0.5)] == list(range(15, 30)), "it can be read again"
        clip = reader._source
    assert not clip.exists()
    assert not clip.parent.exists()
    with recorded(url, 99) as reader:
        assert len(list(reader.frames())) == 60, "a stream may end before the duration"
    with pytest.raises(InvalidConfig, match="duration"), recorded(url):
        pass
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidConfig, match="positive"), recorded(path, wrong):
            pass
    with recorded(path) as reader:
        assert reader.name == "clip.ts"
        assert len(list(reader.frames())) == 60


class Camera(VideoReader):
    """A reader of another kind: frames of two sizes arrive once, at uneven times, and never end."""

    name, fps, size, live = "camera:test", 10.0, (24, 32), True

    def __init__(self):
        self.given, self.closed = 0, False

    def _decode(self, start, index):
        while True:
            self.given += 1
            yield self.given + 100, 7.0 + self.given * 0.1 + (self.given % 2) * 0.03, self.given

    def _image(self, raw):
        height, width = (48, 64) if raw % 5 == 0 else self.size
        return torch.full((3, height, width), min(raw * 4, 255), dtype=torch.uint8)

    def close(self):
        self.closed = True


def test_an_endless_camera_is_recorded_and_released():
    from opsin.localization import recorded

    camera = Camera()
    with recorded(camera, 1.98) as reader:
        assert camera.closed
        assert camera.given == 21, "no frame is read beyond the duration but the one that ends it"
        frames = list(reader.frames())
        assert [f.time for f in frames] == pytest.approx([i * 0.1 - (i % 2) * 0.03 for i in range(20)], abs=1e-3), (
            "uneven times are kept, from 0"
        )
        assert {f.size for f in frames} == {(24, 32)}
        assert [float(f.image.float().mean()) for f in frames] == pytest.approx([4 * i for i in range(1, 21)], abs=4)
