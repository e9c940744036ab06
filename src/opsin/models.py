"""``opsin.load``: a name becomes the model that answers it."""

from __future__ import annotations

from pathlib import Path

import torch

from opsin import hub
from opsin.codec import Codec
from opsin.regions import RegionModel, TransferModel
from opsin.segmentation import Segmenter


def load(
    name: str | Path = "opsin-tiny", *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> RegionModel | TransferModel | Segmenter | Codec:
    """The model called ``name``: a ``RegionModel`` or ``TransferModel`` to ``encode``, a ``Segmenter`` to
    ``segment``, a ``Codec`` to ``encode`` and ``decode``.

    ``name``: a catalogue name (``opsin models`` lists them), ``"hf:org/repo@rev"``, ``"dir:path"``, the path of a
    published ``checkpoint.pth``, or ``"REGIONS+BACKBONE"`` to describe the regions of one model by the tokens of
    another. A ``*.pth.tar`` is RADIO's, and becomes a ``Segmenter``. ``device=None`` takes the accelerator where there
    is one; ``dtype``: None is float32, ``"auto"`` bfloat16 where it is fast.
    Raises ``UnknownModel``, ``GatedModel``, ``ModelUnavailable``, ``InvalidCheckpoint``.
    """
    ref = str(name)
    path = Path(ref.removeprefix("dir:")).expanduser()
    if "+" in ref and not path.exists():
        return TransferModel.from_pretrained(ref, device=device, dtype=dtype)
    if path.is_file():
        kind = Segmenter if path.name.endswith(".pth.tar") else RegionModel
        return kind.from_pretrained(ref, device=device, dtype=dtype)
    card = hub.card_of(ref)
    if card is not None and card.kind == "codec":
        return Codec.from_pretrained(ref, device=device, dtype=dtype)
    if card is not None and card.kind == "segmentation":
        return Segmenter.from_pretrained(ref, device=device, dtype=dtype)
    if card is not None and card.regions:
        return TransferModel.from_pretrained(ref, device=device, dtype=dtype)
    return RegionModel.from_pretrained(ref, device=device, dtype=dtype)
