"""RADIO under its published key names, as numpy in and out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from opsin.backbones import radio_checkpoint
from opsin.backbones.radio import RadioBackbone

Array = np.ndarray


def radio_backbone(weights: dict[str, Array], args: dict[str, Any]) -> RadioBackbone:
    """The backbone with its adaptors, in the dtype of the weights."""
    teachers = [{"name": name, "use_summary": name in args["summary"]} for name in args["teachers"]]
    stated = {key: value for key, value in args.items() if key not in ("teachers", "summary", "num_heads")}
    stated |= {"teachers": teachers, "model_kwargs": {"num_heads": args["num_heads"]}}
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in weights.items()}
    return radio_checkpoint.from_weights(tensors, stated, name="parity")


def radseg_align(
    weights: dict[str, Array], args: dict[str, Any], features: Array, *, adaptor: str = "siglip2"
) -> Array:
    heads = radio_backbone(weights, args).adaptor(adaptor)
    with torch.no_grad():
        tokens = heads.head_mlp(torch.from_numpy(np.array(features)).movedim(1, -1))
    return tokens.movedim(-1, 1).numpy()
