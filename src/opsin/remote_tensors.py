"""Some tensors of a checkpoint, and no more: the text half of a model of images and text, or only SAM's decoder.

A safetensors file begins with a table of its tensors. Where the hub's cache does not hold the whole file, the table
and the wanted tensors are read by HTTP ranges into a small file of the same format.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsin import hub
from opsin.cards import catalogue
from opsin.errors import InvalidCheckpoint, MissingFile, ModelUnavailable

if TYPE_CHECKING:
    from torch import Tensor

Wanted = Callable[[str], bool]
CHUNK = 1 << 20  # bytes handed on at a time
_ATTEMPTS = 5  # in a row without a single byte, before a broken connection is an error
_PAUSE = 1.0  # seconds before a broken connection is made again
_TABLE_LIMIT = 100 << 20  # bytes; the limit of the format
_INDEX = "model.safetensors.index.json"


def load_tensors(ref: str | Path, wanted: Wanted, *, part: str) -> dict[str, Tensor]:
    """The tensors of a model whose names ``wanted`` accepts, on the CPU, in the dtype of the file.

    Of a model in shards only those shards are opened, or read from the hub, that hold one.

    Args:
        ref: ``"hf:org/repo@revision"``, ``"dir:path"``, a folder or a catalogue name.
        wanted: tells by its name whether a tensor is needed.
        part: name of what is read, such as ``"text"``: with model and revision it names the file in Opsin's cache.

    Raises:
        MissingFile, ModelUnavailable, GatedModel, InvalidConfig, InvalidCheckpoint (damaged, or nothing wanted in it).
    """
    card = catalogue().get(str(ref))  # the card inside a folder may name the repository that it was copied from
    if card is not None and card.repo:
        ref = f"hf:{card.repo}@{card.revision}"
    if isinstance(ref, str) and ref.startswith("hf:"):
        paths = _remote_files(*hub.parse_hf(ref), wanted, part)
    else:
        paths = _local_files(hub.resolve(ref), wanted)
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= read_tensors(path, wanted)
    if not tensors:
        raise InvalidCheckpoint(f"The weights of {ref} must hold the {part} half", got="no tensor of it")
    return tensors


def commit_of(repo: str, revision: str, files: Sequence[str] = ("config.json", "model*.safetensors*")) -> str:
    """The commit that a branch or tag stands for now; offline, what it stood for when files were last downloaded.

    ``files`` are what the error names that is raised when there are none: ``ModelUnavailable``.
    """
    try:
        return hub.fetch(repo, "config.json", revision).parent.name
    except ModelUnavailable as error:
        if not hub.is_offline():
            raise
        got = f"the network is switched off (offline mode) and not in the cache: {', '.join(files)}"
        raise hub.unavailable(repo, revision, files, got) from error


def read_tensors(path: str | Path, wanted: Wanted = lambda name: True) -> dict[str, Tensor]:
    """The wanted tensors of a local weight file; of a safetensors file only their bytes are read."""
    from safetensors import SafetensorError, safe_open

    path = hub.check_file(path)
    if path.suffix != ".safetensors":
        content = hub.load_pickle(path)
        if not isinstance(content, dict):
            raise InvalidCheckpoint("A weight file holds tensors by name", got=f"{type(content).__name__} in {path}")
        return {str(key): value for key, value in content.items() if wanted(str(key))}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise InvalidCheckpoint(
            "A safetensors file must be whole", got=f"{path} ({error})", remedy="Download or copy it again."
        ) from error


def fetch_tensors(repo: str, revision: str, filename: str, wanted: Wanted, target: Path) -> Path:
    """A local safetensors file with the wanted tensors of a file on the hub; read it with :func:`read_tensors`.

    That is the whole file where the hub's cache has it, else ``target``: what is not there yet is read by HTTP ranges,
    progress is shown, and a broken download goes on where it stopped. A server without ranges gives the whole file.

    Args:
        repo: ``"org/repo"``.  revision: branch, tag or commit; only under a commit is ``target`` used unasked.
        filename: of the safetensors file in the repository.
        wanted: tells by its name whether a tensor is needed.
        target: the file to write, in :func:`opsin.hub.cache_dir`, with a name of its own for each set of tensors.

    Raises:
        ModelUnavailable (offline and not there, or no such file), GatedModel, InvalidCheckpoint, ResourceError.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    whole = try_to_load_from_cache(repo, filename, revision=revision)
    if isinstance(whole, str):
        return Path(whole)
    pinned = re.fullmatch(r"[0-9a-f]{40}", revision) is not None
    if target.is_file() and (pinned or hub.is_offline()):
        return target
    if hub.is_offline():
        raise hub.unavailable(
            repo, revision, (filename,), f"the network is switched off (offline mode) and not in the cache: {filename}"
        )
    with hub.hub_errors(repo, revision, (filename,), None):
        url = hf_hub_url(repo, filename, revision=revision)
        remote = get_hf_file_metadata(url)
        tag = re.sub(r"\W", "", remote.etag or "") or "untagged"
        if target.is_file() and _tag(target) == tag:
            return target
        try:
            table, start = _table(url, remote.size)
            return _fetch(url, f"{repo}/{filename}", table, start, wanted, target, tag)
        except _NoRanges:
            return hub.fetch(repo, filename, revision)


class _NoRanges(Exception):
    """The server answers a request for a range with the whole file."""


def _local_files(folder: Path, wanted: Wanted) -> list[Path]:
    if (folder / _INDEX).is_file():
        return [folder / name for name in _shards(folder / _INDEX, wanted)]
    names = ("model.safetensors", *hub.PICKLES[:2])
    paths = [path for name in names for path in sorted(folder.glob(name))]
    if not paths:
        raise MissingFile("A model folder holds model.safetensors", got=str(folder))
    return paths[:1] if paths[0].suffix == ".safetensors" else paths


def _remote_files(repo: str, revision: str, wanted: Wanted, part: str) -> list[Path]:
    revision = commit_of(repo, revision)  # all files come from the same one

    def target(name: str) -> Path:
        return hub.cache_dir() / "tensors" / repo.replace("/", "--") / revision / f"{part}-{name}"

    names = ["model.safetensors"]
    if not target(names[0]).is_file():
        try:
            names = _shards(hub.fetch(repo, _INDEX, revision), wanted)
        except ModelUnavailable as error:
            if not (_is_absent(error) or hub.is_offline()):
                raise
    try:
        return [fetch_tensors(repo, revision, name, wanted, target(name)) for name in names]
    except ModelUnavailable as error:
        if not _is_absent(error):
            raise
    return _local_files(hub.resolve(f"hf:{repo}@{revision}"), wanted)  # an older repository, with pickles


def _is_absent(error: ModelUnavailable) -> bool:
    """Whether the repository lacks the file, and not that the network is at fault."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cause = error.__cause__
    return isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError)


def _shards(index: Path, wanted: Wanted) -> list[str]:
    """The names of the shards that hold a wanted tensor."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({str(file) for tensor, file in names.items() if wanted(tensor)})
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InvalidCheckpoint(f"{_INDEX} maps tensors to files", got=f"{index} ({error})") from error
    for name in shards:
        hub.check_inside(name)
    return shards


def _tag(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return str((file.metadata() or {}).get("etag", ""))
    except (SafetensorError, OSError):
        return ""


def _table(url: str, size: int | None) -> tuple[dict[str, Any], int]:
    """The table of a remote safetensors file (name → dtype, shape, data_offsets), and where its data begins."""
    length = int.from_bytes(b"".join(_bytes(url, 0, 8)), "little")
    start = 8 + length
    if length > _TABLE_LIMIT or (size is not None and start > size):
        raise InvalidCheckpoint("A safetensors file begins with a table of its tensors", got=url)
    try:
        table = json.loads(b"".join(_bytes(url, 8, start)))
        for value in table.values():
            if "dtype" in value:
                first, last = value["data_offsets"]
                if not 0 <= first <= last or (size is not None and start + last > size):
                    raise ValueError(f"data_offsets {first}, {last}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidCheckpoint(
            "A safetensors file begins with a table of its tensors", got=f"{url} ({error})"
        ) from error
    return table, start


def _fetch(url: str, what: str, table: dict[str, Any], start: int, wanted: Wanted, target: Path, tag: str) -> Path:
    """Write ``target``; what is there of it already, from an earlier try at the same file, is kept."""
    from filelock import FileLock

    from opsin.runtime import progress

    chosen = sorted(
        ((name, value) for name, value in table.items() if name != "__metadata__" and wanted(name)),
        key=lambda item: item[1]["data_offsets"],
    )
    if not chosen:
        raise InvalidCheckpoint(f"{what} must hold the tensors that are asked for", got="none of them")
    head, runs = _layout(chosen, tag)
    total = sum(last - first for first, last in runs)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{tag}.partial")
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.is_file() and _tag(target) == tag:  # another process was quicker
            return target
        with partial.open("a+b") as file:
            file.seek(0)
            if file.read(len(head)) != head:  # new, or made for other tensors
                file.truncate(0)
                file.write(head)
            done = file.seek(0, os.SEEK_END) - len(head)
            rest = (_bytes(url, start + first, start + last) for first, last in _remaining(runs, done))
            chunks = -(-(total - done) // CHUNK)
            for chunk in progress(chain.from_iterable(rest), total=chunks, description=what, unit="MiB"):
                file.write(chunk)
        if partial.stat().st_size != len(head) + total:
            partial.unlink()
            raise InvalidCheckpoint(f"{what} must arrive whole", got="another number of bytes", remedy="Try again.")
        os.replace(partial, target)
    return target


def _layout(chosen: list[tuple[str, Any]], tag: str) -> tuple[bytes, list[tuple[int, int]]]:
    """The head of a safetensors file with the chosen tensors, and the runs of bytes of the remote data that follow."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt", "etag": tag}}
    runs: list[tuple[int, int]] = []
    position = 0
    for name, value in chosen:
        first, last = value["data_offsets"]
        table[name] = {**value, "data_offsets": [position, position + last - first]}
        position += last - first
        if runs and runs[-1][1] == first:
            first = runs.pop()[0]
        runs.append((first, last))
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, runs


def _remaining(runs: list[tuple[int, int]], done: int) -> Iterator[tuple[int, int]]:
    for first, last in runs:
        if done < last - first:
            yield first + done, last
        done = max(0, done - (last - first))


def _bytes(url: str, start: int, stop: int) -> Iterator[bytes]:
    """Bytes ``start`` to ``stop`` of a file, asked for again from where the connection broke."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    attempts = _ATTEMPTS
    while start < stop:
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            with http_stream_backoff("GET", url, headers=headers, timeout=30, retry_on_exceptions=()) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:
                    raise _NoRanges
                for chunk in response.iter_bytes(CHUNK):
                    start, attempts = start + len(chunk), _ATTEMPTS
                    yield chunk
        except Exception as error:
            # httpx has another name in newer versions of huggingface_hub; what it raises here is a broken connection
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2") or attempts == 1:
                raise
        if start < stop:
            attempts -= 1
            if not attempts:
                raise InvalidCheckpoint(f"{url} must give every byte of a range", got=f"{stop - start} too few")
            time.sleep(_PAUSE)
