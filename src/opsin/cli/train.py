"""``opsin train regions | codec | finetune``: a region encoder on a frozen backbone, or a codec."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

HELP = "train a region encoder on a frozen backbone, or a codec"
HELPS = {
    "regions": "train a region encoder on a frozen backbone",
    "codec": "train a codec: one vector per image, and back",
    "finetune": "train a codec further, on photographs of one's own",
}

REGION_EXAMPLE = """example:
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

CODEC_EXAMPLE = """examples:
  opsin train codec out=models/mine                                  MAE weights, ImageNet-1k, the corrected recipe
  opsin train codec train_cfg=published-train out=models/theirs      as the published code behaves
  opsin train finetune out=models/rooms init=btnk-mae-b train=photos/rooms model.img_size=512
  opsin train finetune out=models/pano train=panorama:photos/pano 'image_size=[256,512]'
  opsin train codec out=models/small train=photos train_cfg=null size=custom patch_size=16 dim=256 layers=3 heads=16 \\
      decoder_dim=192 decoder_layers=3 decoder_heads=4 image_size=64 batch_size=64 epochs=20

  torchrun --nproc-per-node=4 --no-python opsin train codec ...      several processes
  Run the same command again after an interruption: it goes on from the last saved state.

recipes (train_cfg=NAME): train (of opsin train codec), finetune (of opsin train finetune), published-train,
  published-finetune. Published names work too: model.img_size, train_cfg.epochs, data.dataset, run_name ...

photographs (train=[...], val=[...]):
  imagenet-1k[@split]             through Hugging Face datasets; hf:org/name[@split] any other
  tiny-imagenet-200[@val]         the folder data/tiny-imagenet-200
  DIR, ZIP, DIR@part, ZIP@part    all photographs inside; part: a sub-folder, or a text file that lists files
  panorama:DIR                    equirectangular: never cropped, turned at random

options:
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each thing to train."""
    from opsin.training.codec_config import CodecTrainingConfig
    from opsin.training.config import describe

    what = parser.add_subparsers(dest="what", required=True, metavar="regions|codec|finetune")
    for name, text in HELPS.items():
        listed = REGION_EXAMPLE + describe() if name == "regions" else CODEC_EXAMPLE + describe(CodecTrainingConfig)
        one = what.add_parser(
            name, help=text, description=text, epilog=listed, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        one.add_argument("options", nargs="*", metavar="key=value", help="options, listed below; win over --config")
        one.add_argument("--config", metavar="FILE", help="YAML file of options")
        one.add_argument("--check", action="store_true", help="only check the options and print them")
        one.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Train; the summary goes to stderr, with ``--json`` to stdout. Exit code 1 when photographs had to be skipped."""
    return (
        run_regions(args) if args.what == "regions" else run_codec(args, "train" if args.what == "codec" else args.what)
    )


def run_regions(args: argparse.Namespace) -> int:
    """``opsin train regions``."""
    from opsin.training import load_config, train_regions

    config = load_config(args.options, args.config)
    if args.check:
        return show(config)
    summary = train_regions(config)
    best = summary["best_val_loss"]
    return tell(summary, "" if best is None else f", best validation loss {best:.4f}", args.json)


def run_codec(args: argparse.Namespace, recipe: str = "train") -> int:
    """``opsin train codec`` and ``opsin train finetune``, which differ in the recipe they begin from."""
    from opsin.training.codec_config import load_codec_config

    config = load_codec_config(args.options, args.config, recipe)
    if args.check:
        return show(config)
    from opsin.training.codec import train_codec

    summary = train_codec(config)
    best = summary["best_val_psnr"]
    return tell(summary, "" if best is None else f", best validation PSNR {best:.2f} dB", args.json)


def show(config: Any) -> int:
    """The options as they stand."""
    sys.stdout.write(json.dumps(config.to_dict(), indent=2) + "\n")
    return 0


def tell(summary: dict[str, Any], best: str, as_json: bool) -> int:
    """How a run ended."""
    if as_json:
        sys.stdout.write(json.dumps(summary) + "\n")
    loss = "" if summary["loss"] is None else f", loss {summary['loss']:.4f}"
    sys.stderr.write(f"{summary['steps']} steps{loss}{best}; the model is in {summary['out']}\n")
    skipped = summary["skipped"]
    for name, reason in list(skipped.items())[:10]:
        sys.stderr.write(f"skipped {name}: {reason}\n")
    if skipped:
        sys.stderr.write(f"{len(skipped)} photographs were skipped\n")
    return 1 if skipped else 0
