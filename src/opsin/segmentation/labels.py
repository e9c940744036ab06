"""What to look for: classes, the phrases that stand for each, and the sentences that phrases are put into."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from opsin.errors import InvalidConfig, InvalidPrompt, near_misses

if TYPE_CHECKING:
    from torch import Tensor

# The 80 templates that came with CLIP (Radford et al., ICML 2021, arXiv:2103.00020; github.com/openai/CLIP, MIT): the
# mean over sentences is steadier than the bare word.
IMAGENET: tuple[str, ...] = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)
PLAIN: tuple[str, ...] = ("{}",)  # the label as it is
TEMPLATES = {"imagenet": IMAGENET}
_SILENT = frozenset(string.whitespace + string.punctuation)


@dataclass(frozen=True)
class Labels:
    """``C`` classes with ``S ≥ C`` phrases.

    ``classes (C,)`` are names, ``phrases (C,)`` the texts that stand for each class (often just its name), and
    ``templates`` the sentences, with ``{}`` for the phrase; ``("{}",)`` leaves phrases as they are.

    Raises:
        InvalidPrompt: no class, a class without phrase, a blank or duplicate name or phrase (case does not count).
        InvalidConfig: no template, or one without ``{}``.
    """

    classes: tuple[str, ...]
    phrases: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...] = PLAIN

    def __post_init__(self) -> None:
        if not self.classes:
            raise InvalidPrompt("There is at least one label", got="none", remedy='Name one, such as ["cat", "sofa"].')
        if len(self.phrases) != len(self.classes):
            raise InvalidPrompt("Each class has its phrases", got=f"{len(self.classes)} and {len(self.phrases)}")
        _check_texts(self.classes, "label")
        for name, phrases in zip(self.classes, self.phrases, strict=True):
            if not phrases:
                raise InvalidPrompt("A class has at least one phrase", got=f'none for "{name}"')
        _check_texts(self.texts, "phrase")
        if not self.templates:
            raise InvalidConfig("There is at least one template", got="none", remedy='templates=None means ("{}",).')
        for template in self.templates:
            if not isinstance(template, str) or "{}" not in template:
                raise InvalidConfig('A template has "{}" where the label goes', got=repr(template))

    @property
    def texts(self) -> tuple[str, ...]:
        """``(S,)`` the phrases of all classes, in order."""
        return tuple(phrase for phrases in self.phrases for phrase in phrases)

    @cached_property
    def index(self) -> Tensor:
        """``(S,)`` int64: the class of each phrase."""
        import torch

        return torch.tensor([i for i, phrases in enumerate(self.phrases) for _ in phrases])

    def __len__(self) -> int:
        return len(self.classes)


def as_labels(
    labels: str | Sequence[str] | Mapping[str, Sequence[str]] | Labels,
    *,
    templates: str | Sequence[str] | None = "imagenet",
) -> Labels:
    """Labels from what a person writes.

    Args:
        labels: ``"cat, sofa, window"``, a list of names, or a mapping from each name to the phrases that stand for it:
            ``{"person": ["man", "woman"], "sky": []}``. The phrases are exactly those listed, so the name counts only
            when it is among them; none means the name itself. :class:`Labels` come back as they are.
        templates: ``"imagenet"``, the 80 of CLIP, as RADSeg uses them; own sentences with ``{}`` in them; or None,
            for labels that are sentences already.

    Raises:
        InvalidPrompt, InvalidConfig: see :class:`Labels`.
    """
    if isinstance(labels, Labels):
        return labels
    if isinstance(labels, Mapping):
        names = _clean(labels.keys())
        phrases = tuple(_clean(_listed(value)) or (name,) for name, value in zip(names, labels.values(), strict=True))
    else:
        names = _clean(labels.split(",") if isinstance(labels, str) and labels.strip() else _listed(labels, empty=True))
        phrases = tuple((name,) for name in names)
    return Labels(names, phrases, _templates(templates))


def _listed(value: object, *, empty: bool = False) -> Iterable[object]:
    """One text as a list of one; other iterables as they are."""
    if isinstance(value, str):
        return [] if empty else [value]
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise InvalidPrompt("Labels are a text, a list of texts, or a mapping to lists", got=type(value).__name__)
    return value


def _clean(texts: Iterable[object]) -> tuple[str, ...]:
    found = []
    for text in texts:
        if not isinstance(text, str):
            raise InvalidPrompt("A label is a text", got=f"{type(text).__name__} {text!r}")
        found.append(" ".join(text.split()))
    return tuple(found)


def _check_texts(texts: Sequence[str], what: str) -> None:
    seen: dict[str, str] = {}
    for text in texts:
        if not isinstance(text, str) or _SILENT.issuperset(text):
            raise InvalidPrompt(f"A {what} has a letter or a digit", got=repr(text))
        key = unicodedata.normalize("NFC", " ".join(text.split())).casefold()
        if key in seen:
            raise InvalidPrompt(
                f"Each {what} is named once (case does not count)", got=f'"{seen[key]}" and "{text}"',
                remedy="Give the second another name, or leave it out.",
            )
        seen[key] = text


def _templates(templates: str | Sequence[str] | None) -> tuple[str, ...]:
    if templates is None:
        return PLAIN
    if not isinstance(templates, str):
        return tuple(templates)
    if templates not in TEMPLATES:
        remedy = f"{near_misses(templates, TEMPLATES)} Own templates are given as a list.".strip()
        known = ", ".join(TEMPLATES)
        raise InvalidConfig(f"templates is None, a list, or one of {known}", got=templates, remedy=remedy)
    return TEMPLATES[templates]
