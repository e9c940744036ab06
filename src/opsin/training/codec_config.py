"""The options of ``opsin train codec``: recipes, overrides, and what the published code (btnk_mae) calls them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsin.errors import InvalidConfig, near_misses
from opsin.training.config import (
    TrainingConfig,
    at_least,
    fill,
    one_of,
    option,
    positive,
    read_overrides,
    read_yaml,
    within,
)

CUSTOM = ("patch_size", "dim", "layers", "heads", "decoder_dim", "decoder_layers", "decoder_heads")
PUBLISHED = {  # names of the published configuration files → ours
    "data.dataset": "train",
    "model.model_size": "size",
    "model.act_fn": "activation",
    "model.img_size": "image_size",
    "run_name": "name",
    "wandb_project": "project",
    "train_cfg.resume": "init",
    "train_cfg.accum_iter": "accumulation",
    "train_cfg.num_workers": "workers",
    "train_cfg.full_mae_loss_coeff": "full_weight",
    "train_cfg.btnk_mae_loss_coeff": "bottleneck_weight",
    **{f"train_cfg.{k}": k for k in ("epochs", "warmup_epochs", "batch_size", "weight_decay", "lr", "blr", "min_lr")},
}
NOT_NEEDED = {  # published options that something else decides here
    "model.type": "There is one type.",
    "train_cfg.resume_optimizer": "A run goes on by itself when it is started again with the same out.",
    "train_cfg.resume_img_size": "A checkpoint's image size is read off its weights.",
    "train_cfg.start_epoch": "A run goes on by itself when it is started again with the same out.",
    "train_cfg.pin_mem": "Batches are moved without it.",
}


@dataclass(frozen=True)
class CodecTrainingConfig(TrainingConfig):
    """Everything that a training run of a codec depends on."""

    command = "opsin train codec"

    train: tuple[str, ...] = option((), "training photographs, see above", required=True)
    val: tuple[str, ...] = option((), "photographs to validate on; empty: held out from train")
    holdout: float = option(0.01, "share of train that is held out when val is empty; 0: no validation")
    streaming: bool = option(False, "read Hugging Face data while it is downloaded")
    init: str = option("", "mae: the MAE weights of that size; a codec (name, hf:, dir:, .pth); empty: random weights")
    start: str = option("published", "published: as init says; patches: the code begins as components of each patch")
    size: str = option("base", "unless init is a codec: base, large, large_gan, huge; custom: the numbers below")
    patch_size: int | None = option(None, "custom: side of a patch in pixels")
    dim: int | None = option(None, "custom: width of the code and of the encoder")
    layers: int | None = option(None, "custom: layers of the encoder")
    heads: int | None = option(None, "custom: heads of the encoder")
    decoder_dim: int | None = option(None, "custom: width of the decoder")
    decoder_layers: int | None = option(None, "custom: layers of the decoder")
    decoder_heads: int | None = option(None, "custom: heads of the decoder")
    activation: str | None = option(None, "of the code: relu, gelu, swish, tanh, sigmoid; null: none, or that of init")
    image_size: tuple[int, ...] = option((224,), "side of the square input, or [height,width], in pixels")
    batch_size: int = option(128, "photographs per process and micro-step")
    epochs: float = option(100.0, "passes over the training photographs, unless steps is given")
    warmup_epochs: float = option(5.0, "passes of linear warm-up, followed by a cosine to min_lr")
    lr: float | None = option(None, "peak learning rate of AdamW; null: blr × photographs per step / 256")
    blr: float = option(1e-3, "learning rate per 256 photographs of a step")
    min_lr: float = option(0.0, "learning rate at the end")
    encoder_lr: float = option(0.1, "the encoder's rate as a fraction of the decoder's")
    weight_decay: float = option(0.05, "weight decay of AdamW, on matrices only")
    betas: tuple[float, ...] = option((0.9, 0.95), "moments of AdamW")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: never")
    ema: float = option(0.999, "decay of the averaged weights that are validated and saved; 0: no averaging")
    bottleneck_weight: float = option(1.0, "weight of the error of what one vector gives back")
    full_weight: float = option(0.1, "weight of the error of what all tokens give back (MAE without masking)")
    dropout: float = option(0.1, "dropout where the decoder takes the code in")
    crop: float = option(0.2, "smallest area of a crop as a fraction of the photograph; 1: whole photographs")
    flip: float = option(0.5, "probability of a mirrored crop")
    checkpointing: bool = option(False, "compute activations twice to save memory")
    validation_images: int = option(1000, "photographs to validate on at most, always the same ones")
    validate_every: float = option(1.0, "passes between validations")
    samples: int = option(8, "validation photographs shown beside their reconstruction at each validation; 0: none")
    save_every: int = option(500, "steps between saved states, from which a killed run goes on")
    keep: str = option("best", "what out holds. best: the model of the highest validation PSNR; last: of the last step")
    dtype: str = option("auto", "auto, float32, bfloat16 or float16: precision under autocast")
    project: str = option("opsin", "project of wandb")
    compat: str | None = option(None, "published: one rate and weight decay for all parameters, squashed panoramas")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.image_size) not in (1, 2) or min(self.image_size) < 11:  # SSIM looks at 11 pixels
            raise InvalidConfig("image_size is a side or [height,width], at least 11 pixels", got=list(self.image_size))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise InvalidConfig("betas are two numbers in [0, 1)", got=list(self.betas))
        one_of(self, "size", "base", "large", "large_gan", "huge", "custom")
        if self.size == "custom" and self.init == "mae":
            raise InvalidConfig("The weights of MAE are base, large, large_gan or huge", got="size=custom")
        given = [key for key in CUSTOM if getattr(self, key) is not None]
        if self.size == "custom" and not self.init and len(given) < len(CUSTOM):
            missing = ", ".join(key for key in CUSTOM if key not in given)
            raise InvalidConfig("A custom size has all its numbers", got=f"none for {missing}")
        if given and self.size != "custom":
            raise InvalidConfig(f"{given[0]} belongs to size=custom", got=f"size={self.size}")
        for key in (*given, "batch_size", "save_every"):
            at_least(self, key, 1)
        for key in ("warmup_epochs", "min_lr", "weight_decay", "max_grad_norm", "full_weight", "validation_images",
                    "samples"):  # fmt: skip
            at_least(self, key, 0)
        for key in ("epochs", "blr", "lr", "encoder_lr", "crop", "bottleneck_weight", "validate_every"):
            if getattr(self, key) is not None:
                positive(self, key)
        for key, limit in (("crop", 1), ("flip", 1), ("dropout", 0.99), ("ema", 0.99999), ("holdout", 0.9)):
            within(self, key, limit)
        one_of(self, "dtype", "auto", "float32", "bfloat16", "float16")
        one_of(self, "start", "published", "patches")
        if self.start == "patches" and self.dropout:
            raise InvalidConfig("start=patches wants dropout=0: its units are not alike", got=self.dropout)
        one_of(self, "keep", "best", "last")
        one_of(self, "compat", None, "published")

    @property
    def canvas(self) -> tuple[int, int]:
        """``(H, W)`` of the model's input."""
        return self.image_size[0], self.image_size[-1]

    def peak_rate(self, processes: int = 1) -> float:
        """The highest learning rate. ``InvalidConfig`` when ``min_lr`` lies above it, so that the rate would rise.

        ``compat="published"`` allows that: the published fine-tuning recipe does it.
        """
        peak = self.lr if self.lr is not None else self.blr * self.batch_size * self.accumulation * processes / 256
        if self.min_lr > peak and self.compat is None:
            raise InvalidConfig(f"min_lr is at most the peak rate {peak:.3g}", got=self.min_lr)
        return peak


def recipes() -> dict[str, dict[str, Any]]:
    """The recipes that ship with the package, by name."""
    return tomllib.loads(Path(__file__).with_name("codec_recipes.toml").read_text(encoding="utf-8"))


def load_codec_config(
    overrides: Sequence[str] = (), file: str | Path | None = None, recipe: str | None = None
) -> CodecTrainingConfig:
    """A checked configuration from a recipe, a YAML file and Hydra-style overrides ``key=value``: later ones win.

    ``train_cfg=NAME`` among the overrides or in the file names the recipe too. Published names are understood
    (``model.img_size=512``, ``train_cfg.epochs=50``, ``data.dataset=…``).
    Raises ``InvalidConfig``, ``MissingExtra`` without hydra-core, ``MissingFile``. Reads no weight and no data.
    """
    values = {**_translate(read_yaml(file)), **_translate(read_overrides(overrides))}
    recipe = values.pop("train_cfg", recipe)
    known = recipes()
    if recipe is not None and recipe not in known:
        remedy = near_misses(str(recipe), known) or f"Recipes: {', '.join(known)}."
        raise InvalidConfig("train_cfg is the name of a recipe", got=repr(recipe), remedy=remedy)
    base = known.get(recipe or "", {})
    if "train" in values:  # other photographs have no use for the recipe's validation split
        base.pop("val", None)
    return fill(CodecTrainingConfig, {**base, **values})


def _translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Published names to ours; sections of a file (``model: {img_size: …}``) are taken apart."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    for key in flat:
        if key in NOT_NEEDED or key.startswith(("distributed.", "hydra.")):
            remedy = NOT_NEEDED.get(key, "torchrun or accelerate launch says how many processes there are.")
            raise InvalidConfig(f"{key} is no option here", got=f"{key}={flat[key]}", remedy=remedy)
        if "." in key and key not in PUBLISHED:
            remedy = near_misses(key, PUBLISHED) or f"{CodecTrainingConfig.command} --help lists every key."
            raise InvalidConfig("Options of opsin train codec have known names", got=repr(key), remedy=remedy)
    named = {PUBLISHED.get(k, k): v for k, v in flat.items()}
    return {k: "" if v is None and k in ("init", "name") else v for k, v in named.items()}
