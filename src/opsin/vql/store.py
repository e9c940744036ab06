"""A video's tokens, computed once and kept on disk, so that the next question costs no encoding.

A store is a folder: ``store.json`` says of which video, by which model and how; ``00000.safetensors`` and so on hold
the tensors of ``PART`` frames each, memory-mapped when read. A part is written whole or not at all, so a killed run
goes on after the last one.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opsin import runtime
from opsin.errors import IncompatibleModel, InvalidConfig, ResourceError
from opsin.hub import atomic_path, save_safetensors
from opsin.video import VideoFrame, VideoReader
from opsin.vql.timeline import in_chunks

PART = 32  # frames per file
BATCH = 4
Encode = Callable[[Sequence[Tensor]], list[dict[str, Tensor]]]


@dataclass(frozen=True, eq=False)
class Shot:
    """One searched frame: its number, ``time`` in seconds, ``size`` ``(H, W)`` and its tensors by name."""

    frame: int
    time: float
    size: tuple[int, int]
    tensors: Mapping[str, Tensor]


class TokenStore:
    """The shots of one video at ``rate`` frames per second (None: all), in time order, encoded when first asked for.

    ``folder=None`` keeps nothing: every pass encodes anew.
    """

    def __init__(self, reader: VideoReader, encode: Encode, *, rate: float | None, folder: Path | None = None) -> None:
        self.reader, self.encode, self.rate, self.folder = reader, encode, rate, folder
        self.encoded = 0  # frames that went through the model

    def shots(self, start: float = 0.0, stop: float | None = None) -> Iterator[Shot]:
        """Every searched frame with ``start <= time < stop``; what is not there yet is encoded on the way."""
        last: Shot | None = None
        for part in self._parts():
            for shot in _read(part):
                last = shot
                if stop is not None and shot.time >= stop:
                    return
                if shot.time >= start:
                    yield shot
        for shot in self._encode(last, start if self.folder is None else 0.0, self._end_of_tick(stop)):
            if start <= shot.time and (stop is None or shot.time < stop):
                yield shot

    def __len__(self) -> int:
        """Frames on disk."""
        return sum(len(_index(part)) for part in self._parts())

    def _parts(self) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob("[0-9]*.safetensors"))

    def _end_of_tick(self, stop: float | None) -> float | None:
        """The whole tick in which ``stop`` lies is encoded: what is stored must not depend on who asked first."""
        if stop is None or self.rate is None:
            return stop
        return (math.floor(stop * self.rate + 0.5) + 0.5) / self.rate

    def _encode(self, last: Shot | None, start: float, stop: float | None) -> Iterator[Shot]:
        if last is not None:
            after = last.time + 1e-6
            start = after if self.rate is None else (math.floor(last.time * self.rate + 0.5 + 1e-9) + 0.5) / self.rate
        end = min((t for t in (stop, self.reader.duration) if t is not None), default=None)
        total = None if end is None else max(0, math.ceil((end - start) * (self.rate or self.reader.fps)))
        frames = (f for f in self.reader.frames(self.rate, start=start, stop=stop) if not last or f.index > last.frame)
        waiting: list[Shot] = []
        number = len(self._parts())
        try:
            for chunk in in_chunks(runtime.progress(frames, total=total, description="encoding", unit="frame"), BATCH):
                shots = self._shots(chunk)
                waiting += shots if self.folder is not None else []
                yield from shots
                if len(waiting) >= PART:
                    self._write(number, waiting)
                    waiting, number = [], number + 1
        finally:  # an interrupted pass keeps what it has
            if waiting:
                self._write(number, waiting)

    def _shots(self, frames: Sequence[VideoFrame]) -> list[Shot]:
        self.encoded += len(frames)
        tensors = self.encode([f.image for f in frames])
        return [Shot(f.index, f.time, f.size, t) for f, t in zip(frames, tensors, strict=True)]

    def _write(self, number: int, shots: Sequence[Shot]) -> None:
        folder = self.folder
        if folder is None:
            return
        size = sum(t.nbytes for s in shots for t in s.tensors.values())
        free = shutil.disk_usage(folder).free
        if free < 2 * size:
            raise ResourceError(
                "The tokens of a video must fit on the disk", got=f"{free >> 20} MiB free in {folder}",
                remedy="Name another folder as cache, lower the rate, or search without a cache.",
            )  # fmt: skip
        tensors = {f"{s.frame}.{name}": t.contiguous() for s in shots for name, t in s.tensors.items()}
        tensors["index"] = torch.tensor([[s.frame, s.time, *s.size] for s in shots], dtype=torch.float64)
        save_safetensors(tensors, folder / f"{number:05d}.safetensors")


def open_store(
    reader: VideoReader, encode: Encode, key: Mapping[str, Any], *, rate: float | None, cache: Path | None
) -> TokenStore:
    """The store of a video in the folder ``cache``, in a sub-folder named after ``key``: the video's identity and
    everything that the tokens depend on. ``cache=None``: nothing is kept."""
    if cache is None:
        return TokenStore(reader, encode, rate=rate)
    text = json.dumps({**key, "rate": rate}, sort_keys=True)
    folder = Path(cache) / hashlib.sha256(text.encode()).hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    label = folder / "store.json"
    if not label.exists():
        with atomic_path(label) as temporary:
            temporary.write_text(text + "\n")
    elif label.read_text().strip() != text:
        raise IncompatibleModel("A store holds the tokens of one video by one model", got=label.read_text().strip())
    return TokenStore(reader, encode, rate=rate, folder=folder)


def identity(video: Any) -> dict[str, Any]:
    """What tells a video from every other: path, bytes and time of change of its files.

    ``InvalidConfig`` for arrays and live sources, which have no name to be found under again.
    """
    paths = [video] if isinstance(video, (str, Path)) else list(video) if isinstance(video, (list, tuple)) else []
    if not paths or not all(isinstance(p, (str, Path)) and Path(p).exists() for p in paths):
        raise InvalidConfig("Tokens are kept for a video that is a file, a folder or a list of files", got=type(video))
    files = [f for p in map(Path, paths) for f in (sorted(p.iterdir()) if p.is_dir() else [p])]
    facts = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return {"video": hashlib.sha256(json.dumps(facts).encode()).hexdigest(), "name": Path(paths[0]).name}


def made_by(model: Any) -> dict[str, str]:
    """What tells a model from every other, of the same name too: its card, and some numbers of each of its weights."""
    digest = hashlib.sha256(json.dumps(model.card.to_dict(), sort_keys=True).encode())
    for name, weight in model.state_dict().items():
        sample = weight.flatten()[:: max(1, weight.numel() // 16)].double().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + sample.numpy().tobytes())
    return {"weights": digest.hexdigest()}


def _index(part: Path) -> list[list[float]]:
    with safe_open(part, framework="pt") as file:
        return file.get_tensor("index").tolist()


def _read(part: Path) -> Iterator[Shot]:
    try:
        with safe_open(part, framework="pt") as file:
            names: dict[int, list[str]] = {}
            for key in file.keys():  # noqa: SIM118 - not a mapping
                frame, _, name = key.partition(".")
                if name:
                    names.setdefault(int(frame), []).append(name)
            for frame, time, height, width in file.get_tensor("index").tolist():
                tensors = {name: file.get_tensor(f"{int(frame)}.{name}") for name in names[int(frame)]}
                yield Shot(int(frame), time, (int(height), int(width)), tensors)
    except SafetensorError as error:
        raise IncompatibleModel("A part of a token store is a whole safetensors file", got=f"{part}: {error}",
                                remedy="Delete it: it is computed again.") from error  # fmt: skip
