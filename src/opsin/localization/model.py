"""``locate``: one question about one video. ``VideoSearch`` is for more."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from opsin.geometry import check_box
from opsin.hub import atomic_path
from opsin.images import read_image
from opsin.localization.search import TOKENS, VideoSearch, load_for_words
from opsin.tracking.base import Tracker
from opsin.tracking.descriptors import Kind
from opsin.types import Track
from opsin.video import open_video
from opsin.vql.preset import Preset

if TYPE_CHECKING:
    from opsin.regions import RegionModel
    from opsin.segmentation import Segmenter


def locate(
    video: Any, *, image: Any = None, frame: int | None = None, box: Sequence[float] | None = None,
    point: Sequence[float] | None = None, words: str | Sequence[str] | None = None,
    search: Literal["before", "all"] = "before", before: int | None = None, threshold: float | None = None,
    model: str | Path | RegionModel | Segmenter = "opsin-tiny", preset: str | Preset | None = None,
    tracker: str | Path | Tracker = "auto", rate: float | None = 5.0, duration: float | None = None,
    cache: str | Path | None = None, size: int | None = None, tokens: Kind = TOKENS,
    device: Any = None, dtype: Any = None,
) -> Track:  # fmt: skip
    """The last time that an object was seen in a video, as one box per frame.

    The video is streamed at ``rate`` to score it, and at full rate around the moment that is chosen, to follow the
    object both ways until it is gone. Memory does not grow with its length.

    Args:
        video: what ``opsin.open_video`` takes: a file, a folder or list of frames, a URL, a camera.
        image: a picture of the object (anything ``opsin.read_image`` takes); with ``box`` or ``point``, a picture that
            contains it, which tells the object from its surroundings and so works better. A list of pictures shows
            the same object several times, with a list of boxes or points where they contain it.
        frame: instead of ``image``, the number of a frame of the video; needs ``box`` or ``point``.
        words: instead of a picture, a phrase or several for the same thing; needs a model that knows words.
        box, point: ``(x1, y1, x2, y2)`` or ``(x, y)``, pixels of the query's picture.
        search: with ``frame``, ``"before"`` searches the frames before it (VQ2D: where was this last seen?), ``"all"``
            the whole video, in which the query's own moment usually is the answer.
        before: only frames with a smaller number are searched, whatever the query is.
        threshold: least score of an answer, instead of the preset's; raise it for fewer false alarms.
        cache: folder that keeps the encoded frames, so that the next question about this video costs none.
        model, preset, tracker, rate, duration, size, tokens, device, dtype: see ``VideoSearch``.

    Returns:
        Track: ``found`` False with the best score when nothing reaches the threshold.

    Raises:
        InvalidVideo, MissingFile, InvalidImage, InvalidPrompt, InvalidConfig, and what loading a model raises.

    Source: REN-VQL (arXiv 2505.18153, after RELOCATE, 2412.01826); the template is an exemplar discriminant (Hariharan
    et al., 2012).
    """
    if words is not None and isinstance(model, (str, Path)):
        model = load_for_words(model, device=device, dtype=dtype)
    with VideoSearch(
        video, model=model, preset=preset, tracker=tracker, rate=rate, duration=duration, cache=cache, keep=False,
        size=size, tokens=tokens, device=device, dtype=dtype,
    ) as opened:  # fmt: skip
        return opened.locate(
            image=image, frame=frame, box=box, point=point, words=words, search=search, before=before,
            threshold=threshold,
        )  # fmt: skip


def query_picture(
    video: Any, *, image: Any = None, frame: int | None = None, box: Sequence[float] | None = None
) -> Tensor:
    """The picture ``(3, h, w)`` of what was looked for, as a contact sheet shows it."""
    if frame is not None:
        with open_video(video) as reader:
            picture = reader.read_frame(frame).image.float() / 255
    else:
        picture = read_image(image)
    if box is None:
        return picture
    x1, y1, x2, y2 = check_box(list(box), (int(picture.shape[1]), int(picture.shape[2])))
    return picture[:, int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)]


def save_track(track: Track, path: str | Path) -> Path:
    """Write a track as JSON: what ``Track.to_json`` gives, and the timeline."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    timeline = [[round(t, 4), round(s, 4)] for t, s in track.timeline.tolist()]
    with atomic_path(path) as temporary:
        Path(temporary).write_text(json.dumps(track.to_json() | {"timeline": timeline}, allow_nan=False) + "\n")
    return path
