"""The whole recipe of codec-tiny in one command: training, the folder that ships in the package, and its measures.

    python recipes/codec_tiny/run.py --data DATA --out runs/codec_tiny

It goes on where it was stopped. See README.md for the data and the time it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from opsin.cards import ModelCard
from opsin.codec import Codec

HERE = Path(__file__).parent
TRAIN = ("tiny_imagenet_17k.zip@train", "caltech101_112.zip@train.txt", "coco128_panoptic/images/train2017")
UNSEEN = {  # name in the card → photographs that the codec has not been trained on
    "Tiny ImageNet val": "tiny_imagenet_17k.zip@val",
    "Caltech-101 test": "caltech101_112.zip@test.txt",
    "COCO val2017 (100)": "coco128_panoptic/images/val2017",
}
CARD = {
    "licence": "weights: non-commercial research, as the training photographs ask",
    "licence_url": "docs/licences.md",
    "citation": "btnk_mae, of REMI, arXiv:2507.02064 (the architecture); trained from nothing by recipes/codec_tiny",
    "trained_on": (
        "Tiny ImageNet 16,000 photographs (ImageNet terms, non-commercial), Caltech-101 train 5,805 (CC BY 4.0), 100 "
        "COCO train2017 photographs (their own Creative Commons licences)"
    ),
}


def opsin(*words: Any) -> None:
    subprocess.run([sys.executable, "-m", "opsin.cli.main", *map(str, words)], check=True)


def package(trained: Path, folder: Path, measured: dict[str, Any]) -> Codec:
    """Write the trained codec as half-precision safetensors with its card, and read it back."""
    codec = Codec.from_pretrained(f"dir:{trained}", device="cpu")
    card: ModelCard = replace(codec.card, name="codec-tiny", fit="crop", measured=measured, **CARD)
    codec.half().save_pretrained(folder, card=card)
    return Codec.from_pretrained(f"dir:{folder}", device="cpu")


def measure(folder: Path, spec: str, out: Path, files: bool) -> dict[str, Any]:
    """What the report of ``opsin eval reconstruction`` says in short: PSNR, SSIM, and how many images."""
    extra = ["--picture", out.with_suffix(".png")] if files else ["--no-files"]
    opsin("eval", "reconstruction", "--model", f"dir:{folder}", "--data", spec, "--out", out, "--device", "cpu", *extra)
    report = json.loads(out.read_text())
    found = report["methods"]["code float32"]
    return {"psnr": found["psnr"]["mean"], "ssim": found["ssim"]["mean"], "images": report["images"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the photographs, see README.md")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that the recipe makes")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("options", nargs="*", metavar="key=value", help="further options of opsin train codec")
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    data = args.data.resolve()
    sources = ",".join(f"{data}/{source}" for source in TRAIN)
    opsin(
        "train", "codec", "--config", HERE / "codec_tiny.yaml", f"out={(args.out / 'training').resolve()}",
        f"train=[{sources}]", f"val=[{data}/{UNSEEN['Tiny ImageNet val']}]", *args.options,
    )  # fmt: skip
    folder = args.out / "codec-tiny"
    package(args.out / "training", folder, {})
    measured = {
        f"reconstruction, {name}, centre crop 64×64": measure(
            folder, f"{data}/{spec}", args.out / f"report-{number}.json", files=number == 2
        )
        for number, (name, spec) in enumerate(UNSEEN.items())
    }
    codec = package(args.out / "training", folder, measured)
    print(f"{codec.name} is in {folder}: {json.dumps(measured, indent=1)}")


if __name__ == "__main__":
    main()
