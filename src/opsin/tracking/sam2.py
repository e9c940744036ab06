"""SAM 2 on still pictures: a mask for each box, or three for each point. Ravi et al., "SAM 2" (2024), arXiv 2408.00714.

The networks are those of ``transformers``; preparing pictures, caching, batching and finishing masks is done here.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin import hub
from opsin.backbones.base import quiet
from opsin.cards import ModelCard
from opsin.errors import InvalidCheckpoint, InvalidConfig, MissingFile
from opsin.geometry import check_box, check_points
from opsin.images import resize
from opsin.runtime import in_batches, is_out_of_memory, resolve_device, resolve_dtype
from opsin.tracking.base import pairs, size_of
from opsin.tracking.masks import largest_component

if TYPE_CHECKING:
    from transformers import Sam2Model, Sam2VideoModel

DEFAULT = "sam2.1-large"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CACHED = 8  # pictures whose embedding is kept, 17 MB each in float32
BATCH = 4  # pictures encoded at once
PROMPT_BATCH = 8  # prompts decoded at once, each some 70 MB

Kind = Literal["Sam2Model", "Sam2VideoModel"]
Key = tuple[Any, ...]


class Sam2Masks:
    """``opsin.tracking.base.ObjectMasks`` by SAM 2 or 2.1. Build it with :meth:`from_pretrained`.

    The pictures seen last stay encoded, known by their content, so that prompts of one picture may come one by one.
    """

    def __init__(self, model: Sam2Model | Sam2VideoModel, *, name: str = "sam2") -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.name = name
        self.side = int(self.model.prompt_encoder.input_image_size)
        self._seen: OrderedDict[Key, list[Tensor]] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        ref: str | Path = DEFAULT,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Sam2Masks:
        """With the weights of a catalogue name, ``"hf:org/repo@revision"``, ``"dir:path"`` or a folder.

        ``device`` and ``dtype`` as everywhere; ``"auto"`` is bfloat16 where the hardware has it, as published.
        Raises UnknownModel, ModelUnavailable, MissingFile, InvalidConfig (not a SAM 2), InvalidCheckpoint.
        """
        return cls(load_model(ref, "Sam2Model", device, dtype), name=str(ref))

    @torch.inference_mode()
    def from_boxes(self, pictures: Sequence[Tensor], boxes: Sequence[Tensor]) -> list[Tensor]:
        """One mask for each box: ``boxes (N_i, 4)`` of picture i → ``(N_i, H, W)``, the largest component of each.

        As the published visual query pipeline does, the picture is smoothed first (3×3 Gaussian) and a single mask is
        asked for; the network puts the best of three in its place where that one is not stable.
        """
        checked = [
            torch.tensor([check_box(box, size) for box in some], dtype=torch.float64).reshape(-1, 4)
            for size, some in pairs(pictures, boxes)
        ]
        return [found[:, 0] for found in self._masks(pictures, checked, single=True)]

    @torch.inference_mode()
    def from_points(self, pictures: Sequence[Tensor], points: Sequence[Tensor]) -> list[Tensor]:
        """Three masks for each point inside an object: ``points (N_i, 2)`` → ``(N_i, 3, H, W)``."""
        checked = [check_points(some.cpu().double(), size) for size, some in pairs(pictures, points)]
        return self._masks(pictures, checked, single=False)

    def _masks(self, pictures: Sequence[Tensor], prompts: Sequence[Tensor], *, single: bool) -> list[Tensor]:
        """Masks ``(N_i, K, H, W)`` of boxes, one each (``single``), or of points."""
        results = []
        for first in range(0, len(pictures), BATCH):
            group = slice(first, first + BATCH)
            asked = [p for p, some in zip(pictures[group], prompts[group], strict=True) if len(some)]
            embeddings = iter(self._embed(asked, smooth=single))
            for picture, some in zip(pictures[group], prompts[group], strict=True):
                size = size_of(picture)
                if not len(some):
                    count = 1 if single else int(self.model.mask_decoder.num_multimask_outputs)
                    results.append(torch.zeros((0, count, *size), dtype=torch.bool))
                    continue
                # transformers takes numbers of pixels and adds half a pixel; ours are centres already
                canvas = some * (self.side / some.new_tensor([size[1], size[0]])).repeat(some.shape[1] // 2) - 0.5
                decode = partial(self._decode, embedding=next(embeddings), size=size, single=single)
                results.append(torch.stack(in_batches(decode, list(canvas.float()), PROMPT_BATCH)))
        return results

    def _embed(self, pictures: Sequence[Tensor], *, smooth: bool) -> list[list[Tensor]]:
        """What the decoder needs of each picture, from the cache or encoded in one batch."""
        keys = [_key(p, smooth) for p in pictures]
        missing = {key: p for key, p in zip(keys, pictures, strict=True) if key not in self._seen}
        for key in keys:
            if key in self._seen:
                self._seen.move_to_end(key)

        def encode(chosen: Sequence[Tensor]) -> list[list[Tensor]]:
            levels = self.model.get_image_embeddings(torch.cat([prepare(p, self.model, smooth=smooth) for p in chosen]))
            return [[level[i : i + 1].clone() for level in levels] for i in range(len(chosen))]

        self._seen.update(zip(missing, in_batches(encode, list(missing.values()), BATCH), strict=True))
        found = [self._seen[key] for key in keys]
        while len(self._seen) > CACHED:
            self._seen.popitem(last=False)
        return found

    def _decode(
        self, prompts: Sequence[Tensor], embedding: list[Tensor], size: tuple[int, int], single: bool
    ) -> list[Tensor]:
        """Finished masks ``(K, H, W)`` of each prompt, a box or a point of the model's canvas."""
        feature = embedding[-1]
        stacked = torch.stack(list(prompts)).to(feature.device)
        labels = torch.ones((1, len(stacked), 1), dtype=torch.int, device=feature.device)
        asked = (None, None, stacked[None], None) if single else (stacked[None, :, None], labels, None, None)
        sparse, dense = self.model.prompt_encoder(*asked)
        logits = self.model.mask_decoder(
            image_embeddings=feature,
            image_positional_embeddings=self.model.get_image_wide_positional_embeddings().to(feature.dtype),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=not single,
            high_resolution_features=embedding[:-1],
        )[0][0]
        # one prompt at a time, because masks of the picture's size are large
        return [torch.stack([largest_component(mask) for mask in full_size(some, size)]) for some in logits]


def full_size(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks ``(K, *size)``, boolean, on the CPU, of mask logits ``(K, h, w)`` over a whole picture."""
    return (F.interpolate(logits[None].float(), size, mode="bilinear", align_corners=False)[0] > 0).cpu()


def prepare(picture: Tensor, model: Any, *, smooth: bool = False) -> Tensor:
    """A picture ``(3, H, W)``, uint8 or in [0, 1], as the model's input ``(1, 3, S, S)``, by a 3×3 Gaussian or not."""
    pixels = picture.to(model.device, torch.float32)
    if picture.dtype == torch.uint8:
        pixels = pixels / 255
    if smooth:
        mode = "reflect" if min(size_of(picture)) > 1 else "replicate"
        line = pixels.new_tensor([0.25, 0.5, 0.25])
        pixels = F.conv2d(F.pad(pixels[:, None], (1, 1, 1, 1), mode=mode), torch.outer(line, line)[None, None])[:, 0]
    mean, std = (pixels.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    side = int(model.prompt_encoder.input_image_size)
    return ((resize(pixels, (side, side)) - mean) / std)[None].to(model.dtype)


def is_available(ref: str | Path = DEFAULT) -> bool:
    """Whether the weights of a reference are on disk: in the hub's cache, or in the folder. Nothing is downloaded."""
    card = hub.card_of(ref)
    if isinstance(ref, str) and ref.startswith("hf:"):
        repo, revision = hub.parse_hf(ref)
        card = ModelCard(ref, "tracker", "sam2", source=f"hf:{repo}", revision=revision)
    if card is not None and card.repo:
        return hub.is_cached(card)
    folder = Path(str(ref).removeprefix("dir:")).expanduser()
    return (folder / "config.json").is_file() and bool(_weights(folder))


def load_model(ref: str | Path, kind: Kind, device: str | torch.device | None, dtype: str | torch.dtype | None) -> Any:
    """A frozen SAM 2 of ``transformers``; image models are read from the files of video models too.

    Positions of prompts stay in float32 at least: half precision would move them by pixels.
    """
    card = hub.card_of(ref)
    if card is not None and card.family != "sam2":
        raise InvalidConfig("A tracker is a SAM 2", got=f'"{card.name}", of kind {card.kind}')
    folder = hub.resolve(ref)
    _check_type(folder, kind)
    import transformers

    for path in _weights(folder):
        hub.check_file(path)
    try:
        with quiet():
            model, info = getattr(transformers, kind).from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # safetensors, torch and transformers each raise their own on a damaged file
        if is_out_of_memory(error):
            raise
        got = next(iter(str(error).splitlines()), type(error).__name__)
        remedy = "Download or copy them again."
        raise InvalidCheckpoint(f"The weights in {folder} must be whole", got=got, remedy=remedy) from error
    missing = sorted(info["missing_keys"])
    if missing:
        got = f"{len(missing)} missing, such as {missing[0]}"
        raise InvalidCheckpoint(f"The weights in {folder} must fit {kind}", got=got)
    target = resolve_device(device)
    return _to(model, target, resolve_dtype(dtype, target))


def _to(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model moved, but for its frequencies of positions; the positions of its cells are computed once."""
    owners = (model.shared_image_embedding, model.prompt_encoder.shared_embedding)
    exact = [owner.positional_embedding.to(device) for owner in owners]
    model.to(device, dtype)
    if dtype.itemsize < 4:
        for owner, frequencies in zip(owners, exact, strict=True):
            owner.positional_embedding = frequencies
    cells = model.get_image_wide_positional_embeddings().to(dtype)
    model.get_image_wide_positional_embeddings = lambda: cells
    return model


def _check_type(folder: Path, kind: Kind) -> None:
    path = folder / "config.json"
    if not path.is_file() or not _weights(folder):
        raise MissingFile("A SAM 2 folder holds config.json and model.safetensors", got=str(folder))
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise InvalidCheckpoint("config.json is a JSON object", got=str(path)) from error
    accepted = ("sam2_video",) if kind == "Sam2VideoModel" else ("sam2", "sam2_video")
    if found not in accepted:
        raise InvalidConfig(f"The model_type of {kind} is {' or '.join(accepted)}", got=f'"{found}" in {folder}')


def _weights(folder: Path) -> list[Path]:
    return [path for pattern in (*hub.SAFETENSORS[:2], *hub.PICKLES[:2]) for path in sorted(folder.glob(pattern))]


def _key(picture: Tensor, smooth: bool) -> Key:
    content = picture.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return tuple(picture.shape), picture.dtype, smooth, hashlib.blake2b(content.data, digest_size=16).digest()
