"""The published algorithm of RADSeg, written from its description as plainly as published: what is timed against.

It follows the published way of working, costs included: all windows of an image in one batch, position encodings
resampled at every call, both correlations as whole matrices that are masked by a boolean index, one vector product for
every pair of location and label on expanded copies, all probabilities enlarged to every pixel and copied into other
layouts, and for RADSeg+ a loop over classes with one decoder call for each. The numbers are those of
``opsin.segmentation`` (a test checks both); only the way differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.backbones.adaptors import Adaptor
from opsin.backbones.radio import interpolate_positions
from opsin.segmentation.windows import plan

PATCH = 16


class WholeMatrixAttention(nn.Module):
    """SCRA in the place of a last attention, on its weights: two N × N matrices per head."""

    def __init__(self, attention: Any, heads: int, scaling: float) -> None:
        super().__init__()
        self.attention, self.heads, self.scaling = attention, heads, scaling

    def split(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        return x.reshape(batch, count, self.heads, dim // self.heads).transpose(1, 2).contiguous()

    def merge(self, x: Tensor) -> Tensor:
        return self.attention.o_proj(x.transpose(1, 2).flatten(2))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        a = self.attention
        q, k, v = (self.split(layer(hidden_states)) for layer in (a.q_proj, a.k_proj, a.v_proj))
        first = self.merge((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v)
        unit = F.normalize(self.split(first), dim=-1)
        similarity = unit @ unit.transpose(2, 3) * self.scaling
        similarity[similarity < 0] = float("-inf")
        return self.merge(similarity.softmax(-1) @ v), None


class ReferenceRadseg:
    """RADSeg on a ``RadioModel`` of its own (its last attention is replaced) and the heads of the adaptors."""

    def __init__(
        self, model: Any, language: Adaptor, sam: Adaptor | None = None, *, scaling: float = 10.0, crop: int = 336,
        stride: int = 224, denoise: float = 0.5,
    ) -> None:  # fmt: skip
        self.model, self.language, self.sam = model, language, sam
        self.crop, self.stride, self.denoise, self.scaling = crop, stride, denoise, scaling
        last = model.encoder.layer[-1]
        last.attention = WholeMatrixAttention(last.attention, model.config.num_attention_heads, scaling)
        self.mean, self.std = (
            torch.tensor(v).view(3, 1, 1) for v in (list(model.config.norm_mean), list(model.config.norm_std))
        )

    def backbone(self, pixels: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, D, H / 16, W / 16)``."""
        embeddings = self.model.embeddings
        h, w = pixels.shape[-2] // PATCH, pixels.shape[-1] // PATCH
        cells = ((pixels - self.mean) / self.std).reshape(len(pixels), 3, h, PATCH, w, PATCH)
        patches = embeddings.patch_projection(cells.permute(0, 2, 4, 1, 3, 5).reshape(len(pixels), h * w, -1))
        patches = patches + interpolate_positions(embeddings.position_embedding, (h, w))
        prefix = embeddings.cls_register_token.expand(len(pixels), -1, -1)
        tokens = self.model.encoder(torch.cat([prefix, patches], 1)).last_hidden_state[:, prefix.shape[1] :]
        return tokens.transpose(1, 2).reshape(len(pixels), -1, h, w)

    def windows(self, image: Tensor) -> Tensor:
        """``(3, H, W)`` to the stitched features ``(1, D, h, w)``."""
        layout = plan((image.shape[1], image.shape[2]), self.crop, self.stride)
        resized = F.interpolate(image[None], layout.size, mode="bilinear")
        height, width = layout.window
        found = self.backbone(torch.cat([resized[:, :, y : y + height, x : x + width] for y, x in layout.starts]))
        total = found.new_zeros(1, found.shape[1], layout.size[0] // PATCH, layout.size[1] // PATCH)
        hits = torch.zeros_like(total[:, :1])
        for (y, x), features in zip(layout.starts, found, strict=True):
            cut = slice(y // PATCH, (y + height) // PATCH), slice(x // PATCH, (x + width) // PATCH)
            total[:, :, *cut] += features
            hits[:, :, *cut] += 1
        return total / hits

    def aggregate(self, features: Tensor) -> Tensor:
        """SCGA ``(1, D, h, w)``."""
        tokens = features.flatten(2).transpose(1, 2)
        unit = F.normalize(tokens, dim=-1)
        similarity = unit @ unit.transpose(1, 2)
        similarity = (similarity - similarity.mean()) * self.scaling
        similarity[similarity < 0] = float("-inf")
        return (similarity.softmax(-1) @ tokens).transpose(1, 2).reshape(features.shape)

    def align(self, features: Tensor) -> Tensor:
        """Into the space of the words ``(1, E, h, w)``."""
        found = self.language.head_mlp(features.flatten(2).transpose(1, 2))
        return found.transpose(1, 2).unflatten(2, features.shape[2:])

    def probabilities(self, words: Tensor, text: Tensor) -> Tensor:
        """``text (C, E)`` to ``(1, C, h, w)``: the product of every location with every label, one by one."""
        tokens = F.normalize(words.flatten(2).transpose(1, 2), dim=-1)[0]
        cosine = tokens[:, None, None, :] @ F.normalize(text, dim=-1)[None, :, :, None]
        return (100 * cosine[..., 0, 0]).softmax(-1).T.reshape(1, len(text), *words.shape[2:])

    def decide(self, probabilities: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Labels ``(H, W)`` and the probabilities ``(C, H, W)``, those of classes that are nowhere likely set to 0."""
        full = F.interpolate(probabilities, size=size, mode="bilinear", align_corners=False)
        flat = full.permute(0, 2, 3, 1).reshape(-1, full.shape[1])
        weak = flat.max(0).values < self.denoise
        flat[:, weak] = 0
        full = flat.reshape(1, *size, -1).permute(0, 3, 1, 2).contiguous()
        scores, labels = full.max(1)
        labels = labels + 1  # the published answer has an unknown class in front
        labels[scores < 0] = 0
        full = torch.cat([torch.zeros_like(full[:, :1]), full], 1)
        return labels[0] - 1, full[0, 1:]

    def sam_features(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """What SAM's neck is fed with ``(1, 1280, h, w)``, and the size of the image in its frame."""
        height, width = image.shape[1:]
        longest = max(height, width)
        fed = int(height * 64 / longest) * PATCH, int(width * 64 / longest) * PATCH
        features = self.backbone(F.interpolate(image[None], fed, mode="bilinear"))
        if self.sam is None:
            raise SystemExit("RADSeg+ needs the adaptor sam")
        grid = int(features.shape[2]), int(features.shape[3])
        found = self.sam.feat_mlp(features.flatten(2).transpose(1, 2), grid)
        return found.transpose(1, 2).unflatten(2, grid), fed


def reference_refine(
    labels: Tensor, full: Tensor, embedding: Tensor, decoder: Any, *, threshold: float = 0.10, min_area: int = 225,
    coefficient: float = 0.005, gate: float = 0.9,
) -> Tensor:  # fmt: skip
    """RADSeg+ on ``labels (H, W)`` and ``full (C, H, W)``: refined labels. A square image, and every mask that is not
    accepted is forgotten (here the gate lets all pass).
    """
    from scipy import ndimage

    size = labels.shape[0], labels.shape[1]
    half = size[0] // 2, size[1] // 2
    small = F.interpolate(labels[None, None].float(), half, mode="nearest")[0, 0].long()
    likely = F.interpolate(full[None], half, mode="bilinear", align_corners=False)[0]
    small[likely.max(0).values < threshold] = len(full)
    scale = 1024 / max(half)
    scores = torch.zeros_like(full)
    for index in range(len(full)):
        p = likely[index]
        if p.max() < threshold:
            continue
        numbers, count = ndimage.label((small == index).numpy(), structure=[[1, 1, 1]] * 3)
        regions = [torch.from_numpy(numbers == number) for number in range(1, count + 1)]
        regions = [region for region in regions if region.sum() >= min_area]
        if not regions:
            continue
        boxes, points = [], []
        for region in regions:
            y, x = region.nonzero(as_tuple=True)
            boxes.append([float(x.min()), float(y.min()), float(x.max()), float(y.max())])
            best = int((p * region).flatten().argmax())
            points.append([float(best % half[1]), float(best // half[1])])
        prompt = F.interpolate(p[None, None], (256, 256), mode="bilinear", align_corners=False)
        prompt = torch.where(prompt > threshold, prompt * coefficient, torch.zeros_like(prompt))
        logits, iou = decoder.decode(
            embedding, torch.tensor(points) * scale + 0.5, torch.tensor(boxes) * scale + 0.5, prompt,
            mask_index=torch.zeros(len(regions), dtype=torch.long), batch_size=len(regions), compat="published",
        )  # fmt: skip
        large = F.interpolate(logits[iou > gate][:, None], (1024, 1024), mode="bilinear", align_corners=False)
        masks = F.interpolate(large, size, mode="bilinear", align_corners=False)[:, 0]
        if len(masks):
            scores[index] = (masks.sigmoid() * full[index]).max(0).values * (masks > 0).any(0)
    best_score, winner = scores.max(0)
    return torch.where(best_score > 0, winner, labels)
