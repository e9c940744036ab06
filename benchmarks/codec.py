"""The base codec at 224 pixels: encoding, decoding, one training step, peak memory, against the published way.

``python benchmarks/codec.py --child WAY JOB REPEATS`` does one job in one way in a process of its own.
``python benchmarks/codec.py --out FILE`` measures everything and writes JSON; ``--quick`` once each.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import SEED, in_child, interleaved, parameters_mib, ratio, resident_mib, say, spread
from reference_codec import ReferenceCodec
from torch import Tensor

from opsin.codec import Codec
from opsin.codec.config import SIZES, CodecConfig
from opsin.runtime import fast_matmul

WAYS = ("reference", "opsin", "opsin bf16")
BATCHES = (1, 16)
STEP = 16
BASE = SIZES["base"]


def images(count: int, config: CodecConfig = BASE) -> Tensor:
    """Normalised random images."""
    return torch.randn((count, 3, *config.size), generator=torch.Generator().manual_seed(SEED))


def reference(codec: Codec, config: CodecConfig = BASE) -> ReferenceCodec:
    """The published way, on the weights of ``codec``."""
    found = ReferenceCodec(config)
    found.load_state_dict(codec.state_dict())
    return found.eval()


def speed(config: CodecConfig, repeats: int) -> dict[str, Any]:
    """Seconds to encode and to decode a batch, every way in turns, and how far the results are apart."""
    codec, half = Codec.create(config, seed=SEED), Codec.create(config, seed=SEED).bfloat16()
    published = reference(codec, config)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for batch in BATCHES:
            pixels = images(batch, config)
            codes = codec.encoder.bottleneck(pixels)
            rounded, few = pixels.bfloat16(), codes.bfloat16()
            jobs: dict[str, dict[str, Callable[[], Tensor]]] = {
                "encode": {
                    "reference": lambda pixels=pixels: published.encoder(pixels)[:, 0],
                    "opsin": lambda pixels=pixels: quick(codec.encoder.bottleneck, pixels),
                    "opsin bf16": lambda rounded=rounded: quick(half.encoder.bottleneck, rounded),
                },
                "decode": {
                    "reference": lambda codes=codes: published.decoder(codes),
                    "opsin": lambda codes=codes: quick(codec.decoder, codes),
                    "opsin bf16": lambda few=few: quick(half.decoder, few),
                },
            }
            for job, ways in jobs.items():
                say(f"codec: {job}, batch {batch}")
                times = interleaved(ways, repeats=repeats)
                expected = ways["reference"]()
                found[f"{job}, batch {batch}"] = {
                    "seconds": times,
                    "images_per_second": {way: batch / times[way]["median"] for way in ways},
                    "faster": {way: ratio(times, "reference", way) for way in WAYS[1:]},
                    "relative_difference": {
                        way: float((ways[way]().float() - expected).norm() / expected.norm()) for way in WAYS[1:]
                    },
                }
    return found


def quick(function: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
    """As ``Codec.encode`` and ``decode`` call it."""
    with fast_matmul():
        return function(given)


def child(way: str, job: str, repeats: int, config: CodecConfig = BASE) -> dict[str, Any]:
    """One job in one way, in this process alone: seconds, and the peak of its memory."""
    model: Any = ReferenceCodec(config).eval() if way == "reference" else Codec.create(config, seed=SEED)
    if way == "opsin bf16" and job != "step":
        model.bfloat16()
    pixels = images(STEP, config)
    if job == "step":
        act = step(model, way, pixels)
    else:
        model.requires_grad_(False)
        pixels = pixels.to(next(model.parameters()).dtype)
        codes = torch.randn(STEP, config.dim).to(pixels.dtype)
        act = {
            ("encode", True): lambda: model.encoder(pixels)[:, 0],
            ("encode", False): lambda: quick(model.encoder.bottleneck, pixels),
            ("decode", True): lambda: model.decoder(codes),
            ("decode", False): lambda: quick(model.decoder, codes),
        }[job, way == "reference"]
    gc.collect()
    forget_peak()
    taken = []
    for _ in range(repeats + 1):
        started, busy = time.perf_counter(), time.process_time()
        with torch.no_grad() if job != "step" else nullcontext():
            act()
        taken.append((time.perf_counter() - started, time.process_time() - busy))
    return {
        "seconds": spread([t for t, _ in taken[1:]]),
        "cpu_seconds": spread([t for _, t in taken[1:]]),
        "peak_mib": resident_mib(peak=True),
        "weights_mib": parameters_mib(model),
    }


def forget_peak() -> None:
    """Count the highest memory of this process from now on, where the kernel lets us; weights were made before."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")


def step(model: Any, way: str, pixels: Tensor) -> Callable[[], float]:
    """One training step at ``STEP`` images; Opsin's clips its gradients, and under autocast for ``opsin bf16``."""
    model.train()
    if way == "reference":
        optimizer = model.optimizer()
        return lambda: model.step(pixels, optimizer)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )

    def act() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "opsin bf16"):
            loss = model.losses(pixels)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def quickly() -> float:
        with fast_matmul():
            return act()

    return quickly


def run(quick: bool) -> dict[str, Any]:
    """Speed in turns in this process; memory and the training step each in a process of its own, in turns too."""
    found = speed(BASE, 1 if quick else 5)
    for job in ("encode", "decode"):
        memory = {way: in_child("codec.py", "--child", way, job, "1") for way in WAYS}
        found[f"{job}, batch {STEP}"]["memory"] = shares(memory)
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(1 if quick else 3):
        for way in WAYS:
            say(f"codec: training step, {way}")
            rounds[way].append(in_child("codec.py", "--child", way, "step", "1" if quick else "2", timeout=1800))
    times = {
        way: {name: spread([r[name]["median"] for r in results]) for name in ("seconds", "cpu_seconds")}
        for way, results in rounds.items()
    }
    seconds = {way: t["seconds"] for way, t in times.items()}
    found[f"training step, batch {STEP}"] = {
        "seconds": seconds,
        "images_per_second": {way: STEP / t["median"] for way, t in seconds.items()},
        "cpu_seconds": {way: t["cpu_seconds"] for way, t in times.items()},
        "faster": {way: ratio(seconds, "reference", way) for way in WAYS[1:]},
        "memory": shares({way: max(results, key=lambda r: r["peak_mib"]) for way, results in rounds.items()}),
    }
    return found


def shares(memory: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Peaks, and each one's share of the reference's."""
    peak = {way: m["peak_mib"] for way, m in memory.items()}
    return {way: {"peak_mib": value, "share": value / peak["reference"]} for way, value in peak.items()}


def main() -> None:
    """A job of a child process, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, metavar=("WAY", "JOB", "REPEATS"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    if args.child:
        way, job, repeats = args.child
        print(json.dumps(child(way, job, int(repeats))))
        return
    text = json.dumps({"threads": torch.get_num_threads(), **run(args.quick)}, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
