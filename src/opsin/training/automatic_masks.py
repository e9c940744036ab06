"""Automatic masks with SAM 2 (arXiv 2408.00714): a grid of points, quality filters, box suppression; cached on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin import hub
from opsin.errors import InvalidConfig, InvalidDataset, OpsinError
from opsin.geometry import box_nms, mask_boxes
from opsin.images import list_images
from opsin.masks.maps import RegionMaps
from opsin.masks.sources import CachedMasks, Frame
from opsin.masks.store import MaskStore
from opsin.runtime import progress
from opsin.tracking.sam2 import load_model, prepare
from opsin.training.config import RegionTrainingConfig, parse_source

if TYPE_CHECKING:
    from transformers import Sam2Model

VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}


@dataclass(frozen=True)
class MaskSettings:
    """How many points per side are asked, how many at once, and what a mask must reach: REN's choice for SAM 2.1."""

    points_per_side: int = 32
    points_per_batch: int = 64
    min_iou: float = 0.8
    min_stability: float = 0.9
    stability_offset: float = 1.0
    nms_threshold: float = 0.7

    def __post_init__(self) -> None:
        if min(self.points_per_side, self.points_per_batch) < 1:
            raise InvalidConfig("points_per_side and points_per_batch are at least 1", got=self)


class AutomaticMasks:
    """Masks of everything in a photograph, no prompt needed."""

    def __init__(self, model: Sam2Model, settings: MaskSettings | None = None) -> None:
        self.model = model.eval()
        self.settings = settings or MaskSettings()
        encoder: Any = model.prompt_encoder
        self.side = int(encoder.input_image_size)

    @classmethod
    def from_pretrained(cls, ref: str, *, device: str | torch.device | None = None) -> AutomaticMasks:
        """With the SAM 2 weights of a catalogue name, ``"hf:org/repo@rev"`` or ``"dir:path"``; float32."""
        return cls(load_model(ref, "Sam2Model", device, None))

    @torch.inference_mode()
    def generate(self, image: Tensor) -> Tensor:
        """Boolean masks ``(R, S, S)``, best predicted IoU first, of ``image (3, H, W)`` in [0, 1].

        The photograph is stretched to the model's square of side ``S``, where the masks live too. R may be 0.
        """
        s = self.settings
        device = next(self.model.parameters()).device
        embeddings = self.model.get_image_embeddings(prepare(image, self.model))
        line = (torch.arange(s.points_per_side, device=device) + 0.5) * (self.side / s.points_per_side)
        points = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
        masks, boxes, scores = [], [], []
        for asked in points.split(s.points_per_batch):
            output = self.model(
                input_points=asked[None, :, None],
                input_labels=torch.ones((1, len(asked), 1), dtype=torch.int, device=device),
                image_embeddings=embeddings,
                multimask_output=True,
            )
            iou, low = output.iou_scores[0].flatten(), output.pred_masks[0].flatten(0, 1)
            # Filtered by predicted IoU before, and in small groups, because full-size logits are large.
            good = (iou > s.min_iou).nonzero()[:, 0]
            for chosen in good.split(16) if len(good) else ():
                logits = F.interpolate(low[chosen][None].float(), (self.side, self.side), mode="bilinear")[0]
                steady = stability(logits, s.stability_offset) >= s.min_stability
                found = logits[steady] > 0
                masks.append(found.cpu())
                boxes.append(mask_boxes(found).cpu())
                scores.append(iou[chosen][steady].cpu())
        if not masks:
            return torch.zeros((0, self.side, self.side), dtype=torch.bool)
        kept = box_nms(torch.cat(boxes), torch.cat(scores), s.nms_threshold)
        everything = torch.cat(masks)[kept]
        return everything[everything.flatten(1).any(1)]


def stability(logits: Tensor, offset: float) -> Tensor:
    """IoU ``(K,)`` of the masks of ``logits (K, H, W)`` cut at ``+offset`` and at ``-offset``: 1 is a firm edge."""
    inner = (logits > offset).sum((-1, -2))
    outer = (logits > -offset).sum((-1, -2))
    return inner / outer.clamp(min=1)


def fill(frames: Sequence[Frame], store: MaskStore, generator: Callable[[], AutomaticMasks]) -> dict[str, str]:
    """Make the masks that ``store`` lacks. Interrupted, it goes on where it was; ``generator`` is called if needed.

    Photographs that cannot be read are left out of the store: returned by name, with the reason.
    """
    missing = [f for f in frames if f.name not in store]
    failed: dict[str, str] = {}
    masks = generator() if missing else None
    for frame in progress(missing, total=len(missing), description="SAM 2 masks", unit="image"):
        try:
            image = frame.read()
        except OpsinError as error:
            failed[frame.name] = str(error)
            continue
        found = masks.generate(image) if masks is not None else ()
        store.put(frame.name, RegionMaps.from_masks(m.numpy() for m in found) if len(found) else None)
    return failed


def open_cached(spec: str, config: RegionTrainingConfig) -> CachedMasks:
    """The source ``sam2:DIR`` or ``video:DIR``; masks that are not in its cache are made first."""
    kind, text, part = parse_source(spec)
    root = (Path(text).expanduser() / part).resolve()
    frames = video_frames(root, config.video_interval) if kind == "video" else photographs(root)
    if not frames:
        raise InvalidDataset(f"{spec} holds {'videos' if kind == 'video' else 'photographs'}", got="none")
    folder = Path(config.mask_cache).expanduser() if config.mask_cache else hub.cache_dir() / "masks"
    settings = MaskSettings()
    made_by: dict[str, Any] = {"model": config.sam2_model, **asdict(settings)}
    digest = hashlib.sha256(f"{root}|{made_by}".encode()).hexdigest()[:12]
    with MaskStore(folder / f"{root.name}-{digest}.masks", made_by) as store:
        failed = fill(frames, store, lambda: AutomaticMasks.from_pretrained(config.sam2_model, device=config.device))
        source = CachedMasks(spec, frames, store)
    source.skipped.update(failed)
    return source


def photographs(root: Path) -> list[Frame]:
    """All photographs of a folder, named by their relative path."""
    return [Frame(path, path.relative_to(root).as_posix()) for path in list_images(root)]


def video_frames(root: Path, interval: float) -> list[Frame]:
    """A frame of every ``interval`` seconds of each video of a folder; unreadable videos are left out."""
    from opsin.video import open_video

    frames = []
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in VIDEOS):
        try:
            with open_video(path) as video:
                name = path.relative_to(root).as_posix()
                frames += [Frame(path, f"{name}#{f.index}", f.index) for f in video.frames(rate=1 / interval)]
        except OpsinError:
            continue
    return frames
