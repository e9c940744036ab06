"""``opsin eval segmentation``: mIoU of a model that segments by words, on the standard data sets or a folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsin.segmentation import Segmenter

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
    from opsin.errors import InvalidConfig
    from opsin.evaluation import report, segmentation

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
