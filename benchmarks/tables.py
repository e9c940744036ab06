"""``docs/benchmarks.md`` from the JSON of the measurements. Nothing in that document is written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opsin.hub import atomic_path

HEADER = """# Benchmarks

Generated from `benchmarks/results.json` and `benchmarks/quality/*.json`; do not edit. Speed and memory: `make bench`.
Quality: `python benchmarks/run.py --quality DIR`, where `DIR` holds the annotated data; it calls `opsin eval`.
"""

GOALS = """\
"reference" is the published algorithm, written from its description (`benchmarks/reference_ren.py`): a table of the
positions of all pixels, prompts looked up one by one, explicit softmax, all logits kept. It runs without gradients,
which the published call leaves on, so it is if anything kinder. All ways are timed in turns. Measured on the
published code itself on two such cores, DINOv2 size: encoder 3.0 s, grouping 1.1–2.2 s, table 1.1 GB."""

SEGMENTATION = """\
RADSeg on a RADIO of ViT-B size with random weights, a photograph, windows of 336 pixels every 224. "reference" is the
published algorithm, written from its description (`benchmarks/reference_radseg.py`), on the same weights; for a second
question it starts from the image again. "opsin" is float32, "openvino" the same with windows compiled by OpenVINO
(optional); "bf16" computes the windows in bfloat16. Agreement: share of pixels with the label that "opsin" gives, for
text vectors in random directions, and for vectors near features of another photograph, which compete far more closely.
RADSeg+ adds masks of ten regions, one of each of ten classes, all accepted; there the labels of the two sides differ
by design (coordinates), so agreement is between ways of Opsin. Memory: peak of a fresh process, share of the
reference's in brackets. Second question: labels never asked of this image, their vectors on disk, or in memory."""


CODEC = """\
The codec of base size at 224×224 with random weights. "reference" is the published algorithm, written from its
description (`benchmarks/reference_codec.py`), on the same weights: every token of the last block is computed, the
cross-attention has a query per patch for its one key, and the training step takes the norm of all gradients. Opsin's
step also clips them. "bf16": weights in bfloat16; in training, autocast. Memory: peak of a fresh process, weights
included, share of the reference's in brackets. The step of training: seconds of both losses, gradients and AdamW."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join([" --- "] + [" ---: "] * (len(head) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def seconds(times: dict[str, Any]) -> str:
    """Median and range, in a unit that fits."""
    unit, factor = ("s", 1.0) if times["median"] >= 1 else ("ms", 1e3)
    low, mid, high = (f"{times[k] * factor:.3g}" for k in ("min", "median", "max"))
    return f"{mid} {unit} ({low}–{high})"


def measured(value: dict[str, Any]) -> str:
    """A share with its 95 % interval."""
    interval = value.get("interval")
    return f"{value['mean']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def section(title: str, note: str, *blocks: str) -> str:
    """Heading, what was measured, tables and remarks."""
    return "\n\n".join([f"## {title}", note, *blocks]) + "\n"


def where(measurement: dict[str, Any]) -> str:
    """Commit, machine and versions of a measurement, in one line."""
    env = measurement["environment"]
    machine = env["machine"]
    facts = [
        env["date"],
        f"commit {env['commit']}",
        machine["processor"],
        f"{machine['cores']} cores, {env['threads']} threads",
        machine["accelerator"] or "no accelerator",
        f"torch {env['versions']['torch']}",
        f"seed {env['seed']}",
    ]
    quick = " Quick run: one repeat." if measurement.get("quick") else ""
    return f"*{', '.join(facts)}.{quick}*"


def head(found: dict[str, Any]) -> str:
    """Region encoder."""
    rows, sizes = [], []
    for name, r in found.items():
        for way, times in r["seconds"].items():
            faster = f"{r['faster'][way]:.2f}×" if way in r["faster"] else ""
            share = f"{r['memory_share'][way]:.2f}" if way in r["memory_share"] else ""
            rows.append([f"{name}, {way}", seconds(times), faster, f"{r['memory'][way]['added_mib']:.0f} MiB", share])
        size, agreement = r["size"], r["agreement"]
        sizes.append(
            f"{name}: width {size['dim']}, {size['grid']}×{size['grid']} patches, {size['prompts']} prompts, "
            f"largest difference {agreement['opsin_max_difference']:.1e}, "
            f"bf16 mean cosine {agreement['bf16_mean_cosine']:.4f}"
        )
    text = table(["one image, all prompts", "time: median (range)", "faster", "memory added", "share"], rows)
    remark = "Memory: peak of a fresh process above weights and features."
    return section("Region encoder", GOALS, text, f"{'; '.join(sizes)}. {remark}")


def grouping(found: dict[str, Any]) -> str:
    """Grouping of prompts."""
    rows = []
    for name, cases in found.items():
        for case, r in cases.items():
            ways = [seconds(r["seconds"][w]) for w in ("reference", "opsin")]
            rows.append([f"{name}, {case} ({r['groups']})", *ways, f"{r['faster']:.0f}×"])
    note = "Connected components, mean tokens of both kinds, representative points; the published rule on both sides."
    return section("Grouping", note, table(["tokens (groups)", "reference", "opsin", "faster"], rows))


def again(rows_of: dict[str, dict[str, Any]]) -> str:
    """Rows of new prompts on a seen image."""
    rows = []
    for name, cases in rows_of.items():
        for count, r in cases.items():
            if isinstance(r, dict):
                ways = [seconds(r["seconds"][w]) for w in ("from scratch", "seen image")]
                rows.append([f"{name}, {count}", *ways, f"{r['faster']:.1f}×"])
    return table(["prompts", "from scratch", "seen image", "faster"], rows)


def prompts(found: dict[str, Any]) -> str:
    """New prompts on a seen image, encoder alone."""
    kept = ", ".join(f"{n} {r['kept_mib']:.0f} MiB" for n, r in found.items())
    note = f"Region encoder alone, features at hand on both sides. Kept per image: {kept}."
    return section("New prompts on a seen image", note, again(found))


def path(r: dict[str, Any]) -> str:
    """Whole path."""
    speeds = r["images_per_second"]
    rows = [[name, f"{speeds[name]:.1f}", seconds(times)] for name, times in r["seconds_per_batch"].items()]
    note = f"{r['images']} photographs a batch, canvas {r['canvas']}, about {r['prompts']} prompts each."
    asked = "New prompts, from pixels against a seen image:"
    text = table(["", "images/s", "per batch"], rows)
    return section(f"The whole path: {r['model']}", note, text, asked, again({r["model"]: r["new_prompts"]}))


def localization(r: dict[str, Any]) -> str:
    """Questions about a video."""
    rows, calls = [], []
    for name, v in r["rows"].items():
        first, second = v["asked"]["first"], v["asked"]["second"]
        times = [f"{first['seconds']:.1f} s", f"{second['seconds']:.1f} s"]
        sizes = [f"{v['peak_mib']:.0f} MiB", f"{v['ready_mib']:.0f} MiB", f"{v['kept_mib']:.0f} MiB"]
        rows.append([name, str(v["frames_searched"]), *times, *sizes, "yes" if v["found"] else "no"])
        if v["preset"] == "ren-vql":
            for kind, number in v["published_calls"].items():
                calls.append([f"{name}, {kind}", *(str(q["calls"][kind]) for q in (first, second)), str(number)])
    note = (
        f"Generated video, {r['size'][1]}×{r['size'][0]}, {r['fps']:g} frames/s; one object asked for twice, each row "
        "in a fresh process; the tracker of our own, one round. Kept: encoded frames on disk."
    )
    head = ["video", "frames searched", "first", "second", "peak", "model loaded", "kept", "found"]
    shown = table(["pictures through a model", "first", "second", "published, each"], calls)
    grown = f"Growth of the peak from 1 to 30 minutes: {r['growth_mib']:.0f} MiB."
    remark = (
        "Published: counted by reading its code, for the same frames, candidates and length of track; it also builds "
        "every model anew for every query."
    )
    return section("Questions about a video", note, table(head, rows), grown, shown, remark)


def segmentation(found: dict[str, Any]) -> str:
    """Words to pixels."""
    blocks = []
    for title, cases in found.items():
        for count, r in {"": cases}.items() if "seconds" in cases else cases.items():
            ways = list(r["seconds"])
            rows = [[key, *(seconds(r["seconds"][way][key]) for way in ways)] for key in r["seconds"][ways[0]]]
            rows.append(["faster", *(f"{r['faster'][way]:.2f}×" if way in r["faster"] else "" for way in ways)])
            peaks = [r["memory"][way] for way in ways]
            rows.append(["peak memory", *(f"{m['peak_mib']:.0f} MiB ({m['share']:.2f})" for m in peaks)])
            rows.append(["… above what was loaded", *(f"{m['peak_mib'] - m['ready_mib']:.0f} MiB" for m in peaks)])
            for text, shares in r["agreement"].items():
                rows.append(
                    [f"pixels as opsin, {text}", *(f"{shares[way]:.4f}" if way in shares else "" for way in ways)]
                )
            for kind in ("first asked", "asked again"):
                asked = [r.get("second_question", {}).get(way, {}).get(kind) for way in ways]
                if any(asked):
                    cells = (f"{seconds(a)}, {a['faster']:.0f}×" if a else "" for a in asked)
                    rows.append([f"second question, {kind}", *cells])
            blocks += [f"### {title}{', ' * bool(count)}{count}", table(["", *ways], rows)]
    return section("Words to pixels", SEGMENTATION, *blocks)


def codec(found: dict[str, Any]) -> str:
    """One vector per image, and back."""
    rows = []
    for job, r in found.items():
        for way, times in r["seconds"].items():
            memory = r["memory"][way] if "memory" in r else None
            apart = r.get("relative_difference", {}).get(way)
            rows.append(
                [
                    f"{job}, {way}",
                    seconds(times),
                    f"{r['images_per_second'][way]:.2f}",
                    f"{r['faster'][way]:.2f}×" if way in r["faster"] else "",
                    f"{memory['peak_mib']:.0f} MiB ({memory['share']:.2f})" if memory else "",
                    f"{apart:.1e}" if apart is not None else "",
                ]
            )
    head = ["", "time: median (range)", "images/s", "faster", "peak memory", "relative difference"]
    return section("One vector per image, and back", CODEC, table(head, rows))


def retrieval(r: dict[str, Any]) -> str:
    """Retrieval of COCO segments."""
    rows = []
    for name, v in r["descriptors"].items():
        parts = [f"{v['top1'][s]['mean']:.3f}" for s in ("things", "stuff")]
        rows.append([name, *(measured(v[k]["all"]) for k in ("top1", "top5")), *parts, f"{v['class_mean_top1']:.3f}"])
    less = "; ".join(f"{n} {measured(v['top1'])}" for n, v in r["region_token_minus"].items())
    note = (
        f"{r['model']} at {r['size']} pixels: {r['queries']} segments of COCO val look up {r['gallery']} of train "
        f"(the panoptic images of {r['data']}), at least {r['min_area']} pixels; right when of the same category, "
        f"{r['answerable']} can be. 95 % intervals over images."
    )
    text = table(["", "top-1", "top-5", "things top-1", "stuff top-1", "mean over classes"], rows)
    return section("Retrieval of segments", note, text, f"Top-1 of the region token minus that of: {less}.")


def groupings(r: dict[str, Any]) -> str:
    """Grouping against people."""
    rows = []
    for name, v in r["groupings"].items():
        parts = [f"{v[k]['mean']:.3f}" for k in ("together", "apart")]
        count = f"{v['groups']:.0f}" if "groups" in v else ""
        rows.append([name, *(measured(v[k]) for k in ("balanced", "rand")), *parts, count])
    chosen = ", ".join(f"{m} {s['setting']:g}" for m, s in r["settings"].items())
    note = (
        f"{r['model']}: BSDS val, {r['images']} images, {r['prompts']:.0f} prompts each; share of prompt pairs "
        f"put together or apart as people do. Settings chosen on {r['images_chosen_on']} images of train: {chosen}."
    )
    head = ["", "balanced", "all pairs", "together", "apart", "groups"]
    return section("Grouping against people", note, table(head, rows))


def stages(r: dict[str, Any]) -> str:
    """What every stage of a way of searching adds."""
    keys = ("success", "stAP@0.25", "tAP@0.25", "recovery")
    taken = r["seconds"]
    rows = [
        [n, *(measured(v[k]) for k in keys), f"{v['answered']:.2f}", f"{taken[n]:.0f} s" if n in taken else ""]
        for n, v in r["methods"].items()
    ]
    note = (
        f"{r['model']}, tracker {r['tracker']}, {r['episodes']} episodes of {r['videos']} videos, {r['frames']} "
        f'frames; every row adds a stage to the row above, "{r["as_given"]}" is the preset. Frames are encoded once '
        f"({taken['encoding']:.0f} s), and the time is what each row takes after that. 95 % intervals over videos. "
        "Template matching: normalised cross-correlation at five sizes, its threshold chosen on the other videos."
    )
    return section(f"Visual queries: {r['preset']}", note, table(["", *keys, "answered", "time"], rows))


SPEED = {
    "head": head,
    "grouping": grouping,
    "prompts": prompts,
    "path": path,
    "localization": localization,
    "segmentation": segmentation,
    "codec": codec,
}
QUALITY = {"retrieval": retrieval, "grouping": groupings}


def document(results: dict[str, Any], quality: dict[str, Any]) -> str:
    """The whole text."""
    parts = [HEADER]
    parts += [f"{QUALITY[name](quality[name])}\n{where(quality[name])}\n" for name in QUALITY if name in quality]
    parts += [f"{stages(found)}\n{where(found)}\n" for found in quality.values() if "stages" in found]
    parts += [f"{SPEED[name](results[name]['results'])}\n{where(results[name])}\n" for name in SPEED if name in results]
    return "\n".join(parts)


def write(results: dict[str, Any], quality_folder: Path, out: Path) -> Path:
    """Write the document from the results and the newest quality report of each kind."""
    quality: dict[str, Any] = {}
    for file in sorted(quality_folder.glob("*.json")):
        found = json.loads(file.read_text())
        quality[file.stem if "stages" in found else found["measure"]] = found
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary:
        temporary.write_text(document(results, quality))
    return out
