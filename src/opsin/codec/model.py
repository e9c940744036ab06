"""``Codec``: an image becomes one vector, and a vector an image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from opsin import hub
from opsin import images as im
from opsin.cards import ModelCard
from opsin.codec import canvas as cv
from opsin.codec import weights
from opsin.codec.canvas import CodecFit
from opsin.codec.code import ImageCode
from opsin.codec.config import CodecConfig, as_size, named_config
from opsin.codec.decoder import CodecDecoder
from opsin.codec.encoder import CodecEncoder
from opsin.codec.layers import lean
from opsin.codec.patches import reconstruction_loss, unpatchify
from opsin.errors import IncompatibleModel, InputError, InvalidConfig, check_compat
from opsin.geometry import Size
from opsin.runtime import fast_matmul, generator, in_batches, progress, resolve_device, resolve_dtype, to_model

Vectors = ImageCode | Tensor | np.ndarray
FILES = ("card.json", "codec.safetensors")


class Codec(nn.Module):
    """Image → one vector → image: the bottleneck MAE of REMI (arXiv 2507.02064). Made ready for inference.

    ``encoder`` and ``decoder`` have the published state-dict keys; ``card`` says what the weights do not: the
    activation of the code, the heads, the normalisation of pixels.
    """

    def __init__(self, encoder: CodecEncoder, decoder: CodecDecoder, card: ModelCard) -> None:
        super().__init__()
        ours, theirs = ((half.dim, half.patch, half.grid) for half in (encoder, decoder))
        if ours != theirs:
            raise IncompatibleModel(
                "Encoder and decoder have the same width, patch and grid", got=f"{ours} and {theirs}"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.card = card
        self.eval()

    @classmethod
    def create(
        cls, size: str | CodecConfig = "base", *, activation: str | None = None, image_size: int | Size | None = None,
        seed: int = 0, name: str = "codec",
    ) -> Codec:  # fmt: skip
        """A new codec to train, from random weights (those of MAE: :meth:`from_mae`).

        ``size``: ``"base"``, ``"large"``, ``"large_gan"``, ``"huge"``, or a :class:`CodecConfig` of one's own;
        ``activation`` of the code: none, relu, gelu, silu, tanh or sigmoid; ``image_size`` a side or ``(H, W)``.
        """
        changes: dict[str, Any] = {} if activation is None else {"activation": activation}
        if image_size is not None:
            changes["size"] = as_size(image_size)
        config = named_config(size, **changes)
        with torch.device("meta"):
            encoder, decoder = CodecEncoder(config), CodecDecoder(config)
        draw = generator(seed)
        encoder.to_empty(device="cpu").initialise(draw)
        decoder.to_empty(device="cpu").initialise(draw)
        return cls(encoder, decoder, config.to_card(name, parameters=count(encoder) + count(decoder)))

    @classmethod
    def from_pretrained(
        cls, ref: str | Path = "codec-tiny", *, activation: str | None = None,
        device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
    ) -> Codec:  # fmt: skip
        """A trained codec.

        Args:
            ref: catalogue name, ``"hf:org/repo@rev"``, ``"dir:path"``, a folder that :meth:`save_pretrained` wrote, or
                the path of a published ``btnk_mae_vit_*.pth`` or ``checkpoint-*.pth``. A catalogue name of MAE gives
                what :meth:`from_mae` does.
            activation: of the code, for a published file that does not tell (neither inside nor by its name).
            device, dtype: as for ``opsin.load``.

        Raises:
            UnknownModel, ModelUnavailable, MissingFile, InvalidCheckpoint, IncompatibleModel (not a codec).
        """
        path = Path(str(ref).removeprefix("dir:")).expanduser()
        card = None if path.is_file() else hub.card_of(ref)
        if card is not None and card.kind != "codec":
            raise IncompatibleModel("A codec", got=f'"{card.name}", of kind {card.kind}')
        if card is not None and card.family == "mae":
            codec = cls.from_mae(ref, activation=activation, name=card.name)
        elif path.is_file():
            codec = cls._from_published(path, path.stem, activation, {})
        elif card is not None and card.files:
            file = weights.published_file(ref, card)
            codec = cls._from_published(file, card.name, activation or card.activation, card.to_dict())
        else:
            folder = hub.resolve(ref, files=FILES)
            card = ModelCard.load(folder / FILES[0])
            state = hub.load_safetensors(folder / FILES[1])
            encoder, decoder = (weights.half(state, part) for part in ("encoder", "decoder"))
            codec = cls(*weights.build(encoder, decoder, CodecConfig.from_card(card)), card)
        where = resolve_device(device)
        return codec.to(device=where, dtype=resolve_dtype(dtype, where, allow_bfloat16=codec.card.bfloat16))

    @classmethod
    def _from_published(cls, path: Path, name: str, activation: str | None, facts: dict[str, Any]) -> Codec:
        found = weights.read_published(path)
        wanted = found.activation if activation is None else activation
        config = weights.infer_config(found.encoder, found.decoder, wanted)
        encoder, decoder = weights.build(found.encoder, found.decoder, config)
        facts = {key: facts[key] for key in ("licence", "licence_url", "citation", "trained_on") if key in facts}
        return cls(encoder, decoder, config.to_card(name, parameters=count(encoder) + count(decoder), **facts))

    @classmethod
    def from_mae(
        cls, ref: str | Path = "mae-b", *, activation: str | None = None, image_size: int | Size | None = None,
        seed: int = 0, name: str = "codec",
    ) -> Codec:  # fmt: skip
        """A codec to train that starts from a masked autoencoder (arXiv 2111.06377), its class token included.

        The queries and the step from a code to patches start at random (``seed``): it reconstructs from all tokens, not
        yet from codes. The published training leaves out MAE's class token.

        ``ref``: ``mae-b``, ``mae-l``, ``mae-h``, ``"hf:facebook/vit-mae-base"``, the path of a ``mae_visualize_*.pth``,
        or ``"mae_visualize_vit_large_ganloss"`` and its like, which are fetched. Other arguments as for :meth:`create`.
        """
        state, heads = weights.read_mae(ref)
        config = weights.mae_config(state, heads, activation or "")
        codec = cls.create(config, seed=seed, name=name)
        encoder, decoder = weights.from_mae_state(state)
        known, inner = codec.encoder.state_dict(), codec.decoder.state_dict()
        hub.check_keys(encoder, {key: value.shape for key, value in known.items()}, "the encoder of an MAE")
        wanted = {key: value.shape for key, value in inner.items() if key.startswith("mae_decoder.")}
        hub.check_keys(decoder, wanted, "the decoder of an MAE")
        codec.encoder.load_state_dict(encoder)
        codec.decoder.load_state_dict(decoder, strict=False)  # what an MAE has not keeps its random start
        return codec if image_size is None else codec.resize(image_size)

    def save_pretrained(self, folder: str | Path, *, card: ModelCard | None = None) -> Path:
        """Write ``card.json`` and ``codec.safetensors``, by rename; :meth:`from_pretrained` reads the folder.

        ``card``: with other facts (licence, measures); the shape is always that of this codec.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        hub.save_safetensors(self.state_dict(), folder / FILES[1])
        kept = replace(card or self.card, **_shape(self.card))
        replace(kept, source="", files=(), sha256="", revision="main").save(folder / FILES[0])
        return folder

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Put the codec into a repository of the Hugging Face hub; its address."""
        return hub.upload(lambda folder: self.save_pretrained(folder), repo, private=private)

    @property
    def name(self) -> str:
        """Name of the model; codes carry it."""
        return self.card.name

    @property
    def dim(self) -> int:
        """Width ``D`` of a code."""
        return self.encoder.dim

    @property
    def size(self) -> Size:
        """``(H, W)`` of the canvas that images are laid on."""
        return self.encoder.size

    def normalise(self, images: Tensor) -> Tensor:
        """RGB ``(..., 3, H, W)`` in [0, 1] as the networks take it."""
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.card.mean, self.card.std))
        return (images - mean) / std

    def denormalise(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`, clamped to [0, 1], in float32 at least."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.card.mean, self.card.std))
        return (images * std + mean).clamp(0, 1)

    def forward(
        self, images: Tensor, coefficients: tuple[float, float] = (1.0, 0.1), *, norm_pix: bool = False
    ) -> dict[str, Tensor]:
        """See :meth:`losses`: what wrappers such as ``DistributedDataParallel`` call."""
        return self.losses(images, coefficients, norm_pix=norm_pix)

    def losses(
        self, images: Tensor, coefficients: tuple[float, float] = (1.0, 0.1), *, norm_pix: bool = False
    ) -> dict[str, Tensor]:
        """Mean squared errors of normalised images ``(B, 3, H, W)`` decoded from their codes and from all tokens.

        ``coefficients`` weigh ``bottleneck`` and ``full`` in ``loss``; a part of weight 0 is neither computed nor in
        the result. ``norm_pix``: against patches of mean 0 and variance 1 each.
        """
        code, full = coefficients
        if min(coefficients) < 0 or not any(coefficients):
            raise InvalidConfig("The coefficients of the losses are not negative, and not both 0", got=coefficients)
        tokens = self.encoder(images) if full else None
        vectors = self.encoder.bottleneck(images) if tokens is None else tokens[:, 0]
        found: dict[str, Tensor] = {}
        if tokens is not None:
            # Computed a second time for its gradient, after the other pass has let go of what it keeps: two passes need
            # the memory of one, for a sixteenth more work.
            predicted = lean(self.decoder.full, tokens)
            found["full"] = reconstruction_loss(images, predicted, self.decoder.patch, norm_pix=norm_pix)
        if code:
            predicted = self.decoder(vectors)
            found["bottleneck"] = reconstruction_loss(images, predicted, self.decoder.patch, norm_pix=norm_pix)
        parts = {"bottleneck": code, "full": full}
        found["loss"] = torch.stack([parts[name] * value for name, value in found.items()]).sum()
        return found

    def resize(self, size: int | Size, *, compat: Literal["published"] | None = None) -> Codec:
        """Work at another image ``size``, a side or ``(H, W)`` such as 2:1 for panoramas; in place, returns itself.

        Learned queries and positions are resampled (bicubic) and stay the same ``Parameter`` objects, so that an
        optimiser made before still trains them (one that has taken steps keeps moments of the old shape: make a new
        one). ``compat="published"`` draws the queries anew instead, and does not touch the rest of what it did wrong.
        """
        check_compat(compat)
        self.encoder.resize(size, compat=compat)
        self.decoder.resize(size, compat=compat)
        config = replace(CodecConfig.from_card(self.card), size=self.size)
        self.card = replace(self.card, **_shape(config.to_card(self.name)), parameters=count(self))
        return self

    @torch.no_grad()
    def encode(self, images: Any, *, batch_size: int = 16, fit: CodecFit | None = None) -> ImageCode:
        """Images of any sizes to one vector each.

        Args:
            images: one image (path, bytes, PIL, array, tensor), a list, a batch ``(B, C, H, W)``, or a folder; read in
                batches, so that a long list of files needs no more memory than a short one.
            batch_size: images that go together; halved when memory runs out.
            fit: ``"stretch"`` to the model's canvas, as published; ``"pad"`` or ``"crop"`` keep the aspect. By default
                the card's.

        Raises:
            InvalidImage, MissingFile, InvalidConfig, ResourceError.
        """
        way: CodecFit = fit or self.card.fit
        cv.layout((1, 1), self.size, way)
        sources, sizes = _sources(images), {}

        def run(rows: Sequence[int]) -> list[Tensor]:
            pictures = [im.read_image(sources[i]) for i in rows]
            sizes.update({i: (int(p.shape[1]), int(p.shape[2])) for i, p in zip(rows, pictures, strict=True)})
            return list(self.encoder.bottleneck(self._canvas(pictures, way)))

        with fast_matmul():
            found = in_batches(run, range(len(sources)), batch_size)
        vectors = torch.stack(found) if found else torch.zeros((0, self.dim))
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        names = tuple(str(s) for s in sources) if all(isinstance(s, (str, Path)) for s in sources) else ()
        return ImageCode(vectors, self.name, tuple(sizes[i] for i in range(len(sources))), way, names)

    @torch.no_grad()
    def decode(self, code: Vectors, *, batch_size: int = 16) -> Tensor:
        """Codes to RGB in [0, 1], as large as the model's canvas.

        An :class:`ImageCode` or vectors ``(B, D)`` give ``(B, 3, H, W)``; a walk of vectors ``(B, T, D)`` gives the
        videos ``(B, T, 3, H, W)``; in general ``(..., D)`` gives ``(..., 3, H, W)``, computed ``batch_size`` at a time.

        Raises:
            IncompatibleModel (another model's codes, another width), InputError (NaN, no numbers), ResourceError.
        """
        vectors = self._vectors(code)
        rows = vectors.reshape(-1, self.dim)
        with fast_matmul():
            found = in_batches(lambda r: list(self._decoded(rows[list(r)])), range(len(rows)), batch_size)
        pictures = torch.stack(found) if found else torch.zeros((0, 3, *self.size))
        return pictures.reshape(*vectors.shape[:-1], 3, *self.size)

    def restore(self, code: ImageCode, *, batch_size: int = 16) -> Iterator[Tensor]:
        """Decode, and give every image its own size again: ``(3, H, W)`` in [0, 1], one after the other.

        Of an image that was cropped, the part that was seen. Memory does not grow with the number of codes.
        """
        pictures = self.frames(code, batch_size=batch_size)
        for picture, size in zip(pictures, code.sizes, strict=True):
            yield cv.restore(picture, size, code.fit)

    def frames(self, code: Vectors, *, batch_size: int = 16) -> Iterator[Tensor]:
        """The images ``(3, H, W)`` of codes ``(T, D)``, one after the other, computed ``batch_size`` at a time."""
        vectors = self._vectors(code)
        if vectors.ndim != 2:
            raise InputError("One walk of vectors (T, D)", got=tuple(vectors.shape))
        for chunk in vectors.split(max(1, batch_size)):
            yield from self.decode(chunk, batch_size=batch_size)

    def save_video(self, code: Vectors, path: str | Path, *, fps: float = 24.0, batch_size: int = 16) -> Path:
        """Decode a walk of vectors ``(T, D)`` into an H.264 mp4; memory does not grow with its length."""
        from opsin.clip import ClipWriter

        vectors = self._vectors(code)
        if vectors.ndim != 2 or not len(vectors):
            raise InputError("A video is made of vectors (T ≥ 1, D)", got=tuple(vectors.shape))
        with ClipWriter(path, fps, self.size) as clip:
            images = self.frames(vectors, batch_size=batch_size)
            for image in progress(images, total=len(vectors), description="decode", unit="frame"):
                clip.write(image)
        return Path(path)

    def reconstruct(self, images: Any, *, batch_size: int = 16, fit: CodecFit | None = None) -> Tensor:
        """Images through their code and back: ``(B, 3, H, W)`` in [0, 1] at the model's size."""
        return self.decode(self.encode(images, batch_size=batch_size, fit=fit), batch_size=batch_size)

    @torch.no_grad()
    def encode_tokens(self, images: Any, *, batch_size: int = 16, fit: CodecFit | None = None) -> Tensor:
        """All tokens ``(B, 1 + N, D)`` of images, the code first: what the MAE decoder takes."""
        way: CodecFit = fit or self.card.fit
        sources = _sources(images)

        def run(batch: Sequence[Any]) -> list[Tensor]:
            return list(self.encoder(self._canvas([im.read_image(source) for source in batch], way)))

        with fast_matmul():
            found = in_batches(run, sources, batch_size)
        return torch.stack(found) if found else torch.zeros((0, 1 + math.prod(self.encoder.grid), self.dim))

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor, *, batch_size: int = 16) -> Tensor:
        """All tokens ``(B, 1 + N, D)`` to RGB ``(B, 3, H, W)`` in [0, 1]."""

        def run(rows: Sequence[int]) -> list[Tensor]:
            return list(self._image(self.decoder.full(to_model(tokens[list(rows)], self.decoder))))

        _check_finite(tokens)
        with fast_matmul():
            found = in_batches(run, range(len(tokens)), batch_size)
        return torch.stack(found) if found else torch.zeros((0, 3, *self.size))

    def _canvas(self, pictures: Sequence[Tensor], fit: CodecFit) -> Tensor:
        laid = torch.stack([cv.lay(picture, self.size, fit) for picture in pictures])
        return to_model(self.normalise(laid), self.encoder)

    def _decoded(self, vectors: Tensor) -> Tensor:
        return self._image(self.decoder(to_model(vectors, self.decoder)))

    def _image(self, patches: Tensor) -> Tensor:
        return self.denormalise(unpatchify(patches, self.decoder.patch, self.decoder.grid))

    def _vectors(self, code: Vectors) -> Tensor:
        if isinstance(code, ImageCode):
            code.check_model(self.name, self.dim)
            return code.floats()
        vectors = torch.as_tensor(code)
        if not vectors.is_floating_point():
            raise InputError("Vectors are floating numbers", got=vectors.dtype)
        if vectors.ndim < 2 or vectors.shape[-1] != self.dim:
            raise IncompatibleModel(f"Vectors of {self.name} have shape (..., {self.dim})", got=tuple(vectors.shape))
        _check_finite(vectors)
        return vectors


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def _shape(card: ModelCard) -> dict[str, Any]:
    """What a card says of the shape of a codec, which no other card may change."""
    return {name: getattr(card, name) for name in ("kind", "dim", "patch_size", "image_size", "sizes", "activation")}


def _check_finite(numbers: Tensor) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise InputError("Vectors are finite numbers", got="NaN or infinity")


def _sources(images: Any) -> Sequence[Any]:
    """What is to be read, one entry per image."""
    if isinstance(images, (str, Path)) and Path(images).is_dir():
        return im.list_images(images)
    if isinstance(images, (list, tuple)) or (isinstance(images, Tensor) and images.ndim == 4):
        return images  # type: ignore[return-value]
    return [images]
