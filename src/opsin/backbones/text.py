"""Text towers: the half of SigLIP, SigLIP 2, CLIP and TIPSv2 that turns words into vectors.

Only the tensors of that half are read, and only its network is built. Tokenisers run from their published
``tokenizer.json``, whatever class a version of ``transformers`` would make of it.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opsin import hub
from opsin.backbones.base import read_json
from opsin.backbones.text_loading import (
    FAMILIES,
    FILES,
    build,
    files_of,
    settings_of,
    text_config,
    tokenizer_of,
)
from opsin.errors import IncompatibleModel, InvalidConfig, InvalidPrompt
from opsin.remote_tensors import commit_of, load_tensors
from opsin.runtime import in_batches, resolve_device, resolve_dtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PREFIXES = ("text_model.", "text_projection.", "text_encoder.")  # the last one is TIPSv2's
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text: str) -> str:
    """Underscores as spaces, without punctuation, in lower case, with single spaces.

    That is how texts reach the tower that RADIO's SigLIP 2 adaptors were trained for: ``"A traffic-light."`` becomes
    ``"a trafficlight"``.
    """
    return " ".join(text.replace("_", " ").translate(_PUNCTUATION).lower().split())


class TextEncoder(nn.Module):
    """A frozen text tower.

    ``name`` is its reference with the revision, ``dim`` the width ``E`` of its vectors, ``model`` the network of
    ``transformers`` inside, ``max_length`` the tokens it reads of a text; longer texts are cut, as in training.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, *, name: str, dim: int, max_length: int, case: str, masked: bool
    ) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.name = name
        self.dim = dim
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._case = case
        self._masked = masked
        self.eval()

    def train(self, mode: bool = True) -> TextEncoder:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors ``(L, E)`` of token ``ids (L, N)``; ``mask (L, N)`` is 0 where padding is not to be seen."""
        output = self.model(input_ids=ids, attention_mask=mask)
        projected = getattr(output, "text_embeds", None)
        vectors = output.pooler_output if projected is None else projected
        return vectors.to(next(self.parameters()).dtype)  # a mean over integers of a mask comes out wider

    @torch.no_grad()
    def encode(self, texts: Iterable[str], *, batch_size: int = 64) -> Tensor:
        """Vectors of texts, not normalised.

        Args:
            texts: any number of them.
            batch_size: texts that go together; halved when memory runs out.

        Returns:
            ``(L, E)`` on the device and in the dtype of the weights.

        Raises:
            InvalidPrompt: something that is no text.  ResourceError: one text does not fit into memory.
        """
        if isinstance(texts, str):
            raise InvalidPrompt("Texts are a list of strings", got=f"str {texts!r}")
        given = list(texts)
        for text in given:
            if not isinstance(text, str):
                raise InvalidPrompt("Texts are a list of strings", got=f"{type(text).__name__} {text!r}")
        parameter = next(self.parameters())

        def run(batch: Sequence[str]) -> Sequence[Tensor]:
            ids, mask = (part.to(parameter.device) for part in self.tokenize(batch))
            return list(self(ids, mask if self._masked else None))

        rows = in_batches(run, given, batch_size)
        return torch.stack(rows) if rows else parameter.new_zeros(0, self.dim)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids ``(L, N)`` and mask ``(L, N)``, 0 at padding, both int64, of prepared texts."""
        encodings = self._tokenizer.encode_batch([self.prepare(text) for text in texts])
        ids = torch.tensor([encoding.ids for encoding in encodings])
        known = self.model.get_input_embeddings().num_embeddings
        if ids.numel() and int(ids.max()) >= known:
            raise IncompatibleModel(
                f"The tokeniser of {self.name} gives numbers below {known}", got=int(ids.max()),
                remedy="It belongs to another model.",
            )
        return ids, torch.tensor([encoding.attention_mask for encoding in encodings])

    def prepare(self, text: str) -> str:
        """The text as this tower was trained to see it."""
        if self._case == "canonical":
            return canonicalize(text)
        if self._case == "bare":
            return " ".join(text.lower().translate(_PUNCTUATION).split())
        return text.lower()

    def extra_repr(self) -> str:
        """Name and sizes."""
        return f"{self.name}, dim={self.dim}, max_length={self.max_length}"


def load_text(
    ref: str | Path,
    *,
    canonical: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> TextEncoder:
    """The text tower of a model of images and text, frozen.

    Args:
        ref: ``"hf:org/repo@revision"``, ``"dir:path"``, a folder, or a catalogue name, which gives the tower that
            belongs to those weights. Of the repository, only config, tokeniser and the text tensors are downloaded.
        canonical: prepare texts by :func:`canonicalize`, as for RADIO's SigLIP 2 adaptors. Otherwise they are put into
            lower case, as in the training of all of these, and for the first SigLIP lose their punctuation.
        device: by default the machine's accelerator, else the CPU.
        dtype: by default float32; ``"auto"`` is bfloat16 where the hardware has it.

    Raises:
        InvalidConfig (a kind of model without a text tower here), MissingFile, ModelUnavailable, GatedModel,
        UnknownModel, InvalidCheckpoint (weights that are damaged or do not fit), IncompatibleModel, MissingExtra.
    """
    ref = _pinned(ref)
    folder = files_of(ref)
    values = read_json(folder / "config.json")
    kind = str(values.get("model_type", "")).removesuffix("_text_model")
    if kind not in FAMILIES:
        raise InvalidConfig(
            f"The model_type of a text tower is one of {', '.join(sorted(FAMILIES))}",
            got=f'"{values.get("model_type", "")}" in {ref}',
            remedy="Code that comes with a model repository is never run.",
        )
    family = FAMILIES[kind]
    alone = "text_config" not in values
    config = text_config(folder)
    settings = settings_of(folder)
    length = config.max_position_embeddings
    tokenizer = tokenizer_of(folder, settings, length, length if family.filled else None)
    tensors = load_tensors(ref, lambda name: alone or name.startswith(_PREFIXES), part="text")
    if family.head in tensors:
        setattr(config, family.width, tensors[family.head].shape[0])  # some configs state another one
    target = resolve_device(device)
    model = build(family, config, tensors, resolve_dtype(dtype, target), str(ref))
    # the class of its tokeniser tells the first SigLIP from the second
    bare = str(settings.get("tokenizer_class")).startswith("SiglipTokenizer")
    case = "canonical" if canonical else "bare" if bare else "lower"
    return TextEncoder(
        model, tokenizer, name=text_name(ref), dim=getattr(config, family.width or "hidden_size"), max_length=length,
        case=case, masked=family.masked,
    ).to(target)  # fmt: skip


def text_name(ref: str | Path) -> str:
    """The reference under which vectors of a tower compare: with the commit on the hub, or the state of a folder."""
    ref = _pinned(ref)
    if isinstance(ref, str) and ref.startswith("hf:"):
        return ref
    folder = hub.resolve(ref)
    paths = [path for name in ("config.json", "token*.json", "*model*") for path in sorted(folder.glob(name))]
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return f"dir:{folder}@{hashlib.sha256(repr(state).encode()).hexdigest()[:12]}"


def _pinned(ref: str | Path) -> str | Path:
    """The repository, at a commit, or the folder that holds the text tower that ``ref`` means."""
    card = hub.card_of(ref)
    if card is not None and card.kind == "regions":
        raise IncompatibleModel("Region models know no words", got=f'"{card.name}"')
    if card is not None and card.kind == "segmentation":
        return _pinned(card.backbone)
    if card is not None and card.text:
        return _pinned(card.text)
    if card is not None and card.repo:
        ref = f"hf:{card.repo}@{card.revision}"
    if isinstance(ref, str) and ref.startswith("hf:"):
        repo, revision = hub.parse_hf(ref)
        return f"hf:{repo}@{commit_of(repo, revision, FILES)}"
    return ref
