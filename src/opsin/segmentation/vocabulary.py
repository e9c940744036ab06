"""Embeddings of labels, computed once: one label in 80 sentences costs a large text tower a minute of CPU time.

Rows are kept on disk under the model, its revision and the sentences themselves, so a question that was asked before
needs no text tower at all.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opsin import hub
from opsin.backbones.text import TextEncoder, canonicalize, load_text, text_name
from opsin.errors import IncompatibleModel, InvalidCheckpoint
from opsin.runtime import progress, resolve_device, resolve_dtype

if TYPE_CHECKING:
    from opsin.segmentation.labels import Labels

CHUNK = 256  # sentences encoded between two writes to disk
_KEPT = 20_000  # rows held in memory
_ASKED = 64  # questions whose rows are kept at hand: to put 150 labels into 80 sentences takes longer than to answer


class Vocabulary:
    """Labels as rows in the space of words.

    Args:
        encoder_factory: makes the text tower; called when an embedding is neither in memory nor on disk, then kept.
        name: of the tower, with its revision and whatever else changes its output: what rows are cached under.
        dim: width ``E`` of its embeddings.
        cache: folder of the cache, such as :func:`opsin.hub.cache_dir`; None keeps rows in memory only.
        canonical: whether texts are canonicalised first (:func:`opsin.backbones.text.canonicalize`).
    """

    def __init__(
        self,
        encoder_factory: Callable[[], TextEncoder],
        name: str,
        dim: int,
        cache: Path | None = None,
        *,
        canonical: bool = False,
    ) -> None:
        self.name = name
        self.dim = dim
        self.canonical = canonical
        slug = re.sub(r"[^\w.@-]+", "-", name).strip("-")[-60:]
        self._folder = cache and cache / "text" / f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        self._factory = encoder_factory
        self._encoder: TextEncoder | None = None
        self._rows: dict[str, Tensor] = {}
        self._asked: dict[Labels, Tensor] = {}

    @property
    def encoder(self) -> TextEncoder:
        """The text tower, loaded when first asked for."""
        if self._encoder is None:
            self._encoder = self._factory()
        return self._encoder

    def release(self) -> None:
        """Give the memory of the text tower back; it is loaded again when needed."""
        self._encoder = None
        self._asked.clear()

    @torch.no_grad()
    def embed(self, labels: Labels) -> Tensor:
        """One row per phrase: the mean over templates of unit embeddings, itself not of unit length (as published).

        Returns:
            ``(S, E)`` on the CPU, float32 (float64 from a tower in float64).

        Raises:
            IncompatibleModel: the tower has another width.  What loading the tower raises, when it is needed.
        """
        if labels in self._asked:
            return self._asked[labels]
        sentences = [self._sentences(text, labels.templates) for text in labels.texts]
        if len(self._rows) > _KEPT:
            self._rows.clear()
        missing = {key: texts for key, texts in sentences if key not in self._rows and not self._read(key)}
        if missing:
            self._encode(missing, len(labels.templates))
        if len(self._asked) >= _ASKED:
            self._asked.clear()
        self._asked[labels] = torch.stack([self._rows[key] for key, _ in sentences])
        return self._asked[labels]

    def _sentences(self, phrase: str, templates: Sequence[str]) -> tuple[str, list[str]]:
        texts = [template.replace("{}", phrase) for template in templates]
        if self.canonical:
            texts = [canonicalize(text) for text in texts]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest(), texts

    def _encode(self, missing: dict[str, list[str]], templates: int) -> None:
        keys = list(missing)
        step = max(1, CHUNK // templates)
        chunks = [keys[start : start + step] for start in range(0, len(keys), step)]
        for chunk in progress(chunks, description=f"words through {self.name}", unit="chunk"):
            vectors = self.encoder.encode([text for key in chunk for text in missing[key]])
            if self.dim != vectors.shape[-1]:
                raise IncompatibleModel(
                    f"The text tower gives vectors of width {self.dim}", got=f"{vectors.shape[-1]} from {self.name}"
                )
            vectors = vectors.cpu()
            vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
            rows = torch.nn.functional.normalize(vectors, dim=-1).unflatten(0, (len(chunk), templates)).mean(1)
            if not rows.isfinite().all():
                raise InvalidCheckpoint(
                    "Embeddings of texts are finite numbers", got=f"others from {self.name}",
                    remedy='Load the text tower with dtype="float32".',
                )
            for key, row in zip(chunk, rows, strict=True):
                self._rows[key] = row.clone()
                self._write(key)

    def _path(self, key: str) -> Path | None:
        return self._folder and self._folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> bool:
        path = self._path(key)
        if path is None or not path.is_file():
            return False
        try:
            row = hub.load_safetensors(path)["embedding"]
        except (InvalidCheckpoint, KeyError):
            return False  # made anew, and written over
        if row.shape != (self.dim,):
            return False
        self._rows[key] = row
        return True

    def _write(self, key: str) -> None:
        from safetensors import SafetensorError

        path = self._path(key)
        if path is None:
            return
        try:
            hub.save_safetensors({"embedding": self._rows[key]}, path)
        except (OSError, SafetensorError) as error:  # the second on a full disk
            warnings.warn(f"Embeddings of words cannot be kept in {self._folder}: {error}", stacklevel=2)
            self._folder = None

    def __repr__(self) -> str:
        return f"Vocabulary({self.name!r}, dim={self.dim}, canonical={self.canonical})"


def of_text(
    ref: str | Path,
    dim: int,
    *,
    canonical: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Vocabulary:
    """The vocabulary of a text tower (see :func:`opsin.backbones.text.load_text`), cached in Opsin's cache folder.

    The tower is not loaded here; its repository is only asked for the commit that the reference stands for.
    """
    kind = resolve_dtype(dtype, resolve_device(device))
    name = text_name(ref) + ("" if kind == torch.float32 else f" {kind}")

    def load() -> TextEncoder:
        return load_text(ref, canonical=canonical, device=device, dtype=kind)

    return Vocabulary(load, name, dim, hub.cache_dir(), canonical=canonical)


def reduce_synonyms(scores: Tensor, index: Tensor, classes: int) -> Tensor:
    """The best phrase of each class.

    Args:
        scores: ``(S, ...)`` one row per phrase.
        index: ``(S,)`` the class of each phrase, ascending, as in :attr:`opsin.segmentation.labels.Labels.index`.
        classes: ``C``; each has at least one phrase.

    Returns:
        ``(C, ...)`` the maximum over the phrases of each class; ``scores`` itself where each has one.
    """
    if len(scores) == classes:
        return scores
    counts = torch.bincount(index.cpu(), minlength=classes).tolist()
    return torch.stack([part.amax(0) for part in scores.split(counts)])
