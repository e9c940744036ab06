"""Contact sheets of answered episodes, for docs/localization.md: query, score over time, the answer.

python benchmarks/episodes.py DATA bag_0 jumping_1 ...      into docs/images/episode-<id>.jpg
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import say
from PIL import Image

from opsin.evaluation import datasets
from opsin.evaluation.localization import as_boxes, query_crop
from opsin.localization import locate, render
from opsin.vq2d.metrics import BoxTrack, spatiotemporal_iou, temporal_iou

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WIDTH = 760


def main() -> int:
    """One picture for each episode that is named."""
    root, *wanted = sys.argv[1:]
    episodes = {e.id: e for e in datasets.episodes(root)}
    for name in wanted:
        episode = episodes[name]
        frames, crop = [str(f) for f in episode.frames], query_crop(episode)
        track = locate(frames, image=crop, tracker="template")
        truth, answer = BoxTrack.of(episode.response), as_boxes(track)
        with tempfile.TemporaryDirectory() as folder:
            path = render.contact_sheet(frames, track, Path(folder) / "sheet.png", query=crop)
            sheet = Image.open(path).convert("RGB")
        sheet.thumbnail((WIDTH, WIDTH))
        sheet.save(IMAGES / f"episode-{name}.jpg", quality=80)
        span = (int(truth.frames[0]), int(truth.frames[-1]))
        overlaps = f"tIoU {temporal_iou(answer, truth):.2f}, stIoU {spatiotemporal_iou(answer, truth):.2f}"
        say(f"{name}: truth {span}, answer {answer.frames[[0, -1]].tolist() if track.found else None}, {overlaps}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
