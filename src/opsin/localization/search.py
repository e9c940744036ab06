"""``VideoSearch``: a video opened for questions. Its frames are encoded once, whatever is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from opsin import hub, models
from opsin.errors import IncompatibleModel, InvalidConfig, InvalidVideo
from opsin.localization import engines
from opsin.localization.query import Asked, check_names, read_query
from opsin.localization.recording import recorded
from opsin.regions import RegionModel
from opsin.segmentation import Segmenter
from opsin.tracking.base import ObjectMasks, Step, Tracker
from opsin.tracking.descriptors import Kind
from opsin.tracking.follow import smooth
from opsin.tracking.sam2 import is_available
from opsin.tracking.sam2_video import Sam2Tracker
from opsin.types import Track
from opsin.vql.finder import TokenFinder, encode_views
from opsin.vql.pipeline import Outcome, scan, search
from opsin.vql.preset import Preset
from opsin.vql.preset import preset as preset_of
from opsin.vql.store import Shot, TokenStore, identity, made_by, open_store

if TYPE_CHECKING:
    from opsin.video import VideoReader

# What a cell is described by. On the same episodes, at its best threshold, stAP@0.25: features .107, region tokens 0,
# both .050. A region token says what kind of thing is there; which one of them the features know better.
TOKENS: Kind = "features"
SAM2 = ("sam2.1-large", "sam2.1-base-plus", "sam2.1-small", "sam2.1-tiny")  # what tracker="auto" looks for, in order


class VideoSearch:
    """Questions about one video: where was this last seen?

    >>> with VideoSearch("kitchen.mp4", cache="tokens") as search:
    ...     mug = search.locate(image="mug.jpg")
    ...     keys = search.locate(frame=900, box=(410, 220, 500, 330))

    The video is streamed and encoded when it is first asked, at ``rate`` frames per second; later questions read what
    was kept. Memory does not grow with the video; the disk does, by a MB or so per searched frame.

    Args:
        video: what ``opsin.open_video`` takes: a file, a folder or list of frames, a URL, a camera.
        model: a ``RegionModel`` or, for words, a ``Segmenter``; or a reference to load one, on ``device`` in ``dtype``.
        preset: how objects are found: ``"template"`` (a discriminant of dense features, learned per question),
            ``"ren-vql"`` (the published five stages with region tokens), ``"words"``, or a ``Preset``; None is what
            the model is best used with.
        tracker: ``"auto"`` takes SAM 2.1 when its weights are on this machine, else ``"template"``, a tracker of our
            own with no further weights; or a reference of SAM 2 weights, or a ``Tracker``.
        rate: frames searched per second; None searches every frame. A track has every frame in either case.
        duration: only the first so many seconds are searched. A live source needs it: it is recorded that long.
        cache: folder that keeps the encoded frames for another time; None keeps them until the search is closed.
        keep: False keeps nothing, for a single question or questions asked together: only further rounds, which look at
            what comes after a track, then encode that again.
        size: side of the square model input; None is the preset's choice.
        tokens: for ``"template"``: ``"features"`` of the backbone, ``"pred"`` or ``"proj"`` region tokens of a dense
            grid of prompts, or ``"both"``, features and pred. docs/benchmarks.md compares them.

    Raises:
        InvalidVideo, MissingFile, InvalidConfig, IncompatibleModel, and what loading a model raises.
    """

    def __init__(
        self, video: Any, *, model: str | Path | RegionModel | Segmenter = "opsin-tiny",
        preset: str | Preset | None = None, tracker: str | Path | Tracker = "auto", rate: float | None = 5.0,
        duration: float | None = None, cache: str | Path | None = None, keep: bool = True, size: int | None = None,
        tokens: Kind = TOKENS, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        if tokens not in get_args(Kind):
            raise InvalidConfig(f"tokens is one of {', '.join(get_args(Kind))}", got=tokens)
        if rate is not None and not rate > 0:
            raise InvalidConfig("rate is a positive number of frames per second", got=rate)
        chosen = None if preset is None else preset_of(preset)
        self._stack = ExitStack()
        try:
            kept = {} if cache is None else identity(video)
            self.reader: VideoReader = self._stack.enter_context(recorded(video, duration))
            self.model = models.load(model, device=device, dtype=dtype) if isinstance(model, (str, Path)) else model
            self.preset = chosen or preset_of(default_preset(self.model))
            self.duration, self.rate = duration, rate
            self.tracker = tracker_of(tracker, device=device, dtype=dtype, window=self.preset.window)
            self.engine = engine_of(self.model, self.preset, self.tracker, size, tokens)
            folder = Path(cache) if cache is not None else Path(self._temporary()) if keep else None
            kept |= {} if cache is None else made_by(self.model)
            key = {**kept, **self.engine.key}
            self.store = open_store(self.reader, self.engine.encode, key, rate=rate, cache=folder)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> VideoSearch:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Forget what was kept only for this search."""
        self._stack.close()

    def locate(self, *, threshold: float | None = None, **query: Any) -> Track:
        """The last occurrence of an object: see ``opsin.locate`` for the arguments."""
        return self.locate_all([query], threshold=threshold)[0]

    def locate_all(self, queries: Sequence[Mapping[str, Any]], *, threshold: float | None = None) -> list[Track]:
        """Several objects in one pass over the video: a ``Track`` for each of ``queries``, mappings of arguments."""
        asked = [self._read(check_names(q)) for q in queries]
        if not asked:
            return []
        preset = self.preset if threshold is None else replace(self.preset, threshold=threshold)
        finders = [self.engine.finder(self.reader, a) for a in asked]
        store = self._store(finders)
        stops = [a.stop for a in asked]
        latest = None if None in stops else max(s for s in stops if s is not None)
        timelines = scan(store.shots(stop=latest), finders, stops)
        tracks = []
        for question, finder, timeline in zip(asked, finders, timelines, strict=True):
            if not len(timeline):
                got = f"{self.reader.name}: none before {question.source}"
                raise InvalidVideo("There is at least one frame to search", got=got)
            shots = partial(_from, store, question.stop)
            found = search(self.reader, timeline, finder, preset, shots=shots, tracker=self.tracker,
                           stop=question.stop, own=question.own)  # fmt: skip
            tracks.append(self._track(found))
        return tracks

    def _read(self, query: Mapping[str, Any]) -> Asked:
        asked = read_query(self.reader, self.engine.box_at, **query)
        if self.duration is None:
            return asked
        return replace(asked, stop=min(t for t in (asked.stop, self.duration) if t is not None))

    def _store(self, finders: Sequence[Any]) -> TokenStore:
        """What is searched. Region tokens that are not kept for other questions are thinned to these, as published:
        a second round then needs no second encoding."""
        known = [f.known.tokens for f in finders if isinstance(f, TokenFinder) and f.known.others is None]
        if self.store.folder is not None or len(known) < len(finders):
            return self.store
        encode = encode_views(self.engine.source, self.preset, torch.cat(known))  # type: ignore[attr-defined]
        return open_store(self.reader, encode, self.engine.key, rate=self.rate, cache=Path(self._temporary()))

    def _temporary(self) -> str:
        return self._stack.enter_context(TemporaryDirectory(prefix="opsin-"))

    def _track(self, found: Outcome) -> Track:
        steps, rows = found.steps, found.timeline
        tracker = self.tracker.name if self.tracker is not None else "template"
        moments = [{"frame": m.frame, "time": round(m.time, 4), "score": round(m.score, 4)} for m in found.candidates]
        return Track(
            found=bool(steps),
            score=found.score,
            frames=torch.tensor([s.frame for s in steps], dtype=torch.long),
            times=torch.tensor([s.time for s in steps], dtype=torch.float64),
            boxes=self._boxes(steps),
            scores=torch.tensor([s.score for s in steps], dtype=torch.float32),
            timeline=torch.stack([rows.times, rows.scores.double()], -1),
            video=self.reader.name,
            model=self.engine.name,
            skipped=self.reader.skipped,
            size=self.reader.size,
            details={"preset": self.preset.name, "tracker": tracker, "rounds": found.rounds, "candidates": moments},
        )

    def _boxes(self, steps: Sequence[Step]) -> Tensor:
        if not steps:
            return torch.zeros((0, 4))
        return smooth(steps) if self.tracker is None else torch.stack([s.box for s in steps])


def _from(store: TokenStore, stop: float | None, start: float) -> Iterable[Shot]:
    return store.shots(start, stop)


def default_preset(model: Any) -> str:
    """How a model is best used: its card says so; words for a segmenter; a template otherwise."""
    if isinstance(model, Segmenter):
        return "words"
    return model.card.preset or "template" if isinstance(model, RegionModel) else "template"


def load_for_words(ref: str | Path, *, device: Any = None, dtype: Any = None) -> Any:
    """A model that is asked for words: a backbone, or weights without a card, is asked what it knows of words, not of
    regions."""
    card = hub.card_of(ref)
    if card is not None and card.kind != "backbone":
        return models.load(ref, device=device, dtype=dtype)
    return Segmenter.from_pretrained(str(ref), device=device, dtype=dtype)


def tracker_of(
    tracker: str | Path | Tracker, *, device: Any = None, dtype: Any = None, window: int = 500
) -> Tracker | None:
    """The tracker that is named; None for the finder's own."""
    if not isinstance(tracker, (str, Path)):
        return tracker
    if tracker == "template":
        return None
    if tracker == "auto":
        found = next((name for name in SAM2 if is_available(name)), None)
        return None if found is None else Sam2Tracker.from_pretrained(found, device=device, dtype=dtype, window=window)
    return Sam2Tracker.from_pretrained(tracker, device=device, dtype=dtype, window=window)


def engine_of(model: Any, preset: Preset, tracker: Tracker | None, size: int | None, tokens: Kind) -> engines.Engine:
    """The engine of a preset for a model; masks come with the tracker, else from the model's own tokens."""
    masks: ObjectMasks | None = tracker.masks if isinstance(tracker, Sam2Tracker) else None
    if isinstance(model, Segmenter):
        return engines.word_engine(model, masks, preset)
    if not isinstance(model, RegionModel):
        got = f'"{getattr(model, "name", type(model).__name__)}"'
        raise IncompatibleModel("A video is searched with a region model, or with a segmenter for words", got=got)
    if preset.name == "template":
        return engines.TemplateEngine(model, size or search_size(model), tokens)
    return engines.region_engine(model, masks, preset, size)


def search_size(model: RegionModel) -> int:
    """1.5 times the side the model was made for, in whole patches, as objects may be small; models with one fixed input
    keep theirs."""
    patch, side = model.backbone.patch_size, model.card.image_size
    return side if model.backbone.card.family == "openclip" else max(1, round(1.5 * side / patch)) * patch
