"""Timing and memory, the same way for every benchmark."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

SEED = 0


def interleaved(variants: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1) -> dict[str, Any]:
    """Seconds of each variant, measured in turns (A B A B …) so that a slow moment of the machine hits all alike.

    Gives per variant the median, extremes and quartiles of ``repeats`` rounds, after ``warmup`` unmeasured ones.
    """
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + repeats):
        for name, function in variants.items():
            gc.collect()
            started = time.perf_counter()
            result = function()
            seconds = time.perf_counter() - started
            del result
            if turn >= warmup:
                taken[name].append(seconds)
    return {name: spread(values) | {"warmup": warmup} for name, values in taken.items()}


def spread(values: list[float]) -> dict[str, Any]:
    """Median, extremes and quartiles."""
    ordered = sorted(values)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.25, 0.75))
    facts = {"median": median(ordered), "min": ordered[0], "max": ordered[-1], "quartiles": [low, high]}
    return facts | {"repeats": len(ordered)}


def ratio(times: Mapping[str, Any], slow: str, fast: str) -> float:
    """How many times faster ``fast`` is, by medians."""
    return times[slow]["median"] / times[fast]["median"]


def resident_mib(peak: bool = False) -> float:
    """Resident memory of this process, now or at its highest, in MiB.

    Read from the kernel's status file: ``ru_maxrss`` of a child starts at what its parent had when it was started.
    """
    status = Path("/proc/self/status")
    if status.exists():
        wanted = "VmHWM:" if peak else "VmRSS:"
        for line in status.read_text().splitlines():
            if line.startswith(wanted):
                return int(line.split()[1]) / 1024
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest / (2**20 if sys.platform == "darwin" else 2**10)


def parameters_mib(module: torch.nn.Module) -> float:
    """Size of the weights."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) / 2**20


def in_child(script: str, *arguments: str, timeout: float = 900) -> dict[str, Any]:
    """Run ``script`` of this folder in a process of its own; it prints one JSON object as its last line."""
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    quiet = {**os.environ, "OPSIN_PROGRESS": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=quiet)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def say(text: str) -> None:
    """Progress for people."""
    print(text, file=sys.stderr, flush=True)
