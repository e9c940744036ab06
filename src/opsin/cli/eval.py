"""``opsin eval``: measure a model on annotated data and write a report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from opsin.cli.eval_segmentation import add_segmentation_arguments, run_segmentation

HELP = "measure a model on annotated data"

EXAMPLES = """examples:
  opsin eval retrieval --data data/coco128_panoptic --out retrieval.json
  opsin eval grouping  --data data/bsds500 --out grouping.json
  opsin eval locate    --data data/vql --out locate.json
  opsin eval segmentation --dataset folder --root data/coco128_panoptic --split val2017 --out coco128.json

retrieval  COCO panoptic: segments of val2017 look up segments of train2017, right when of the same category;
           region tokens against mean patch features of the same map and colour histograms
grouping   BSDS: prompt pairs put together or apart as people do; thresholds chosen on train, judged on val
locate     visual-query episodes: where was the object last seen; against template matching
segmentation  open-vocabulary segmentation: mIoU on the standard data sets or a folder; opsin eval segmentation -h
"""

FOLDERS = {"retrieval": "coco128_panoptic", "grouping": "bsds500", "locate": "vql"}
HELPS = {
    "retrieval": "segments look up segments of the same category",
    "grouping": "prompts put together or apart as people do",
    "locate": "visual-query episodes on video",
    "segmentation": "mIoU of labels by words",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per measure."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    measures = parser.add_subparsers(dest="measure", required=True, metavar="MEASURE")
    for name in FOLDERS:
        _region_arguments(measures.add_parser(name, help=HELPS[name]))
    add_segmentation_arguments(measures.add_parser("segmentation", help=HELPS["segmentation"]))


def _region_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="opsin-tiny", help='catalogue name, "hf:org/repo@rev" or "dir:path"')
    parser.add_argument("--data", type=Path, required=True, help="the data folder, or the folder that holds it")
    parser.add_argument("--out", type=Path, help="write the whole report to this JSON file")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument("--size", type=int, help="side of the square model input (default: the model's)")
    parser.add_argument("--limit", type=int, help="use at most so many images or episodes of each split, evenly spaced")
    parser.add_argument("--min-area", type=int, default=1, help="retrieval: pixels of the smallest segment (default 1)")
    parser.add_argument("--context", action="store_true", help="locate: give the whole query frame and the box in it")
    parser.add_argument("--rate", type=float, help="locate: frames searched per second (default: that of opsin locate)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap intervals (default 0)")
    parser.add_argument("--device", help="where to run (default: the machine's accelerator, else the CPU)")
    parser.add_argument("--dtype", help='"auto", "float32" or "bfloat16" (default float32)')


def run(args: argparse.Namespace) -> int:
    """Measure, write and print. Data on stdout, text for people on stderr."""
    if args.measure == "segmentation":
        return run_segmentation(args)
    from opsin.errors import InvalidConfig
    from opsin.evaluation import report
    from opsin.regions import RegionModel

    if args.limit is not None and args.limit < 1:
        raise InvalidConfig("--limit is at least 1", got=args.limit)
    root = args.data / FOLDERS[args.measure] if (args.data / FOLDERS[args.measure]).is_dir() else args.data
    model = RegionModel.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    measured = {"retrieval": _retrieval, "grouping": _grouping, "locate": _locate}[args.measure](model, root, args)
    full = {
        "measure": args.measure,
        "model": model.name,
        "data": root.name,
        "environment": report.environment(args.seed),
        **measured,
    }
    if args.out is not None:
        report.write(args.out, full)
        sys.stderr.write(f"Report: {args.out}\n")
    if args.json:
        sys.stdout.write(json.dumps(report.tidy(full), ensure_ascii=False) + "\n")
    else:
        sys.stderr.write(_table(args.measure, full) + "\n")
    return 0


def _thin(records: Any, limit: int | None) -> Any:
    if limit is None or limit >= len(records):
        return records
    return [records[i * len(records) // limit] for i in range(limit)]


def _retrieval(model: Any, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    from opsin.evaluation import datasets, retrieval

    queries, gallery = (_thin(datasets.coco_panoptic(root, s), args.limit) for s in ("val2017", "train2017"))
    names = datasets.category_names(root, "val2017")
    return retrieval.evaluate(
        model, queries, gallery, min_area=args.min_area, size=args.size, seed=args.seed, names=names
    )


def _grouping(model: Any, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    from opsin.evaluation import datasets, grouping

    judged, chosen_on = (_thin(datasets.human_segmentations(root, s), args.limit) for s in ("val", "train"))
    return grouping.evaluate(model, judged, chosen_on, size=args.size, seed=args.seed)


def _locate(model: Any, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    from opsin.evaluation import datasets, localization

    options: dict[str, Any] = {n: v for n, v in (("rate", args.rate), ("size", args.size)) if v is not None}
    records = _thin(datasets.episodes(root), args.limit)
    return localization.evaluate(model, records, context=args.context, seed=args.seed, **options)


def _table(measure: str, full: dict[str, Any]) -> str:
    """The main numbers, one row per method, for people."""
    if measure == "retrieval":
        rows = {n: {k: v[k]["all"] for k in ("top1", "top5")} for n, v in full["descriptors"].items()}
        title = f"{full['queries']} queries, {full['gallery']} gallery segments"
    elif measure == "grouping":
        rows = {n: {k: v[k] for k in ("balanced", "rand", "together", "apart")} for n, v in full["groupings"].items()}
        title = f"{full['images']} images, {full['prompts']:.0f} prompts each"
    else:
        rows = {
            n: {k: v[k] for k in ("success", "stAP@0.25", "tAP@0.25", "recovery")} for n, v in full["methods"].items()
        }
        title = f"{full['episodes']} episodes of {full['videos']} videos"
    width = max(len(n) for n in rows)
    columns = list(next(iter(rows.values())))
    lines = [
        f"{full['model']}: {title} (95 % intervals in brackets)",
        " " * width + "".join(f"{c:>24}" for c in columns),
    ]
    lines += [f"{n:<{width}}" + "".join(f"{_cell(r[c]):>24}" for c in columns) for n, r in rows.items()]
    return "\n".join(lines)


def _cell(value: dict[str, Any]) -> str:
    interval = value.get("interval")
    return f"{value['mean']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
