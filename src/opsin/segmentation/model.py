"""``Segmenter``: an image is encoded once, then any words are found in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin import hub
from opsin import images as im
from opsin.backbones import openvino
from opsin.cards import ModelCard
from opsin.errors import IncompatibleModel, InvalidConfig, check_compat
from opsin.geometry import Size
from opsin.runtime import fast_matmul, resolve_device, to_model
from opsin.segmentation import aligned as alignment
from opsin.segmentation import prediction, sam
from opsin.segmentation.aggregation import aggregate_all
from opsin.segmentation.aligned import AlignedBackbone
from opsin.segmentation.attention import check_scaling
from opsin.segmentation.labels import Labels, as_labels
from opsin.segmentation.refine import ClassMaps, Refinement, frame, refine
from opsin.segmentation.result import Segmentation
from opsin.segmentation.sam import SamDecoder
from opsin.segmentation.windows import sliding_features

Words = str | Sequence[str] | Mapping[str, Sequence[str]] | Labels
# What competes with a single label when nothing else is named: the canonical phrases of LERF (arXiv 2303.09553).
OTHER = ("object", "things", "stuff", "texture")
_BACKGROUND = "(background)"
_ALIGN_ROWS = 512  # locations that go through the head to the words at a time


@dataclass(frozen=True, eq=False)
class SegmentationFeatures:
    """One image, encoded: ask it for any words.

    ``features (D, h, w)`` stitched and aggregated; ``words (E, h, w)`` the same in the space of the words, of unit
    length; ``size (H, W)`` of the original image; ``embedding (256, 64, 64)`` of SAM's decoder and ``fed (H, W)``, the
    size of the image in its frame, when it was encoded for refinement.
    """

    features: Tensor
    words: Tensor
    size: Size
    segmenter: Segmenter
    embedding: Tensor | None = None
    fed: Size | None = None

    @property
    def grid(self) -> Size:
        """``(h, w)``."""
        return int(self.words.shape[1]), int(self.words.shape[2])

    def query(self, labels: Words, **options: Any) -> Segmentation:
        """See :meth:`Segmenter.query`."""
        return self.segmenter.query(self, labels, **options)

    def heat_map(self, phrase: str, **options: Any) -> Tensor:
        """See :meth:`Segmenter.heat_map`."""
        return self.segmenter.heat_map(self, phrase, **options)


class Segmenter(nn.Module):
    """Open-vocabulary segmentation without training (RADSeg, arXiv 2511.19704), on any backbone that knows words.

    ``aligned`` is the backbone with its way to the words, ``card`` the defaults, ``refiner`` the decoder of SAM for
    RADSeg+, loaded when first needed unless given. ``runtime`` is ``"torch"``, or ``"openvino"`` for the windows.
    """

    def __init__(self, aligned: AlignedBackbone, card: ModelCard, refiner: SamDecoder | None = None) -> None:
        super().__init__()
        self.runtime = "torch"
        self._precision = torch.float32  # of OpenVINO
        self.aligned = aligned
        self.card = card
        self._refiner = [refiner] if refiner is not None else []  # in a list: not a part of the weights

    @classmethod
    def from_pretrained(
        cls,
        ref: str | Path = "radseg-b",
        *,
        language: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        runtime: Literal["torch", "openvino"] = "torch",
    ) -> Segmenter:
        """A segmentation model, or a backbone that knows words, ready to segment.

        Args:
            ref: catalogue name (``radseg-b``, ``siglip2-…``), ``"hf:org/repo@rev"``, ``"dir:path"``, a folder, or the
                path of a published ``*_half.pth.tar`` of RADIO.
            language: RADIO's adaptor that leads to words; by default the card's, else the first with a text tower.
            device, dtype: as for ``opsin.load``.
            runtime: ``"openvino"`` compiles the network for the windows of the first image (some seconds, the memory
                of a second copy of the weights); on CPUs it is the faster one. Other sizes still run in torch.

        Raises:
            UnknownModel, GatedModel, ModelUnavailable, MissingFile, InvalidCheckpoint, IncompatibleModel (no words).
            MissingExtra (no OpenVINO), InvalidConfig (another runtime; OpenVINO elsewhere than on the CPU).
        """
        if runtime not in ("torch", "openvino"):
            raise InvalidConfig('runtime is "torch" or "openvino"', got=repr(runtime))
        precision = torch.float32
        if runtime == "openvino":
            device = resolve_device(device or "cpu")
            precision, dtype = openvino.check(device, dtype), None
        path = Path(str(ref).removeprefix("dir:")).expanduser()
        card = None if path.is_file() else hub.card_of(ref)
        aligned = alignment.from_pretrained(ref, language=language, device=device, dtype=dtype)
        if card is None or card.kind != "segmentation":
            card = default_card(aligned)
            aligned.scra = card.scra
        found = cls(aligned, card)
        found.runtime, found._precision = runtime, precision
        return found

    @property
    def name(self) -> str:
        """Name of the model, with its language adaptor when that is not the card's."""
        other = self.aligned.language if self.aligned.language != self.card.language else ""
        return f"{self.card.name}:{other}" if other else self.card.name

    @torch.no_grad()
    def encode(
        self,
        images: Any,
        *,
        crop: int | None = None,
        stride: int | None = None,
        scga: float | None = None,
        longest: int | None = None,
        refine: bool = False,
        batch_size: int | None = None,
        compat: Literal["published"] | None = None,
    ) -> list[SegmentationFeatures]:
        """Encode images of any sizes, once; in order.

        Args:
            images: one image (path, bytes, PIL, array, tensor), a list, a batch ``(B, 3, H, W)``, or a folder.
            crop, stride: windows in pixels, multiples of the patch; by default the card's. ``crop=0``: one pass.
            scga: scaling of the global aggregation, 0 for none; by default the card's.
            longest: shrink images whose longest side is above this many pixels first (labels still have every pixel).
            refine: also compute what RADSeg+ needs, one pass at 1024 pixels.
            batch_size: windows that go together, of whichever image; halved when memory runs out. By default 2 on a
                CPU, whose caches hold no more, and 16 elsewhere and with OpenVINO, which takes them one by one.
            compat: ``"published"`` takes SCGA's mean over all images, and floors the size that SAM sees.

        Raises:
            InvalidImage, MissingFile, InvalidConfig, UnsupportedSize, ResourceError,
            IncompatibleModel (``refine`` with weights that have no SAM head). Options are checked before any encoding.
        """
        check_compat(compat)
        if longest is not None and longest < self.aligned.patch_size:
            raise InvalidConfig("longest is at least one patch", got=longest)
        if batch_size is not None and batch_size < 1:
            raise InvalidConfig("batch_size is at least 1", got=batch_size)
        scaling = self.card.scga if scga is None else scga
        if scaling:
            check_scaling(scaling)
        if refine:
            _ = self.aligned.sam  # a missing head is told now
        pictures = im.read_images(images)
        if refine:
            _ = self.refiner
        crop = self.card.crop if crop is None else crop
        compiled = self.runtime == "openvino"
        if compiled:
            self.aligned.use_openvino(crop, self._precision)
        with fast_matmul():
            shown = [p if longest is None or max(p.shape[1:]) <= longest else _shrink(p, longest) for p in pictures]
            maps = sliding_features(
                shown,
                self._features,
                crop=crop,
                stride=self.card.stride if stride is None else stride,
                patch=self.aligned.patch_size,
                batch_size=batch_size or (16 if compiled or self._device.type != "cpu" else 2),
            )
            if scaling:
                maps = aggregate_all(maps, scaling, compat)
            found = []
            for picture, features in zip(pictures, maps, strict=True):
                embedding, fed = self._sam_embedding(picture, compat) if refine else (None, None)
                size = int(picture.shape[1]), int(picture.shape[2])
                found.append(SegmentationFeatures(features, self._words(features), size, self, embedding, fed))
        return found

    def segment(
        self, image: Any, labels: Words, *, crop: int | None = None, stride: int | None = None,
        longest: int | None = None, refine: bool = False, **options: Any,
    ) -> Segmentation:  # fmt: skip
        """One image and words to labels: :meth:`encode`, then :meth:`query` (whose options it takes too)."""
        self._question(labels, **options)  # a mistake in the question is told before the expensive step
        found = self.encode(
            [im.read_image(image)], crop=crop, stride=stride, longest=longest, refine=refine,
            compat=options.get("compat"),
        )  # fmt: skip
        return self.query(found[0], labels, refine=refine, **options)

    @torch.no_grad()
    def query(
        self,
        encoded: SegmentationFeatures,
        labels: Words,
        *,
        size: Size | None = None,
        templates: str | Sequence[str] | None = "imagenet",
        background: str | Sequence[str] | None = None,
        denoise: float | None = None,
        threshold: float = 0.0,
        refine: bool = False,
        coarse_threshold: float = 0.10,
        min_area: int = 225,
        iou_threshold: float = 0.9,
        compat: Literal["published"] | None = None,
    ) -> Segmentation:
        """The most probable label of every pixel, by a softmax over all labels.

        Args:
            encoded: an image from :meth:`encode` of this model.
            labels: ``"cat, sofa"``, a list of names, or ``{"person": ["man", "woman"]}`` with synonyms.
            size: ``(H, W)`` of the result; by default that of the image.
            templates: ``"imagenet"`` (80 sentences), own sentences with ``{}``, or None for phrases as they are.
            background: phrases, written as labels are, that compete with these and whose pixels become unknown. A
                softmax over one label is always 1, so a single label gets ``("object", "things", "stuff", "texture")``
                when this is None; ``()`` means none, and is an error for a single label.
            denoise: leave out labels whose probability reaches this nowhere; by default the card's. 0: keep all.
            threshold: pixels whose best label is less probable become unknown.
            refine: sharpen masks with SAM's decoder (RADSeg+); the image must be encoded with ``refine=True``.
            coarse_threshold, min_area, iou_threshold: RADSeg+: what is refined, from which area (pixels at half
                resolution), and the predicted IoU a mask must exceed.
            compat: ``"published"``: where denoising leaves no label in, every pixel gets the first one instead of
                becoming unknown, and masks are sharpened as the published code does it.

        Raises:
            InvalidPrompt (labels), InvalidConfig (options), IncompatibleModel (features of another model).
        """
        wanted, other, asked = self._question(
            labels, size=size, templates=templates, background=background, denoise=denoise, threshold=threshold,
            coarse_threshold=coarse_threshold, min_area=min_area, iou_threshold=iou_threshold, compat=compat,
        )  # fmt: skip
        if refine:
            _sam_view(encoded)
        grid = self._probabilities(encoded, asked)
        height, width = encoded.size if size is None else size
        limit = self.card.denoise if denoise is None else denoise
        found = prediction.decide(grid, (height, width), denoise=limit, threshold=threshold, compat=compat)
        result, scores = found.labels, found.scores
        if refine:
            kept = ClassMaps(grid * found.kept[:, None, None], (height, width))
            finer = self.refined(
                encoded, result, kept, coarse_threshold=coarse_threshold, min_area=min_area, iou=iou_threshold,
                compat=compat,
            )  # fmt: skip
            result, scores = finer.labels, finer.scores
        if other:
            result.masked_fill_(result >= len(wanted), prediction.UNKNOWN)
        best = grid[: len(wanted)].flatten(1).amax(1)
        return Segmentation(result, scores, wanted.classes, best, self.name, other)

    @torch.no_grad()
    def probabilities(
        self, encoded: SegmentationFeatures, labels: Words, *, size: Size | None = None,
        templates: str | Sequence[str] | None = "imagenet", denoise: float | None = None,
    ) -> Tensor:  # fmt: skip
        """``(C, H, W)`` probabilities of all labels at every pixel, 0 for those left out: mind the memory."""
        prediction.check_options(size=size, denoise=denoise)
        grid = self._probabilities(encoded, as_labels(labels, templates=templates))
        target = encoded.size if size is None else size
        kept = prediction.present(grid, target, self.card.denoise if denoise is None else denoise)
        return prediction.enlarge(grid, target, kept)

    @torch.no_grad()
    def heat_map(
        self, encoded: SegmentationFeatures, phrase: str, *, size: Size | None = None,
        templates: str | Sequence[str] | None = "imagenet",
    ) -> Tensor:  # fmt: skip
        """Cosine of every pixel to one phrase ``(H, W)``, in [-1, 1]; what counts as high differs between phrases."""
        self._check(encoded)
        prediction.check_options(size=size)
        text = self.embed(as_labels([phrase], templates=templates))
        cosine = F.normalize(text, dim=1).to(encoded.words) @ encoded.words.flatten(1)
        return prediction.enlarge(cosine.view(1, *encoded.grid), encoded.size if size is None else size)[0]

    def embed(self, labels: Labels) -> Tensor:
        """``(S, E)`` one vector per phrase of the labels, from the cache or the text tower."""
        return self.aligned.vocabulary.embed(labels)

    def _question(
        self, labels: Words, *, templates: str | Sequence[str] | None = "imagenet",
        background: str | Sequence[str] | None = None, **options: Any,
    ) -> tuple[Labels, tuple[str, ...], Labels]:  # fmt: skip
        """Labels, what competes with them, and both as one, of the arguments of :meth:`query`, which are checked."""
        prediction.check_options(**options)
        wanted = as_labels(labels, templates=templates)
        other: tuple[str, ...] = OTHER if background is None and len(wanted) == 1 else ()
        if background:
            other = as_labels(background).texts
        if len(wanted) == 1 and not other:
            raise InvalidConfig(
                "One label needs something to compete with: a softmax over one is always 1", got="background=()",
                remedy="Leave background out, name other things there, or use heat_map.",
            )
        asked = wanted
        if other:
            asked = Labels((*wanted.classes, _BACKGROUND), (*wanted.phrases, other), wanted.templates)
        return wanted, other, asked

    @property
    def _device(self) -> torch.device:
        return next(self.aligned.head.parameters()).device

    def _features(self, pixels: Tensor) -> Tensor:
        found = self.aligned.features(to_model(pixels, self.aligned))
        return found.to(torch.promote_types(found.dtype, torch.float32))  # sums over windows and images need the bits

    def _words(self, features: Tensor) -> Tensor:
        tokens = features.flatten(1)
        words = features.new_empty((self.aligned.text_dim, tokens.shape[1]))  # filled in pieces: a panorama is large
        for start in range(0, tokens.shape[1], _ALIGN_ROWS):
            rows = slice(start, start + _ALIGN_ROWS)
            found = self.aligned.align(to_model(tokens[:, rows].T, self.aligned.head)).to(features.dtype)
            words[:, rows] = F.normalize(found, dim=1).T
        return words.view(-1, *features.shape[1:])

    def _probabilities(self, encoded: SegmentationFeatures, labels: Labels) -> Tensor:
        self._check(encoded)
        text, scale = self.embed(labels), self.aligned.logit_scale
        return prediction.class_probabilities(encoded.words, text, labels.index, len(labels), scale)

    def _check(self, encoded: SegmentationFeatures) -> None:
        if encoded.segmenter.name != self.name:
            raise IncompatibleModel(f"Features of {self.name}", got=f"features of {encoded.segmenter.name}")

    @property
    def refiner(self) -> SamDecoder:
        """The decoder half of SAM, loaded when first used."""
        if not self._refiner:
            self._refiner.append(sam.load(self.card.refiner or sam.DEFAULT, device=self._device))
        return self._refiner[0]

    def _sam_embedding(self, picture: Tensor, compat: Literal["published"] | None) -> tuple[Tensor, Size]:
        fed = frame((int(picture.shape[1]), int(picture.shape[2])), compat=compat)
        shrunk = compat is None and fed[0] * fed[1] < picture.shape[1] * picture.shape[2]  # published: never smoothed
        shown = F.interpolate(picture[None], fed, mode="bilinear", antialias=shrunk)
        features = self.aligned.sam_features(self.aligned.features(to_model(shown, self.aligned)))
        return self.refiner.embed(features)[0], fed

    def refined(
        self, encoded: SegmentationFeatures, labels: Tensor, probabilities: Tensor | ClassMaps, **options: Any
    ) -> Refinement:
        """RADSeg+ on a prediction: ``labels (H, W)``, probabilities ``(C, H, W)``; options of ``refine``."""
        embedding, fed = _sam_view(encoded)
        return refine(labels, probabilities, embedding[None], self.refiner, fed=fed, **options)


def default_card(aligned: AlignedBackbone) -> ModelCard:
    """Defaults for a backbone without a segmentation card of its own: RADSeg's for RADIO, else one plain pass."""
    radio = aligned.backbone.card.family == "radio"
    options: dict[str, Any] = {"language": aligned.language}
    if radio:
        options |= {"scra": 10.0, "scga": 10.0, "crop": 336, "stride": 224, "denoise": 0.5, "refiner": sam.DEFAULT}
    card = aligned.backbone.card
    return ModelCard(
        name=aligned.name, kind="segmentation", family=card.family, backbone=card.name, licence=card.licence, **options
    )


def _sam_view(encoded: SegmentationFeatures) -> tuple[Tensor, Size]:
    """The embedding for SAM's decoder, and the size at which the image was fed."""
    if encoded.embedding is None or encoded.fed is None:
        raise InvalidConfig(
            "Refinement needs an image that was encoded for it", got="refine=True",
            remedy="encode(image, refine=True), then query(labels, refine=True).",
        )
    return encoded.embedding, encoded.fed


def _shrink(image: Tensor, longest: int) -> Tensor:
    scale = longest / max(image.shape[1:])
    return im.resize(image, (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[2] * scale))))
