"""``opsin train codec`` and ``opsin train finetune``: a codec from MAE weights, from another codec, or from nothing."""

from __future__ import annotations

import argparse
import json
import sys

HELP = "train a codec: one vector per image, and back"
FINETUNE_HELP = "train a codec further, on photographs of one's own"

EXAMPLE = """examples:
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
    """The options of ``opsin train codec`` and ``opsin train finetune``."""
    from opsin.training.codec_config import CodecTrainingConfig
    from opsin.training.config import describe

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE + describe(CodecTrainingConfig)
    parser.add_argument("options", nargs="*", metavar="key=value", help="options, listed below; win over --config")
    parser.add_argument("--config", metavar="FILE", help="YAML file of options")
    parser.add_argument("--check", action="store_true", help="only check the options and print them")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace, recipe: str = "train") -> int:
    """Train; the summary goes to stderr, with ``--json`` to stdout. Exit code 1 when photographs had to be skipped."""
    from opsin.training.codec_config import load_codec_config

    config = load_codec_config(args.options, args.config, recipe)
    if args.check:
        sys.stdout.write(json.dumps(config.to_dict(), indent=2) + "\n")
        return 0
    from opsin.training.codec import train_codec

    summary = train_codec(config)
    if args.json:
        sys.stdout.write(json.dumps(summary) + "\n")
    best = "" if summary["best_val_psnr"] is None else f", best validation PSNR {summary['best_val_psnr']:.2f} dB"
    loss = "" if summary["loss"] is None else f", loss {summary['loss']:.4f}"
    sys.stderr.write(f"{summary['steps']} steps{loss}{best}; the model is in {summary['out']}\n")
    skipped = summary["skipped"]
    for name, reason in list(skipped.items())[:10]:
        sys.stderr.write(f"skipped {name}: {reason}\n")
    if skipped:
        sys.stderr.write(f"{len(skipped)} photographs were skipped\n")
    return 1 if skipped else 0
