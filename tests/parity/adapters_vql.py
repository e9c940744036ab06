"""Visual query localization: from plain numpy, (row, col) points and xywh boxes to calls of the product and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsin.backbones.base import Backbone, BackboneOutput
from opsin.cards import ModelCard
from opsin.geometry import box_iou, clip_boxes
from opsin.regions import RegionEncoder, RegionModel
from opsin.vql import crops, expansion, query_tokens
from opsin.vql.candidates import selection
from opsin.vql.preset import preset
from opsin.vql.sources import RegionTokenSource, matching, similarity

Array = np.ndarray


def _xyxy(box: Any) -> Tensor:
    x, y, w, h = box
    return torch.tensor([x, y, x + w, y + h], dtype=torch.float64)


def _picture(image: Array) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def vq_crop(image: Array, bbox: Any, factor: float) -> dict[str, Any]:
    crop = crops.crop_around(_picture(image), _xyxy(bbox), factor)
    x1, y1, x2, y2 = clip_boxes(crop.to_crop(_xyxy(bbox)), image.shape[:2]).tolist()
    left, top, _, _ = crop.window
    return {
        "new_bbox": [x1, y1, x2 - x1, y2 - y1], "crop_left": left, "crop_top": top,
        "scale_x": crop.transform.scale[0], "scale_y": crop.transform.scale[1],
        "crop": (crop.picture * 255).round().byte().permute(1, 2, 0).numpy(),
    }  # fmt: skip


def vq_sliding(image: Array, factor: float, overlap: float) -> dict[str, Any]:
    tiles = crops.sliding(_picture(image), factor, overlap, compat="published")
    return {
        "starts": [[t.window[1], t.window[0]] for t in tiles],
        "sizes": [[t.window[3] - t.window[1], t.window[2] - t.window[0]] for t in tiles],
        "crops": np.stack([(t.picture * 255).round().byte().permute(1, 2, 0).numpy() for t in tiles]),
    }


def vq_cropping_factor(bbox: Any, frame: Any, expansion: float) -> float:
    return crops.cropping_factor(_xyxy(bbox), (frame[1], frame[0]), expansion)


def vq_iou(a: Any, b: Any) -> float:
    return box_iou(_xyxy(a)[None], _xyxy(b)[None]).item()


def vq_select(
    tokens: Array, query_tokens: Array, mask: Array, frame_ids: Any, query_frame_number: int,
    *, top_k: int, top_p: float, nms_threshold: float, compat: str | None = "published",
) -> dict[str, Any]:  # fmt: skip
    cosines = similarity(torch.from_numpy(tokens), torch.from_numpy(query_tokens))
    found = selection(
        frame_ids, cosines.amax(1), preset=preset("ren-vql", top_k=top_k, top_p=top_p, nms=nms_threshold),
        query_frame=query_frame_number, mask=torch.from_numpy(mask), compat=compat,
    )  # fmt: skip
    steps = {"after_frame_max": found.frame_max, "after_inter_nms": found.peaks, "after_topk": found.top_k}
    last = found.top_p
    return {
        "object_scores": cosines.amax(1).tolist(),
        **{name: {"idxs": s.rows.tolist(), "scores": s.scores.tolist()} for name, s in steps.items()},
        "selected_idxs": last.rows.tolist(), "selected_frames": last.frames.tolist(),
        "selected_scores": last.scores.tolist(), "query_match_idxs": cosines.argmax(1)[last.rows].tolist(),
    }  # fmt: skip


def vq_query_token(
    masks: list[Array], points: Array, tokens: list[Array], compat: str | None = "published"
) -> tuple[Array, list[int]]:
    """Rows, and the mask that each is of. ``points (P, 2)`` as (row, col), which need not be whole."""
    places = torch.from_numpy(points).flip(-1)
    chosen = [
        query_tokens.choose(torch.from_numpy(m), places, torch.from_numpy(t), compat=compat)
        for m, t in zip(masks, tokens, strict=True)
    ]
    kept = [i for i, c in enumerate(chosen) if c is not None]
    return np.stack([chosen[i].numpy() for i in kept]), kept


def vq_sharpness(image: Array) -> float:
    return expansion.sharpness(_picture(image), compat="published")


class GivenFeatures(Backbone):
    """A backbone that answers with features that are known beforehand, in order; ``seen`` is what it was shown."""

    def __init__(self, features: Tensor, patch: int) -> None:
        side = features.shape[-1] * patch
        card = ModelCard("given", "backbone", "given", dim=features.shape[1], patch_size=patch, image_size=side)
        super().__init__(torch.nn.Linear(1, 1), card)
        self.given, self.seen = features, []

    def _features(self, pixels: Tensor) -> BackboneOutput:
        first = len(self.seen)
        self.seen += list(pixels)
        return BackboneOutput(self.given[first : first + len(pixels)])


class GivenRen:
    """The product's region tokens over given features, called as the published wrapper is."""

    def __init__(self, weights: dict[str, Array], features: Array, *, heads: int, patch: int, grid: int) -> None:
        encoder = RegionEncoder.from_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, heads=heads)
        self.backbone = GivenFeatures(torch.from_numpy(features), patch)
        card = ModelCard("given-ren", "regions", "ren", dim=encoder.dim, image_size=self.backbone.image_size)
        self.source = RegionTokenSource(RegionModel(self.backbone, encoder, card), grid=grid)

    def tokens(
        self, images: Array, matching_tokens: Array | None = None, threshold: float = 0.0
    ) -> list[tuple[Array, Array]]:
        """Per image points ``(row, col)``, of the corner of the input's pixel rather than of its centre, and tokens."""
        results = []
        height, width = images.shape[1:3]
        half = torch.tensor((width, height)) / (2 * self.backbone.image_size)
        for found in self.source.tokens([_picture(i) for i in images]):
            if matching_tokens is not None:
                found = found.select(matching(found.tokens, torch.from_numpy(matching_tokens), threshold))
            results.append(((found.points - half).flip(-1).numpy(), found.tokens.numpy()))
        return results

    def attention(self, image: Array, points: Array) -> Array:
        """Maps ``(P, H, W)`` for points ``(row, col)`` as :meth:`tokens` gives them, on the first image's features."""
        self.backbone.seen.clear()
        half = torch.tensor((image.shape[1], image.shape[0])) / (2 * self.backbone.image_size)
        return self.source.attention(_picture(image), torch.from_numpy(points).flip(-1) + half).numpy()
