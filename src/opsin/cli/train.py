"""``opsin train regions``: train a region encoder on any frozen backbone."""

from __future__ import annotations

import argparse
import json
import sys

HELP = "train a region encoder on a frozen backbone"

EXAMPLE = """example:
  opsin train regions backbone=dinov2-s14 out=models/my-regions steps=20000 \\
      'train=[bsds:data/bsds500,coco-panoptic:data/coco128_panoptic@train2017]' 'val=[bsds:data/bsds500@val]'

  torchrun --nproc-per-node=4 --no-python opsin train regions ...    several processes
  Run the same command again after an interruption: it goes on from the last saved state.

sources (train=[...], val=[...]):
  bsds:DIR[@split]                images/<split>, segments/<split>/<id>_<k>.png, as BSDS500
  masks:DIR                       images/, masks/<stem>.png or <stem>_<k>.png or <stem>/*.png; 0 is no region
  coco:FILE.json@IMAGES           COCO or LVIS instances
  coco-panoptic:FILE.json@IMAGES  COCO panoptic, PNGs in FILE/; or DIR[@split], which finds them
  mosaic:DIR_OR_ZIP[@part]        classified photographs, a folder per class; part: a sub-folder, or a list of files
  sam2:DIR                        photographs without masks: SAM 2 makes them, once
  video:DIR                       frames of videos, masks by SAM 2

options:
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``opsin train``."""
    from opsin.training.config import describe

    what = parser.add_subparsers(dest="what", required=True, metavar="regions")
    regions = what.add_parser(
        "regions",
        help=HELP,
        description="Train a region encoder (REN, arXiv 2505.18153) on a frozen backbone.",
        epilog=EXAMPLE + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    regions.add_argument("options", nargs="*", metavar="key=value", help="options, listed below; win over --config")
    regions.add_argument("--config", metavar="FILE", help="YAML file of options")
    regions.add_argument("--check", action="store_true", help="only check the options and print them")
    regions.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Train; the summary goes to stderr, with ``--json`` to stdout. Exit code 1 when photographs had to be skipped."""
    from opsin.training import load_config, train_regions

    config = load_config(args.options, args.config)
    if args.check:
        sys.stdout.write(json.dumps(config.to_dict(), indent=2) + "\n")
        return 0
    summary = train_regions(config)
    if args.json:
        sys.stdout.write(json.dumps(summary) + "\n")
    best = "" if summary["best_val_loss"] is None else f", best validation loss {summary['best_val_loss']:.4f}"
    loss = "" if summary["loss"] is None else f", loss {summary['loss']:.4f}"
    sys.stderr.write(f"{summary['steps']} steps{loss}{best}; the model is in {summary['out']}\n")
    skipped = summary["skipped"]
    for name, reason in list(skipped.items())[:10]:
        sys.stderr.write(f"skipped {name}: {reason}\n")
    if skipped:
        sys.stderr.write(f"{len(skipped)} photographs were skipped\n")
    return 1 if skipped else 0
