"""Tiny photographs with masks in every format, and a tiny random backbone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SIZE = (48, 64)


def blocks(seed: int, regions: int = 4) -> np.ndarray:
    """A label map of vertical bands, 1 to ``regions``."""
    edges = np.sort(np.random.default_rng(seed).choice(np.arange(8, SIZE[1] - 8), regions - 1, replace=False))
    return np.tile(np.searchsorted(edges, np.arange(SIZE[1]), side="right") + 1, (SIZE[0], 1)).astype(np.uint8)


def paint(labels: np.ndarray) -> Image.Image:
    """A photograph whose colours tell the regions apart."""
    palette = np.random.default_rng(0).integers(0, 255, (300, 3), dtype=np.uint8)
    return Image.fromarray(palette[labels])


@pytest.fixture(scope="session")
def bsds(tmp_path_factory):
    root = tmp_path_factory.mktemp("bsds")
    for split, seeds in (("train", range(6)), ("val", range(6, 8))):
        (root / "images" / split).mkdir(parents=True)
        (root / "segments" / split).mkdir(parents=True)
        for seed in seeds:
            paint(blocks(seed)).save(root / "images" / split / f"{seed}.jpg", quality=95)
            for k in range(2):
                Image.fromarray(blocks(seed + 10 * k)).save(root / "segments" / split / f"{seed}_{k}.png")
    return root


@pytest.fixture(scope="session")
def classes_zip(tmp_path_factory):
    path = tmp_path_factory.mktemp("mosaic") / "classes.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(["cat", "dog", "owl", "BACKGROUND_x"]):
            for k in range(3):
                file = path.parent / "one.png"
                Image.new("RGB", (20, 30), (60 * number, 10 * k, 200)).save(file)
                archive.write(file, f"train/{name}/{k}.png")
        archive.writestr("train/readme.md", "not a photograph")
        archive.writestr("list.txt", "train/cat/0.png\r\ntrain/dog/1.png\r\n")
    return path


@pytest.fixture(scope="session")
def panoptic(tmp_path_factory):
    root = tmp_path_factory.mktemp("panoptic")
    images, labels = root / "images" / "mini", root / "annotations" / "panoptic_mini"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    info, notes = [], []
    for number in range(3):
        map_ = blocks(number, 3).astype(np.int64) * 70000
        Image.fromarray(np.stack([map_ % 256, map_ // 256 % 256, map_ // 65536], -1).astype(np.uint8)).save(
            labels / f"{number}.png"
        )
        paint(blocks(number, 3)).save(images / f"{number}.jpg")
        info.append({"id": number, "file_name": f"{number}.jpg", "height": SIZE[0], "width": SIZE[1]})
        segments = [{"id": 70000 * k, "category_id": 7 * k, "iscrowd": int(k == 3)} for k in (1, 2, 3)]
        shown = segments if number < 2 else []
        notes.append({"image_id": number, "file_name": f"{number}.png", "segments_info": shown})
    categories = [{"id": 7 * k, "name": f"kind{k}"} for k in (1, 2, 3)]
    content = {"images": info, "annotations": notes, "categories": categories}
    (root / "annotations" / "panoptic_mini.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> str:
    from transformers import ResNetBackbone, ResNetConfig

    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2"],
    )
    ResNetBackbone(config).eval().save_pretrained(folder)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 64, "width": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return f"dir:{folder}"


@pytest.fixture
def options(backbone, bsds, tmp_path):
    """Keyword arguments of a run that takes seconds."""
    return {
        "backbone": backbone,
        "out": str(tmp_path / "model"),
        "train": (f"bsds:{bsds}",),
        "image_size": 64,
        "batch_size": 4,
        "max_prompts": 24,
        "steps": 6,
        "warmup_steps": 2,
        "heads": 2,
        "layers": 2,
        "dtype": "float32",
        "device": "cpu",
        "validation_batches": 2,
    }


def losses_of(out: str | Path) -> dict[int, dict[str, float]]:
    """What a run logged, by step."""
    lines = (Path(out) / "training" / "log.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if "loss" in row}


def words(options: dict) -> list[str]:
    """Keyword arguments as the words of a command line."""
    return [f"{k}={json.dumps(list(v) if isinstance(v, tuple) else v)}" for k, v in options.items()]


def environment() -> dict[str, str]:
    """That of a run in a process of its own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def run_and_kill(code: str, loop: str, options: dict) -> None:
    """Start ``code`` in a process of its own, and kill it in its fifth step. ``loop``: the class, ``module.Class``."""
    module, name = loop.rsplit(".", 1)
    slow = (
        f"import time; from {module} import {name} as L; whole = L._step\n"
        "def slow(self, *given):\n"
        "    time.sleep(60 if self.step == 4 else 0)\n"
        "    return whole(self, *given)\n"
        "L._step = slow\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow + code, *words(options)], env=environment())
    log = Path(options["out"]) / "training/log.jsonl"
    limit = time.time() + 60
    while process.poll() is None and (not log.exists() or '"step": 4,' not in log.read_text()) and time.time() < limit:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert max(losses_of(options["out"])) == 4


@pytest.fixture(autouse=True)
def one_thread():
    """Runs are compared bit for bit with runs of other processes, which have one thread: so has this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
