"""Region encoder and grouping at the three published sizes, random weights, against the published way of doing it.

``python benchmarks/head.py --child WAY NAME`` measures the peak memory of one way in a process of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from common import SEED, in_child, interleaved, parameters_mib, ratio, resident_mib, say
from reference_ren import PUBLISHED, Published, ReferenceEncoder, reference_group
from torch import Tensor
from torch.nn import functional as F

from opsin.regions import RegionEncoder, group
from opsin.regions.encoder import fourier_matrix, pixel_prompts

WAYS = ("reference", "opsin", "opsin bf16")


def inputs(size: Published) -> tuple[Tensor, Tensor]:
    """Random features ``(1, D, h, w)`` and the published prompt grid ``(1, P, 2)`` (row, col)."""
    draw = torch.Generator().manual_seed(SEED)
    features = torch.randn((1, size.dim, size.grid, size.grid), generator=draw)
    axis = torch.linspace(1, size.resolution - 2, size.prompts_per_side, dtype=torch.float64).long()
    return features, torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(1, -1, 2)


def reference_encoder(size: Published) -> ReferenceEncoder:
    """The published way, its tables built."""
    return ReferenceEncoder(size.dim, size.resolution, size.patch, fourier_matrix(size.dim)).eval()


def run_head(size: Published, repeats: int) -> dict[str, Any]:
    """Seconds per image of the encoder alone, all prompts, every way in turns; and peak memory of each."""
    features, prompts = inputs(size)
    torch.manual_seed(SEED)
    encoder = RegionEncoder(size.dim).eval()
    reference = reference_encoder(size)
    reference.load_state_dict(encoder.state_dict())
    half = RegionEncoder.from_state_dict({k: v.bfloat16() for k, v in encoder.state_dict().items()})
    points = pixel_prompts(prompts, size.resolution)
    few = prompts[:, :: max(1, size.prompts // 64)]
    expected = reference(features, few)[0]
    found = encoder(features, pixel_prompts(few, size.resolution)).pred_tokens
    rounded = half(features.bfloat16(), pixel_prompts(few, size.resolution)).pred_tokens.float()
    ways: dict[str, Callable[[], Any]] = {
        "reference": lambda: reference(features, prompts),
        "opsin": lambda: encoder(features, points),
        "opsin bf16": lambda: half(features.bfloat16(), points),
    }
    times = interleaved(ways, repeats=repeats)
    memory = {way: in_child("head.py", "--child", way, size.name) for way in WAYS}
    return {
        "size": {"dim": size.dim, "grid": size.grid, "prompts": size.prompts, "resolution": size.resolution},
        "seconds": times,
        "faster": {way: ratio(times, "reference", way) for way in WAYS[1:]},
        "memory": memory,
        "memory_share": {way: memory[way]["added_mib"] / memory["reference"]["added_mib"] for way in WAYS[1:]},
        "agreement": {
            "opsin_max_difference": float((found - expected).abs().max()),
            "bf16_mean_cosine": float(F.cosine_similarity(rounded, expected, dim=-1).mean()),
        },
    }


def token_cases(size: Published) -> dict[str, Tensor]:
    """Tokens ``(P, D)`` to group: all alike (the slow case of the published code), and 40 objects with strays."""
    draw = torch.Generator().manual_seed(SEED)
    noise = torch.randn((size.prompts, size.dim), generator=draw)
    one = torch.randn(size.dim, generator=draw)
    centres = torch.randn((40, size.dim), generator=draw)
    side = size.prompts_per_side
    cells = torch.arange(side) * 8 // side
    owner = ((cells[:, None] * 5) // 8 * 8 + cells[None, :]).flatten() % 40
    objects = centres[owner] + 0.1 * noise
    stray = torch.rand(size.prompts, generator=draw) < 0.05
    objects[stray] = noise[stray]
    return {"one group": one + 0.02 * noise, "40 objects": objects}


def run_grouping(size: Published, repeats: int) -> dict[str, Any]:
    """Seconds per image of grouping with means and representative points, the published rule on both sides."""
    prompts = inputs(size)[1][0]
    points = prompts.float()
    found: dict[str, Any] = {}
    for case, tokens in token_cases(size).items():
        proj = tokens.flip(0).contiguous()

        def published(tokens: Tensor = tokens, proj: Tensor = proj) -> Any:
            return reference_group(tokens, proj, prompts, 0.975)

        def ours(tokens: Tensor = tokens, proj: Tensor = proj) -> Any:
            groups = group(tokens, threshold=0.975, compat="published")
            return groups, groups.mean(tokens), groups.mean(proj), prompts[groups.representatives(points)]

        expected, (groups, means, _, middle) = published(), ours()
        if len(groups) != len(expected.members) or not torch.equal(middle, expected.points):
            raise SystemExit(f"{size.name}, {case}: the two ways of grouping disagree")
        times = interleaved({"reference": published, "opsin": ours}, repeats=repeats)
        found[case] = {
            "groups": len(groups),
            "max_difference": float((means - expected.pred).abs().max()),
            "seconds": times,
            "faster": ratio(times, "reference", "opsin"),
        }
    return found


def run_prompts(size: Published, repeats: int) -> dict[str, Any]:
    """Seconds to answer new prompts on an image: from scratch (features at hand), and from its kept keys and values."""
    features, prompts = inputs(size)
    torch.manual_seed(SEED)
    encoder = RegionEncoder(size.dim).eval()
    memory = encoder.memory(features)
    found: dict[str, Any] = {"kept_mib": sum(t.numel() * 4 for t in (*memory.keys, *memory.values)) / 2**20}
    for count in (1, 16, 256):
        points = pixel_prompts(prompts[:, torch.linspace(0, size.prompts - 1, count).long()], size.resolution)
        ways: dict[str, Callable[[], Any]] = {
            "from scratch": lambda points=points: encoder(features, points),
            "seen image": lambda points=points: encoder.decode(memory, points),
        }
        times = interleaved(ways, repeats=repeats)
        found[f"{count} prompts"] = {"seconds": times, "faster": ratio(times, "from scratch", "seen image")}
    return found


def child(way: str, name: str) -> dict[str, Any]:
    """Memory that one way adds to weights and features: tables, activations, kept logits."""
    size = next(s for s in PUBLISHED if s.name == name)
    dtype = torch.bfloat16 if way == "opsin bf16" else torch.float32
    features, prompts = inputs(size)
    features = features.to(dtype)
    before = resident_mib()
    if way == "reference":
        encoder: Any = reference_encoder(size)
        asked = prompts
    else:
        torch.set_default_dtype(dtype)  # weights are born in their precision: no float32 copy in the peak
        encoder = RegionEncoder(size.dim).eval()
        torch.set_default_dtype(torch.float32)
        asked = pixel_prompts(prompts, size.resolution)
    kept = encoder(features, asked)
    weights = parameters_mib(encoder)
    del kept
    return {"added_mib": resident_mib(peak=True) - before - weights, "weights_mib": weights}


def run(section: str, quick: bool) -> dict[str, Any]:
    """One section: ``head``, ``grouping`` or ``prompts``."""
    found = {}
    with torch.inference_mode():
        for size in PUBLISHED:
            say(f"{section}: {size.name}")
            if section == "head":
                found[size.name] = run_head(size, 1 if quick else 5)
            elif section == "grouping":
                found[size.name] = run_grouping(size, 1 if quick else 7)
            else:
                found[size.name] = run_prompts(size, 1 if quick else 7)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "NAME"), required=True)
    with torch.inference_mode():
        print(json.dumps(child(*parser.parse_args().child)))
