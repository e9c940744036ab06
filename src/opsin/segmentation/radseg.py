"""RADSeg's own names, for code that was written for its ``torch.hub`` entry: thin over :class:`Segmenter`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.cards import catalogue
from opsin.errors import InvalidConfig, check_compat
from opsin.geometry import Size
from opsin.segmentation import prediction, sam
from opsin.segmentation.labels import PLAIN, Labels, as_labels
from opsin.segmentation.model import SegmentationFeatures, Segmenter
from opsin.segmentation.refine import ClassMaps


class RADSegEncoder(nn.Module):
    """What ``torch.hub.load(..., "radseg_encoder")`` gives, with the argument names and attributes of the original.

    Args:
        model_version: RADIO's version (``"c-radio_v3-b"``), any other reference, or a :class:`Segmenter`.
        lang_model: RADIO's adaptor that leads to words; None: the first with a text tower.
        device: by default the machine's accelerator, else the CPU. ``.to(device)`` works too.
        predict: :meth:`encode_image_to_feat_map` returns probabilities of ``prompts`` instead of features.
        classes: labels (``text_query_mode="labels"``, 80 templates each) or ``"prompts"`` taken as they are. An empty
            first name is left out: it stands for what is ignored.
        prediction_thresh, prompt_denoising_thresh, scra_scaling, scga_scaling, slide_crop, slide_stride: as published.
        sam_refinement, sam_ckpt, coarse_thresh, minimal_area, sam_mask_coff, sam_iou_thresh: RADSeg+. ``sam_ckpt`` is
            a reference of SAM's weights or the path of ``sam_vit_h_4b8939.pth``; None: from the hub.
        amp: bfloat16 where the hardware has it.
        compat: by default images of a batch do not touch one another and an image without any class left is unknown
            (0); ``"published"`` does as the original does.
    """

    def __init__(
        self, device: str | None = None, model_version: str | Segmenter = "c-radio_v3-b",
        lang_model: str | None = "siglip2", *, predict: bool = False, classes: Sequence[str] | None = None,
        text_query_mode: Literal["labels", "prompts"] = "labels", prediction_thresh: float = 0.0,
        prompt_denoising_thresh: float = 0.5, scra_scaling: float = 10.0, scga_scaling: float = 10.0,
        slide_crop: int = 336, slide_stride: int = 224, sam_refinement: bool = False, sam_ckpt: str | None = None,
        coarse_thresh: float = 0.10, minimal_area: int = 225, sam_mask_coff: float = 0.005,
        sam_iou_thresh: float = 0.9, amp: bool = False, compat: Literal["published"] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if text_query_mode not in ("labels", "prompts"):
            raise InvalidConfig('text_query_mode is "labels" or "prompts"', got=text_query_mode)
        check_compat(compat)
        if isinstance(model_version, Segmenter):
            self.segmenter = model_version
        else:
            dtype = "auto" if amp else None
            found = Segmenter.from_pretrained(model_version, language=lang_model, device=device, dtype=dtype)
            decoder = sam.load(sam_ckpt, device=device) if sam_ckpt else None
            self.segmenter = Segmenter(found.aligned, found.card, decoder)
        self.segmenter.aligned.scra = scra_scaling
        self.predict = predict
        self.prediction_thresh, self.prompt_denoising_thresh = prediction_thresh, prompt_denoising_thresh
        self.scga_scaling, self.slide_crop, self.slide_stride = scga_scaling, slide_crop, slide_stride
        self.sam_refinement, self.coarse_thresh, self.minimal_area = sam_refinement, coarse_thresh, minimal_area
        self.sam_mask_coff, self.sam_iou_thresh = sam_mask_coff, sam_iou_thresh
        self.compat = compat
        self.prompts: list[str] = []
        self.text_embeds: Tensor | None = None
        names = list(classes or ())
        if names and not names[0]:
            names.pop(0)
        if names:
            encode = self.encode_labels if text_query_mode == "labels" else self.encode_prompts
            self.text_embeds = encode(names)
            self.prompts = names

    @property
    def num_classes(self) -> int:
        """Number of channels that a prediction has: the prompts, and one for what is ignored."""
        return len(self.prompts) + 1

    @property
    def cat_index_to_name(self) -> dict[int, str]:
        """Names of the values of a prediction, 0 being what is ignored."""
        return dict(enumerate(["", *self.prompts]))

    @property
    def cat_name_to_index(self) -> dict[str, int]:
        """The other way round."""
        return {name: index for index, name in self.cat_index_to_name.items()}

    def encode_labels(self, labels: Sequence[str], onehot: bool | None = None) -> Tensor:
        """``(L, E)`` means over 80 templates; or ``(L, C + 1)`` one-hot rows (see :meth:`encode_prompts`)."""
        return self._texts(as_labels(list(labels)), onehot)

    def encode_prompts(self, prompts: Sequence[str], onehot: bool | None = None) -> Tensor:
        """``(L, E)`` unit vectors of texts as they are.

        ``onehot`` gives rows that pick the channel of a prediction instead, for code that treats probabilities as
        features; by default when ``predict`` is on, a vocabulary is set and every text is in it.
        """
        texts = tuple(prompts)
        return self._texts(Labels(texts, tuple((text,) for text in texts), PLAIN), onehot)

    def _texts(self, labels: Labels, onehot: bool | None) -> Tensor:
        known = self.cat_name_to_index
        if onehot is None:
            onehot = self.predict and self.text_embeds is not None and set(labels.classes) <= set(known)
        if onehot:
            missing = [name for name in labels.classes if name not in known]
            if missing:
                raise InvalidConfig("One-hot rows are of prompts that were set", got=", ".join(missing))
            return F.one_hot(torch.tensor([known[name] for name in labels.classes]), self.num_classes).float()
        return self.segmenter.embed(labels)

    @torch.no_grad()
    def encode_image_to_feat_map(
        self, rgb_image: Tensor, orig_img_size: Size | None = None, return_preds: bool = False,
        ignore_label: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Features, or probabilities of the prompts.

        Args:
            rgb_image: ``(B, 3, H, W)`` in [0, 1].
            orig_img_size: ``(H, W)`` of a prediction; by default that of the input.
            return_preds: also return the labels ``(B, 1, H, W)``.
            ignore_label: a prediction has a first channel, all zero, and labels start at 1; 0 is what is ignored.

        Returns:
            ``(B, D, h, w)``; with ``predict``, ``(B, C (+ 1), H, W)``.
        """
        if rgb_image.ndim != 4:
            raise InvalidConfig("Images come as (B, 3, H, W)", got=tuple(rgb_image.shape))
        text = self.text_embeds
        if self.predict and text is None:
            raise InvalidConfig(
                "A prediction needs labels", got="text_embeds is None",
                remedy="Set classes=[...], or prompts and text_embeds = encode_labels(labels).",
            )
        encoded = self.segmenter.encode(
            rgb_image, crop=self.slide_crop, stride=self.slide_stride, scga=self.scga_scaling,
            refine=self.predict and self.sam_refinement, compat=self.compat,
        )  # fmt: skip
        if not self.predict or text is None:
            return torch.stack([image.features for image in encoded])
        results = [self._predicted(image, text, orig_img_size, ignore_label) for image in encoded]
        probabilities, labels = (torch.stack(part) for part in zip(*results, strict=True))
        return (probabilities, labels[:, None]) if return_preds else probabilities

    def _predicted(
        self, image: SegmentationFeatures, text: Tensor, size: Size | None, ignore_label: bool
    ) -> tuple[Tensor, Tensor]:
        count = len(text)
        scale = self.segmenter.aligned.logit_scale
        grid = prediction.class_probabilities(image.words, text, torch.arange(count), count, scale)
        size = image.size if size is None else (int(size[0]), int(size[1]))
        found = prediction.decide(grid, size, denoise=self.prompt_denoising_thresh, compat=self.compat)
        labels = found.labels
        if not self.sam_refinement:
            full = prediction.enlarge(grid, size, found.kept)
        else:
            full = grid.new_empty((count, *size))
            coarse = ClassMaps(grid * found.kept[:, None, None], size)
            labels = self.segmenter.refined(
                image, labels, coarse, coarse_threshold=self.coarse_thresh, min_area=self.minimal_area,
                mask_coefficient=self.sam_mask_coff, iou=self.sam_iou_thresh, compat=self.compat, out=full,
            ).labels  # fmt: skip
        if not ignore_label:
            return full, labels
        # as published, the threshold is on the probability before refinement
        labels = torch.where(found.scores < self.prediction_thresh, 0, labels + 1)
        return torch.cat([torch.zeros_like(full[:1]), full]), labels

    @torch.no_grad()
    def align_spatial_features_with_language(self, features: Tensor, onehot: bool | None = None) -> Tensor:
        """``(B, D, h, w)`` to the space of words ``(B, E, h, w)``, not normalised; a prediction passes as it is."""
        if onehot or (onehot is None and self.predict):
            return features
        aligned = self.segmenter.aligned
        tokens = features.to(next(aligned.head.parameters())).flatten(2).transpose(1, 2)
        return aligned.align(tokens).transpose(1, 2).unflatten(2, features.shape[-2:])

    def is_compatible_size(self, h: int, w: int) -> bool:
        """Whether a single pass (``slide_crop=0``) keeps the size."""
        return self.get_nearest_size(h, w) == (h, w)

    def get_nearest_size(self, h: int, w: int) -> Size:
        """The nearest size of whole patches."""
        patch = self.segmenter.aligned.patch_size
        return max(1, round(h / patch)) * patch, max(1, round(w / patch)) * patch


def radseg_encoder(model_version: str = "c-radio_v3-b", lang_model: str | None = None, **options: Any) -> RADSegEncoder:
    """The hub entry: ``lang_model=None`` takes the adaptor that the weights have. See :class:`RADSegEncoder`."""
    known = catalogue().get(model_version)
    if lang_model is not None and known is not None and known.adaptors and lang_model not in known.adaptors:
        raise InvalidConfig(
            f"lang_model is one of the adaptors of {model_version}", got=lang_model,
            remedy=f"It has {', '.join(known.adaptors)}.",
        )
    return RADSegEncoder(model_version=model_version, lang_model=lang_model, **options)
