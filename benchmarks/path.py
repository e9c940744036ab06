"""The whole path of a model on photographs: images per second, and new prompts on a seen image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interleaved, ratio, say
from torch import Tensor

from opsin.regions import RegionModel

PHOTOGRAPHS = (
    "astronaut",
    "coffee",
    "chelsea",
    "rocket",
    "camera",
    "hubble_deep_field",
    "retina",
    "immunohistochemistry",
)
BATCH = 8


def photographs() -> list[Tensor]:
    """Eight pictures of those that come with scikit-image, repeated where there are fewer. Never downloads."""
    import skimage
    from skimage import io

    folder = Path(skimage.__file__).parent / "data"
    files = [p for name in PHOTOGRAPHS for p in sorted(folder.glob(f"{name}.*"))]
    pictures = [torch.from_numpy(_rgb(io.imread(p))).permute(2, 0, 1).float() / 255 for p in files]
    return [pictures[i % len(pictures)] for i in range(BATCH)]


def _rgb(array: Any) -> Any:
    return np.repeat(array[..., None], 3, -1) if array.ndim == 2 else array[..., :3]


def run(ref: str, quick: bool) -> dict[str, Any]:
    """Images per second of ``encode`` in its parts, in float32 and bfloat16, and the cost of asking again."""
    say(f"path: {ref}")
    repeats = 1 if quick else 5
    pictures = photographs()
    model = RegionModel.from_pretrained(ref)
    half = RegionModel.from_pretrained(ref, dtype="bfloat16")
    maps = model.features(pictures)
    ways: dict[str, Callable[[], Any]] = {
        "encode": lambda: model.encode(pictures),
        "encode, grid prompts": lambda: model.encode(pictures, prompts="grid"),
        "encode, bf16": lambda: half.encode(pictures),
        "encode, bf16, grid prompts": lambda: half.encode(pictures, prompts="grid"),
        "backbone alone": lambda: model.features(pictures),
        "regions of known features": lambda: model.encode_features(maps, pictures),
    }
    times = interleaved(ways, repeats=repeats)
    return {
        "model": model.name,
        "images": len(pictures),
        "sizes": [list(p.shape[1:]) for p in pictures],
        "canvas": model.card.image_size,
        "prompts": model.card.grid_size**2,
        "seconds_per_batch": times,
        "images_per_second": {name: len(pictures) / t["median"] for name, t in times.items()},
        "new_prompts": _new_prompts(model, pictures[0], repeats),
    }


def _new_prompts(model: RegionModel, picture: Tensor, repeats: int) -> dict[str, Any]:
    """Seconds to answer points on one photograph: from the pixels, and when it was seen before."""
    maps = model.features([picture])
    memories = [model.memory(m) for m in maps]
    found: dict[str, Any] = {}
    for count in (1, 16, 256):
        draw = torch.Generator().manual_seed(count)
        points = torch.rand((count, 2), generator=draw) * torch.tensor([picture.shape[2], picture.shape[1]])
        ways: dict[str, Callable[[], Any]] = {
            "from scratch": lambda points=points: model.encode(picture, points=points),
            "seen image": lambda points=points: model.encode_features(maps, points=[points], memories=memories),
        }
        times = interleaved(ways, repeats=max(repeats, 3))
        found[f"{count} prompts"] = {"seconds": times, "faster": ratio(times, "from scratch", "seen image")}
    return found
