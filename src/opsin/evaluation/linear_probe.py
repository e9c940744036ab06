"""Linear probe: how much of a labelling can be read off dense features by batch normalisation and one 1×1 convolution.

REN, section on semantic segmentation (arXiv 2505.18153), decoder of the published code: ``BatchNorm2d(D)`` then a 1×1
convolution to the classes. Weights keep the published key names ``bn.*`` and ``conv.*``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from opsin.errors import InvalidCheckpoint, InvalidConfig, InvalidDataset
from opsin.geometry import Size


class LinearProbe(nn.Module):
    """Class logits ``(B, C, h, w)`` from features ``(B, D, h, w)``; ``dim`` is ``D``, ``classes`` is ``C``.

    New weights are Kaiming-normal (fan in) with zero bias, drawn from ``seed``. Call ``.eval()`` to decode: in training
    mode the statistics of the batch are used and the running ones move by 0.1.
    """

    def __init__(self, dim: int, classes: int, *, seed: int = 42) -> None:
        super().__init__()
        if dim < 1 or classes < 1:
            raise InvalidConfig("dim and classes are at least 1", got=(dim, classes))
        self.bn = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, classes, kernel_size=1)
        draw = torch.randn(self.conv.weight.shape, generator=torch.Generator("cpu").manual_seed(seed))
        with torch.no_grad():
            self.conv.weight.copy_(draw * (1.0 / dim) ** 0.5)
            self.conv.bias.zero_()  # type: ignore[union-attr]

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> LinearProbe:
        """A probe in evaluation mode with the weights of a published ``decoder_state``; sizes and dtype are its own."""
        weight = state.get("conv.weight")
        if weight is None or weight.ndim != 4:
            got = "no conv.weight" if weight is None else tuple(weight.shape)
            raise InvalidCheckpoint("A probe has conv.weight of shape (C, D, 1, 1)", got=got)
        probe = cls(int(weight.shape[1]), int(weight.shape[0])).to(dtype=weight.dtype, device=weight.device)
        try:
            probe.load_state_dict(dict(state))
        except RuntimeError as error:
            raise InvalidCheckpoint("A probe has the keys bn.* and conv.* of one width", got=str(error)) from error
        return probe.eval()

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(B, C, h, w)`` of features ``(B, D, h, w)``."""
        return self.conv(self.bn(features))

    @torch.no_grad()
    def predict(self, features: Tensor, size: Size) -> Tensor:
        """Labels ``(B, H, W)``: logits resized to ``size`` (bilinear, half-pixel centres), then the largest."""
        logits = nn.functional.interpolate(self(features), size=tuple(size), mode="bilinear", align_corners=False)
        return logits.argmax(1)


class ConfusionMatrix:
    """Counts of (true, predicted) label pairs over a whole data set; ``mean_iou`` pools them before it divides.

    ``ignore`` marks true labels that do not count. mIoU over the set by summed histograms, absent classes left out, as
    the published evaluation does.
    """

    def __init__(self, classes: int, *, ignore: int = 255) -> None:
        self.classes = classes
        self.ignore = ignore
        self.counts = torch.zeros((classes, classes), dtype=torch.int64)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add label maps of equal shape."""
        if predicted.shape != target.shape:
            raise InvalidDataset("Predicted and true labels have one shape", got=(predicted.shape, target.shape))
        valid = target != self.ignore
        truth, guess = target[valid].long().cpu(), predicted[valid].long().cpu()
        if truth.numel() and (int(torch.maximum(truth, guess).max()) >= self.classes or int(truth.min()) < 0):
            raise InvalidDataset(f"Labels lie in 0 … {self.classes - 1}, or are {self.ignore}", got=int(truth.max()))
        pairs = truth * self.classes + guess
        self.counts += torch.bincount(pairs, minlength=self.classes**2).reshape(self.classes, self.classes)

    def iou(self) -> Tensor:
        """IoU per class ``(C,)`` in [0, 1]; NaN for a class that neither occurs nor is predicted."""
        hits = self.counts.diagonal().double()
        union = self.counts.sum(0) + self.counts.sum(1) - self.counts.diagonal()
        return hits / union  # 0 / 0 is the NaN that the docstring promises

    def mean_iou(self) -> float:
        """Mean over the classes that have an IoU."""
        return float(self.iou().nanmean())
