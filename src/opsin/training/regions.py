"""``opsin train regions``: from a configuration to the folder of a region model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opsin import backbones, hub
from opsin.cards import ModelCard
from opsin.errors import InvalidConfig, MissingFile, UnsupportedSize
from opsin.masks.coco import CocoInstances, CocoPanoptic
from opsin.masks.sources import LabelMaps, Mosaic, Source
from opsin.regions.encoder import RegionEncoder
from opsin.regions.model import save_backbone
from opsin.runtime import resolve_dtype
from opsin.training.config import RegionTrainingConfig, parse_source
from opsin.training.data import Batches
from opsin.training.loop import Loop, open_accelerator
from opsin.training.views import Augmentation


def train_regions(config: RegionTrainingConfig) -> dict[str, Any]:
    """Train a region encoder on a frozen backbone and write the model to ``config.out``.

    Everything that can be wrong with options and data is found before a weight is read. Started by ``torchrun`` or
    ``accelerate launch`` it runs on many processes. A run that was killed goes on from its last saved state when it is
    started again with the same options. Returns the summary: steps, losses, photographs that were skipped, folder.

    Raises ``InvalidConfig``, ``InvalidDataset``, ``MissingFile``, ``MissingExtra``, and what loading a backbone raises.
    """
    accelerator = open_accelerator(config.device)
    out = Path(config.out)
    folder = out / "training"
    folder.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():  # masks that SAM 2 has to make are made once
        train, val = (open_sources(specs, config) for specs in (config.train, config.val))
    with torch.random.fork_rng():
        backbone = backbones.load(config.backbone, device=accelerator.device).eval().requires_grad_(False)
        size = config.image_size or backbone.image_size
        if size % backbone.patch_size:
            nearest = max(1, round(size / backbone.patch_size)) * backbone.patch_size
            raise UnsupportedSize(
                f"image_size is a multiple of the backbone's {backbone.patch_size} pixels",
                got=size,
                remedy=f"The nearest is {nearest}.",
            )
        encoder = _encoder(config, backbone.dim)
        grid = (size // backbone.patch_size, size // backbone.patch_size)
        shape = {"size": size, "grid": grid, "batch_size": config.batch_size, "prompts": config.max_prompts}
        process = {"rank": accelerator.process_index, "world": accelerator.num_processes, "cache_mb": config.cache_mb}
        views = Augmentation(config.flip, config.jitter, config.rotation, config.shear, config.crop)
        common = {**shape, **process, "augmentation": views, "published": config.compat == "published"}
        batches = Batches(train, seed=config.seed, weights=config.weights, **common)
        held_out = Batches(val, seed=config.seed + 1, **common) if val else None
        dtype = resolve_dtype(config.dtype, accelerator.device, allow_bfloat16=backbone.card.bfloat16)

        def export(encoder: nn.Module) -> None:
            save_model(encoder, backbone, config, out, size)

        loop = Loop(config, accelerator, backbone, encoder, batches, held_out, folder, dtype, export)
        summary = loop.run()
    known = {k: v for source in (*train, *val) for k, v in source.skipped.items()}
    return {**summary, "skipped": known | summary["skipped"], "out": str(out)}


def _encoder(config: RegionTrainingConfig, dim: int) -> RegionEncoder:
    if config.init:
        path = Path(config.init.removeprefix("dir:"))
        state = hub.load_safetensors(path / "regions.safetensors" if path.is_dir() else path)
        encoder = RegionEncoder.from_state_dict(state, heads=config.heads, dropout=config.dropout)
        if encoder.dim != dim:
            raise InvalidConfig(f"init is an encoder of the backbone's width {dim}", got=encoder.dim)
    else:
        torch.manual_seed(config.seed)
        encoder = RegionEncoder(dim, heads=config.heads, layers=config.layers, dropout=config.dropout)
        if config.start == "pooling":
            encoder.start_as_pooling()
    # The last layer takes the features as they are: its value projection exists in the format and is never used.
    encoder.region_attention_layers[-1].cross_attn.v_proj.requires_grad_(False)  # type: ignore[union-attr]
    return encoder


def save_model(encoder: nn.Module, backbone: nn.Module, config: RegionTrainingConfig, out: Path, size: int) -> None:
    """Write ``card.json``, ``regions.safetensors`` and maybe ``backbone/``: what ``opsin.load("dir:out")`` takes."""
    card: ModelCard = backbone.card  # type: ignore[assignment]
    if config.embed_backbone and not (out / "backbone").exists():
        save_backbone(backbone, out / "backbone", config.name or out.name)  # type: ignore[arg-type]
    steps = size // int(backbone.patch_size)  # type: ignore[arg-type]
    values = {
        **asdict(card),
        "name": config.name or out.name,
        "kind": "regions",
        "family": "ren",
        "source": "",  # where the folder lies is no property of the model
        "revision": "main",
        "sha256": "",
        "files": (),
        "image_size": size,
        "backbone": "backbone" if config.embed_backbone else config.backbone,
        "heads": config.heads,
        "layers": len(encoder.region_attention_layers),  # type: ignore[arg-type]
        "grid_size": steps,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "trained_on": ", ".join(Path(parse_source(s)[1]).name for s in config.train),
        "measured": {},
    }
    hub.save_safetensors({k: v.float() for k, v in encoder.state_dict().items()}, out / "regions.safetensors")
    ModelCard(**values).save(out / "card.json")


def open_sources(specs: Sequence[str], config: RegionTrainingConfig) -> list[Source]:
    """The sources that ``specs`` name; masks that a ``sam2:`` or ``video:`` source lacks are made (and cached) last."""
    sources: dict[int, Source] = {}
    order = sorted(range(len(specs)), key=lambda i: parse_source(specs[i])[0] in ("sam2", "video"))
    for i in order:
        sources[i] = _open(specs[i], config)
    return [sources[i] for i in range(len(specs))]


def _open(spec: str, config: RegionTrainingConfig) -> Source:
    kind, text, part = parse_source(spec)
    path = Path(text).expanduser()
    if not path.exists():
        raise MissingFile("The data of a source must exist", got=spec)
    if kind == "bsds":
        split = part or "train"
        return LabelMaps(spec, path / "images" / split, path / "segments" / split)
    if kind == "masks":
        return LabelMaps(spec, path / "images" / part, path / "masks" / part)
    if kind == "coco":
        return CocoInstances(spec, path, Path(part).expanduser())
    if kind == "coco-panoptic":
        return CocoPanoptic(spec, *_panoptic(path, part))
    if kind == "mosaic":
        few, many = config.mosaic_tiles
        return Mosaic(spec, path, part, tiles=(few, many), classes_per_batch=config.classes_per_batch)
    from opsin.training.automatic_masks import open_cached

    return open_cached(spec, config)


def _panoptic(path: Path, part: str) -> tuple[Path, Path]:
    """The JSON file and the photographs of ``coco-panoptic:file.json@images`` or ``coco-panoptic:folder@split``."""
    if path.is_file():
        return path, Path(part).expanduser() if part else path.parent
    split = part or "train2017"
    notes = sorted(path.rglob(f"panoptic_{split}.json"))
    if not notes:
        raise MissingFile("A COCO panoptic folder holds its annotations", got=f"no panoptic_{split}.json in {path}")
    photos = [path / "images" / split, path / split]
    return notes[0], next((p for p in photos if p.is_dir()), photos[0])
