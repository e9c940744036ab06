"""From a reference or a config to a backbone: which family, which preprocessing, and weights that really fit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opsin import hub
from opsin.backbones import conv, radio_checkpoint, vit
from opsin.backbones.base import Backbone, first_line, quiet, read_json
from opsin.backbones.radio import RadioBackbone
from opsin.cards import ModelCard
from opsin.errors import InvalidCheckpoint, InvalidConfig, MissingFile
from opsin.runtime import is_out_of_memory, resolve_device, resolve_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# parameters that a forward pass does not read, or that keep their exact neutral start when a checkpoint lacks them
_OPTIONAL = ("mask_token", "hidden_states_norms", "pooler")


def families() -> list[str]:
    """The ``model_type`` values of ``config.json`` that can be loaded."""
    return sorted([*vit.MODEL_TYPES, *conv.MODEL_TYPES, "radio"])


def load(
    ref: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> Backbone:
    """A frozen backbone in evaluation mode.

    Args:
        ref: catalogue name, ``"hf:org/repo@revision"``, ``"dir:path"`` or a folder. A region model gives its backbone.
            Also the path of a published RADIO checkpoint (``*.pth.tar``), converted once into Opsin's cache.
        device: by default the machine's accelerator, else the CPU.
        dtype: by default float32; ``"auto"`` is bfloat16 where the hardware has it and the card allows it.

    Raises:
        UnknownModel, GatedModel, ModelUnavailable, MissingFile, InvalidCheckpoint (weights that do not fit),
        InvalidConfig (a kind of model that is not supported, or one without preprocessing facts).
    """
    checkpoint = radio_checkpoint.checkpoint_file(ref)
    if checkpoint is not None:
        return load(radio_checkpoint.cached(checkpoint), device=device, dtype=dtype)
    card = hub.card_of(ref)
    if card is not None and card.kind == "regions" and card.backbone != "backbone":
        return load(card.backbone, device=device, dtype=dtype)
    folder = hub.resolve(ref)
    if card is None:
        card = hub.card_of(folder)  # what a repository on the hub says of itself, under the name it was asked by
        card = card and replace(card, name=str(ref))
    if card is not None and card.kind == "regions":
        inner = folder / "backbone" if card.backbone == "backbone" else card.backbone
        return load(inner, device=device, dtype=dtype)
    target = resolve_device(device)
    if card is not None and card.family == "radio" and any((folder / name).is_file() for name in card.files):
        folder = radio_checkpoint.cached(folder / card.files[0])
    values = read_json(folder / "config.json")
    if radio_checkpoint.is_radio(values):
        backbone = radio_checkpoint.load(folder, values, card, _name(ref, folder))
        return backbone.to(target, resolve_dtype(dtype, target, allow_bfloat16=backbone.card.bfloat16))
    config = _read_config(folder)
    family = _family(config.model_type)
    if card is None:
        card = _card(config, _preprocessing(folder), name=_name(ref, folder))
    else:
        _check_card(card, config)
    model = _load_model(folder, config, family, resolve_dtype(dtype, target, allow_bfloat16=card.bfloat16))
    return _wrap(model, card).to(target)


def from_config(
    config: PretrainedConfig | Mapping[str, Any],
    *,
    name: str = "untrained",
    image_size: int | None = None,
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
    std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Backbone:
    """An untrained backbone of a ``transformers`` config (object, or dictionary with ``model_type``).

    Weights are drawn from torch's global generator: seed it for a repeatable start. ``image_size`` is the side of the
    default canvas, ``mean`` and ``std`` the normalisation of RGB in [0, 1].
    """
    from transformers import AutoConfig

    if isinstance(config, Mapping):
        values = dict(config)
        kind = str(values.pop("model_type", ""))
        _family(kind)
        config = AutoConfig.for_model(kind, **values)
    family = _family(config.model_type)
    if family == "radio":  # its config states the normalisation
        config = copy.deepcopy(config)
        config.norm_mean, config.norm_std = list(mean), list(std)
    processing: dict[str, Any] = {"image_mean": mean, "image_std": std}
    if image_size is not None:
        processing["canvas"] = image_size
    card = _card(config, processing, name=name)
    target = resolve_device(device)
    inner = _vision(config)
    with torch.device(target):
        model = _model_class(inner, family)(inner, **_options(family))
    return _wrap(model, card).to(target, resolve_dtype(dtype, target))


def _wrap(model: Any, card: ModelCard) -> Backbone:
    card = replace(card, parameters=sum(p.numel() for p in model.parameters()))
    wrapper = {"conv": conv.ConvBackbone, "radio": RadioBackbone}.get(card.family, vit.VitBackbone)
    return wrapper(model, card)


def _family(model_type: str) -> str:
    if model_type in conv.MODEL_TYPES:
        return "conv"
    if model_type == "radio":
        return "radio"
    if model_type not in vit.MODEL_TYPES:
        raise InvalidConfig(
            f"The model_type of a backbone is one of {', '.join(families())}", got=f'"{model_type}"',
            remedy="Code that comes with a model repository is never run.",
        )
    return vit.MODEL_TYPES[model_type]


def _vision(config: Any) -> Any:
    """The vision half of a config of images and text."""
    return getattr(config, "vision_config", config)


def _model_class(config: Any, family: str) -> Any:
    import transformers

    if family == "conv":
        return conv.model_class(config)
    return transformers.RadioModel if family == "radio" else getattr(transformers, vit.FAMILIES[family].model)


def _options(family: str) -> dict[str, Any]:
    return dict(vit.FAMILIES[family].load) if family in vit.FAMILIES else {}


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    _family(str(read_json(folder / "config.json").get("model_type", "")))  # before any class is looked up
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError) as error:
        got = f"{folder} ({first_line(error)})"
        raise InvalidCheckpoint("config.json must describe the model", got=got) from error


def _preprocessing(folder: Path) -> dict[str, Any]:
    """The image half of ``preprocessor_config.json``, or of the ``processor_config.json`` of image-text models."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            values = values.get("image_processor", values)
            if values.get("do_normalize") is False:
                values |= {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
            if "image_mean" in values and "image_std" in values:
                return values
    raise InvalidConfig(
        "A backbone states its normalisation", got=f"no image_mean and image_std in {folder}",
        remedy='Add preprocessor_config.json: {"image_mean": [r, g, b], "image_std": [r, g, b]}.',
    )


def _canvas(processing: Mapping[str, Any]) -> int:
    """The side that preprocessing produces, 0 when it does not say."""
    for value in (processing.get("canvas"), processing.get("crop_size"), processing.get("size")):
        if isinstance(value, Mapping):
            value = min((int(v) for k, v in value.items() if k in ("height", "width", "shortest_edge")), default=0)
        if value:
            return int(value)
    return 0


def _facts(config: Any, family: str) -> dict[str, int]:
    try:
        return conv.facts(config) if family == "conv" else vit.facts(_vision(config))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InvalidCheckpoint("config.json must describe the model", got=first_line(error)) from error


def _card(config: Any, processing: Mapping[str, Any], *, name: str) -> ModelCard:
    family = _family(config.model_type)
    facts = _facts(config, family)
    patch = facts["patch_size"]
    # a canvas that the caller names wins, then the config (positions were learned at that size), then preprocessing
    side = int(processing.get("canvas") or facts["image_size"] or _canvas(processing))
    if side < patch:
        remedy = 'Add "size" to preprocessor_config.json.'
        raise InvalidConfig("A backbone states the size of its images", got=name, remedy=remedy)
    mean, std = (tuple(map(float, processing[k])) for k in ("image_mean", "image_std"))
    if len(mean) != 3 or len(std) != 3:
        raise InvalidConfig("Images have three channels", got=f"image_mean {mean}, image_std {std}")
    sizes = {"dim": facts["dim"], "patch_size": patch, "image_size": side // patch * patch}
    return ModelCard(name=name, kind="backbone", family=family, mean=mean, std=std, **sizes)  # type: ignore[arg-type]


def _check_card(card: ModelCard, config: Any) -> None:
    family = _family(config.model_type)
    facts = _facts(config, family)
    stated = (card.family, card.dim, card.patch_size)
    found = (family, facts["dim"], facts["patch_size"])
    if stated != found:
        raise InvalidCheckpoint(f"The weights of {card.name} have (family, dim, patch size) {stated}", got=found)


def _name(ref: str | Path, folder: Path) -> str:
    if isinstance(ref, str) and ref.startswith("hf:"):
        return ref
    parent = folder.parent / "card.json"
    if folder.name == "backbone" and parent.is_file():  # the backbone that a region model carries with it
        return f"{ModelCard.load(parent).name}/backbone"
    return f"dir:{folder}"


def _load_model(folder: Path, config: Any, family: str, dtype: torch.dtype) -> Any:
    weights = [path for pattern in (*hub.SAFETENSORS[:2], *hub.PICKLES[:2]) for path in sorted(folder.glob(pattern))]
    if not weights:
        raise MissingFile("A backbone folder holds model.safetensors", got=str(folder))
    for path in weights:
        hub.check_file(path)
    cls = _model_class(config, family)
    options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True, **_options(family)}
    if family == "conv":
        options["config"] = config  # vision classes find their half of a joint config themselves
    try:
        with quiet():
            model, info = cls.from_pretrained(folder, **options)
    except Exception as error:  # safetensors, torch and transformers each raise their own on a damaged file
        if is_out_of_memory(error):
            raise
        raise InvalidCheckpoint(
            f"The weights in {folder} must be whole and fit their config.json", got=first_line(error),
            remedy="Download or copy them again.",
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not any(part in key for part in _OPTIONAL))
    if missing:
        got = f"missing: {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InvalidCheckpoint(f"The weights in {folder} must fit {cls.__name__}", got=got)
    return model
