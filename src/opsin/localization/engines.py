"""How objects are known: by a template over dense features, by region tokens as REN-VQL does, or by words.

An engine joins a model, what of a frame is kept, and the finder made of a question. ``VideoSearch`` uses one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import InvalidPrompt
from opsin.geometry import ImageTransform, mask_boxes
from opsin.localization.query import Asked, Wanted
from opsin.localization.template_finder import TemplateFinder, as_tensors, learn
from opsin.tracking.base import ObjectMasks, Step
from opsin.tracking.descriptors import DenseTokens, Kind, dense_tokens
from opsin.tracking.template import TokenMasks
from opsin.video import VideoReader
from opsin.vql.finder import Known, TokenFinder, encode_views, object_tokens
from opsin.vql.pipeline import Finder
from opsin.vql.preset import Preset
from opsin.vql.sources import AlignedTokenSource, RegionTokenSource, TokenSource

if TYPE_CHECKING:
    from opsin.regions import RegionModel
    from opsin.segmentation import Segmenter

# What competes with words: the canonical phrases of LERF (arXiv 2303.09553).
OTHERS = ("object", "things", "stuff", "texture")


class Engine(Protocol):
    """See the module."""

    name: str

    @property
    def key(self) -> dict[str, Any]:
        """Everything that what is kept of a frame depends on."""
        ...

    def encode(self, pictures: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """What is kept of each frame."""
        ...

    def box_at(self, picture: Tensor, point: Tensor) -> list[float]:
        """The box of the object at a point of a picture."""
        ...

    def finder(self, reader: VideoReader, asked: Asked) -> Finder:
        """What finds the object that is asked for."""
        ...


class TemplateEngine:
    """Dense tokens of a region model, ``size`` pixels a side, and a template per question."""

    def __init__(self, model: RegionModel, size: int, kind: Kind) -> None:
        self.model, self.size, self.kind = model, size, kind
        self.name = model.name
        self.dense = partial(dense_tokens, model, size=size, kind=kind)

    @property
    def key(self) -> dict[str, Any]:
        """Model, input size, kind of token."""
        return {"model": self.name, "size": self.size, "tokens": self.kind}

    def encode(self, pictures: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Dense tokens."""
        return as_tensors(self.dense(pictures))

    def box_at(self, picture: Tensor, point: Tensor) -> list[float]:
        """Where the region token of the point looks."""
        return self.model.encode(picture, points=point[None]).boxes[0].tolist()

    def finder(self, reader: VideoReader, asked: Asked) -> TemplateFinder:
        """Learned from the pictures. ``InvalidPrompt`` for words."""
        if asked.words:
            raise no_words(self.name)
        return learn(reader, asked.pictures, self.dense, asked.stop)


class TokenEngine:
    """Tokens at points from ``source``, masks from ``masks``; ``dense`` feeds the tracker without further weights."""

    def __init__(self, source: TokenSource, masks: ObjectMasks, preset: Preset, dense: Any, name: str) -> None:
        self.source, self.masks, self.preset, self.dense, self.name = source, masks, preset, dense, name
        self.encode = encode_views(source, preset)

    @property
    def key(self) -> dict[str, Any]:
        """Source and tiles."""
        return {"model": self.source.name, "views": [*self.preset.video_factors, self.preset.video_overlap]}

    def box_at(self, picture: Tensor, point: Tensor) -> list[float]:
        """Of the masks at the point the middle one in size: neither a part of the object nor what it stands on."""
        masks = self.masks.from_points([picture], [point[None]])[0][0]
        usable = masks[masks.flatten(1).any(1)]
        if not len(usable):
            raise InvalidPrompt("There is an object at the point", got=point.tolist(), remedy="Give a box instead.")
        order = usable.flatten(1).sum(1).argsort()
        return mask_boxes(usable[order[(len(order) - 1) // 2]][None])[0].tolist()

    def finder(self, reader: VideoReader, asked: Asked) -> TokenFinder:
        """From pictures or words. ``InvalidPrompt`` for words that the model does not know."""
        follower = SeedTracker(self.dense)
        if asked.words:
            if not isinstance(self.source, AlignedTokenSource):
                raise no_words(self.name)
            tokens = self.source.words(asked.words)
            scale = float(self.source.segmenter.aligned.logit_scale)
            known = Known(tokens, tokens, tokens, self.source.words(OTHERS), scale)
        else:
            pictures = [w.picture for w in asked.pictures]
            known = object_tokens(self.source, self.masks, pictures, [w.area for w in asked.pictures], self.preset)
        return TokenFinder(self.source, self.masks, self.preset, known, follower)


class SeedTracker:
    """Follows whatever is in the box that it starts from: a template learned from that frame against the video."""

    name = "template"

    def __init__(self, dense: Any) -> None:
        self.dense = dense

    def track(self, reader: VideoReader, seed: Step, *, start: float = 0.0, stop: float | None = None) -> list[Step]:
        """See ``tracking.base.Tracker``."""
        scene = reader.read_frame(seed.frame).image.float() / 255
        x1, y1, x2, y2 = (round(float(v)) for v in seed.box)
        wanted = Wanted(scene[:, y1 : max(y2, y1 + 2), x1 : max(x2, x1 + 2)], scene, tuple(seed.box.tolist()))
        finder = learn(reader, [wanted], self.dense, stop)
        found = finder.template.best(self.dense([scene])[0], finder.size[None], seed.box)
        steps = finder.tracker().track(
            reader, Step(seed.frame, seed.time, seed.box, found.score), start=start, stop=stop
        )
        return [Step(s.frame, s.time, s.box, s.score if s.frame != seed.frame else seed.score) for s in steps]


def region_engine(model: RegionModel, masks: ObjectMasks | None, preset: Preset, size: int | None) -> TokenEngine:
    """REN-VQL's way with the region tokens of ``model``."""
    source = RegionTokenSource(model, size=size)

    def dense(pictures: Sequence[Tensor]) -> list[DenseTokens]:
        maps = source.features(pictures)
        return [DenseTokens(F.normalize(m.features.float(), dim=0).cpu(), m.transform) for m in maps]

    return TokenEngine(source, masks or TokenMasks(dense), preset, dense, model.name)


def word_engine(segmenter: Segmenter, masks: ObjectMasks | None, preset: Preset) -> TokenEngine:
    """Words, or pictures, in the space of the words."""

    def dense(pictures: Sequence[Tensor]) -> list[DenseTokens]:
        encoded = segmenter.encode([p.float() / 255 if p.dtype == torch.uint8 else p for p in pictures])
        cells = [(e.grid[1] / e.size[1], e.grid[0] / e.size[0]) for e in encoded]
        maps = zip(encoded, cells, strict=True)
        return [DenseTokens(e.words.float().cpu(), ImageTransform(e.size, e.grid, scale)) for e, scale in maps]

    return TokenEngine(AlignedTokenSource(segmenter), masks or TokenMasks(dense), preset, dense, segmenter.name)


def no_words(name: str) -> InvalidPrompt:
    """Words were asked of a model that knows none."""
    return InvalidPrompt(
        "Words need a model whose tokens are aligned with text", got=f'words for "{name}"',
        remedy='Use model="radseg-b" or another of kind "segmentation" (opsin models), or give a picture.',
    )  # fmt: skip
