"""``opsin models``: what can be loaded by name, under which licence, and whether it is already here."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from opsin import cards, hub
from opsin.cards import ModelCard

HELP = "list the models that can be named, or tell all about one"
EXAMPLE = "opsin models ren-dinov2-l14"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``[NAME] [--json]``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="tell all that is known of this model")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the catalogue as a table, or one card."""
    chosen = [cards.find(args.name)] if args.name else list(cards.catalogue().values())
    rows = [card.to_dict() | {"embedded": card.embedded, "where": _where(card)} for card in chosen]
    if args.json:
        text = json.dumps(rows[0] if args.name else rows, indent=2, ensure_ascii=False)
    elif args.name:
        text = "\n".join(f"{key:13} {_value(value)}" for key, value in _stated(rows[0]).items())
    else:
        text = _table(chosen)
    sys.stdout.write(text + "\n")
    return 0


def _where(card: ModelCard) -> str:
    return "embedded" if card.embedded else "cached" if hub.is_cached(card) else "to download"


def _stated(row: dict[str, Any]) -> dict[str, Any]:
    """What says something about this kind of model."""
    encoder = ("heads", "layers", "seed", "threshold", "grouping", "fit")
    foreign = {"regions": ("mean", "std"), "segmentation": ("mean", "std", *encoder)}.get(row["kind"], encoder)
    return {k: v for k, v in row.items() if v not in ("", [], {}, 0) and k not in foreign}


def _value(value: object) -> str:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(chosen: list[ModelCard]) -> str:
    head = ("name", "kind", "dim", "parameters", "where", "gated", "licence")
    rows = [head]
    for card in chosen:
        millions = f"{card.parameters / 1e6:.1f} M" if card.parameters else "-"
        gated = "yes" if card.gated else "no"
        rows.append((card.name, card.kind, str(card.dim), millions, _where(card), gated, card.licence))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    return "\n".join(lines)
