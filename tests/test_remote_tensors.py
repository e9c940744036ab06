"""Tensors of a file on the hub by HTTP ranges: a local server in the shape of the hub, no network."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opsin import hub, remote_tensors
from opsin.backbones.text import load_text
from opsin.cards import ModelCard
from opsin.errors import InvalidCheckpoint, MissingFile, ModelUnavailable
from opsin.remote_tensors import fetch_tensors, load_tensors, read_tensors
from tests.conformance.test_text import full_model, save_tokenizer

COMMIT = "c" * 40
STATE = {
    "logit_scale": torch.tensor(3.0),
    "text_model.a": torch.randn(7, 5),
    "text_model.b": torch.randn(3).to(torch.bfloat16),
    "text_projection.weight": torch.arange(6).reshape(2, 3),
    "vision_model.a": torch.randn(300, 100),
    "vision_model.z": torch.randn(11),
    "zzz.text": torch.randn(4, 2, dtype=torch.float64),
}


def is_text(name: str) -> bool:
    return "text" in name


@dataclass
class Hub:
    """Files under ``org/repo``; what was asked for, and how the server misbehaves."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    sent: int = 0
    ranges: bool = True
    breaks: int = 0  # this many answers stop in the middle
    mute: bool = False  # answers stop before the first byte

    def put(self, name: str, state: dict[str, torch.Tensor], folder: Path) -> None:
        save_file(state, folder / "one.safetensors")
        self.files[name] = (folder / "one.safetensors").read_bytes()


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does for ``/org/repo/resolve/<revision>/<name>``."""

    def __init__(self, hub: Hub, *args: object) -> None:
        self.hub = hub
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        name = path.split("/resolve/")[-1].split("/", 1)[-1]
        wanted = self.headers.get("Range", "")
        self.hub.asked.append((self.command, name, wanted))
        data = self.hub.files.get(name)
        if path == f"/api/models/org/repo/tree/{COMMIT}":
            sizes = {name: len(content) for name, content in self.hub.files.items()}
            listing = [{"type": "file", "path": name, "size": size, "oid": ""} for name, size in sizes.items()]
            data = json.dumps(listing).encode()
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        part, whole = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted), data
        if part and self.hub.ranges:
            data = data[int(part[1]) : int(part[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {part[1]}-{int(part[1]) + len(data) - 1}/{len(whole)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{hash(whole) & 0xFFFFFFFF:08x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            if self.hub.breaks and len(data) > 100:
                self.hub.breaks -= 1
                data = data[: len(data) // 2]
                self.close_connection = True
            if self.hub.mute:
                data, self.close_connection = b"", True
            self.wfile.write(data)
            self.hub.sent += len(data)

    def log_message(self, *args: object) -> None:
        pass


def use_port(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    from huggingface_hub import constants

    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    state = Hub()
    state.put("model.safetensors", STATE, tmp_path)
    state.files["config.json"] = b'{"model_type": "clip"}'
    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, state))
    threading.Thread(target=partial(web.serve_forever, 0.01), daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "opsin"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    use_port(monkeypatch, web.server_port)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(remote_tensors, "_PAUSE", 0.01)
    yield state
    web.shutdown()
    web.server_close()


def equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return got.keys() == expected.keys() and all(
        torch.equal(got[key], value) and got[key].dtype == value.dtype for key, value in expected.items()
    )


TEXT = {key: value for key, value in STATE.items() if is_text(key)}


def test_only_the_wanted_bytes_travel(server: Hub, tmp_path: Path):
    target = tmp_path / "opsin/some/text.safetensors"
    path = fetch_tensors("org/repo", "main", "model.safetensors", is_text, target)
    assert path == target
    assert equal(load_file(path), TEXT)
    assert server.sent < 3000 < len(server.files["model.safetensors"])
    assert [p.name for p in target.parent.iterdir() if p.suffix == ".partial"] == []
    before = server.sent
    assert fetch_tensors("org/repo", "main", "model.safetensors", is_text, target) == target
    assert server.sent == before, "an unchanged file is not read again"
    server.put("model.safetensors", {key: value + 1 for key, value in STATE.items()}, tmp_path)
    path = fetch_tensors("org/repo", "main", "model.safetensors", is_text, target)
    assert equal(load_file(path), {key: value + 1 for key, value in TEXT.items()}), "a changed file is"


def test_under_a_commit_nothing_is_asked_twice(server: Hub, tmp_path: Path):
    target = tmp_path / "t.safetensors"
    for _ in range(2):
        fetch_tensors("org/repo", COMMIT, "model.safetensors", is_text, target)
    assert sum(command == "HEAD" for command, _, _ in server.asked) == 1


def test_a_broken_download_goes_on(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "t.safetensors"
    server.breaks = 3
    path = fetch_tensors("org/repo", "main", "model.safetensors", lambda name: True, target)
    assert equal(load_file(path), STATE)
    target.unlink()
    # a crash in the middle: the next call asks only for the rest
    real = remote_tensors._bytes

    def crash(url: str, start: int, stop: int) -> Iterator[bytes]:
        for chunk in real(url, start, stop):
            yield chunk[: len(chunk) // 2] if stop - start > 100_000 else chunk
            if stop - start > 100_000:
                raise KeyboardInterrupt

    monkeypatch.setattr(remote_tensors, "_bytes", crash)
    with pytest.raises(KeyboardInterrupt):
        fetch_tensors("org/repo", "main", "model.safetensors", lambda name: True, target)
    assert not target.exists()
    monkeypatch.setattr(remote_tensors, "_bytes", real)
    before = len(server.asked)  # what was sent is counted by the server's thread, perhaps after the crash
    path = fetch_tensors("org/repo", "main", "model.safetensors", lambda name: True, target)
    assert equal(load_file(path), STATE)
    ranges = [r.removeprefix("bytes=").split("-") for command, _, r in server.asked[before:] if command == "GET"]
    asked = sum(int(last) - int(first) + 1 for first, last in ranges)
    assert asked < 0.6 * len(server.files["model.safetensors"])


def test_a_connection_that_never_holds_is_an_error(server: Hub, tmp_path: Path):
    server.mute = True
    with pytest.raises(ModelUnavailable, match="must be in the cache or reachable"):
        fetch_tensors("org/repo", "main", "model.safetensors", is_text, tmp_path / "t.safetensors")
    assert sum(command == "GET" for command, _, _ in server.asked) == 5


def test_a_server_without_ranges_gives_the_whole_file(server: Hub, tmp_path: Path):
    server.ranges = False
    path = fetch_tensors("org/repo", "main", "model.safetensors", is_text, tmp_path / "t.safetensors")
    assert equal(load_file(path), STATE)
    assert equal(read_tensors(path, is_text), TEXT)


def test_a_cached_whole_file_is_used(server: Hub, tmp_path: Path):
    whole = hub.fetch("org/repo", "model.safetensors")
    before = len(server.asked)
    assert fetch_tensors("org/repo", "main", "model.safetensors", is_text, tmp_path / "t.safetensors") == whole
    assert len(server.asked) == before


def test_offline(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "t.safetensors"
    fetch_tensors("org/repo", "main", "model.safetensors", is_text, target)
    got = load_tensors("hf:org/repo", is_text, part="text")
    monkeypatch.setenv("OPSIN_OFFLINE", "1")
    before = len(server.asked)
    assert fetch_tensors("org/repo", "main", "model.safetensors", is_text, target) == target
    assert equal(load_tensors("hf:org/repo", is_text, part="text"), got)
    with pytest.raises(ModelUnavailable, match=r"offline mode.*hf download org/other"):
        fetch_tensors("org/other", "main", "model.safetensors", is_text, tmp_path / "o.safetensors")
    with pytest.raises(ModelUnavailable, match=r"offline mode.*hf download org/other .*safetensors"):
        load_tensors("hf:org/other", is_text, part="text")
    with pytest.raises(ModelUnavailable, match="offline"):
        load_tensors("hf:org/repo", is_text, part="another-part")
    assert len(server.asked) == before


@pytest.mark.parametrize(
    "data",
    [b"<!doctype html>" * 20, b"\x08" + b"\x00" * 7 + b"not json", (10).to_bytes(8, "little") + b'{"a": {"dt', b""],
)
def test_damaged_files(server: Hub, tmp_path: Path, data: bytes):
    server.files["model.safetensors"] = data
    with pytest.raises((InvalidCheckpoint, ModelUnavailable)):
        fetch_tensors("org/repo", "main", "model.safetensors", is_text, tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()


def test_nothing_wanted(server: Hub, tmp_path: Path):
    with pytest.raises(InvalidCheckpoint, match="none of them"):
        fetch_tensors("org/repo", "main", "model.safetensors", lambda name: False, tmp_path / "t.safetensors")
    with pytest.raises(ModelUnavailable, match="not found"):
        fetch_tensors("org/repo", "main", "no.safetensors", is_text, tmp_path / "t.safetensors")


def index(weight_map: dict[str, str]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def test_remote_shards(server: Hub, tmp_path: Path):
    del server.files["model.safetensors"]
    server.put("model-00001-of-00002.safetensors", TEXT, tmp_path)
    server.files["model-00002-of-00002.safetensors"] = b"damaged"
    server.files["model.safetensors.index.json"] = index(
        {key: f"model-0000{1 if is_text(key) else 2}-of-00002.safetensors" for key in STATE}
    )
    assert equal(load_tensors("hf:org/repo", is_text, part="text"), TEXT)
    assert not any("00002-of" in name for _, name, _ in server.asked)


def test_a_remote_repository_with_pickles_only(server: Hub, tmp_path: Path):
    del server.files["model.safetensors"]
    torch.save(STATE, tmp_path / "w.bin")
    server.files["pytorch_model.bin"] = (tmp_path / "w.bin").read_bytes()
    assert equal(load_tensors("hf:org/repo", is_text, part="text"), TEXT)


@pytest.mark.parametrize("family", ["siglip2", "clip", "tipsv2"])
def test_a_text_tower_from_the_hub(server: Hub, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch):
    """Config, tokeniser and the text tensors travel, the image half does not; then offline."""
    folder = tmp_path / "model"
    full_model(family).save_pretrained(folder)
    save_tokenizer(folder)
    server.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    encoder = load_text("hf:org/repo")
    assert encoder.name == f"hf:org/repo@{COMMIT}"
    rows = encoder.encode(["a red cat", "dog"])
    assert torch.equal(rows, load_text(folder).encode(["a red cat", "dog"]))
    whole = load_file(folder / "model.safetensors")
    image = sum(value.nbytes for name, value in whole.items() if name.startswith("vision"))
    assert server.sent < sum(map(len, server.files.values())) - 0.9 * image
    before = len(server.asked)
    with monkeypatch.context() as patch:
        patch.setenv("OPSIN_OFFLINE", "1")
        assert torch.equal(load_text("hf:org/repo").encode(["a red cat", "dog"]), rows)
    use_port(monkeypatch, 9)  # there is no network, and nobody has said so
    assert torch.equal(load_text("hf:org/repo").encode(["a red cat", "dog"]), rows)
    assert len(server.asked) == before


def test_a_pickle_of_something_else(tmp_path: Path):
    torch.save([torch.zeros(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidCheckpoint, match="by name"):
        load_tensors(tmp_path, is_text, part="text")
    torch.save({3: torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidCheckpoint, match="text half"):
        load_tensors(tmp_path, is_text, part="text")


def test_a_folder_is_read_itself_whatever_its_card_says(tmp_path: Path):
    ModelCard("copy", "backbone", "clip", source="hf:org/repo").save(tmp_path / "card.json")
    save_file(STATE, tmp_path / "model.safetensors")
    for ref in (tmp_path, str(tmp_path), f"dir:{tmp_path}"):
        assert equal(load_tensors(ref, is_text, part="text"), TEXT)


def test_local_folders(tmp_path: Path):
    with pytest.raises(MissingFile, match=r"model\.safetensors"):
        load_tensors(tmp_path, is_text, part="text")
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert equal(load_tensors(tmp_path, is_text, part="text"), TEXT)
    save_file({key: value + 1 for key, value in STATE.items()}, tmp_path / "model.safetensors")
    assert torch.equal(load_tensors(f"dir:{tmp_path}", is_text, part="text")["text_model.a"], STATE["text_model.a"] + 1)
    with pytest.raises(InvalidCheckpoint, match="sam half"):
        load_tensors(tmp_path, lambda name: name.startswith("sam"), part="sam")
    # shards: the one without a wanted tensor is not opened
    save_file(TEXT, tmp_path / "model-1.safetensors")
    (tmp_path / "model-2.safetensors").write_bytes(b"damaged")
    table = {key: f"model-{1 if is_text(key) else 2}.safetensors" for key in STATE}
    (tmp_path / "model.safetensors.index.json").write_bytes(index(table))
    assert equal(load_tensors(tmp_path, is_text, part="text"), TEXT)
    with pytest.raises(InvalidCheckpoint, match="whole"):
        load_tensors(tmp_path, lambda name: "vision" in name, part="vision")
    (tmp_path / "model.safetensors.index.json").write_bytes(b"[]")
    with pytest.raises(InvalidCheckpoint, match="maps tensors"):
        load_tensors(tmp_path, is_text, part="text")
