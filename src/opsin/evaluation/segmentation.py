"""Quality of open-vocabulary segmentation: one confusion matrix over a whole data set, and what follows from it.

Every image adds its share of the matrix to a journal, one line of JSON. A run that was stopped goes on where it was;
shards that ran on several machines add up to exactly the matrix of one run, since counts are whole numbers and every
image is counted once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from opsin import report
from opsin.errors import (
    IncompatibleModel,
    InputError,
    InvalidConfig,
    InvalidDataset,
    InvalidImage,
    MissingFile,
    UnsupportedSize,
)
from opsin.evaluation.protocols import Protocol
from opsin.evaluation.segmentation_data import Sample, SegmentationData
from opsin.hub import atomic_path
from opsin.runtime import progress

if TYPE_CHECKING:
    from opsin.segmentation import Segmenter

Entries = dict[str, dict[str, Any]]
FORMAT = 1


def confusion(prediction: Tensor, truth: Tensor, classes: int) -> np.ndarray:
    """Pixels by true and predicted class, ``(C, C + 1)`` int64; the last column counts predictions of -1 (unknown).

    ``prediction (H, W)`` holds -1 … C-1; ``truth (H, W)`` too, -1 where a pixel does not count.
    """
    if prediction.shape != truth.shape:
        raise InputError("Prediction and truth have one shape", got=f"{prediction.shape} and {truth.shape}")
    predicted, true = prediction.reshape(-1).cpu().long(), truth.reshape(-1).cpu().long()
    for what, values in (("Predictions", predicted), ("True classes", true)):
        if values.numel() and not -1 <= int(values.min()) <= int(values.max()) < classes:
            raise InputError(f"{what} lie in -1 … {classes - 1}", got=(int(values.min()), int(values.max())))
    counted = true >= 0
    predicted = torch.where(predicted < 0, classes, predicted)[counted]
    cells = torch.bincount(true[counted] * (classes + 1) + predicted, minlength=classes * (classes + 1))
    return cells.reshape(classes, classes + 1).numpy()


def measures(matrix: np.ndarray) -> dict[str, Any]:
    """What a confusion matrix ``(C, C + 1)`` says, as shares in [0, 1]; mIoU, mAcc, aAcc as mmsegmentation's IoUMetric.

    ``IoU (C,)`` is NaN for a class that is neither there nor predicted, ``accuracy (C,)`` for one that is not there;
    means leave NaN out. ``fwIoU`` weighs classes by their true pixels; ``unknown`` is the share without an answer.
    """
    hits, true, predicted, union = _areas(matrix)
    with np.errstate(invalid="ignore"):
        iou, accuracy = hits / union, hits / true
    total = max(int(true.sum()), 1)
    return {
        "mIoU": _mean(iou),
        "fwIoU": float((true * np.nan_to_num(iou)).sum() / total),
        "aAcc": float(hits.sum() / total),
        "mAcc": _mean(accuracy),
        "unknown": float(matrix[:, -1].sum() / total),
        "IoU": iou,
        "accuracy": accuracy,
        "true": true,
        "predicted": predicted,
    }


def header_of(
    model: str,
    data: SegmentationData,
    protocol: Protocol,
    *,
    compat: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What has to be equal for numbers to be added up. ``details``: more that counts, such as the dtype."""
    ids = "\n".join(s.id for s in data.samples)
    header = {
        "format": FORMAT,
        "model": model,
        "dataset": data.name,
        "split": data.split,
        "names": data.spelling,
        "classes": data.classes,
        "phrases": data.phrases,
        "protocol": protocol.to_dict(),
        "compat": compat,
        "details": dict(details or {}),
        "images": len(data.samples),
        "published_images": data.expected,
        "ids": hashlib.sha256(ids.encode()).hexdigest(),
    }
    return dict(json.loads(json.dumps(header)))  # as it comes back from a file


def evaluate(
    model: Segmenter,
    data: SegmentationData,
    protocol: Protocol,
    header: Mapping[str, Any],
    *,
    journal: Path | None = None,
    shard: tuple[int, int] = (1, 1),
) -> Entries:
    """Segment the images of one shard and count; what the ``journal`` has already is not done again.

    ``shard``: number, from 1, and count. Returns an entry per image of the journal: the
    cells of its confusion matrix that are not zero, or why it was ``skipped`` (those are tried again by the next run).
    """
    number, count = shard
    if not 1 <= number <= count:
        raise InvalidConfig("Shards are numbered from 1 to their count", got=f"{number}/{count}")
    entries = resume(journal, header) if journal else {}
    todo = [s for s in data.samples[number - 1 :: count] if "n" not in entries.get(s.id, {})]
    labels = data.query()
    for sample in progress(todo, total=len(todo), description=f"{data.name} {number}/{count}", unit="image"):
        entries[sample.id] = _measure(model, sample, labels, len(data.classes), protocol, header["compat"])
        if journal:
            _append(journal, {"id": sample.id, **entries[sample.id]})
    return entries


def _measure(
    model: Segmenter, sample: Sample, labels: Any, classes: int, protocol: Protocol, compat: str | None
) -> dict[str, Any]:
    try:
        image, truth = sample.image(), sample.labels()
        if image.shape[-2:] != truth.shape:
            raise InvalidDataset(
                "Image and labels have one size", got=f"{tuple(image.shape[-2:])} and {tuple(truth.shape)}"
            )
    except (InvalidImage, InvalidDataset, MissingFile) as error:
        return {"skipped": f"{type(error).__name__}: {error}"}
    shown, size = [protocol.show(image)], (truth.shape[0], truth.shape[1])
    windows: dict[str, Any] = {"crop": protocol.crop, "stride": protocol.stride, "compat": compat}
    options: dict[str, Any] = {"denoise": protocol.denoise, "refine": protocol.refine, "compat": compat}
    if protocol.coarse_threshold is not None:
        options["coarse_threshold"] = protocol.coarse_threshold
    try:
        features = model.encode(shown, refine=protocol.refine, **windows)[0]
        answer = features.query(labels, size=size, **options)
    except UnsupportedSize as error:
        return {"skipped": f"{type(error).__name__}: {error}"}
    matrix = confusion(answer.labels, truth, classes)
    true, predicted = np.nonzero(matrix)
    return {"true": true.tolist(), "predicted": predicted.tolist(), "n": matrix[true, predicted].tolist()}


def resume(path: Path, header: Mapping[str, Any]) -> Entries:
    """The entries of a journal to go on with; a line that a killed run left unfinished is cut off. Makes a new one."""
    if path.is_file() and b"\n" in path.read_bytes():
        found, entries = read_journal(path)
        _require_same(found, header, path)
        with path.open("r+b") as file:
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
        return entries
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(header, ensure_ascii=False) + "\n", encoding="utf-8")
    return {}


def read_journal(path: Path) -> tuple[dict[str, Any], Entries]:
    """Header and entries of a journal; of two entries for one image the later counts, an unfinished last line not."""
    if not path.is_file():
        raise MissingFile("A journal must exist", got=path)
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        header, *rest = [json.loads(line) for line in lines]
        entries = {line.pop("id"): line for line in rest}
        wrong = header["format"] != FORMAT
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidDataset(
            "A journal is a header and one JSON object per image", got=f"{path}: {error!r}", remedy="Delete it."
        ) from error
    if wrong:
        raise InvalidDataset(f"A journal has format {FORMAT}", got=f"{path}: {header['format']}")
    return header, entries


def merge(paths: Iterable[Path]) -> tuple[dict[str, Any], Entries]:
    """Journals of one measurement, added up. ``IncompatibleModel`` when one is of another model, protocol or data."""
    paths = list(paths)
    if not paths:
        raise MissingFile("There is at least one journal to merge", got="none")
    header, entries = read_journal(paths[0])
    for path in paths[1:]:
        other, more = read_journal(path)
        _require_same(other, header, path)
        for name, entry in more.items():
            known = entries.get(name, {})
            if "n" in known and "n" in entry and known != entry:
                raise IncompatibleModel("Journals agree where they hold the same image", got=f"{name} in {path}")
            entries[name] = known if "n" in known else entry
    return header, entries


def summarize(header: Mapping[str, Any], entries: Entries, *, published: float | None = None) -> dict[str, Any]:
    """The report: measures of the whole matrix, of every class, the interval over images, and how it was made.

    ``published``: the mIoU in percent that a paper prints for this setting; Opsin holds no such number itself.
    """
    names, phrases = header["classes"], header["phrases"]
    measured = [e for _, e in sorted(entries.items()) if "n" in e]
    matrix = np.zeros((len(names), len(names) + 1), dtype=np.int64)
    hits, unions = (np.zeros((len(measured), len(names)), dtype=np.int64) for _ in range(2))
    for i, entry in enumerate(measured):
        share = _dense(entry, len(names))
        matrix += share
        hits[i], _, _, unions[i] = _areas(share)
    found = measures(matrix)
    rows = zip(names, phrases, found["IoU"], found["accuracy"], found["true"], found["predicted"], strict=True)
    keys = ("class", "phrases", "IoU", "accuracy", "true_pixels", "predicted_pixels")
    return {
        "measure": "segmentation",
        **{k: header[k] for k in ("model", "dataset", "split", "names", "protocol", "compat", "details")},
        "images": {
            "in_split": header["images"],
            "measured": len(measured),
            "skipped": len(entries) - len(measured),
            "in_published_split": header["published_images"] or None,
        },
        "complete": len(measured) == header["images"],
        **{k: found[k] for k in ("mIoU", "fwIoU", "aAcc", "mAcc", "unknown")},
        "mIoU_interval": None if np.isnan(found["mIoU"]) else _interval(hits, unions),
        "published_mIoU": None if published is None else published / 100,
        "classes": [dict(zip(keys, row, strict=True)) for row in rows],
        "skipped": {name: e["skipped"] for name, e in sorted(entries.items()) if "skipped" in e},
        "environment": report.environment(0),
    }


def markdown(full: Mapping[str, Any]) -> str:
    """The report for people: percentages, the setting, a row per class, what was skipped."""
    images, protocol, env = full["images"], full["protocol"], full["environment"]
    machine = env["machine"]
    partial = "" if full["complete"] else f" (PARTIAL: {images['measured']} of {images['in_split']} images)"
    low, high = full["mIoU_interval"] or (float("nan"), float("nan"))
    published = full["published_mIoU"]
    expected = f", {images['in_published_split']} in the published split" if images["in_published_split"] else ""
    counts = f"{images['in_split']} images, {images['measured']} measured, {images['skipped']} skipped{expected}"
    setting = {
        "model": full["model"],
        "data": f"{full['dataset']} {full['split']}: {counts}",
        "class names": full["names"],
        "protocol": f"{protocol['name']} ({protocol['source']}): frame {protocol['frame']}, crop {protocol['crop']}, "
        f"stride {protocol['stride']}, denoising {protocol['denoise']}, refined {protocol['refine']}",
        "compatibility": full["compat"] or "none",
        **full["details"],
        "made": f"{env['date']}, commit {env['commit']}, {machine['accelerator'] or machine['processor']}",
        "versions": ", ".join(f"{k} {v}" for k, v in env["versions"].items()),
    }
    lines = [
        f"# {full['model']} on {full['dataset']}{partial}\n",
        "| | measured | published |\n|---|---|---|",
        f"| mIoU | {_percent(full['mIoU'])} [{_percent(low)}, {_percent(high)}] | "
        f"{'not recorded here' if published is None else _percent(published)} |",
        *(f"| {k} | {_percent(full[k])} | |" for k in ("fwIoU", "aAcc", "mAcc", "unknown")),
        "\nIn percent; in brackets the 95 % interval when images are drawn again. Unknown pixels count as missed.\n",
        *(f"* {key}: {value}" for key, value in setting.items()),
        "\n| class | asked for | IoU | accuracy | true pixels | predicted pixels |\n|---|---|---|---|---|---|",
    ]
    for row in full["classes"]:
        cells = (row["class"], ", ".join(row["phrases"]), _percent(row["IoU"]), _percent(row["accuracy"]))
        lines.append(f"| {' | '.join(cells)} | {row['true_pixels']} | {row['predicted_pixels']} |")
    if full["skipped"]:
        lines += ["\n## Skipped\n", *(f"* {name}: {reason}" for name, reason in full["skipped"].items())]
    return "\n".join(lines) + "\n"


def write(path: Path, full: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write the report as JSON to ``path`` and as Markdown beside it; returns both paths."""
    report.write(path, dict(full))
    with atomic_path(path.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(full), encoding="utf-8")
    return path, path.with_suffix(".md")


def _areas(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hits, true, predicted pixels and union of every class; of ``(…, C, C + 1)`` each ``(…, C)``."""
    hits = np.diagonal(matrix[..., :-1], axis1=-2, axis2=-1)
    true, predicted = matrix.sum(-1), matrix[..., :-1].sum(-2)
    return hits, true, predicted, true + predicted - hits


def _interval(hits: np.ndarray, unions: np.ndarray) -> tuple[float, float]:
    def drawn_again(rows: np.ndarray) -> float:
        weights = np.bincount(rows, minlength=len(hits))
        with np.errstate(invalid="ignore"):
            return _mean((weights @ hits) / (weights @ unions))

    return report.bootstrap(drawn_again, len(hits))


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def _dense(entry: Mapping[str, Any], classes: int) -> np.ndarray:
    matrix = np.zeros((classes, classes + 1), dtype=np.int64)
    matrix[entry["true"], entry["predicted"]] = entry["n"]
    return matrix


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """One write and a sync per image: a killed run loses at most the image it was at."""
    with path.open("ab") as file:
        file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    other = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if other:
        raise IncompatibleModel(
            "A journal belongs to one model, protocol and data set",
            got=f"{path} with another {', '.join(other)}",
            remedy="Write to another file, or delete this journal.",
        )


def _percent(share: float) -> str:
    return "n/a" if share != share else f"{100 * share:.2f}"
