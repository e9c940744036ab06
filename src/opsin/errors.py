"""Everything Opsin raises on purpose. Each message states the rule, what came, and the remedy.

OpsinError
├── InputError (ValueError)        what the caller handed over cannot be used
│   ├── InvalidImage               unreadable, truncated, too large, wrong type
│   ├── InvalidVideo               unreadable, no video stream, no decodable frame
│   ├── InvalidPrompt              point, box or mask that is empty, outside, or of the wrong shape
│   ├── UnsupportedSize            image or grid size that the model cannot take
│   ├── InvalidConfig              unknown or contradictory option
│   └── InvalidDataset             annotation or mask file that does not follow its format
├── MissingFile (FileNotFoundError)
├── ModelError (RuntimeError)      a model cannot be had or does not fit
│   ├── UnknownModel               no such name in the catalogue
│   ├── GatedModel                 the licence has to be accepted on a web page first
│   ├── ModelUnavailable           not in the cache, and the network is off or failed
│   ├── InvalidCheckpoint          truncated, not a weight file, wrong keys or shapes
│   └── IncompatibleModel          tokens, vectors or files made by another model
├── MissingExtra (ImportError)     an optional dependency is not installed
└── ResourceError (RuntimeError)   memory, disk or device exhausted or absent
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OpsinError(Exception):
    """Base of all typed errors: ``rule`` (what must hold), ``got`` (what came), ``remedy`` (what to do)."""

    def __init__(self, rule: str, *, got: object = None, remedy: str = "") -> None:
        self.rule = rule
        self.got = got
        self.remedy = remedy
        parts = [rule.rstrip(".")]
        if got is not None:
            parts.append(f"got {got}")
        message = "; ".join(parts) + "."
        super().__init__(f"{message} {remedy}".strip())


class InputError(OpsinError, ValueError):
    """What the caller handed over cannot be used."""


class InvalidImage(InputError):
    """An image that cannot be read or is outside the stated limits."""


class InvalidVideo(InputError):
    """A video that cannot be opened or has no decodable frame."""


class InvalidPrompt(InputError):
    """A point, box or mask that is empty, outside the image, or of the wrong shape."""


class UnsupportedSize(InputError):
    """An image or grid size that the model cannot take."""


class InvalidConfig(InputError):
    """An unknown or contradictory option."""


class InvalidDataset(InputError):
    """An annotation or mask file that does not follow its format."""


class MissingFile(OpsinError, FileNotFoundError):
    """A path that does not exist."""


class ModelError(OpsinError, RuntimeError):
    """A model that cannot be had or does not fit."""


class UnknownModel(ModelError):
    """A name that the catalogue does not hold."""


class GatedModel(ModelError):
    """Weights whose licence has to be accepted on a web page first."""


class ModelUnavailable(ModelError):
    """Weights that are not cached while the network is off or failed."""


class InvalidCheckpoint(ModelError):
    """A weight file that is truncated, of another kind, or has other keys or shapes."""


class IncompatibleModel(ModelError):
    """Tokens, vectors or files that were made by another model."""


class MissingExtra(OpsinError, ImportError):
    """An optional dependency that is not installed."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtra:
        """The error for ``package``, brought by the extra ``extra``, needed to ``purpose``."""
        return cls(f'"{package}" is needed to {purpose}', remedy=f'Install it: pip install "opsin[{extra}]".')


class ResourceError(OpsinError, RuntimeError):
    """Memory, disk or device exhausted or absent."""


def check_compat(compat: str | None) -> bool:
    """Whether published behaviour is asked for; ``InvalidConfig`` for anything but None and ``"published"``."""
    if compat not in (None, "published"):
        raise InvalidConfig('compat is None or "published"', got=repr(compat))
    return compat == "published"


def near_misses(name: str, known: Iterable[str]) -> str:
    """``'Did you mean "a" or "b"?'`` for the closest known names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return "Did you mean " + " or ".join(f'"{c}"' for c in close) + "?" if close else ""
