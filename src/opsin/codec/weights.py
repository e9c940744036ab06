"""Weights of others: published checkpoints of btnk_mae, and MAE to start from. Nothing in a file is ever run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsin import hub
from opsin.cards import ModelCard
from opsin.codec.config import SIZES, CodecConfig, activation_name
from opsin.codec.decoder import CodecDecoder
from opsin.codec.download import download
from opsin.codec.encoder import CodecEncoder
from opsin.codec.layers import assign, count_blocks, shape_of, square
from opsin.errors import InvalidCheckpoint, MissingFile
from opsin.remote_tensors import read_tensors

HEADS = {config.dim: config.heads for config in SIZES.values()}
VISUALIZE = "https://dl.fbaipublicfiles.com/mae/visualize/"  # MAE with its decoder, trained on plain pixels
_INSIDE_CONFIG = re.compile(  # classes; they are never imported
    r"omegaconf\.[\w.]+|typing\.Any|collections\.defaultdict|builtins\.(dict|list|tuple|int|float|str|bool|bytes)"
)


class _Inert(dict[Any, Any]):
    """Stands for every class that a configuration inside a checkpoint names: it keeps its state and does nothing."""

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A ``torch.save`` dictionary whose only objects are tensors and OmegaConf's; those come as plain dictionaries.

    ``InvalidCheckpoint`` for a file that names anything else, before any of it is run.
    """
    path = hub.check_file(path)
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # damaged, or of the older format, which holds tensors only: load_pickle says which
        named = []
    allowed = [(_Inert, name) for name in named if _INSIDE_CONFIG.fullmatch(name)]
    with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
        found = hub.load_pickle(path)
    if not isinstance(found, dict):
        raise InvalidCheckpoint("A checkpoint is a dictionary", got=f"{type(found).__name__} in {path}")
    return {key: _plain(value) if isinstance(value, _Inert) else value for key, value in found.items()}


def _plain(value: Any) -> Any:
    """The values inside a node of OmegaConf's tree."""
    if not isinstance(value, _Inert) or not isinstance(value.state, dict):
        return None if isinstance(value, _Inert) else value
    if "_content" not in value.state:
        return value.state.get("_val")
    content = value.state["_content"]
    if isinstance(content, dict):
        return {key: _plain(item) for key, item in content.items()}
    return [_plain(item) for item in content] if isinstance(content, list) else content


@dataclass(frozen=True)
class Published:
    """What a published ``*.pth`` holds: both state dicts, and the activation that it or its name tells."""

    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    activation: str


def read_published(path: str | Path) -> Published:
    """A ``btnk_mae_vit_*.pth`` or a ``checkpoint-*.pth`` of the published training."""
    path = Path(path)
    found = load_checkpoint(path)
    for part in ("enc_model", "dec_model"):
        if not isinstance(found.get(part), dict):
            raise InvalidCheckpoint(
                "A checkpoint of btnk_mae holds enc_model and dec_model", got=f"{', '.join(map(str, found))} in {path}"
            )
    config = found.get("cfg")
    model = config.get("model") if isinstance(config, dict) else None
    if isinstance(model, dict) and "act_fn" in model:
        stated = model["act_fn"]
    else:  # as the authors' notebook does
        stated = next((word for word in path.stem.lower().split("_") if word in _ACTS), None)
    halves = [{key.removeprefix("module."): t for key, t in found[part].items()} for part in ("enc_model", "dec_model")]
    return Published(halves[0], halves[1], activation_name(stated))


_ACTS = ("relu", "gelu", "swish", "silu", "tanh", "sigmoid")


def build(
    encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], config: CodecConfig
) -> tuple[CodecEncoder, CodecDecoder]:
    """Both halves from their weights, in the shape that ``config`` states; ``InvalidCheckpoint`` when they differ."""
    with torch.device("meta"):
        halves = CodecEncoder(config), CodecDecoder(config)
    return assign(halves[0], encoder, "the encoder of this codec"), assign(halves[1], decoder, "its decoder")


def half(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """What a state dict holds below ``part``."""
    return {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}


def infer_config(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], activation: str = "") -> CodecConfig:
    """The shape of a square codec of a published width from its weights (64 channels a head for another width)."""
    dim, patch = shape_of(encoder, "cls_token")[-1], shape_of(encoder, "mae_encoder.patch_embed.proj.weight")[-1]
    side = square(shape_of(decoder, "learned_embed")[1]) * patch
    width = shape_of(decoder, "mae_decoder.decoder_embed.bias")[0]
    return CodecConfig(
        dim, count_blocks(encoder, "mae_encoder.blocks"), _heads(dim), width,
        count_blocks(decoder, "mae_decoder.decoder_blocks"), 16, patch, (side, side), activation,
    )  # fmt: skip


def _heads(dim: int) -> int:
    return HEADS.get(dim, max(1, dim // 64))


def mae_config(state: Mapping[str, Tensor], heads: tuple[int, int] | None = None, activation: str = "") -> CodecConfig:
    """The shape of a codec that starts from MAE's weights ``state``; ``heads`` of encoder and decoder."""
    dim, patch = shape_of(state, "cls_token")[-1], shape_of(state, "patch_embed.proj.weight")[-1]
    side = square(shape_of(state, "pos_embed")[1] - 1) * patch
    heads = heads or (_heads(dim), 16)
    return CodecConfig(
        dim, count_blocks(state, "blocks"), heads[0], shape_of(state, "decoder_embed.bias")[0],
        count_blocks(state, "decoder_blocks"), heads[1], patch, (side, side), activation,
    )  # fmt: skip


def from_mae_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """MAE's own keys → what they fill of encoder and decoder, the class token included."""
    encoder: dict[str, Tensor] = {}
    decoder: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in ("cls_token", "pos_embed"):
            encoder[key] = value
        elif key == "mask_token" or key.startswith("decoder_"):
            decoder[f"mae_decoder.{key}"] = value
        elif key.split(".")[0] in ("patch_embed", "blocks", "norm"):
            encoder[f"mae_encoder.{key}"] = value
        else:
            raise InvalidCheckpoint("The weights of MAE have its keys only", got=key)
    return encoder, decoder


_RENAMED = (  # of transformers' ViTMAEForPreTraining
    (r"^vit\.embeddings\.cls_token$", "cls_token"),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.encoder\.layer\.", "blocks."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of ``ViTMAEForPreTraining`` → MAE's own, with one matrix for queries, keys and values."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in _RENAMED:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    found = {}
    for key, value in renamed.items():
        if ".attn.query." in key:
            parts = [renamed.get(key.replace(".query.", f".{name}.")) for name in ("query", "key", "value")]
            if any(part is None for part in parts):
                raise InvalidCheckpoint("Attention has queries, keys and values", got=key)
            found[key.replace(".query.", ".qkv.")] = torch.cat([part for part in parts if part is not None])
        elif ".attn.key." not in key and ".attn.value." not in key:
            found[key] = value
    return found


def read_mae(ref: str | Path) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """MAE's weights under its own keys, and the heads of both halves where something states them.

    ``ref``: a catalogue name (``mae-b``), ``"hf:facebook/vit-mae-base"`` or a folder of that form, the path of a
    ``mae_visualize_*.pth``, or ``"mae_visualize_vit_large_ganloss"``, which is fetched from its authors.
    """
    path = Path(str(ref)).expanduser()
    if re.fullmatch(r"mae_visualize_\w+", str(ref)) and not path.exists():
        path = download(f"{VISUALIZE}{ref}.pth", hub.cache_dir() / "mae")
    if path.is_file():
        state = load_checkpoint(path)
        state = state.get("model", state)
        if not isinstance(state, dict) or "cls_token" not in state:
            raise InvalidCheckpoint('A file of MAE holds its weights under "model"', got=str(path))
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}, None
    folder = hub.resolve(ref)
    return from_transformers(_folder_state(folder)), _stated_heads(folder)


def _folder_state(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise MissingFile("The folder of an MAE holds model.safetensors", got=str(folder))
    return {key: value for file in files for key, value in read_tensors(file).items()}


def _stated_heads(folder: Path) -> tuple[int, int] | None:
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(facts["num_attention_heads"]), int(facts["decoder_num_attention_heads"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def published_file(ref: str | Path, card: ModelCard) -> Path:
    """The ``*.pth`` of a catalogue model, fetched when it is not there."""
    return hub.resolve(ref) / card.files[0]
