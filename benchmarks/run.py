"""Everything that ``make bench`` measures: writes ``benchmarks/results.json`` and from it ``docs/benchmarks.md``.

python benchmarks/run.py                    all of it, about half an hour on two cores
python benchmarks/run.py --only head path   these sections; the others keep their earlier numbers
python benchmarks/run.py --quality DIR      ``opsin eval`` on the annotated data in DIR, into benchmarks/quality/
python benchmarks/run.py --tables           only write the document again
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import codec
import head
import localization
import path
import segmentation
import tables
import torch
from common import SEED, say

from opsin import report
from opsin.cli.main import main as opsin_command

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
QUALITY = ("retrieval", "grouping", "locate")
SECTIONS: dict[str, Callable[[str, bool], dict[str, Any]]] = {
    "head": lambda model, quick: head.run("head", quick),
    "grouping": lambda model, quick: head.run("grouping", quick),
    "prompts": lambda model, quick: head.run("prompts", quick),
    "path": path.run,
    "localization": localization.run,
    "segmentation": lambda model, quick: segmentation.run(quick),
    "codec": lambda model, quick: codec.run(quick),
}


def main() -> int:
    """Measure, merge into the results, write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), help="sections to measure (default: all)")
    parser.add_argument("--model", default="opsin-tiny", help="model of the sections path and localization")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file (default: benchmarks/results.json)")
    parser.add_argument("--quick", action="store_true", help="one repeat and a 3-minute video: to see that it runs")
    parser.add_argument(
        "--quality", type=Path, metavar="DIR", help="measure quality on the data in DIR instead of speed"
    )
    parser.add_argument("--tables", action="store_true", help="measure nothing, write docs/benchmarks.md again")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    if args.quality:
        for measure in QUALITY:
            words = [
                "--model",
                args.model,
                "--data",
                str(args.quality),
                "--out",
                str(HERE / "quality" / ("stages-template.json" if measure == "locate" else f"{measure}.json")),
                *(("--ablation", "--tracker", "template") if measure == "locate" else ()),
            ]
            if opsin_command(["eval", measure, *words]):
                return 1
    for name in () if args.tables or args.quality else args.only or SECTIONS:
        started = time.perf_counter()
        torch.manual_seed(SEED)
        measured = SECTIONS[name](args.model, args.quick)
        took = time.perf_counter() - started
        results[name] = {
            "environment": report.environment(SEED),
            "quick": args.quick,
            "took_seconds": took,
            "results": measured,
        }
        report.write(args.out, results)  # after every section: an interrupted run loses only the one it was in
        say(f"{name}: {took:.0f} s")
    if args.out == RESULTS:
        say(f"wrote {tables.write(results, HERE / 'quality', HERE.parent / 'docs' / 'benchmarks.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
