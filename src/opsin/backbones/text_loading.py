"""Files to the parts of a text tower: config, the published tokeniser, and a network with weights that really fit."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsin import hub
from opsin.backbones.base import first_line, quiet, read_json
from opsin.errors import InvalidCheckpoint, MissingExtra, MissingFile, ModelUnavailable
from opsin.runtime import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor

FILES = ("config.json", "*token*", "model*.safetensors*")  # what a text tower is made from


@dataclass(frozen=True)
class Family:
    """How a tower is run: its class, and the tensor and the option of the config that say how wide its vectors are.

    ``filled``: texts are padded to the full length, as in training, since the last position is what is read;
    elsewhere to the longest text. ``masked``: padding has to be hidden; a causal tower does not see it anyway.
    """

    model: str
    head: str = ""
    width: str = ""
    filled: bool = False
    masked: bool = False


FAMILIES = {
    "siglip": Family("SiglipTextModel", "text_model.head.weight", "projection_size", filled=True),
    "siglip2": Family("Siglip2TextModel", "text_model.head.weight", "projection_size", filled=True),
    "clip": Family("CLIPTextModelWithProjection", "text_projection.weight", "projection_dim"),
    "tipsv2": Family("Tipsv2TextModel", masked=True),
}


def files_of(ref: str | Path) -> Path:
    """The folder with config and tokeniser of a folder or a pinned repository, downloaded when not there."""
    if not (isinstance(ref, str) and ref.startswith("hf:")):
        return hub.resolve(ref)
    folder = hub.resolve(ref, files=FILES[:2])
    if not (folder / "tokenizer.json").is_file():
        repo, revision = hub.parse_hf(ref)
        for name in ("vocab.json", "merges.txt", "spiece.model"):
            with suppress(ModelUnavailable):
                hub.fetch(repo, name, revision)
    return folder


def settings_of(folder: Path) -> dict[str, Any]:
    """What the tokeniser's own config says, special tokens as plain strings."""
    values: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            values |= read_json(folder / name)
    return {key: value.get("content", value) if isinstance(value, dict) else value for key, value in values.items()}


def text_config(folder: Path) -> Any:
    """The part of ``config.json`` that describes the text tower."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the checks of configs raise their own
        raise InvalidCheckpoint("config.json must describe the model", got=f"{folder} ({first_line(error)})") from error
    return getattr(config, "text_config", config)


def tokenizer_of(folder: Path, settings: dict[str, Any], limit: int, length: int | None) -> Tokenizer:
    """The published tokeniser, set to cut at ``limit`` tokens and to pad to ``length``, or to the longest text."""
    from tokenizers import Tokenizer, processors

    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            tokenizer, settings = _converted(folder)
        if tokenizer.post_processor is None and settings.get("add_eos_token") and settings.get("eos_token"):
            end = settings["eos_token"]
            pairs = [(end, tokenizer.token_to_id(end))]
            tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=pairs)
    except (MissingExtra, MissingFile):
        raise
    except Exception as error:  # the library raises plain Exception
        raise InvalidCheckpoint("The tokeniser must be readable", got=f"{folder} ({first_line(error)})") from error
    name = settings.get("pad_token") or (tokenizer.padding or {}).get("pad_token")
    pad = tokenizer.token_to_id(name) if name else None
    if pad is None:
        raise InvalidCheckpoint("A tokeniser names the token that texts are padded with", got=f"{name} in {folder}")
    tokenizer.enable_truncation(limit)
    tokenizer.enable_padding(direction="right", pad_id=pad, pad_token=name, length=length)
    return tokenizer


def _converted(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokeniser, and its settings, of a folder with a vocabulary and merges, or with a SentencePiece model."""
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    models = sorted(path.name for path in folder.glob("*.model"))
    if not models and not (folder / "vocab.json").is_file():
        raise MissingFile(
            "The folder of a text tower holds tokenizer.json", got=str(folder),
            remedy="Save the tokeniser beside the weights: AutoTokenizer.from_pretrained(…).save_pretrained(folder).",
        )
    if models and find_spec("sentencepiece") is None:
        what = f'"sentencepiece" is needed to read {models[0]} in {folder}'
        raise MissingExtra(what, remedy="Install it: pip install sentencepiece.")
    with quiet():
        made = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return made.backend_tokenizer, {"pad_token": made.pad_token}


def build(family: Family, config: Any, tensors: dict[str, Tensor], dtype: torch.dtype, what: str) -> Any:
    """The network ``family.model`` of ``transformers`` with exactly these weights."""
    import transformers

    cls = getattr(transformers, family.model)
    try:
        with quiet():
            model, info = cls.from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # each library raises its own on weights that do not fit
        if is_out_of_memory(error):
            raise
        raise InvalidCheckpoint(f"The text tensors of {what} must fit {family.model}", got=first_line(error)) from error
    extra = [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]  # of older versions
    problems = [
        f"{label}: {', '.join(sorted(map(str, names))[:3])}"
        for label, names in (("missing", info["missing_keys"]), ("unexpected", extra))
        if names
    ]
    if problems:
        raise InvalidCheckpoint(f"The text tensors of {what} must fit {family.model}", got="; ".join(problems))
    return model
