"""``opsin eval``: measure a model on annotated data and write a report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsin.segmentation import Segmenter

from opsin.cli.eval_reconstruction import add_reconstruction_arguments, run_reconstruction
from opsin.cli.eval_vq2d import add_vq2d_arguments, run_vq2d

HELP = "measure a model on annotated data"

EXAMPLES = """examples:
  opsin eval retrieval --data data/coco128_panoptic --out retrieval.json
  opsin eval grouping  --data data/bsds500 --out grouping.json
  opsin eval locate    --data data/vql --out locate.json
  opsin eval vql-folder data/vql --ablation --out stages.json
  opsin eval segmentation --dataset folder --root data/coco128_panoptic --split val2017 --out coco128.json

retrieval  COCO panoptic: segments of val2017 look up segments of train2017, right when of the same category;
           region tokens against mean patch features of the same map and colour histograms
grouping   BSDS: prompt pairs put together or apart as people do; thresholds chosen on train, judged on val
locate     visual-query episodes: where was the object last seen; against template matching
vql-folder the same, of a folder with episodes.json; --ablation says what every stage adds
vq2d       the Ego4D VQ2D benchmark, from the videos to the submission; opsin eval vq2d -h
reconstruction  PSNR and SSIM of a codec beside JPEG, WebP and AVIF of as many bytes; opsin eval reconstruction -h
segmentation  open-vocabulary segmentation: mIoU on the standard data sets or a folder; opsin eval segmentation -h
"""

FOLDERS = {"retrieval": "coco128_panoptic", "grouping": "bsds500", "locate": "vql"}
HELPS = {
    "retrieval": "segments look up segments of the same category",
    "grouping": "prompts put together or apart as people do",
    "locate": "visual-query episodes on video",
    "vql-folder": "the same as locate, of a folder with episodes.json",
    "vq2d": "the Ego4D VQ2D benchmark",
    "segmentation": "mIoU of labels by words",
    "reconstruction": "what a codec keeps of images",
}

# Said here too, so that the help needs no torch; a test compares them with the readers and protocols there are.
DATA = ("voc20", "voc21", "context59", "context60", "coco-object", "coco-stuff", "ade20k", "cityscapes", "folder")
WAYS = ("radseg-low", "radseg-mid", "radseg-high", "radseg-plus", "native")
SEGMENTATION_EXAMPLES = """examples:
  opsin eval segmentation --dataset voc20 --root data/VOCdevkit --protocol radseg-mid --names published --out voc.json
  opsin eval segmentation --dataset ade20k --root data/ADEChallengeData2016 --shard 2/4 --out ade.json
  opsin eval segmentation --dataset folder --root data/coco128_panoptic --split val2017 --out coco128.json
  opsin eval segmentation --merge ade.shard-*.jsonl --out ade.json

Beside REPORT.json come REPORT.md and a journal per shard (REPORT.shard-1-of-4.jsonl). The same command again goes on
where it stopped. Every run reports what all journals beside the report hold together; copied into one folder, shards
of several machines become one report with --merge. Exit code 1: images were skipped; they are listed in the report.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per measure."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    measures = parser.add_subparsers(dest="measure", required=True, metavar="MEASURE")
    for name in (*FOLDERS, "vql-folder"):
        parser = measures.add_parser(name, help=HELPS[name])
        what: dict[str, Any] = {"type": Path, "help": "the data folder, or the folder that holds it"}
        if name == "vql-folder":
            parser.add_argument("data", metavar="DIR", **what)
        else:
            parser.add_argument("--data", required=True, **what)
        _region_arguments(parser)
        if name == "retrieval":
            parser.add_argument("--min-area", type=int, default=1, help="pixels of the smallest segment (default 1)")
        if name in ("locate", "vql-folder"):
            _locate_arguments(parser)
    add_vq2d_arguments(measures.add_parser("vq2d", help=HELPS["vq2d"]))
    add_segmentation_arguments(measures.add_parser("segmentation", help=HELPS["segmentation"]))
    add_reconstruction_arguments(measures.add_parser("reconstruction", help=HELPS["reconstruction"]))


def _region_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="opsin-tiny", help='catalogue name, "hf:org/repo@rev" or "dir:path"')
    parser.add_argument("--out", type=Path, help="write the whole report to this JSON file")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument("--size", type=int, help="side of the square model input (default: the model's)")
    parser.add_argument("--limit", type=int, help="use at most so many images or episodes of each split, evenly spaced")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap intervals (default 0)")
    parser.add_argument("--device", help="where to run (default: the machine's accelerator, else the CPU)")
    parser.add_argument("--dtype", help='"auto", "float32" or "bfloat16" (default float32)')


def _locate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", action="store_true", help="give the whole query frame and the box in it")
    parser.add_argument("--rate", type=float, help="frames searched per second (default: that of opsin locate)")
    parser.add_argument("--tokens", choices=("features", "pred", "proj", "both"), help="what places are compared by")
    parser.add_argument("--preset", help='the way of searching, as "ren-vql" (default: the model\'s)')
    parser.add_argument("--tracker", default="auto", help='"auto", "template", or a SAM 2 model (default: auto)')
    parser.add_argument("--ablation", action="store_true", help="measure the preset stage by stage, a row for each")


def run(args: argparse.Namespace) -> int:
    """Measure, write and print. Data on stdout, text for people on stderr."""
    own = {"segmentation": run_segmentation, "reconstruction": run_reconstruction, "vq2d": run_vq2d}
    if args.measure in own:
        return own[args.measure](args)
    from opsin import report
    from opsin.errors import InvalidConfig
    from opsin.regions import RegionModel

    if args.limit is not None and args.limit < 1:
        raise InvalidConfig("--limit is at least 1", got=args.limit)
    measure = "locate" if args.measure == "vql-folder" else args.measure
    root = args.data / FOLDERS[measure] if (args.data / FOLDERS[measure]).is_dir() else args.data
    model = RegionModel.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    measured = {"retrieval": _retrieval, "grouping": _grouping, "locate": _locate}[measure](model, root, args)
    full = {
        "measure": measure,
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
        sys.stderr.write(_table(measure, full) + "\n")
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

    given = {"rate": args.rate, "size": args.size, "tokens": args.tokens}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    records = _thin(datasets.episodes(root), args.limit)
    return localization.evaluate(
        model, records, context=args.context, ablation=args.ablation, preset=args.preset, tracker=args.tracker,
        seed=args.seed, **options,
    )  # fmt: skip


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
        how = f"preset {full['preset']}, tracker {full['tracker']}"
        title = f"{full['episodes']} episodes of {full['videos']} videos, {how}"
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


def add_segmentation_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``opsin eval segmentation``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = SEGMENTATION_EXAMPLES
    parser.add_argument("--dataset", metavar="NAME", help=f"one of {', '.join(DATA)}")
    parser.add_argument("--root", type=Path, help="the folder of the data set")
    parser.add_argument("--split", help='another split than the usual one; of a folder the sub-folder, as "val2017"')
    parser.add_argument(
        "--protocol", default="native", metavar="NAME", help=f"one of {', '.join(WAYS)} (default native)"
    )
    parser.add_argument("--names", choices=("english", "published"), default="english", help="spelling of the classes")
    parser.add_argument("--classes", type=Path, help="folder: the file that names the label values")
    parser.add_argument("--ignore", type=int, help="folder: a label value that does not count")
    parser.add_argument("--model", default="radseg-b", help='catalogue name, "hf:org/repo@rev" or "dir:path"')
    parser.add_argument("--language", help="RADIO's adaptor that leads to words (default: the model's)")
    parser.add_argument("--compat", choices=("published",), help="the published code's behaviour, mistakes included")
    parser.add_argument("--shard", type=shard_of, default=(1, 1), metavar="I/N", help="only part I of N, from 1")
    parser.add_argument("--limit", type=int, help="use at most so many images, evenly spaced")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JOURNAL", help="report these journals, no model runs")
    parser.add_argument("--published", type=float, metavar="PERCENT", help="mIoU of a paper, to be printed beside")
    parser.add_argument("--out", type=Path, metavar="REPORT.json", help="report and journals go here")
    parser.add_argument("--device", help="where to run (default: the machine's accelerator, else the CPU)")
    parser.add_argument("--dtype", help='"auto", "float32" or "bfloat16" (default float32)')
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")


def shard_of(text: str) -> tuple[int, int]:
    """``"2/4"`` → ``(2, 4)``."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f'a shard is a number from 1 and a count, as "2/4"; got "{text}"')
    return int(number), int(count)


def run_segmentation(args: argparse.Namespace) -> int:
    """Measure or merge, write and print. Returns 1 when images were skipped, else 0."""
    from opsin import report
    from opsin.errors import InvalidConfig
    from opsin.evaluation import segmentation

    if args.out is not None and args.out.suffix != ".json":
        raise InvalidConfig("A report is a .json file", got=args.out.name, remedy="The Markdown comes beside it.")
    if args.merge:
        header, entries = segmentation.merge(args.merge)
    elif args.dataset is None or args.root is None:
        raise InvalidConfig("A measurement needs --dataset and --root", got="neither these nor --merge")
    else:
        header, entries = _measure(args)
    full = segmentation.summarize(header, entries, published=args.published)
    if args.out is not None:
        written = segmentation.write(args.out, full)
        sys.stderr.write(f"Report: {written[0]}, {written[1]}\n")
    if args.json:
        sys.stdout.write(json.dumps(report.tidy(full), ensure_ascii=False) + "\n")
    else:
        sys.stderr.write(segmentation.markdown(full))
    return 1 if full["skipped"] else 0


def _measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    from dataclasses import replace

    from opsin.errors import InvalidConfig
    from opsin.evaluation import segmentation
    from opsin.evaluation.protocols import protocol
    from opsin.evaluation.segmentation_data import read

    data = read(args.dataset, args.root, names=args.names, split=args.split, classes=args.classes, ignore=args.ignore)
    if args.limit is not None and args.limit < 1:
        raise InvalidConfig("--limit is at least 1", got=args.limit)
    if args.limit is not None and args.limit < len(data.samples):
        chosen = [i * len(data.samples) // args.limit for i in range(args.limit)]
        data = replace(data, samples=tuple(data.samples[i] for i in chosen))
    way = protocol(args.protocol, args.dataset)
    model = load_segmenter(args)
    card = model.card
    details = {"dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "revision": card.revision}
    details |= {name: getattr(card, name) for name in ("scra", "scga", "crop", "stride", "denoise")}
    header = segmentation.header_of(model.name, data, way, compat=args.compat, details=details)
    if args.out is None:
        return header, segmentation.evaluate(model, data, way, header, shard=args.shard)
    number, count = args.shard
    journal = args.out.with_name(f"{args.out.stem}.shard-{number}-of-{count}.jsonl")
    segmentation.evaluate(model, data, way, header, journal=journal, shard=args.shard)
    return segmentation.merge(sorted(args.out.parent.glob(f"{args.out.stem}.shard-*-of-*.jsonl")))


def load_segmenter(args: argparse.Namespace) -> Segmenter:
    """The model that ``--model``, ``--language``, ``--device`` and ``--dtype`` name."""
    from opsin.segmentation import Segmenter

    return Segmenter.from_pretrained(args.model, language=args.language, device=args.device, dtype=args.dtype)
