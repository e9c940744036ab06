"""Published RADIO weights under any of their layouts, as ``RadioModel`` of ``transformers`` and adaptors.

Three layouts: the training checkpoint ``*.pth.tar`` (the only one with adaptor heads), the Hub repository
(``radio_model.*`` keys, training arguments inside ``config.json``), and a folder with ``model_type: radio``.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin import hub
from opsin.backbones.adaptors import Adaptor
from opsin.backbones.radio import RadioBackbone, adaptor_facts, adaptor_file, save_adaptor
from opsin.cards import ModelCard
from opsin.errors import IncompatibleModel, InvalidCheckpoint, InvalidConfig, MissingFile

if TYPE_CHECKING:
    from transformers import RadioConfig

FORMAT = 1  # of what convert() writes: another number, another cache entry
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1536: 24}  # of the ViT of each width, unless the file says
_RENAMED = (
    (r"^patch_generator\.embedder\.", "embeddings.patch_projection."),
    (r"^patch_generator\.pos_embed$", "embeddings.position_embedding"),
    (r"^patch_generator\.cls_token\.token$", "embeddings.cls_register_token"),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls([12])\.(?:gamma|grandma)$", r".layer_scale\1.lambda1"),
)
# tokens and head of the plain ViT, which RADIO puts out of use, and the video half of newer models
_UNUSED = re.compile(r"(?:reg_token|cls_token|mask_token|head\.|patch_generator\.video_embedder\.).*")
_PARAMETRISED = ".parametrizations.weight."
_QKV = tuple(f".attention.{name}_proj." for name in "qkv")
_GATED = (".mlp.gate_proj.", ".mlp.up_proj.")
_TEXT = {
    "siglip2-so400m": "hf:google/siglip2-so400m-patch16-naflex",
    "siglip2-g-384": "hf:google/siglip2-giant-opt-patch16-384",
    "ViT-SO400M-14-SigLIP-384": "hf:google/siglip-so400m-patch14-384",
    "ViT-H-14-378-quickgelu": "hf:apple/DFN5B-CLIP-ViT-H-14-378",
}


def state(
    weights: Mapping[str, Tensor], args: argparse.Namespace | Mapping[str, Any]
) -> tuple[RadioConfig, dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What a published state dictionary and its training arguments amount to; reads no file.

    Args:
        weights: ``base_model.*``, ``input_conditioner.*``, ``_heads.*``, ``_feature_projections.*``; other keys are of
            the training alone and are left out.
        args: ``teachers`` (a list of dictionaries with ``name``), ``cls_token_per_teacher``, ``model_kwargs`` …

    Returns:
        the config, the tensors of ``RadioModel`` (in the dtype they came in), and for each adaptor the arguments of
        ``Adaptor.from_state_dict``.

    Raises:
        InvalidCheckpoint: what the config is read off is not there. (:func:`build` checks every key and shape.)
        IncompatibleModel: a RADIO that ``RadioModel`` cannot express (before 2.5, or with a final norm).
    """
    facts: dict[str, Any] = dict(vars(args) if isinstance(args, argparse.Namespace) else args)
    weights = fold(weights)
    base = _under(weights, "base_model.")
    if not base:
        raise InvalidCheckpoint("A RADIO checkpoint has keys base_model.*", got=", ".join(list(weights)[:3]) or "none")
    norm = facts.get("model_norm") or "norm.weight" in base
    if norm or _under(weights, "_feature_normalizer."):
        raise IncompatibleModel(
            "The features of RADIO leave its last block as they are",
            got=f"a checkpoint with a {'final norm' if norm else 'feature normaliser'}",
            remedy="C-RADIOv3 and C-RADIOv4 have neither.",
        )
    tensors = _rename(base)
    conditioner = _under(weights, "input_conditioner.")
    config = _config(tensors, facts, conditioner)
    return config, _completed(config, tensors), _adaptors(weights, facts)


def build(config: RadioConfig, tensors: Mapping[str, Tensor], known: ModelCard, **options: Any) -> RadioBackbone:
    """The backbone around those tensors; ``InvalidCheckpoint`` for missing or unexpected keys and other shapes."""
    from transformers import RadioModel

    with torch.device("meta"):
        model: Any = RadioModel(config)
    hub.check_keys(tensors, {key: value.shape for key, value in model.state_dict().items()}, "RADIO")
    model.load_state_dict(dict(tensors), assign=True)
    model.to(tensors["embeddings.position_embedding"].dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return RadioBackbone(model, replace(known, parameters=parameters), **options)


def from_weights(
    weights: Mapping[str, Tensor], args: argparse.Namespace | Mapping[str, Any], *, name: str
) -> RadioBackbone:
    """A backbone with its adaptors, in memory and in the dtype of the weights, from what :func:`state` takes."""
    config, tensors, adaptors = state(weights, args)
    heads = {key: Adaptor.from_state_dict(**parts) for key, parts in adaptors.items()}
    return build(config, tensors, card(config, adaptors, name), adaptors=heads)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dictionary (the averaged one where there are two) and training arguments of a ``*.pth.tar``.

    Only tensors, numbers, containers and ``argparse.Namespace`` are unpickled; anything else is refused, never run.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = hub.load_pickle(path)
    found = content if isinstance(content, Mapping) else {}
    weights, args = found.get("state_dict_ema") or found.get("state_dict"), found.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if not isinstance(weights, Mapping) or not isinstance(args, Mapping):
        got = f"{', '.join(map(str, found))[:80] or type(content).__name__} in {path}"
        raise InvalidCheckpoint("A RADIO checkpoint holds state_dict and args", got=got)
    return {key: value for key, value in weights.items() if isinstance(value, Tensor)}, dict(args)


def convert(path: str | Path, folder: str | Path, *, name: str | None = None) -> Path:
    """Write a published ``*.pth.tar`` as a folder of config, safetensors, card and one file per adaptor."""
    path, folder = Path(path), Path(folder)
    config, tensors, adaptors = state(*read(path))
    backbone = build(config, tensors, card(config, adaptors, name or f"dir:{path.absolute()}"))
    with hub.atomic_path(folder) as temporary:
        backbone.save_pretrained(temporary)
        for key, parts in adaptors.items():
            save_adaptor(adaptor_file(temporary, key), **parts)
    return folder


def cached(path: Path) -> Path:
    """The converted form of a ``*.pth.tar`` in Opsin's cache, made when it is not there yet."""
    facts = hub.check_file(path).stat()
    # a file of the hub's cache is named by its checksum
    key = hashlib.sha256(f"{FORMAT}|{path.resolve()}|{facts.st_size}|{facts.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = hub.cache_dir() / "radio" / f"{path.name.removesuffix('.pth.tar')}-{key}"
    return folder if (folder / "card.json").is_file() else convert(path, folder)


def checkpoint_file(ref: str | Path) -> Path | None:
    """The ``*.pth.tar`` that a reference names, itself or as the only model of a folder; None otherwise."""
    text = str(ref)
    if text.endswith(".pth.tar"):
        return Path(text.removeprefix("dir:")).expanduser()
    folder = Path(text.removeprefix("dir:")).expanduser()
    named = isinstance(ref, Path) or text.startswith("dir:") or len(folder.parts) > 1  # else it is a catalogue name
    if not named or not folder.is_dir() or (folder / "config.json").is_file():
        return None
    found = sorted(folder.glob("*.pth.tar"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise InvalidConfig("A folder holds one model", got=names, remedy="Name the file itself.")
    return found[0] if found else None


def is_radio(config: Mapping[str, Any]) -> bool:
    """Whether the values of a ``config.json`` describe a RADIO, in one layout or the other."""
    return config.get("model_type") == "radio" or "RADIOModel" in (config.get("architectures") or ())


def load(folder: Path, values: Mapping[str, Any], known: ModelCard | None, name: str) -> RadioBackbone:
    """The backbone in ``folder``, whose ``config.json`` holds ``values``, in the dtype of its files.

    ``known`` facts are checked against the files; ``name`` is given where nothing is known.
    """
    config, tensors = _read_folder(folder, values)
    adaptors = {path.stem: adaptor_facts(path) for path in sorted((folder / "adaptors").glob("*.safetensors"))}
    found = card(config, adaptors, name)
    if known is not None:
        stated, real = ((c.family, c.dim, c.patch_size) for c in (known, found))
        if stated != real:
            raise InvalidCheckpoint(f"The weights of {known.name} have (family, dim, patch size) {stated}", got=real)
        text = found.text or known.text
        found = replace(known, mean=found.mean, std=found.std, adaptors=found.adaptors, text=text)
    return build(config, tensors, found, folder=folder)


def card(config: RadioConfig, adaptors: Mapping[str, Mapping[str, Any]], name: str) -> ModelCard:
    """What config and adaptors tell of a model. SigLIP goes before CLIP where there are both."""
    names = sorted(adaptors, key=lambda key: (not key.startswith("siglip"), key))
    text = next((adaptors[key]["text"] for key in names if adaptors[key]["text"]), "")
    mean: Any = tuple(config.norm_mean)
    std: Any = tuple(config.norm_std)
    return ModelCard(
        name=name, kind="backbone", family="radio", dim=config.hidden_size, patch_size=config.patch_size,
        image_size=config.image_size // config.patch_size * config.patch_size, mean=mean, std=std,
        adaptors=tuple(names), text=text,
    )  # fmt: skip


def fold(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parametrised weights replaced by what they amount to; all others as they are.

    σReparam (arXiv:2303.06296): a weight W, with the stored singular vectors u, v of its largest singular value, acts
    as γ W / (uᵀ W v), where γ is ``scale``, or softplus(scale) + 0.05 from ``_sn_version`` 2 on. The rows of query, key
    and value are three weights; a part without a scale is left as it is.
    """
    plain = {key: value for key, value in weights.items() if _PARAMETRISED not in key}
    for name in dict.fromkeys(key.split(_PARAMETRISED)[0] for key in weights if _PARAMETRISED in key):
        parts = _under(weights, name + _PARAMETRISED)
        if "original" not in parts:
            raise InvalidCheckpoint("A parametrised weight has its original", got=f"none of {name}")
        original = parts["original"]
        weight = original.to(torch.promote_types(original.dtype, torch.float32), copy=True)
        try:
            for path in (key.removesuffix(".scale") for key in parts if key.endswith(".scale")):
                rows = weight.chunk(3)[int(path.rsplit(".", 1)[1])] if "." in path else weight
                u, v, scale = (parts[f"{path}.{key}"].to(weight.dtype) for key in ("_u", "_v", "scale"))
                version = int(parts.get(f"{path}._sn_version", torch.tensor(1)))
                gain = scale if version < 2 else F.softplus(scale) + 0.05
                rows.mul_(gain.reshape(()) / (u @ rows.flatten(1) @ v))
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            got = f"{name}: {error}".splitlines()[0]
            raise InvalidCheckpoint("A spectral parametrisation is whole", got=got) from error
        plain[f"{name}.weight"] = weight.to(original.dtype)
    return plain


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _rename(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of ``RadioModel``; query, key and value, or the two halves of a gated MLP, apart."""
    first, second = base.get("blocks.0.mlp.fc1.weight"), base.get("blocks.0.mlp.fc2.weight")
    packed = first is not None and second is not None and len(first) == 2 * second.shape[1]
    tensors: dict[str, Tensor] = {}
    for key, value in base.items():
        if _UNUSED.fullmatch(key):
            continue
        for pattern, name in _RENAMED:
            key = re.sub(pattern, name, key)
        if packed:
            key = key.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        key = key.replace(".mlp.w3.", ".mlp.down_proj.")
        for joint, names in ((".attn.qkv.", _QKV), (".mlp.w12.", _GATED)):
            if joint in key:
                parts = zip(names, value.chunk(len(names)), strict=True)
                tensors |= {key.replace(joint, name): part.clone() for name, part in parts}
                break
        else:
            tensors[key] = value
    return tensors


def _teachers(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = [vars(t) if isinstance(t, argparse.Namespace) else dict(t) for t in facts.get("teachers") or ()]
    if any(not isinstance(teacher.get("name"), str) for teacher in found):
        raise InvalidCheckpoint("Every teacher in the training arguments has a name", got=found)
    return found


def _config(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], conditioner: Mapping[str, Tensor]) -> RadioConfig:
    from transformers import RadioConfig

    layers = {int(match[1]) for key in tensors if (match := re.match(r"encoder\.layer\.(\d+)\.", key))}
    gated = "encoder.layer.0.mlp.down_proj.weight" in tensors
    try:
        dim, pixels = tensors["embeddings.patch_projection.weight"].shape
        cells, prefix = (tensors[f"embeddings.{key}"].shape[-2] for key in ("position_embedding", "cls_register_token"))
        hidden = tensors[f"encoder.layer.0.mlp.{'down_proj' if gated else 'fc2'}.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise InvalidCheckpoint(
            "A RADIO has a patch generator and blocks", got=f"no {error}",
            remedy="RADIO before 2.5, E-RADIO, and the -g models of 2.x after DINOv2 have another design.",
        ) from error
    kwargs = facts.get("model_kwargs") or {}
    heads = kwargs.get("num_heads") or facts.get("num_attention_heads") or _HEADS.get(dim)
    if not heads or dim % int(heads):
        raise InvalidCheckpoint(f"The number of heads of a RADIO {dim} wide is known", got=heads)
    teachers = _teachers(facts)
    names = [teacher["name"] for teacher in teachers]
    classes = int(facts.get("num_cls_tokens") or len(set(names)) if facts.get("cls_token_per_teacher", True) else 1)
    summary = [i for i, t in enumerate(teachers) if t.get("use_summary", True) and names.index(t["name"]) == i]
    if not 0 < classes <= prefix:
        raise InvalidCheckpoint("A RADIO has one class token per teacher", got=f"{prefix} tokens, teachers {names}")
    patch = math.isqrt(pixels // 3)
    preferred = facts.get("preferred_resolution") or [512]
    ratio = hidden * (1.5 if gated else 1.0) / dim
    if int(dim * ratio) < hidden:  # the model rounds down again
        ratio = (hidden + 0.5) / dim
    options: dict[str, Any] = {}
    if conditioner:
        options = {key: conditioner[key].flatten().tolist() for key in ("norm_mean", "norm_std") if key in conditioner}
    return RadioConfig(
        hidden_size=dim, num_hidden_layers=len(layers), num_attention_heads=int(heads), mlp_ratio=ratio,
        use_swiglu_ffn=gated, qkv_bias=any(key.endswith(".q_proj.bias") for key in tensors), patch_size=patch,
        image_size=max(1, int(min(preferred)) // patch) * patch, max_img_size=math.isqrt(cells) * patch,
        num_cls_tokens=classes, num_registers=prefix - classes,
        summary_idxs=facts.get("summary_idxs") or [i for i in summary if i < classes] or [0],
        architectures=["RadioModel"], **options,
    )  # fmt: skip


def _completed(config: RadioConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With what files leave out because it is neutral, or because the config has it."""
    like = tensors["embeddings.position_embedding"]
    extra = {
        "input_conditioner.norm_mean": torch.tensor(config.norm_mean).view(3, 1, 1),
        "input_conditioner.norm_std": torch.tensor(config.norm_std).view(3, 1, 1),
        "summary_idxs": torch.tensor(config.summary_idxs),
    }
    if not any(".layer_scale" in key for key in tensors):
        names = [f"encoder.layer.{i}.layer_scale{n}.lambda1" for i in range(config.num_hidden_layers) for n in (1, 2)]
        extra |= {name: like.new_ones(config.hidden_size) for name in names}
    return extra | tensors


def _adaptors(weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for index, teacher in enumerate(_teachers(facts)):
        name = teacher["name"]
        head, features = (  # files of different age name a teacher by its name or by its number
            _under(weights, f"{part}.{name}.") or _under(weights, f"{part}.{index}.")
            for part in ("_heads", "_feature_projections")
        )
        if name in found or not (head or features):
            continue
        slot = teacher.get("token_slot")
        token = (index if slot is None else int(slot)) if facts.get("cls_token_per_teacher", True) else 0
        upsample = teacher.get("fd_upsample_factor") or 1
        text = _TEXT.get(str(teacher.get("model")), "")
        found[name] = {"head": head, "features": features, "token": token, "text": text, "upsample": int(upsample)}
    return found


def _read_folder(folder: Path, values: Mapping[str, Any]) -> tuple[RadioConfig, dict[str, Tensor]]:
    from transformers import RadioConfig

    files = sorted(path for pattern in hub.SAFETENSORS[:2] for path in folder.glob(pattern))
    if not files:
        raise MissingFile("A backbone folder holds model.safetensors", got=str(folder))
    weights: dict[str, Tensor] = {}
    for path in files:
        weights |= hub.load_safetensors(path)
    if any(key.startswith("radio_model.") for key in weights):
        # transformers renames these too, but would leave the LayerScale of the smaller models out without a word
        published = {"base_model.": "radio_model.model.", "input_conditioner.": "radio_model.input_conditioner."}
        renamed = {new + key: v for new, old in published.items() for key, v in _under(weights, old).items()}
        config, tensors, _ = state(renamed, {**values, **(values.get("args") or {})})
        return config, tensors
    try:
        config = RadioConfig.from_dict(dict(values))
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidCheckpoint("config.json must describe the model", got=f"{folder} ({error})") from error
    if "embeddings.position_embedding" not in weights:
        raise InvalidCheckpoint("The weights must fit RADIO", got=f"keys {', '.join(sorted(weights)[:3])} in {folder}")
    return config, _completed(config, weights)
