"""The codec under its published key names, as numpy in and out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsin.codec import Codec, CodecConfig, CodecDecoder, CodecEncoder

Array = np.ndarray


def tensors(weights: dict[str, Array]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.array(value)) for key, value in weights.items()}


def codec_encode(weights: dict[str, Array], *, heads: int, patch: int, act: str | None, images: Array) -> Array:
    size = (images.shape[2], images.shape[3])
    encoder = CodecEncoder.from_state_dict(tensors(weights), heads=heads, activation=act, size=size)
    with torch.no_grad():
        return encoder(torch.from_numpy(images)).numpy()


def codec_decode(
    weights: dict[str, Array], *, heads: int, decoder_heads: int, patch: int, vectors: Array
) -> Array:
    decoder = CodecDecoder.from_state_dict(tensors(weights), heads=decoder_heads)
    with torch.no_grad():
        return decoder(torch.from_numpy(vectors)).numpy()


def codec_full(weights: dict[str, Array], *, decoder_heads: int, patch: int, tokens: Array) -> Array:
    decoder = CodecDecoder.from_state_dict(tensors(weights), heads=decoder_heads)
    with torch.no_grad():
        return decoder.full(torch.from_numpy(tokens)).numpy()


def codec_model(
    enc: dict[str, Array], dec: dict[str, Array], *, heads: int, decoder_heads: int, act: str | None, images: Array
) -> Codec:
    """Both halves as one model."""
    size = (images.shape[2], images.shape[3])
    encoder = CodecEncoder.from_state_dict(tensors(enc), heads=heads, activation=act, size=size)
    decoder = CodecDecoder.from_state_dict(tensors(dec), heads=decoder_heads, size=size)
    blocks, part = len(encoder.mae_encoder.blocks), decoder.mae_decoder
    config = CodecConfig(
        encoder.dim, blocks, heads, part.decoder_embed.out_features, len(part.decoder_blocks), decoder_heads,
        encoder.patch, size, encoder.activation,
    )  # fmt: skip
    return Codec(encoder, decoder, config.to_card("parity"))


def codec_losses(
    enc: dict[str, Array], dec: dict[str, Array], *, heads: int, decoder_heads: int, patch: int, act: str | None,
    images: Array, coefficients: tuple[float, float],
) -> dict[str, Any]:  # fmt: skip
    model = codec_model(enc, dec, heads=heads, decoder_heads=decoder_heads, act=act, images=images)
    loss = model.losses(torch.from_numpy(images), tuple(coefficients))["loss"]
    loss.backward()
    found = {
        f"{part}.{key}": value.grad
        for part, module in (("enc", model.encoder), ("dec", model.decoder))
        for key, value in module.named_parameters()
        if value.grad is not None
    }
    norm = torch.nn.utils.get_total_norm(list(found.values()))
    return {"loss": loss.item(), "grad_norm": float(norm), "grads": {key: g.numpy() for key, g in found.items()}}
