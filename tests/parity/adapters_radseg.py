"""RADSeg from plain numpy: weights under their published names, images in [0, 1], vectors of words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from opsin.segmentation import aggregation
from opsin.segmentation.aligned import AlignedBackbone
from opsin.segmentation.model import Segmenter, default_card
from opsin.segmentation.radseg import RADSegEncoder
from opsin.segmentation.sam import SamDecoder
from tests.parity.adapters_radio import radio_backbone

Array = np.ndarray
COMPAT = "published"


def segmenter(weights: dict[str, Array], args: dict[str, Any], scra: float | None) -> Segmenter:
    aligned = AlignedBackbone(radio_backbone(weights, args), "siglip2")
    aligned.scra = scra
    return Segmenter(aligned, default_card(aligned))


def radseg_features(
    weights: dict[str, Array], args: dict[str, Any], image: Array, *, crop: int, stride: int, scra: float
) -> Array:
    images = list(torch.from_numpy(np.array(image)))
    found = segmenter(weights, args, scra).encode(images, crop=crop, stride=stride, scga=0)
    return torch.stack([one.features for one in found]).numpy()


def radseg_scra(weights: dict[str, Array], args: dict[str, Any], tokens: Array, *, scaling: float) -> Array:
    model: Any = segmenter(weights, args, scaling).aligned.backbone.model
    with torch.no_grad():
        return model.encoder.layer[-1].attention(torch.from_numpy(np.array(tokens)))[0].numpy()


def radseg_scga(features: Array, *, scaling: float, compat: Any = None) -> Array:
    return aggregation.aggregate(torch.from_numpy(np.array(features)), scaling, compat).numpy()


def radseg_predict(
    weights: dict[str, Array], args: dict[str, Any], image: Array, text: Array, *, crop: int, stride: int, scra: float,
    scga: float, denoise: float, threshold: float, size: tuple[int, int] | None = None, ignore: bool = True,
) -> dict[str, Array]:  # fmt: skip
    encoder = RADSegEncoder(
        model_version=segmenter(weights, args, scra), predict=True, scra_scaling=scra, scga_scaling=scga,
        slide_crop=crop, slide_stride=stride, prompt_denoising_thresh=denoise, prediction_thresh=threshold,
        compat=COMPAT,
    )  # fmt: skip
    return _answer(encoder, image, text, size, ignore)


def radseg_refine(
    weights: dict[str, Array], args: dict[str, Any], sam_weights: dict[str, Array], image: Array, text: Array, *,
    options: dict[str, Any],
) -> dict[str, Array]:  # fmt: skip
    rest = dict(options)
    model = segmenter(weights, args, rest.get("scra_scaling", 10.0))
    names = {key.removeprefix("sam."): torch.from_numpy(np.array(value)) for key, value in sam_weights.items()}
    model = Segmenter(model.aligned, model.card, SamDecoder.from_state_dict(names))
    size, ignore = rest.pop("orig_img_size", None), rest.pop("ignore_label", False)
    encoder = RADSegEncoder(model_version=model, predict=True, sam_refinement=True, compat=COMPAT, **rest)
    return _answer(encoder, image, text, size, ignore)


def _answer(
    encoder: RADSegEncoder, image: Array, text: Array, size: tuple[int, int] | None, ignore: bool
) -> dict[str, Array]:
    encoder.text_embeds = torch.from_numpy(np.array(text))
    probabilities, labels = encoder.encode_image_to_feat_map(
        torch.from_numpy(np.array(image)), size, return_preds=True, ignore_label=ignore
    )
    return {"probs": probabilities.numpy(), "labels": labels[:, 0].numpy()}
