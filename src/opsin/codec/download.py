"""One file of a web server: continued where it stopped, complete or not there."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from opsin import hub
from opsin.errors import ModelUnavailable
from opsin.runtime import progress

_CHUNK = 1 << 20


def download(url: str, folder: Path, *, sha256: str = "", timeout: float = 30.0) -> Path:
    """The file at ``url`` in ``folder``, fetched once.

    A broken download is continued by the next call; the file appears under its name when its length, and its SHA-256
    where one is stated, are right. ``ModelUnavailable`` without the network, ``InvalidCheckpoint`` for another SHA-256.
    """
    name = Path(urlsplit(url).path).name
    target, partial = folder / name, folder / f".{name}.partial"
    if target.is_file():
        return target
    if hub.is_offline():
        raise _unavailable(url, target, "the network is switched off (offline mode)")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(url, partial, timeout)
    except (HTTPError, URLError, TimeoutError, ConnectionError) as error:
        raise _unavailable(url, target, str(error)) from error
    if sha256:
        try:
            hub.check_sha256(partial, sha256)
        except Exception:
            partial.unlink()  # continuing it would not mend it
            raise
    os.replace(partial, target)
    return target


def _fetch(url: str, partial: Path, timeout: float) -> None:
    done = partial.stat().st_size if partial.exists() else 0
    headers = {"User-Agent": "opsin", **({"Range": f"bytes={done}-"} if done else {})}
    try:
        response = urlopen(Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        if error.code != 416 or not done:
            raise
        partial.unlink()  # longer than the file is now: begin again
        return _fetch(url, partial, timeout)
    with response:
        continued = response.status == 206
        length = int(response.headers.get("Content-Length") or 0) + (done if continued else 0)
        with partial.open("ab" if continued else "wb") as file:
            chunks = iter(lambda: response.read(_CHUNK), b"")
            for chunk in progress(chunks, total=length // _CHUNK or None, description=partial.name, unit="MiB"):
                file.write(chunk)
    if length and partial.stat().st_size != length:
        raise ConnectionError(f"{partial.stat().st_size} of {length} bytes came")


def _unavailable(url: str, target: Path, got: str) -> ModelUnavailable:
    return ModelUnavailable(
        "The file must be there or reachable", got=f"{url} ({got})",
        remedy=f"Where there is a network, fetch it, and put it to {target}.",
    )  # fmt: skip
