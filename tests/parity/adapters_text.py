"""Words: from plain lists and arrays to calls of the product and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opsin.segmentation.labels import as_labels
from opsin.segmentation.vocabulary import Vocabulary

Array = np.ndarray


@dataclass
class Tower:
    """A text tower that is a function of texts."""

    function: Callable[[Sequence[str]], Array]

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> torch.Tensor:
        return torch.from_numpy(self.function(texts))


def radseg_text(
    tower: Callable[[Sequence[str]], Array], texts: Sequence[str], *, dim: int, templates: str | None
) -> Array:
    vocabulary = Vocabulary(lambda: Tower(tower), "toy", dim, canonical=True)  # type: ignore[arg-type,return-value]
    return vocabulary.embed(as_labels(texts, templates=templates)).numpy()
