"""The results that the public verbs return: frozen dataclasses with tensors inside, checked when they are made.

Letters: ``B`` images, ``R`` regions, ``P`` prompts, ``h, w`` patch grid, ``H, W`` pixels, ``D`` dim, ``T`` frames.
Results convert outwards (``to_numpy``, ``to_json``, ``save``), never inwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from opsin.errors import InputError, MissingExtra

if TYPE_CHECKING:  # `import opsin` must not import torch
    import numpy as np
    from torch import Tensor

    from opsin.geometry import ImageTransform, RunLengthMask, Size


def _require(ok: bool, rule: str, got: object) -> None:
    if not ok:
        raise InputError(rule, got=got)


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """What a frozen backbone says about one image.

    ``features (D, h, w)``, ``class_token (D,)`` and ``register_tokens (K, D)`` where the backbone has them,
    ``transform`` from original pixels to the canvas that the grid covers, ``model`` the name of the backbone.
    """

    features: Tensor
    transform: ImageTransform
    model: str
    class_token: Tensor | None = None
    register_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        _require(self.features.ndim == 3, "FeatureMap.features has shape (D, h, w)", tuple(self.features.shape))

    @property
    def dim(self) -> int:
        """``D``."""
        return int(self.features.shape[0])

    @property
    def grid(self) -> Size:
        """``(h, w)``."""
        return int(self.features.shape[1]), int(self.features.shape[2])


@dataclass(frozen=True, eq=False)
class RegionTokens:
    """The regions of ``B`` images as one table of ``R`` rows.

    ``tokens (R, D)`` unnormalised; ``points (R, 2)`` a representative prompt, original pixels; ``boxes (R, 4)``;
    ``counts (R,)`` prompts merged into each region; ``image_index (R,)`` the image of each row, ascending;
    ``sizes`` the ``(H, W)`` of every image; ``masks`` a run-length mask per row, or None when they were not asked for;
    ``model`` the name of what made them: tokens of different models do not compare. Zero regions is a legal result.
    """

    tokens: Tensor
    points: Tensor
    boxes: Tensor
    counts: Tensor
    image_index: Tensor
    sizes: tuple[Size, ...]
    model: str
    masks: tuple[RunLengthMask, ...] | None = None

    def __post_init__(self) -> None:
        rows = self.tokens.shape[0]
        _require(self.tokens.ndim == 2, "RegionTokens.tokens has shape (R, D)", tuple(self.tokens.shape))
        for name, width in (("points", 2), ("boxes", 4)):
            shape = tuple(getattr(self, name).shape)
            _require(shape == (rows, width), f"RegionTokens.{name} has shape ({rows}, {width})", shape)
        for name in ("counts", "image_index"):
            shape = tuple(getattr(self, name).shape)
            _require(shape == (rows,), f"RegionTokens.{name} has shape ({rows},)", shape)
        _require(self.masks is None or len(self.masks) == rows, f"RegionTokens.masks has {rows} entries", self.masks)

    def __len__(self) -> int:
        """Number of regions ``R``."""
        return int(self.tokens.shape[0])

    @property
    def dim(self) -> int:
        """Width ``D`` of a token."""
        return int(self.tokens.shape[1])

    def select(self, rows: Tensor) -> RegionTokens:
        """The rows that an index or boolean tensor ``rows`` names, in that order."""
        picked = rows.nonzero()[:, 0] if str(rows.dtype) == "torch.bool" else rows
        masks = None if self.masks is None else tuple(self.masks[i] for i in picked.tolist())
        table = {name: getattr(self, name)[picked] for name in ("tokens", "points", "boxes", "counts", "image_index")}
        return replace(self, masks=masks, **table)

    def image(self, index: int) -> RegionTokens:
        """The regions of one image, as a table of that image alone."""
        rows = self.select(self.image_index == index)
        return replace(rows, image_index=rows.image_index * 0, sizes=(self.sizes[index],))

    def images(self) -> Iterator[RegionTokens]:
        """One table per image."""
        return (self.image(i) for i in range(len(self.sizes)))

    def to_numpy(self) -> dict[str, np.ndarray]:
        """Plain arrays; masks as ``(R, H, W)`` booleans when there are masks and one image size."""
        table = {n: getattr(self, n).detach().float().cpu().numpy() for n in ("tokens", "points", "boxes")}
        table |= {n: getattr(self, n).cpu().numpy() for n in ("counts", "image_index")}
        if self.masks is not None and len(set(self.sizes)) == 1:
            table["masks"] = self.dense_masks().numpy()
        return table

    def dense_masks(self) -> Tensor:
        """Boolean masks ``(R, H, W)``; needs masks and images of one size."""
        import torch

        _require(self.masks is not None, "These regions carry masks", "regions encoded with masks=False")
        _require(len(set(self.sizes)) == 1, "Images of one size", self.sizes)
        decoded = [m.decode() for m in self.masks or ()]
        return torch.stack(decoded) if decoded else torch.zeros((0, *self.sizes[0]), dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Query:
    """What is looked for: ``tokens (Q, D)`` of the object, the ``model`` that made them, and words on the source."""

    tokens: Tensor
    model: str
    source: str = ""

    def __post_init__(self) -> None:
        _require(self.tokens.ndim == 2 and len(self.tokens) > 0, "Query.tokens has shape (Q ≥ 1, D)", self.tokens.shape)


@dataclass(frozen=True, eq=False)
class Track:
    """Where an object was last seen: ``frames (T,)`` int64 and contiguous at the video's own frame numbers,
    ``times (T,)`` seconds, ``boxes (T, 4)`` pixels, ``scores (T,)`` of each box, NaN where it was not measured.

    What a score is depends on the preset. ``"template"``: the mean of the response of a template learned from the query
    and of the cosine of the box's mean token to the query's, counted from what the video usually gives to other places:
    about 1 for the query itself, 0 there. ``"ren-vql"``: the cosine of a region token to the query's, in [-1, 1].
    ``"words"``: the probability of the words beside general ones, in [0, 1]. The boxes of a track are scored by the
    tracker, SAM 2 in its own way. Scores compare within one model, preset and tracker only.

    ``found`` False means no confident occurrence: the arrays are empty and ``score`` is the best that was seen.
    ``timeline`` is ``(S, 2)`` seconds and best score of every searched frame; ``skipped`` counts undecodable frames.
    ``details`` names the ``preset`` and the ``tracker``, and holds how many ``rounds`` of search there were and the
    ``candidates`` of the first, each a mapping with ``frame``, ``time`` and ``score``, in time order.
    """

    found: bool
    score: float
    frames: Tensor
    times: Tensor
    boxes: Tensor
    scores: Tensor
    timeline: Tensor
    video: str
    model: str
    skipped: int = 0
    size: Size = (0, 0)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.frames)
        _require(tuple(self.boxes.shape) == (count, 4), f"Track.boxes has shape ({count}, 4)", tuple(self.boxes.shape))
        _require(len(self.times) == len(self.scores) == count, "Track columns have equal length", count)
        _require(self.found == (count > 0), "A found track has frames and a lost one has none", (self.found, count))

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frames)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, one entry per frame."""
        rows = zip(self.frames.tolist(), self.times.tolist(), self.boxes.tolist(), self.scores.tolist(), strict=True)
        return {
            "found": self.found,
            "score": round(self.score, 6) if self.score == self.score else None,
            "video": self.video,
            "model": self.model,
            "size": list(self.size),
            "skipped_frames": self.skipped,
            "track": [
                {
                    "frame": f,
                    "time": round(t, 4),
                    "box": [round(v, 2) for v in b],
                    "score": round(s, 4) if s == s else None,  # nan where it was not measured
                }
                for f, t, b, s in rows
            ],
            **self.details,
        }

    def to_numpy(self) -> dict[str, np.ndarray]:
        """Plain arrays: ``frames``, ``times``, ``boxes``, ``scores`` (NaN where not measured) and ``timeline``."""
        names = ("frames", "times", "boxes", "scores", "timeline")
        return {name: getattr(self, name).detach().cpu().numpy() for name in names}

    def to_supervision(self) -> dict[int, Any]:
        """Frame number → ``supervision.Detections`` of the one box in it: ``tracker_id`` 1, ``class_id`` 0, its time
        in ``data``. Needs the extra ``supervision``."""
        try:
            import supervision
        except ImportError as error:
            raise MissingExtra.of("supervision", "supervision", "convert to supervision") from error
        import numpy as np

        return {
            frame: supervision.Detections(
                xyxy=np.array([box], np.float32),
                confidence=np.array([score], np.float32),
                class_id=np.array([0]),
                tracker_id=np.array([1]),
                data={"time": np.array([time])},
            )
            for frame, time, box, score in self._rows()
        }

    def to_mot(self, identity: int = 1) -> str:
        """Lines of a MOTChallenge result, ``frame, id, left, top, width, height, confidence, -1, -1, -1``.

        Frames and, as that format has it, pixels count from 1. Source: motchallenge.net/instructions.
        """
        return "".join(
            f"{frame + 1},{identity},{x1 + 1:.2f},{y1 + 1:.2f},{x2 - x1:.2f},{y2 - y1:.2f},{score:.6g},-1,-1,-1\n"
            for frame, _, (x1, y1, x2, y2), score in self._rows()
        )

    def to_coco(self, category: str = "object") -> dict[str, Any]:
        """COCO for videos: ``videos``, ``tracks``, ``images``, ``annotations``, ``categories``; ids count from 1.

        There is an image for every frame of the track, with its ``frame_index`` from 0 and its ``time``. ``file_name``
        is the one it would have as a picture: no such file is written. ``bbox`` is x, y, width, height. Source: the
        layout of TAO (arXiv 2005.10356), which readers of COCO read too.
        """
        height, width = self.size
        size, folder = {"width": width, "height": height}, PurePosixPath(self.video).stem or "video"
        rows = list(enumerate(self._rows(), 1))
        found = [{"id": 1, "category_id": 1, "video_id": 1}] if rows else []
        return {
            "info": {"description": f"{category} in {self.video}, by {self.model}"},
            "videos": [{"id": 1, "name": self.video, **size}],
            "tracks": found,
            "images": [
                {"id": i, "video_id": 1, "file_name": f"{folder}/{f:06d}.jpg", "frame_index": f, "time": t, **size}
                for i, (f, t, _, _) in rows
            ],
            "annotations": [
                {
                    "id": i, "image_id": i, "video_id": 1, "track_id": 1, "category_id": 1, "iscrowd": 0,
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "score": score,
                }
                for i, (_, _, (x1, y1, x2, y2), score) in rows
            ],
            "categories": [{"id": 1, "name": category}],
        }  # fmt: skip

    def _rows(self) -> Iterator[tuple[int, float, list[float], float]]:
        """Frame, seconds, box and score of every box; other formats have no NaN, so that a score which was not measured
        is that of the track, or 0 where that is none either."""
        whole = self.score if self.score == self.score else 0.0
        boxes, scores = self.boxes.double().tolist(), self.scores.nan_to_num(whole).tolist()
        return zip(self.frames.tolist(), self.times.tolist(), boxes, scores, strict=True)
