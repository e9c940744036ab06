"""Model cards and the catalogue: what is known of a model before any weight is read.

The facts live in ``catalogue.toml``; a trained or embedded model carries its own ``card.json``. No torch in here.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from opsin.errors import InvalidCheckpoint, MissingFile, UnknownModel, near_misses

KINDS = ("backbone", "regions", "segmentation", "codec", "tracker")
WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class ModelCard:
    """One model: where its weights are, how its input is prepared, what its licence allows.

    ``kind`` is one of ``KINDS``; ``family`` the adapter that runs it. ``source`` is
    ``"hf:org/repo"`` (with ``revision``), ``"embedded"``, or empty for a folder and for a model that only combines
    others; ``files`` names what is fetched, empty meaning config, preprocessing and weights. ``dim`` is the width of a
    token, ``patch_size`` the pixels of one grid step, ``image_size`` the side of the default square canvas; ``mean``,
    ``std`` act on RGB in [0, 1]. ``bfloat16`` tells whether ``dtype="auto"`` may choose it. ``gated`` weights need a
    licence accepted at ``gate_url``; ``substitute`` is an open model for the same use.

    Region models only: ``backbone`` (a catalogue name, an ``hf:`` or ``dir:`` reference, or ``"backbone"`` for the
    sub-folder of that name), ``heads``, ``layers`` and ``seed`` of the encoder, ``grid_size`` prompts per side,
    ``threshold`` cosine at which prompts merge and ``grouping`` how, ``fit`` of the image to the square canvas,
    ``regions`` and ``tokens`` when regions of one model are described by the tokens of another, ``preset`` the way of
    searching videos that suits it.
    Backbones that know words: ``text``, a reference of the text tower that belongs to the weights (empty: the same
    repository has it), and ``adaptors``, the names of the heads that lead from RADIO's features to those of a teacher.
    Segmentation models only: ``backbone``, ``language`` (the adaptor that leads to words; empty: the backbone's own
    space), ``scra`` and ``scga`` scaling of the two correlations (0: off), ``crop`` and ``stride`` of the windows in
    pixels (crop 0: one pass), ``denoise`` the probability that a class has to reach somewhere, ``refiner`` the SAM
    whose decoder sharpens masks.
    Codecs only: ``activation`` of the code ("" for none), which nothing in the weights tells; ``sizes``: encoder depth
    and heads, decoder width, depth and heads, and height and width of the canvas where it is not square (then
    ``image_size`` is the shorter side); ``fit`` may be ``"crop"`` too.
    Trackers have nothing of their own: ``opsin.tracking.sam2`` reads the rest from the files.
    ``measured`` holds quality numbers with their protocol as the key.
    """

    name: str
    kind: str
    family: str
    source: str = ""
    revision: str = "main"
    files: tuple[str, ...] = ()
    sha256: str = ""
    dim: int = 0
    patch_size: int = 0
    image_size: int = 0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    parameters: int = 0
    bfloat16: bool = True
    licence: str = "not stated"
    licence_url: str = ""
    gated: bool = False
    gate_url: str = ""
    substitute: str = ""
    citation: str = ""
    trained_on: str = ""
    backbone: str = ""
    heads: int = 8
    layers: int = 4
    seed: int = 42
    grid_size: int = 0
    threshold: float = 0.9
    grouping: Literal["components", "average"] = "components"
    fit: Literal["stretch", "pad", "crop"] = "stretch"
    regions: str = ""
    tokens: str = ""
    preset: str = ""
    text: str = ""
    adaptors: tuple[str, ...] = ()
    language: str = ""
    scra: float = 0.0
    scga: float = 0.0
    crop: int = 0
    stride: int = 0
    denoise: float = 0.0
    refiner: str = ""
    activation: str = ""
    sizes: tuple[int, ...] = ()
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def embedded(self) -> bool:
        """Whether the weights ship inside the package."""
        return self.source == "embedded"

    @property
    def repo(self) -> str:
        """``"org/repo"`` of weights on the Hugging Face hub, else an empty string."""
        return self.source.removeprefix("hf:") if self.source.startswith("hf:") else ""

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelCard:
        """From what :meth:`to_dict` gives. Unknown or missing fields and wrong kinds raise ``InvalidCheckpoint``."""
        known = {f.name: f for f in fields(cls)}
        for key in values:
            if key not in known:
                raise InvalidCheckpoint("A model card has only known fields", got=key, remedy=near_misses(key, known))
        for key in ("name", "kind", "family"):
            if not isinstance(values.get(key), str) or not values[key]:
                raise InvalidCheckpoint(f'A model card states its "{key}"', got=values.get(key))
        if values["kind"] not in KINDS:
            raise InvalidCheckpoint(f'The "kind" of a model card is one of {", ".join(KINDS)}', got=values["kind"])
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        from opsin.hub import atomic_path

        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ModelCard:
        """Read JSON; ``MissingFile`` or ``InvalidCheckpoint`` when that cannot be."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MissingFile("A model card must exist", got=str(path)) from error
        except (ValueError, OSError) as error:
            raise InvalidCheckpoint("A model card is a JSON file", got=f"{path} ({error})") from error
        if not isinstance(values, dict):
            raise InvalidCheckpoint("A model card is a JSON object", got=f"{type(values).__name__} in {path}")
        return cls.from_dict(values)


@cache
def _read_catalogue() -> dict[str, ModelCard]:
    groups = tomllib.loads((Path(__file__).parent / "catalogue.toml").read_text(encoding="utf-8"))
    cards = {}
    for group in groups.values():
        shared = {key: value for key, value in group.items() if key != "models"}
        for name, facts in group["models"].items():
            cards[name] = ModelCard.from_dict({"name": name, **shared, **facts})
    for path in sorted(WEIGHTS.glob("*/card.json")):
        card = ModelCard.load(path)
        cards[card.name] = ModelCard.from_dict({**card.to_dict(), "source": "embedded"})
    return cards


def catalogue() -> dict[str, ModelCard]:
    """All known models by name: those of ``catalogue.toml`` and those embedded in the package."""
    return dict(_read_catalogue())


def find(name: str) -> ModelCard:
    """The card of a catalogue name; ``UnknownModel`` with the near misses otherwise."""
    cards = _read_catalogue()
    if name not in cards:
        remedy = f'{near_misses(name, cards)} "opsin models" lists all; "hf:org/repo" and "dir:path" name any other.'
        raise UnknownModel("A model name must be in the catalogue", got=f'"{name}"', remedy=remedy.strip())
    return cards[name]
