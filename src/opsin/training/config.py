"""The options of ``opsin train``: frozen dataclasses, filled from a YAML file and ``key=value`` overrides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from opsin.errors import InvalidConfig, MissingExtra, MissingFile, near_misses

C = TypeVar("C", bound="TrainingConfig")
KINDS = ("bsds", "masks", "coco", "coco-panoptic", "mosaic", "sam2", "video")


def option(default: Any, text: str, required: bool = False) -> Any:
    """A field with its help."""
    return field(default=default, metadata={"help": text + " (required)" * required, "required": required})


@dataclass(frozen=True)
class TrainingConfig:
    """What every training run depends on. Each kind of run adds its own; ``command`` is the one that it is run by."""

    command: ClassVar[str] = "opsin train"

    out: str = option("", "folder for the model; everything else goes to its sub-folder training", required=True)
    name: str = option("", "name of the model; empty: the name of the folder")
    accumulation: int = option(1, "micro-steps per optimiser step")
    steps: int | None = option(None, "optimiser steps; null: from epochs")
    resume: bool = option(True, "go on from a saved state in out; false: begin again")
    seed: int = option(42, "of everything random: same seed, same run")
    device: str | None = option(None, "device; null: the machine's accelerator, else the CPU")
    workers: int = option(0, "processes that prepare batches; 0: none")
    cache_mb: int = option(512, "memory for decoded photographs, per process")
    tracker: str = option("none", "none, tensorboard or wandb (offline unless WANDB_MODE says otherwise)")

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if str(entry.type).startswith("tuple"):  # configuration files know lists only
                values = value if isinstance(value, (tuple, list)) else [value]
                object.__setattr__(self, entry.name, tuple(values))
            if entry.metadata["required"] and not value:
                raise InvalidConfig(f'"{entry.name}" must be given', remedy=f"{self.command} --help lists every key.")
        at_least(self, "accumulation", 1)
        if self.steps is not None:
            at_least(self, "steps", 1)
        for key in ("seed", "workers", "cache_mb"):
            at_least(self, key, 0)
        one_of(self, "tracker", "none", "tensorboard", "wandb")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, lists for tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class RegionTrainingConfig(TrainingConfig):
    """Everything that a training run of a region encoder depends on. Defaults are the published recipe (REN, §3)."""

    command = "opsin train regions"

    backbone: str = option("", "frozen backbone: catalogue name, hf:org/repo@rev or dir:/path", required=True)
    train: tuple[str, ...] = option((), "sources kind:path, see above", required=True)
    weights: tuple[float, ...] = option((), "share of the draws of each source; empty: equal")
    val: tuple[str, ...] = option((), "sources to validate on")
    image_size: int | None = option(None, "side of the square input in pixels; null: the backbone's")
    batch_size: int = option(16, "photographs per process and micro-step (two views each)")
    epochs: float = option(50.0, "passes over the training photographs, unless steps is given")
    lr: float = option(1e-3, "peak learning rate of AdamW")
    weight_decay: float = option(0.01, "weight decay of AdamW")
    warmup_steps: int = option(100, "steps of linear warm-up, followed by a cosine to zero")
    max_grad_norm: float = option(5.0, "gradients are clipped to this norm; 0: never")
    max_prompts: int = option(256, "random prompts per view")
    temperature: float = option(0.1, "temperature of the contrastive loss")
    contrastive_weight: float = option(1.0, "weight of the contrastive loss (pred tokens, within an image)")
    feature_weight: float = option(1.0, "weight of the feature loss (proj tokens, towards the backbone)")
    semantic_weight: float = option(0.0, "weight of the contrast between categories across images (pred tokens)")
    semantic_temperature: float = option(0.1, "temperature of that contrast")
    pred_feature_weight: float = option(0.0, "weight of the distance of pred tokens to the backbone's mean features")
    heads: int = option(8, "attention heads of the region encoder")
    layers: int = option(4, "layers of the region encoder")
    dropout: float = option(0.1, "dropout of the region encoder")
    start: str = option("published", "published: random weights; pooling: tokens begin as a mean around them")
    init: str = option("", "region model whose encoder to start from: dir:/path or a regions.safetensors")
    flip: float = option(0.5, "probability of a mirrored view")
    jitter: float = option(0.4, "strength of brightness, contrast and saturation changes; 0: no colour change at all")
    rotation: float = option(45.0, "largest rotation of a view in degrees")
    shear: float = option(15.0, "largest shear of a view in degrees")
    crop: float = option(0.3, "smallest side of a view as a fraction of the photograph")
    mosaic_tiles: tuple[int, ...] = option((4, 16), "fewest and most photographs on a mosaic")
    classes_per_batch: int = option(32, "classes that the mosaics of one batch draw from")
    sam2_model: str = option("hf:facebook/sam2.1-hiera-large", "model that makes the masks of sam2: and video:")
    mask_cache: str = option("", "folder of the mask caches; empty: masks in the cache folder of opsin")
    video_interval: float = option(15.0, "seconds between the frames that a video: source takes")
    dtype: str = option("auto", "auto, float32 or bfloat16: precision of backbone and encoder under autocast")
    validate_every: int = option(50, "steps between validations")
    validation_batches: int = option(10, "batches per validation, always the same ones")
    save_every: int = option(100, "steps between saved states, from which a killed run goes on")
    keep: str = option("best", "best: the model of the lowest validation loss; last: of the last step")
    embed_backbone: bool = option(False, "copy the backbone into the model folder, which then stands alone")
    compat: str | None = option(None, "published: null prompts, mask edges, schedule, clipping as in the REN release")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("batch_size", "max_prompts", "heads", "layers", "validate_every", "save_every",
                    "validation_batches", "classes_per_batch"):  # fmt: skip
            at_least(self, key, 1)
        if self.image_size is not None:
            at_least(self, "image_size", 1)
        for key in ("warmup_steps", "max_grad_norm", "weight_decay"):
            at_least(self, key, 0)
        for key in ("contrastive_weight", "feature_weight", "semantic_weight", "pred_feature_weight"):
            at_least(self, key, 0)
        for key in ("epochs", "lr", "temperature", "semantic_temperature", "video_interval", "crop"):
            positive(self, key)
        for key, limit in (("dropout", 1), ("flip", 1), ("crop", 1), ("jitter", 1), ("rotation", 180), ("shear", 44)):
            within(self, key, limit)
        one_of(self, "dtype", "auto", "float32", "bfloat16")
        one_of(self, "keep", "best", "last")
        one_of(self, "start", "published", "pooling")
        one_of(self, "compat", None, "published")
        for spec in (*self.train, *self.val):
            parse_source(spec)
        if self.weights and (len(self.weights) != len(self.train) or min(self.weights) < 0 or not sum(self.weights)):
            raise InvalidConfig(f"weights has a number ≥ 0 for each of the {len(self.train)} sources", got=self.weights)
        if len(self.mosaic_tiles) != 2 or not 1 <= self.mosaic_tiles[0] <= self.mosaic_tiles[1]:
            raise InvalidConfig("mosaic_tiles is [fewest, most]", got=list(self.mosaic_tiles))


def at_least(config: Any, key: str, low: float) -> None:
    """``InvalidConfig`` unless the value of ``key`` is finite and at least ``low``."""
    value = getattr(config, key)
    if not value >= low or not math.isfinite(value):
        raise InvalidConfig(f"{key} is at least {low}", got=value)


def positive(config: Any, key: str) -> None:
    """``InvalidConfig`` unless the value of ``key`` is finite and greater than 0."""
    if not 0 < getattr(config, key) < math.inf:
        raise InvalidConfig(f"{key} is positive", got=getattr(config, key))


def within(config: Any, key: str, limit: float) -> None:
    """``InvalidConfig`` unless the value of ``key`` lies in [0, ``limit``]."""
    if not 0 <= getattr(config, key) <= limit:
        raise InvalidConfig(f"{key} lies in [0, {limit}]", got=getattr(config, key))


def one_of(config: Any, key: str, *allowed: Any) -> None:
    """``InvalidConfig`` unless the value of ``key`` is one of ``allowed``."""
    if getattr(config, key) not in allowed:
        raise InvalidConfig(f"{key} is one of {', '.join(str(a) for a in allowed)}", got=getattr(config, key))


def parse_source(spec: str) -> tuple[str, str, str]:
    """``"kind:path@part"`` → (kind, path, part)."""
    kind, colon, rest = spec.partition(":")
    path, _, part = rest.rpartition("@") if "@" in rest else (rest, "", "")
    if not colon or kind not in KINDS or not path:
        remedy = near_misses(kind, KINDS) or f"Kinds: {', '.join(KINDS)}."
        raise InvalidConfig("A source is written kind:path, or kind:path@part", got=repr(spec), remedy=remedy)
    if kind == "coco" and not part:
        raise InvalidConfig("A COCO source is written coco:annotations.json@images_folder", got=repr(spec))
    return kind, path, part


def load_config(overrides: Sequence[str] = (), file: str | Path | None = None) -> RegionTrainingConfig:
    """A checked configuration from a YAML file and Hydra-style overrides ``key=value``, which win.

    Raises ``InvalidConfig`` for unknown keys (with the near misses), wrong types and contradictions, ``MissingExtra``
    without hydra-core, ``MissingFile`` for a file that is not there. Reads no weight and no data.
    """
    return fill(RegionTrainingConfig, {**read_yaml(file), **read_overrides(overrides)})


def read_yaml(file: str | Path | None) -> dict[str, Any]:
    """Keys and values of a YAML file; nothing for None. Raises as :func:`load_config` does."""
    if file is None:
        return {}
    with _hydra():
        from omegaconf import OmegaConf
    if not Path(file).is_file():
        raise MissingFile("A configuration file must exist", got=file)
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except Exception as error:  # YAML's own exceptions have no common base with OmegaConf's
        raise InvalidConfig("A configuration file is YAML", got=f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise InvalidConfig("A configuration file holds keys and values", got=file)
    return {str(k): v for k, v in content.items()}


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Hydra-style ``key=value`` words as keys and values. Raises as :func:`load_config` does."""
    with _hydra():
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException
    values: dict[str, Any] = {}
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
            value = override.value()
        except (HydraException, ValueError) as error:
            raise InvalidConfig(
                "An option is written key=value", got=repr(text), remedy="Lists: train=[a,b]; quote odd characters."
            ) from error
        if override.is_add() or override.is_delete() or override.is_sweep_override():
            raise InvalidConfig("An option is written key=value, without + or ~ and without sweeps", got=repr(text))
        values[override.key_or_group] = value
    return values


def fill(kind: type[C], values: Mapping[str, Any]) -> C:
    """The configuration ``kind`` with ``values``, whose names and types are checked."""
    with _hydra():
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    values = dict(values)
    types = {f.name: str(f.type) for f in fields(kind)}
    for key in values:
        if key not in types:
            remedy = near_misses(key, types) or f"{kind.command} --help lists every key."
            raise InvalidConfig(f"Options of {kind.command} have known names", got=repr(key), remedy=remedy)
        if types[key].startswith("tuple") and not isinstance(values[key], list):
            values[key] = [values[key]]
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(kind), values))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or "?"
        raise InvalidConfig(
            f"{key} is of type {types.get(key.split('[')[0], '?')}", got=repr(values.get(key.split("[")[0]))
        ) from error
    return kind(**merged)  # type: ignore[arg-type]


@contextmanager
def _hydra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtra.of("hydra-core", "train", "read training options") from error


def describe(kind: type[TrainingConfig] = RegionTrainingConfig) -> str:
    """All keys with their defaults and meanings, for ``--help``: required, own and common ones, in that order."""
    common = {entry.name for entry in fields(TrainingConfig)}
    lines = []
    for entry in sorted(fields(kind), key=lambda e: (not e.metadata["required"], e.name in common)):
        value: Any = entry.default
        if isinstance(value, bool) or value is None:
            value = "null" if value is None else str(value).lower()
        shown = "[" + ",".join(map(str, value)) + "]" if isinstance(value, tuple) else value
        lines.append(f"  {f'{entry.name}={shown}':<28} {entry.metadata['help']}")
    return "\n".join(lines)
