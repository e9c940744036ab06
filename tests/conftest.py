"""Fixtures of all tests: where golden numbers and real data are, and the filler of golden weights."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
os.environ.setdefault("OPSIN_PROGRESS", "0")


def _first_existing(*paths: Path) -> Path | None:
    return next((p for p in paths if p.exists()), None)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real images and video (``OPSIN_DATA``, or ``shared/data`` beside the checkout)."""
    named = os.environ.get("OPSIN_DATA")
    found = _first_existing(*([Path(named)] if named else []), ROOT.parent / "shared/data", ROOT / "shared/data")
    if found is None:
        pytest.skip("real data is absent: set OPSIN_DATA to its folder")
    return found


def golden_path(name: str, folder: str = "ren") -> Path:
    """A golden file, from the copies in the repository or from ``OPSIN_GOLDEN``; the test skips where it is absent."""
    named = os.environ.get("OPSIN_GOLDEN")
    roots = [HERE / "golden", *([Path(named)] if named else []), ROOT.parent / "shared/golden", ROOT / "shared/golden"]
    found = _first_existing(*(root / folder / name for root in roots))
    if found is None:
        pytest.skip(f"golden file {name} is absent: set OPSIN_GOLDEN to its folder")
    return found


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """``golden("tinyA_grid.npz")`` → its path, or a skip."""
    return golden_path


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache, or the network."""
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def draw(key: str, shape: Sequence[int]) -> torch.Tensor:
    """The deterministic normal draw that golden numbers are made from."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(zlib.crc32(key.encode())))


def golden_input(tag: str, shape: Sequence[int]) -> np.ndarray:
    """Golden input ``tag``."""
    return draw(f"input/{tag}", shape).numpy()


def filler(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Golden weights: one draw per key, scaled by fan-in, LayerNorm gains around one."""
    weights = {}
    for key, shape in shapes.items():
        value = draw(key, shape)
        value = value * (1.0 / math.sqrt(value.numel() / shape[0])) if len(shape) >= 2 else 0.2 * value
        parts = key.split(".")
        if parts[-1] == "weight" and len(parts) > 1 and "norm" in parts[-2] and len(shape) == 1:
            value = value + 1.0
        weights[key] = value.numpy()
    return weights
