"""``opsin.load``: a name becomes the model that answers it."""

from __future__ import annotations

from pathlib import Path

import torch

from opsin import hub
from opsin.regions.model import RegionModel
from opsin.regions.transfer import TransferModel


def load(
    name: str | Path = "opsin-tiny", *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> RegionModel | TransferModel:
    """The model called ``name``, ready to ``encode``.

    ``name``: a catalogue name (``opsin models`` lists them), ``"hf:org/repo@rev"``, ``"dir:path"``, the path of a
    published ``checkpoint.pth``, or ``"REGIONS+BACKBONE"`` to describe the regions of one model by the tokens of
    another. ``device=None`` takes the accelerator where there is one; ``dtype``: None is float32, ``"auto"``
    bfloat16 where it is fast. Raises ``UnknownModel``, ``GatedModel``, ``ModelUnavailable``, ``InvalidCheckpoint``.
    """
    ref = str(name)
    if "+" in ref and not Path(ref).exists():
        return TransferModel.from_pretrained(ref, device=device, dtype=dtype)
    is_file = Path(ref.removeprefix("dir:")).expanduser().is_file()
    card = None if is_file else hub.card_of(ref)
    if card is not None and card.regions:
        return TransferModel.from_pretrained(ref, device=device, dtype=dtype)
    return RegionModel.from_pretrained(ref, device=device, dtype=dtype)
