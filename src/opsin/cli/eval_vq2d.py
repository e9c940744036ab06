"""``opsin eval vq2d``: the Ego4D VQ2D benchmark from the videos to the submission file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VQ2D_EXAMPLES = """examples:
  opsin eval vq2d prepare  --annotations vq_val.json --videos ego4d/v2/full_scale --out clips/
  opsin eval vq2d predict  --annotations vq_val.json --clips clips/ --model opsin-tiny --out answers/ --shard 1/8
  opsin eval vq2d metrics  --annotations vq_val.json --predictions answers/ --out report.json
  opsin eval vq2d submit   --annotations vq_test_unannotated.json --predictions answers/ --out predictions.json
  opsin eval vq2d validate --annotations vq_test_unannotated.json --predictions predictions.json

prepare makes every clip small (5 frames a second, 288 lines, black bars cut off). predict writes a file per clip. Both
can be stopped at any moment; the same command again does what is left, and shards may run at the same time, each on a
--device of its own. metrics writes REPORT.json and REPORT.md. Exit code 1: clips failed or were missing, and are named.
"""

STEPS = {
    "prepare": "make clips small, from videos or canonical clips",
    "predict": "answer the queries of prepared clips",
    "metrics": "measure answers beside published baselines",
    "submit": "write the file for the challenge server",
    "validate": "check a file of predictions",
}


def add_vq2d_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per step."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = VQ2D_EXAMPLES
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    made = {name: steps.add_parser(name, help=text, description=text) for name, text in STEPS.items()}
    for step in made.values():
        step.add_argument(
            "--annotations",
            type=Path,
            required=True,
            metavar="FILE",
            help="vq_val.json and the like, or a list (.json.gz)",
        )
    for name in ("prepare", "predict"):
        made[name].add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write")
        made[name].add_argument(
            "--shard", type=_shard, default=(1, 1), metavar="I/N", help="only part I of N, from 1 (default: all)"
        )
    made["prepare"].add_argument("--videos", type=Path, metavar="FOLDER", help="full-scale videos, <video_uid>.mp4")
    made["prepare"].add_argument("--canonical", type=Path, metavar="FOLDER", help="canonical clips, <clip_uid>.mp4")
    made["prepare"].add_argument("--keep-bars", action="store_true", help="do not cut black bars off")
    predict = made["predict"]
    predict.add_argument("--clips", type=Path, required=True, metavar="FOLDER", help="what prepare wrote")
    predict.add_argument("--model", default="opsin-tiny", help='catalogue name, "hf:org/repo@rev" or "dir:path"')
    predict.add_argument("--preset", help='the way of searching, as "ren-vql" (default: the model\'s)')
    predict.add_argument("--tracker", default="auto", help='"auto", "template", or a SAM 2 model (default auto)')
    predict.add_argument("--threshold", type=float, help="score from which an answer is given (default: the preset's)")
    predict.add_argument("--cache", type=Path, metavar="FOLDER", help="keep the encoded frames for another run")
    predict.add_argument("--device", help="where to run (default: the machine's accelerator, else the CPU)")
    predict.add_argument("--dtype", help='"auto", "float32" or "bfloat16" (default float32)')
    for name in ("metrics", "submit", "validate"):
        kind = "a file in the format of the challenge" + ("" if name == "validate" else ", or what predict wrote")
        made[name].add_argument("--predictions", type=Path, required=True, metavar="PATH", help=kind)
    made["metrics"].add_argument("--out", type=Path, metavar="REPORT.json", help="write the report here, and REPORT.md")
    made["metrics"].add_argument("--json", action="store_true", help="print the report as JSON")
    made["metrics"].add_argument("--seed", type=int, default=0, help="of intervals and orders (default 0)")
    made["submit"].add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the submission file")


def run_vq2d(args: argparse.Namespace) -> int:
    """Do one step. Returns 1 when clips failed or were missing, else 0."""
    from opsin.vq2d.annotations import Annotations

    annotations = Annotations.load(args.annotations)
    steps = {"prepare": _prepare, "predict": _predict, "metrics": _metrics, "submit": _submit, "validate": _validate}
    return steps[args.step](annotations, args)


def _prepare(annotations: Any, args: argparse.Namespace) -> int:
    from opsin.vq2d.clips import prepare

    made = prepare(
        annotations.clips, args.out, videos=args.videos, canonical=args.canonical, shard=args.shard,
        trim=not args.keep_bars,
    )  # fmt: skip
    sys.stderr.write(f"{len(made.made)} clips prepared, {len(made.done)} were there\n")
    return _trouble(dict.fromkeys(made.missing, "no video") | made.failed)


def _predict(annotations: Any, args: argparse.Namespace) -> int:
    from opsin.vq2d.predict import predict, searcher

    ways = {name: getattr(args, name) for name in ("model", "preset", "tracker", "threshold", "dtype")}
    locate = searcher(**ways, cache=args.cache, device=args.device)
    made = predict(annotations.clips, locate, args.out, prepared=args.clips, shard=args.shard, details=ways)
    sys.stderr.write(f"{len(made.made)} clips answered, {len(made.done)} were there\n")
    return _trouble(made.failed)


def _metrics(annotations: Any, args: argparse.Namespace) -> int:
    from opsin import report
    from opsin.vq2d import summary

    full = summary.summarise(annotations, _predictions(annotations, args.predictions), seed=args.seed)
    if args.out is not None:
        sys.stderr.write(f"Report: {summary.write(full, args.out)}\n")
    if args.json:
        sys.stdout.write(json.dumps(report.tidy(full), ensure_ascii=False) + "\n")
    else:
        sys.stderr.write(summary.markdown(full))
    return 0


def _submit(annotations: Any, args: argparse.Namespace) -> int:
    from opsin.hub import atomic_path
    from opsin.vq2d.prediction_file import validate

    made = _predictions(annotations, args.predictions)
    validate(annotations.require_tree(), made, strict=True)
    with atomic_path(args.out) as temporary:
        temporary.write_text(json.dumps(made) + "\n")
    sys.stderr.write(f"Submission: {args.out}\n")
    return 0


def _validate(annotations: Any, args: argparse.Namespace) -> int:
    from opsin.vq2d.annotations import read_json
    from opsin.vq2d.prediction_file import validate

    validate(annotations.require_tree(), read_json(args.predictions), strict=True)
    sys.stderr.write(f"{args.predictions} follows {args.annotations}\n")
    return 0


def _predictions(annotations: Any, path: Path) -> dict[str, Any]:
    from opsin.vq2d.annotations import read_json
    from opsin.vq2d.predict import load_folder

    return load_folder(path, annotations) if path.is_dir() else read_json(path)


def _trouble(failed: Mapping[str, str]) -> int:
    for name, reason in failed.items():
        sys.stderr.write(f"{name}: {reason}\n")
    return 1 if failed else 0


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f'a shard is a number from 1 and a count, as "2/4"; got "{text}"')
    return int(number), int(count)
