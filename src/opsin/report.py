"""What every measurement is reported with: commit, machine, versions, seed and spread; and the JSON file it goes to."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opsin.errors import InputError
from opsin.hub import atomic_path

PACKAGES = ("opsin", "torch", "transformers", "numpy", "scipy", "scikit-image", "av", "pillow")


def environment(seed: int | None = None) -> dict[str, Any]:
    """Where and with what a number was measured: commit, machine, versions, threads, date (UTC) and ``seed``."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def commit() -> str | None:
    """Commit of the checkout that this package runs from, with "+" when files differ from it; None when installed."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD").strip()
        changed = _git(folder, "status", "--porcelain", "--", "..")  # only the package: reports may lie beside it
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed.strip() else "")


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB, accelerator, system."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "accelerator": str(accelerator) if accelerator else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def write(path: str | Path, report: dict[str, Any]) -> Path:
    """Write a report as JSON, whole or not at all. Numbers are rounded to 6 digits; NaN becomes null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(tidy(report), indent=1, ensure_ascii=False) + "\n")
    return path


def tidy(value: Any) -> Any:
    """JSON-ready copy: floats rounded to 6 significant digits, NaN and infinity None, NumPy scalars plain."""
    if isinstance(value, dict):
        return {str(k): tidy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(v) for v in value]
    if isinstance(value, np.generic):
        return tidy(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def bootstrap(
    statistic: Callable[[np.ndarray], float], units: int, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of ``statistic(rows)`` when the ``units`` that were measured are drawn again with
    replacement.

    ``rows`` are unit numbers; a unit is what is independent (an image, not a segment of it; a video, not an episode).
    """
    if units < 1:
        raise InputError("A bootstrap needs at least one unit", got=units)
    generator = np.random.default_rng(seed)
    drawn = [statistic(generator.integers(0, units, units)) for _ in range(resamples)]
    tail = (1 - level) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def clustered_mean(
    values: Sequence[float] | np.ndarray, clusters: Sequence[int] | np.ndarray, **options: Any
) -> dict[str, Any]:
    """Mean of ``values`` with its bootstrap interval; values of one cluster are drawn together."""
    array, owners = np.asarray(values, dtype=np.float64), np.unique(clusters, return_inverse=True)[1]
    if not len(array):
        return {"mean": float("nan"), "interval": None, "count": 0}
    totals, counts = np.bincount(owners, array), np.bincount(owners)

    def mean(rows: np.ndarray) -> float:
        return float(totals[rows].sum() / counts[rows].sum())

    return {"mean": float(array.mean()), "interval": bootstrap(mean, len(counts), **options), "count": len(array)}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=10).stdout


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
