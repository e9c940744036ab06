"""Deterministic weights that the golden numbers of RADSeg were made with: every tensor is drawn from its key name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tests.conftest import draw, golden_path

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def radseg_keys(model: str) -> dict[str, tuple[int, ...]]:
    """Key names and shapes of the synthetic checkpoints ``"tiny"``, ``"vitb"``, ``"sam_tiny"``."""
    name = "sam_keys_tiny.json" if model == "sam_tiny" else f"checkpoint_keys_{model}.json"
    found = json.loads(golden_path(name, "radseg").read_text())
    return {key: tuple(shape) for key, shape in found.items()}


def radseg_weights(keys: Mapping[str, Sequence[int]], mode: str = "fan3", prefix: str = "") -> dict[str, np.ndarray]:
    """Values for ``keys``: ``"flat"``, or ``"fan<gain>"`` with the gain of the attention's query, key and value."""
    return {key: _value(prefix + key, tuple(shape), mode).numpy() for key, shape in keys.items()}


def _value(key, shape, mode):
    for name, constant in (("norm_mean", MEAN), ("norm_std", STD)):
        if key.endswith(f"input_conditioner.{name}"):
            return torch.tensor(constant).view(shape)
    noise, last = draw(key, shape), key.rsplit(".", 1)[-1]
    gain_like = last in ("weight", "gamma", "grandma") and len(shape) == 1
    if mode == "flat":
        return 0.02 * noise + (1.0 if gain_like else 0.0)
    if gain_like:
        return 1 + 0.1 * noise
    if last in ("pos_embed", "token", "reg_token"):
        return 0.5 * noise
    if key.endswith("positional_encoding_gaussian_matrix"):
        return noise
    if len(shape) <= 1:
        return 0.02 * noise
    gain = float(mode.removeprefix("fan")) if key.endswith("attn.qkv.weight") else 1.0
    return noise * gain / math.sqrt(math.prod(shape[1:]))
