"""Backbones whose patches lead to words: RADIO with a language adaptor, CLIP, SigLIP 2, TIPSv2."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opsin import backbones, hub
from opsin.backbones import Backbone, half, openvino
from opsin.backbones.adaptors import Adaptor
from opsin.backbones.alignment import OWN_SPACE, OwnValues, last_attention, projection_and_scale, take_head
from opsin.cards import ModelCard, catalogue
from opsin.errors import IncompatibleModel, InvalidConfig
from opsin.runtime import to_model
from opsin.segmentation.attention import SelfCorrelatingAttention
from opsin.segmentation.vocabulary import Vocabulary, of_text

LIMIT = 1e6  # from this scaling on, the softmax of SCRA leaves no weight to any other token
LOGIT_SCALE = 100.0  # RADSeg's, and that of CLIP after training


class AlignedBackbone(nn.Module):
    """An image encoder, and the way from each of its patches to the words for it.

    It takes the backbone over: a final LayerNorm and a pooling head move from the network to :meth:`align`, so that
    :meth:`features` are the raw tokens of the last block.

    Args:
        backbone: of family radio, clip, siglip or tipsv2.
        language: RADIO's adaptor that leads to words; by default the first one that has a text tower.
        text: reference of the text tower; by default the one that the adaptor, then the backbone's card, names.
        projection: CLIP's ``visual_projection.weight (E, D)``, which its backbone does not hold.
        logit_scale: what cosines are multiplied by before the softmax over labels.

    Raises:
        IncompatibleModel: a backbone without words, an adaptor that is not there, CLIP without its projection.
    """

    def __init__(
        self,
        backbone: Backbone,
        language: str = "",
        *,
        text: str = "",
        projection: Tensor | None = None,
        logit_scale: float = LOGIT_SCALE,
    ) -> None:
        super().__init__()
        family = backbone.card.family
        if family not in ("radio", *OWN_SPACE):
            raise IncompatibleModel(
                "Labels need a backbone that was trained with words", got=backbone.name,
                remedy=f"These were: {_names()}.",
            )
        if language and family != "radio":
            raise IncompatibleModel(
                f"{backbone.name} is in the space of words by itself and has no adaptors", got=f'language="{language}"',
                remedy="Leave language empty.",
            )
        self.backbone = backbone
        self.language = language or (self._first_language() if family == "radio" else "")
        self.head = self._adaptor(self.language) if family == "radio" else take_head(backbone, projection)
        self.head.eval().requires_grad_(False)
        self.text = text or getattr(self.head, "text", "") or backbone.card.text
        self.logit_scale = logit_scale
        parent, attention = last_attention(backbone)
        self._last = (parent, attention, getattr(parent, attention))  # in a tuple: not registered a second time
        self._scra: float | None = None
        self._compiled: tuple[Any, tuple[int, torch.dtype]] | None = None  # features by OpenVINO; side and dtype

    @property
    def name(self) -> str:
        """The name under which its features compare."""
        return self.backbone.name

    @property
    def patch_size(self) -> int:
        """Pixels of one step of the feature grid."""
        return self.backbone.patch_size

    @property
    def dim(self) -> int:
        """Width ``D`` of a feature."""
        return self.backbone.dim

    @cached_property
    def text_dim(self) -> int:
        """Width ``E`` of the space of words."""
        return self.align(next(self.head.parameters()).new_zeros(1, self.dim)).shape[-1]

    @property
    def scra(self) -> float | None:
        """Scaling of the self-correlating attention in the last block (SCRA, RADSeg); None: its attention as it is.

        The larger, the less a token takes from those unlike it. From 10⁶ on the limit is computed: every token keeps
        its own value, which is what MaskCLIP does to CLIP and what TIPSv2's published segmentation does.

        Raises:
            InvalidConfig: not a positive number, or between the largest that can be computed and 10⁶.
        """
        return self._scra

    @scra.setter
    def scra(self, scaling: float | None) -> None:
        scaling = scaling or None  # 0 in a card means off
        if scaling == self._scra:
            return
        self._compiled = None
        parent, name, attention = self._last
        if scaling is not None and scaling >= LIMIT:
            attention = OwnValues(attention)
        elif scaling is not None:
            attention = SelfCorrelatingAttention(attention, scaling)
        setattr(parent, name, attention)
        self._scra = scaling

    def train(self, mode: bool = True) -> AlignedBackbone:
        """Stays in evaluation mode: it is frozen."""
        return super().train(False)

    def features(self, pixels: Tensor) -> Tensor:
        """Tokens of the last block, before any final norm.

        Args:
            pixels: ``(B, 3, H, W)`` RGB in [0, 1]; H and W multiples of :attr:`patch_size`.

        Returns:
            ``(B, D, H / patch_size, W / patch_size)`` in the dtype of the weights.

        Raises:
            UnsupportedSize: H or W is no multiple of the patch, or the shape is another.
        """
        if self._compiled is not None and pixels.device.type == "cpu" and pixels.dtype == torch.float32:
            return self._compiled[0](pixels)
        return self.backbone(pixels).features

    def use_openvino(self, side: int, dtype: torch.dtype = torch.float32) -> None:
        """From now on :meth:`features` of square images of ``side`` pixels come from OpenVINO; others from torch.

        Compiling takes some seconds and the memory of another copy of the weights; it happens when side or dtype are
        others than the last time, or SCRA was changed. Weights that are changed later are not seen.

        Raises:
            InvalidConfig (no multiple of the patch), and as :func:`opsin.backbones.openvino.compile_features`.
        """
        if side < 1 or side % self.patch_size:
            raise InvalidConfig(
                f"OpenVINO needs windows of one size, a multiple of {self.patch_size} pixels", got=f"crop={side}",
                remedy='Say crop=336, stride=224, or take runtime="torch".',
            )
        if self._compiled is None or self._compiled[1] != (side, dtype):
            self._compiled = None  # the memory of the last one is free before another is made
            found = openvino.compile_features(self.backbone, side, dtype=dtype)
            self._compiled = found, (side, dtype)

    def align(self, tokens: Tensor) -> Tensor:
        """``tokens (..., D)`` of :meth:`features` in the space of words ``(..., E)``, not normalised.

        RADIO: the summary head of the language adaptor, applied to patches (RADSeg). CLIP, SigLIP: what they do to an
        image, with this token for all there is of it. TIPSv2, trained to align patches: its final LayerNorm.
        """
        run = self.head.head_mlp if isinstance(self.head, Adaptor) else self.head
        return run(to_model(tokens, self.head)).to(tokens.dtype)  # the head may be in float32 behind bfloat16

    @property
    def sam(self) -> Adaptor:
        """The adaptor that leads to SAM's features.

        Raises:
            IncompatibleModel: the weights have no adaptor "sam".
        """
        try:
            return self._adaptor("sam")
        except IncompatibleModel as error:
            raise IncompatibleModel(
                'Refining masks needs weights with an adaptor "sam"', got=f"{self.name} with {error.got}",
                remedy=f"These have one: {_names('sam')}. Or segment without refining.",
            ) from error

    def sam_features(self, features: Tensor) -> Tensor:
        """``features (B, D, h, w)`` as SAM's image encoder gives them before its neck: ``(B, 1280, h, w)``.

        Raises as :attr:`sam` does.
        """
        adaptor = self.sam
        h, w = features.shape[-2:]
        tokens = adaptor.feat_mlp(features.flatten(2).transpose(1, 2), (h, w))
        return tokens.transpose(1, 2).unflatten(2, (h * adaptor.upsample, w * adaptor.upsample))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Embeddings of labels in the space of words, cached on disk; the text tower is loaded when one is not there.

        Raises:
            IncompatibleModel: no text tower is named for these weights.
        """
        if not self.text:
            raise IncompatibleModel(
                "Labels are embedded by the text tower that belongs to the weights", got=f"none named for {self.name}",
                remedy='Name it: AlignedBackbone(backbone, text="hf:org/repo"), or "text" in card.json.',
            )
        device = next(self.head.parameters()).device
        return of_text(self.text, self.text_dim, canonical=self.language.startswith("siglip2"), device=device)

    def extra_repr(self) -> str:
        """Name and options."""
        return f"{self.name}, language={self.language or None}, scra={self.scra}, logit_scale={self.logit_scale:g}"

    def _adaptor(self, name: str) -> Adaptor:
        if self.backbone.card.family != "radio":
            raise IncompatibleModel("Only RADIO has adaptors", got="no adaptors")
        backbone: Any = self.backbone
        return backbone.adaptor(name)

    def _first_language(self) -> str:
        backbone: Any = self.backbone
        names = list(dict.fromkeys([*backbone.card.adaptors, *backbone.adaptors]))
        for name in names:
            if self._adaptor(name).text:
                return name
        raise IncompatibleModel(
            "Labels need an adaptor that has a text tower",
            got=f"{backbone.name} with {', '.join(names) or 'no adaptors'}", remedy=f"These have one: {_names()}.",
        )


def from_pretrained(
    ref: ModelCard | str | Path,
    *,
    language: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> AlignedBackbone:
    """A backbone with words, with the SCRA of its card. Of an image-text checkpoint only the image half is read.

    Args:
        ref: the card of a segmentation model, or what :func:`opsin.backbones.load` takes; with a backbone, SCRA is off.
        language: RADIO's adaptor that leads to words; by default the card's, else the first that has a text tower.
        device, dtype: as for :func:`opsin.backbones.load`.

    Raises:
        IncompatibleModel: a backbone without words, and all that :func:`opsin.backbones.load` raises.
    """
    file = str(ref).endswith(".pth.tar")
    card = ref if isinstance(ref, ModelCard) else None if file else hub.card_of(ref)
    source, scaling = (ref.name if isinstance(ref, ModelCard) else ref), 0.0
    if card is not None and card.kind == "regions":
        raise IncompatibleModel("Region models know no words", got=f'"{card.name}"', remedy=f"These do: {_names()}.")
    if card is not None and card.kind == "segmentation":
        source, scaling = card.backbone, card.scra
        language = card.language if language is None else language
    backbone = backbones.load(source, device=device, dtype=dtype)
    projection, scale, text = None, None, ""
    if backbone.card.family in OWN_SPACE:
        projection, scale = projection_and_scale(hub.resolve(source))
        text = str(source)  # both halves are in the same repository
    aligned = AlignedBackbone(
        backbone, language or "", text=text, projection=projection, logit_scale=scale or LOGIT_SCALE
    )
    if next(backbone.parameters()).dtype == torch.bfloat16 and next(backbone.parameters()).device.type == "cpu":
        half.tune(backbone)
        aligned.head.float()  # rounding near the words changes labels most, and the head is small
    aligned.scra = scaling
    return aligned


def _names(adaptor: str = "") -> str:
    """The segmentation models of the catalogue whose backbone has the adaptor."""
    known = catalogue()
    cards = [card for card in known.values() if card.kind == "segmentation" and card.backbone in known]
    return ", ".join(card.name for card in cards if not adaptor or adaptor in known[card.backbone].adaptors)
