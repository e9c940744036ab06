"""A walk between photographs in the space of codes, decoded into a video.

python examples/rollout.py a.jpg b.jpg c.jpg --out walk.mp4
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise

import torch

from opsin.codec import Codec


def walk(stations: torch.Tensor, frames: int) -> torch.Tensor:
    """Codes ``(S, D)`` and what lies between them, ``frames`` per leg: ``((S - 1) · frames + 1, D)``; starts gently."""
    eased = [0.5 - 0.5 * math.cos(math.pi * i / frames) for i in range(frames)]
    legs = [torch.lerp(a, b, t) for a, b in pairwise(stations) for t in eased]
    return torch.stack([*legs, stations[-1]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", nargs="+", help="two or more image files")
    parser.add_argument("--out", default="walk.mp4", help="the video (default walk.mp4)")
    parser.add_argument("--model", default="codec-tiny", help='catalogue name, "hf:org/repo" or "dir:path"')
    parser.add_argument("--frames", type=int, default=24, help="frames from one photograph to the next (default 24)")
    args = parser.parse_args()
    codec = Codec.from_pretrained(args.model)
    code = codec.encode(args.photographs)
    vectors = walk(code.vectors, args.frames)
    codec.save_video(vectors, args.out)
    print(f"{len(code)} codes of {codec.dim} numbers became {len(vectors)} frames in {args.out}")


if __name__ == "__main__":
    main()
