"""A mask cache: one append-only file per split, memory-mapped, that survives being killed at any moment."""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opsin.errors import InvalidDataset
from opsin.masks.maps import RegionMaps

MAGIC = b"OPSM"
HEADER = struct.Struct("<4sIII")  # magic, bytes of the key, bytes of the payload, crc32 of both
SHAPE = struct.Struct("<IIII")  # regions, layers, height, width


class MaskStore:
    """Regions of many images under their names, in one file.

    A record is header, name and zlib-compressed label maps; the first record holds the settings that made the masks.
    Opening reads the headers only; a record that was cut off by a kill is dropped and made again. One process writes;
    any number read, each through its own memory map (a store can be pickled into a worker).
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any] | None = None) -> None:
        """Open or begin ``path``; ``InvalidDataset`` when other ``settings`` made it, or it is no mask cache."""
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        self._records: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._scan()
        if settings is not None:
            text = json.dumps(settings, sort_keys=True)
            if "" not in self._records:
                self._append("", text.encode())
            elif (made := self._payload("").decode()) != text:
                raise InvalidDataset(
                    f"The mask cache {self.path} is used with the settings that made it",
                    got=f"{text} where it was made with {made}",
                    remedy="Name another mask_cache, or delete the file to make the masks again.",
                )

    def __contains__(self, name: str) -> bool:
        """Whether ``name`` has been stored, be it without any region."""
        return name in self._records

    def __len__(self) -> int:
        """Number of images."""
        return len(self._records) - ("" in self._records)

    def count(self, name: str) -> int:
        """How many regions ``name`` has."""
        return int(SHAPE.unpack_from(self._payload(name))[0])

    def put(self, name: str, regions: RegionMaps | None) -> None:
        """Store the regions of ``name`` (None: it has none), flushed to disk before this returns."""
        if regions is None:
            self._append(name, SHAPE.pack(0, 0, 0, 0))
            return
        layers = regions.layers.numpy()
        self._append(name, SHAPE.pack(len(regions), *layers.shape) + zlib.compress(layers.tobytes(), 3))

    def get(self, name: str) -> RegionMaps:
        """The regions of ``name``; ``InvalidDataset`` when there are none."""
        payload = self._payload(name)
        count, *shape = SHAPE.unpack_from(payload)
        if not count:
            raise InvalidDataset("An image to train on has at least one region", got=f"none for {name}")
        try:
            layers = np.frombuffer(zlib.decompress(payload[SHAPE.size :]), np.int16).reshape(shape)
        except (zlib.error, ValueError) as error:
            raise InvalidDataset("A mask cache record is whole", got=f"{name} of {self.path}: {error}") from error
        return RegionMaps(torch.from_numpy(layers.copy()), torch.full((count,), -1))

    def _payload(self, name: str) -> bytes:
        if name not in self._records:
            raise InvalidDataset("The masks of an image are in the cache", got=f"{name!r} is not in {self.path}")
        start, length = self._records[name]
        if self._map is None or len(self._map) < start + length:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map[start : start + length]

    def _append(self, name: str, payload: bytes) -> None:
        key = name.encode()
        header = HEADER.pack(MAGIC, len(key), len(payload), zlib.crc32(payload, zlib.crc32(key)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.truncate(self._end)  # what a killed writer left behind
            file.seek(self._end)
            file.write(header + key + payload)
            file.flush()
            os.fsync(file.fileno())
        self._records[name] = (self._end + HEADER.size + len(key), len(payload))
        self._end += HEADER.size + len(key) + len(payload)

    def _scan(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        if not size:
            return
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != MAGIC[: min(4, size)]:
                raise InvalidDataset("A mask cache begins with its own mark", got=f"another kind of file, {self.path}")
            while self._end + HEADER.size <= size:
                magic, name_length, length, checksum = HEADER.unpack_from(data, self._end)
                start = self._end + HEADER.size + name_length
                if magic != MAGIC or start + length > size:
                    break
                # Only the last record can be torn (each is synced before the next begins): check that one.
                last = start + length + HEADER.size > size
                if last and zlib.crc32(data[self._end + HEADER.size : start + length]) != checksum:
                    break
                self._records[data[start - name_length : start].decode()] = (start, length)
                self._end = start + length

    def close(self) -> None:
        """Let go of the memory map."""
        if self._map is not None:
            self._map.close()
            self._map = None

    def __enter__(self) -> MaskStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}
