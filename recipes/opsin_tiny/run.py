"""The whole recipe of opsin-tiny in one command: backbone, region encoder, and the folder that ships in the package.

    python recipes/opsin_tiny/run.py --data DATA --out runs/opsin_tiny

Every stage goes on where it was stopped. About two hours on two CPU cores, minutes on a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from opsin.cards import ModelCard
from opsin.hub import load_safetensors, save_safetensors
from opsin.regions import RegionModel

HERE = Path(__file__).parent
SOURCES = (
    "bsds:{data}/bsds500",
    "coco-panoptic:{data}/coco128_panoptic",
    "mosaic:{data}/tiny_imagenet_17k.zip@train",
    "mosaic:{data}/caltech101_112.zip@train.txt",
)
# Grouping and threshold have the best Rand index on BSDS train (opsin eval grouping).
INFERENCE = {"image_size": 256, "grid_size": 32, "threshold": 0.8, "grouping": "average"}
CARD = {
    "licence": "weights: non-commercial research, as two of the training sets ask",
    "licence_url": "docs/licences.md",
    "citation": "REN, arXiv:2505.18153 (the region encoder); trained from nothing by recipes/opsin_tiny",
    "trained_on": (
        "Tiny ImageNet 16,000 photographs (ImageNet terms, non-commercial), Caltech-101 train (CC BY 4.0), 100 COCO "
        "train2017 photographs with panoptic labels (annotations CC BY 4.0), 200 BSDS500 train photographs "
        "(non-commercial)"
    ),
}


def package(trained: Path, folder: Path) -> RegionModel:
    """Write the trained model as half-precision safetensors with its card, and read it back."""
    RegionModel.from_pretrained(f"dir:{trained}", device="cpu").save_pretrained(folder, embed_backbone=True)
    for path in (folder / "regions.safetensors", folder / "backbone" / "model.safetensors"):
        state = load_safetensors(path)
        save_safetensors({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
    card = ModelCard.load(folder / "card.json")
    replace(card, name="opsin-tiny", source="", backbone="backbone", **INFERENCE, **CARD).save(folder / "card.json")
    return RegionModel.from_pretrained(f"dir:{folder}", device="cpu")


def main() -> None:
    """Train what is missing, then package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four data sets, see README.md")
    parser.add_argument("--out", type=Path, default=Path("runs/opsin_tiny"), help="where everything is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    sources = ",".join(s.format(data=args.data.resolve()) for s in SOURCES)
    stages = (
        [HERE / "pretrain.py", "--data", args.data, "--out", args.out, "--threads", args.threads],
        [
            "-m", "opsin.cli.main", "train", "regions", "--config", HERE / "regions.yaml",
            f"backbone=dir:{(args.out / 'backbone').resolve()}",
            f"out={(args.out / 'regions').resolve()}",
            f"train=[{sources}]",
        ],
    )  # fmt: skip
    for stage in stages:
        subprocess.run([sys.executable, *map(str, stage)], check=True)
    model = package(args.out / "regions", args.out / "opsin-tiny")
    print(f"{model.name} is in {args.out / 'opsin-tiny'}; opsin eval retrieval --model dir:... measures it")


if __name__ == "__main__":
    main()
