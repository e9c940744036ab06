"""``RegionModel``: a frozen backbone and a region encoder behind one door. Images in, ``RegionTokens`` out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin import backbones, hub, runtime
from opsin.backbones import Backbone
from opsin.cards import ModelCard
from opsin.errors import IncompatibleModel, InvalidConfig, InvalidPrompt
from opsin.images import ImageSource, read_images
from opsin.regions import aggregate, extent
from opsin.regions.aggregate import Grouping, Groups
from opsin.regions.asking import Asked, Prompts, one_each, own_prompts, spread_prompts
from opsin.regions.checkpoint import REGION_WEIGHTS, locate_weights
from opsin.regions.encoder import RegionEncoder, RegionMemory, RegionOutput
from opsin.types import FeatureMap, Query, RegionTokens

Token = Literal["pred", "proj"]


class RegionModel(nn.Module):
    """Object-level tokens of images (REN, arXiv 2505.18153).

    >>> model = RegionModel.from_pretrained("opsin-tiny")
    >>> regions = model.encode("kitchen.jpg")
    """

    def __init__(self, backbone: Backbone, encoder: RegionEncoder, card: ModelCard) -> None:
        super().__init__()
        if backbone.dim != encoder.dim:
            raise IncompatibleModel(
                "A region encoder is as wide as the features of its backbone",
                got=f"encoder {encoder.dim}, {backbone.name} {backbone.dim}",
            )
        self.backbone, self.encoder, self.card = backbone, encoder, card
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        ref: str | Path = "opsin-tiny",
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> RegionModel:
        """A model by catalogue name, ``"hf:org/repo@rev"``, ``"dir:path"``, or the path of a published
        ``checkpoint.pth``.

        ``device=None`` takes the machine's accelerator, else the CPU; ``dtype`` None is float32, ``"auto"`` bfloat16
        where it is fast and the card allows it.
        """
        weights = locate_weights(str(ref))
        place = runtime.resolve_device(device)
        precision = runtime.resolve_dtype(dtype, place, allow_bfloat16=weights.card.bfloat16)
        backbone = backbones.load(weights.backbone, device=place, dtype=precision)
        encoder = RegionEncoder.from_state_dict(weights.state, heads=weights.card.heads, seed=weights.card.seed)
        return cls(backbone, encoder.to(place, precision), weights.card)

    def save_pretrained(self, folder: str | Path, *, embed_backbone: bool = False) -> Path:
        """Write ``card.json`` and ``regions.safetensors``; with ``embed_backbone`` the backbone's files too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        card = self.card
        if embed_backbone:
            save_backbone(self.backbone, folder / "backbone", self.name)
            card = replace(card, backbone="backbone")
        hub.save_safetensors(self.encoder.state_dict(), folder / REGION_WEIGHTS)
        card.save(folder / "card.json")
        return folder

    def push_to_hub(self, repo: str, *, private: bool = False, embed_backbone: bool = False) -> str:
        """Upload what ``save_pretrained`` writes to the Hugging Face repository ``repo``; returns its address."""
        return hub.upload(
            lambda folder: self.save_pretrained(folder, embed_backbone=embed_backbone), repo, private=private
        )

    @property
    def name(self) -> str:
        """Name that tokens of this model carry."""
        return self.card.name

    @property
    def dim(self) -> int:
        """Width ``D`` of a token."""
        return self.encoder.dim

    @torch.inference_mode()
    def features(
        self, images: ImageSource | Sequence[ImageSource], *, size: int | None = None, batch_size: int = 8
    ) -> list[FeatureMap]:
        """Feature maps of images, one each: the expensive step, done once per image."""
        fit: Any = self.card.fit  # "crop" is for codecs; the backbone refuses it
        return self.backbone.encode(images, size=size or self.card.image_size, fit=fit, batch_size=batch_size)

    @torch.inference_mode()
    def memory(self, features: FeatureMap) -> RegionMemory:
        """What prompts need to know of an image; with it, new prompts cost only their own side."""
        if features.model != self.backbone.name:
            raise IncompatibleModel(
                "Features must come from the backbone of this model",
                got=features.model,
                remedy=f"Encode with {self.backbone.name}.",
            )
        return self.encoder.memory(runtime.to_model(features.features, self.encoder)[None])

    def encode(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        prompts: Prompts = "slic",
        points: Sequence[Any] | Tensor | None = None,
        boxes: Sequence[Any] | Tensor | None = None,
        masks: Sequence[Any] | Tensor | None = None,
        size: int | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> RegionTokens:
        """Regions of one or several images, as one table.

        Without own prompts the image is asked on superpixels (``prompts="slic"``) or a grid, and prompts with like
        tokens are merged. ``points`` (P, 2), ``boxes`` (K, 4) or ``masks`` (K, H, W), per image, in original pixels:
        one row per prompt, in order, nothing merged; for several images a list of such arrays. ``size``: side of the
        square model input. Further options: those of ``encode_features``. Zero regions is a legal result. Raises
        ``InvalidImage``, ``InvalidPrompt``, ``InvalidConfig``.
        """
        pictures = read_images(images)
        single = len(pictures) == 1
        asked: dict[str, Any] = {
            name: _per_image(value, len(pictures), rank, single, name)
            for name, value, rank in (("points", points, 2), ("boxes", boxes, 2), ("masks", masks, 3))
        }
        features = self.features(pictures, size=size, batch_size=batch_size)
        return self.encode_features(features, pictures, prompts=prompts, batch_size=batch_size, **asked, **options)

    @torch.inference_mode()
    def encode_features(
        self,
        features: Sequence[FeatureMap],
        pictures: Sequence[Tensor] | None = None,
        *,
        prompts: Prompts = "slic",
        points: Sequence[Tensor] | None = None,
        boxes: Sequence[Tensor] | None = None,
        masks: Sequence[Tensor] | None = None,
        memories: Sequence[RegionMemory] | None = None,
        grid_size: int | None = None,
        threshold: float | None = None,
        min_size: int = 1,
        grouping: Grouping | None = None,
        merge: bool = True,
        token: Token = "pred",
        with_masks: bool = False,
        compat: str | None = None,
        batch_size: int = 8,
    ) -> RegionTokens:
        """As ``encode``, from feature maps: ask the same images again without running the backbone.

        ``pictures`` (3, H, W), needed for superpixels; ``memories`` from ``memory`` saves the keys and values too.
        ``grid_size`` prompts per side; ``threshold`` cosine, ``grouping`` and ``min_size`` as in
        ``aggregate.group``, the defaults from the model's card; ``merge=False`` leaves one row per prompt.
        ``token``: ``"pred"`` names regions, ``"proj"`` lives in the backbone's space. ``with_masks`` adds run-length
        masks. ``compat="published"``: REN's rules for small groups.
        """
        own = {
            kind: given for kind, given in (("points", points), ("boxes", boxes), ("masks", masks)) if given is not None
        }
        if len(own) > 1:
            raise InvalidPrompt("Prompts are points, or boxes, or masks", got=" and ".join(own))
        if token not in ("pred", "proj"):
            raise InvalidConfig('token is "pred" or "proj"', got=token)
        asked = []
        for i, feature in enumerate(features):
            if own:
                ((kind, given),) = own.items()
                asked.append(own_prompts(kind, given[i], feature.transform, feature.grid))
            else:
                picture = None if pictures is None else pictures[i]
                asked.append(spread_prompts(prompts, picture, feature.transform, grid_size or self.card.grid_size))
        rule = {
            "threshold": self.card.threshold if threshold is None else threshold,
            "method": grouping or self.card.grouping,
            "min_size": min_size,
            "compat": compat,
        }

        def answer(indices: Sequence[int]) -> list[RegionTokens]:
            kept = [memories[i] if memories is not None else self.memory(features[i]) for i in indices]
            tokens = self._decode(kept, [asked[i] for i in indices])
            return [
                self._regions(features[i], m, asked[i], t, rule if merge else None, token, with_masks)
                for i, m, t in zip(indices, kept, tokens, strict=True)
            ]

        return stack(runtime.in_batches(answer, range(len(features)), batch_size), self.name, self.dim)

    def query(
        self,
        image: ImageSource,
        *,
        box: Sequence[float] | Tensor | None = None,
        point: Sequence[float] | Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Query:
        """What to look for: the object in ``box``, under ``point``, in ``mask``, or the whole image as a crop."""
        picture = read_images(image)[0]
        if box is None and point is None and mask is None:
            box = (0, 0, picture.shape[2], picture.shape[1])
        found = self.encode(
            picture,
            boxes=None if box is None else torch.as_tensor(box, dtype=torch.float32).reshape(1, -1),
            points=None if point is None else torch.as_tensor(point, dtype=torch.float32).reshape(1, -1),
            masks=None if mask is None else mask[None],
        )
        return Query(found.tokens, self.name, "crop" if box is not None else "image")

    def _decode(self, memories: Sequence[RegionMemory], asked: Sequence[Asked]) -> list[RegionOutput]:
        """Tokens of each image's prompts; images of one grid go through together, shorter lists padded."""
        points = [a.points for a in asked]
        device = memories[0].keys[0].device
        alike = len({m.grid for m in memories}) == 1 and all(a.weights is None for a in asked)
        if len(memories) == 1 or not alike:
            return [
                self.encoder.decode(
                    m, a.points.to(device)[None], None if a.weights is None else a.weights.to(device)[None]
                )
                for m, a in zip(memories, asked, strict=True)
            ]
        joint = RegionMemory(
            tuple(torch.cat(k) for k in zip(*(m.keys for m in memories), strict=True)),
            tuple(torch.cat(v) for v in zip(*(m.values for m in memories), strict=True)),
            memories[0].grid,
        )
        longest = max(len(p) for p in points)
        padded = torch.stack([F.pad(p, (0, 0, 0, longest - len(p))) for p in points]).to(joint.keys[0].device)
        output = self.encoder.decode(joint, padded)
        return [
            RegionOutput(output.pred_tokens[i : i + 1, : len(p)], output.proj_tokens[i : i + 1, : len(p)])
            for i, p in enumerate(points)
        ]

    def _regions(
        self,
        features: FeatureMap,
        memory: RegionMemory,
        asked: Asked,
        output: RegionOutput,
        rule: Any,
        token: Token,
        with_masks: bool,
    ) -> RegionTokens:
        pred = output.pred_tokens[0]
        pred = pred.to(torch.promote_types(pred.dtype, torch.float32))
        device = pred.device
        if asked.owners is not None:
            groups = Groups(asked.owners.labels.to(device), asked.owners.counts.to(device))
        elif rule is None:
            groups = one_each(len(pred), device)
        else:
            groups = aggregate.group(pred, **rule)
        chosen = pred if token == "pred" else output.proj_tokens[0].to(pred.dtype)
        middle = groups.representatives(asked.original.to(device))
        boxes, masks = asked.boxes, asked.masks
        if asked.superpixels is not None and asked.superpixel_transform is not None:
            labels = extent.region_labels(asked.superpixels, groups, asked.superpixel_transform)
            boxes = extent.label_boxes(labels, len(groups))
            masks = extent.label_run_lengths(labels, len(groups)) if with_masks else None
        elif boxes is None or (with_masks and masks is None):
            maps = extent.attention_maps(self.encoder, memory, asked.points.to(device)[None], groups)
            reached, masks = extent.attention_extent(maps, features.transform, with_masks=with_masks)
            boxes = reached if boxes is None else boxes
        return RegionTokens(
            tokens=groups.mean(chosen),
            points=asked.original.to(device)[middle],
            boxes=boxes.to(device),
            counts=groups.counts,
            image_index=torch.zeros(len(groups), dtype=torch.long, device=device),
            sizes=(features.transform.size,),
            model=self.name,
            masks=masks if with_masks else None,
        )


def save_backbone(backbone: Backbone, folder: Path, owner: str) -> None:
    """Write a backbone that stands inside the model ``owner``, under a name that does not tell where it came from."""
    backbone.save_pretrained(folder)
    replace(backbone.card, name=f"{owner}/backbone", source="").save(folder / "card.json")


def _per_image(value: Any, count: int, rank: int, single: bool, name: str) -> list[Tensor] | None:
    """One array of prompts per image; a bare array is accepted for a single image."""
    if value is None:
        return None
    if single:
        array = value if isinstance(value, Tensor) else torch.as_tensor(value)
        return [array[0] if array.ndim == rank + 1 and len(array) == 1 else array]
    if len(value) != count:
        raise InvalidPrompt(f"{name} holds one array per image", got=f"{len(value)} for {count} images")
    return [torch.as_tensor(v) for v in value]


def stack(tables: Sequence[RegionTokens], model: str, dim: int) -> RegionTokens:
    """One table of several single-image ones, in order; of none, an empty table."""
    if not tables:
        zeros = torch.zeros
        index = zeros(0, dtype=torch.long)
        return RegionTokens(zeros((0, dim)), zeros((0, 2)), zeros((0, 4)), index, index, (), model)
    columns = {name: torch.cat([getattr(t, name) for t in tables]) for name in ("tokens", "points", "boxes", "counts")}
    index = torch.cat([torch.full_like(t.image_index, i) for i, t in enumerate(tables)])
    masked = all(t.masks is not None for t in tables)
    masks = tuple(m for t in tables for m in (t.masks or ())) if masked else None
    return RegionTokens(**columns, image_index=index, sizes=tuple(t.sizes[0] for t in tables), model=model, masks=masks)
