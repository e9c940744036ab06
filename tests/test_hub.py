"""References, downloads without a network, damaged files, and writing that is never half done."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hf

from opsin import cards, hub
from opsin.cards import ModelCard
from opsin.errors import (
    GatedModel,
    InvalidCheckpoint,
    InvalidConfig,
    MissingFile,
    ModelUnavailable,
    ResourceError,
    UnknownModel,
)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library believe in a network; every test that uses this replaces the download itself."""
    for name in ("HF_HUB_OFFLINE", "OPSIN_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


# -- references ------------------------------------------------------------------------------------------------------


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text("{}")
    for ref in (f"dir:{tmp_path}", str(tmp_path), tmp_path):
        assert hub.resolve(ref) == tmp_path.resolve()
    assert hub.resolve(tmp_path, files=["card.json"]) == tmp_path.resolve()
    with pytest.raises(MissingFile, match="regions"):
        hub.resolve(tmp_path, files=["regions.safetensors"])
    with pytest.raises(MissingFile, match="must exist"):
        hub.resolve(f"dir:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..\\secret", ""])
def test_paths_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="inside"):
        hub.resolve(tmp_path, files=[name])
    with pytest.raises(InvalidConfig, match="inside"):
        hub.resolve("hf:org/repo", files=[name])
    with pytest.raises(InvalidConfig, match="inside"):
        hub.fetch("org/repo", name)


@pytest.mark.parametrize(
    "ref",
    ["hf:", "hf:repo", "hf:/repo", "hf:org/", "hf:a/b/c", "hf:../x", "hf:org/..", "hf:o/r r", "hf:o/r@", "hf:o/r@../x"],
)
def test_malformed_hub_references(ref: str) -> None:
    with pytest.raises(InvalidConfig, match="hf:org/repo"):
        hub.resolve(ref)


def test_well_formed_hub_references() -> None:
    assert hub.parse_hf("hf:org/re.po-1") == ("org/re.po-1", "main")
    assert hub.parse_hf("hf:org/repo@v1.0/x") == ("org/repo", "v1.0/x")


def test_unknown_names() -> None:
    with pytest.raises(UnknownModel, match="dino-b8"):
        hub.resolve("dino-b9")
    with pytest.raises(UnknownModel, match='Did you mean "hf:facebook/dinov2-base"'):
        hub.resolve("facebook/dinov2-base")
    with pytest.raises(UnknownModel, match="does not exist"):
        hub.resolve("./nowhere/")


# -- downloads, with the network replaced ----------------------------------------------------------------------------


def fill_cache(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> list[dict[str, Any]]:
    """A snapshot that holds ``names``; returns the calls made for it."""
    calls: list[dict[str, Any]] = []
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"data")

    def snapshot_download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.usefixtures("online")
def test_only_the_needed_files_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fill_cache(monkeypatch, tmp_path, "config.json", "model.safetensors")
    assert hub.resolve("dinov2-s14") == tmp_path
    assert hub.resolve("hf:org/repo@abc") == tmp_path
    assert [(c["repo"], c["revision"]) for c in calls] == [("facebook/dinov2-small", "main"), ("org/repo", "abc")]
    assert not calls[0]["local_files_only"]
    patterns = calls[0]["allow_patterns"]
    assert "config.json" in patterns
    assert not any(p in ("*", "*.safetensors") or p.endswith(".bin") for p in patterns)  # no second copy of the weights


@pytest.mark.usefixtures("online")
def test_pickled_weights_only_where_there_is_nothing_better(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fill_cache(monkeypatch, tmp_path, "config.json", "pytorch_model.bin")
    assert hub.resolve("hf:org/repo") == tmp_path
    assert "pytorch_model.bin" in calls[1]["allow_patterns"]


@pytest.mark.usefixtures("online")
def test_region_models_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fill_cache(monkeypatch, tmp_path, "card.json", "regions.safetensors", "backbone/config.json")
    assert hub.resolve("hf:me/mine") == tmp_path
    assert len(calls) == 1
    assert "backbone/model*.safetensors" in calls[0]["allow_patterns"]
    fill_cache(monkeypatch, tmp_path / "b", "regions.safetensors")
    with pytest.raises(ModelUnavailable, match=r"no card\.json"):
        hub.resolve("hf:me/mine")


@pytest.mark.usefixtures("online")
def test_a_repository_without_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fill_cache(monkeypatch, tmp_path, "README.md")
    with pytest.raises(ModelUnavailable, match=r"no config\.json and no weights"):
        hub.resolve("hf:org/repo")


@pytest.mark.parametrize("variable", ["OPSIN_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_says_which_files_and_how(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelUnavailable) as found:
        hub.resolve("ren-dinov2-l14")
    message = str(found.value)
    assert "checkpoint.pth" in message
    assert "hf download savyak2/ren-dinov2-vitl14 --revision main checkpoint.pth" in message
    assert "offline" in message
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors.*hf download facebook/dinov2-small"):
        hub.resolve("dinov2-s14")
    with pytest.raises(ModelUnavailable, match=r"checkpoint\.pth"):
        hub.resolve("ren-dino-b8")  # through fetch, because its checksum is known
    assert not any(hub.is_cached(card) for card in cards.catalogue().values() if not card.embedded)


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "the server said no")
    return error


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (hub_error(hf.GatedRepoError), GatedModel, "dinov3-vitb16-pretrain-lvd1689m.*hf auth login.*dinov2-b14-reg"),
        (hub_error(hf.RepositoryNotFoundError), ModelUnavailable, "repository not found"),
        (hub_error(hf.RevisionNotFoundError), ModelUnavailable, "revision not found"),
        (hf.LocalEntryNotFoundError("no"), ModelUnavailable, "no network"),
        (hub_error(hf.HfHubHTTPError), ModelUnavailable, "server said no"),
        (ConnectionError("reset by peer"), ModelUnavailable, "reset by peer"),
        (OSError(28, "No space left on device"), ResourceError, "room"),
        (ZeroDivisionError("a bug"), ZeroDivisionError, "a bug"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_can_go_wrong_on_the_way(
    raised: Exception, expected: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(expected, match=message):
        hub.resolve("dinov3-b16")
    if expected is not GatedModel:
        with pytest.raises(expected, match=message):
            hub.fetch("org/repo", "checkpoint.pth")


@pytest.mark.usefixtures("online")
def test_checksum(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(b"weights")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **options: str(path))
    good = hashlib.sha256(b"weights").hexdigest()
    assert hub.fetch("org/repo", "checkpoint.pth", sha256=good.upper()) == path
    with pytest.raises(InvalidCheckpoint, match=f"{good}.*download it again"):
        hub.fetch("org/repo", "checkpoint.pth", sha256="0" * 64)
    with pytest.raises(InvalidCheckpoint, match="25f8e2d0"):
        hub.resolve("ren-dino-b8")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path))
    assert hub.cache_dir() == tmp_path
    monkeypatch.delenv("OPSIN_CACHE")
    assert hub.cache_dir() == Path("~/.cache/opsin").expanduser()


# -- writing ---------------------------------------------------------------------------------------------------------


def test_atomic_file(tmp_path: Path) -> None:
    target = tmp_path / "new/file.txt"
    with hub.atomic_path(target) as temporary:
        temporary.write_text("first")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), hub.atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "first"
    with pytest.raises(MissingFile), hub.atomic_path(target):
        pass
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_atomic_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("one", "two"):
        with hub.atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert [p.name for p in target.iterdir()] == ["two"]  # nothing of the older one is left
    with pytest.raises(RuntimeError), hub.atomic_path(target) as temporary:  # noqa: PT012
        temporary.mkdir()
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in target.iterdir()] == ["two"]


def test_upload_writes_then_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo: str, **options: Any) -> None:
            sent["repo"] = repo, options["private"]

        def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
            sent["files"] = [p.name for p in Path(folder_path).iterdir()]

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = hub.upload(lambda folder: (folder / "card.json").write_text("{}"), "me/mine", private=True)
    assert address == "https://huggingface.co/me/mine"
    assert sent == {"repo": ("me/mine", True), "files": ["card.json"]}


# -- weight files ----------------------------------------------------------------------------------------------------

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


def test_tensors_survive(tmp_path: Path) -> None:
    hub.save_safetensors({**STATE, "c": torch.ones(2, 3).T}, tmp_path / "w.safetensors")
    torch.save({"epoch": 3, "state": STATE}, tmp_path / "w.pth")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for state in (
        hub.load_safetensors(tmp_path / "w.safetensors"),
        hub.load_pickle(tmp_path / "w.pth")["state"],
        hub.load_pickle(tmp_path / "old.pth"),
    ):
        for key, value in STATE.items():
            assert torch.equal(state[key], value)
            assert state[key].dtype == value.dtype


def damaged(kind: str, whole: bytes) -> bytes:
    return {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "head only": whole[:9],
        "html": b"\n<!DOCTYPE html><html>404</html>",
        "xml": b"<?xml version='1.0'?><Error>AccessDenied</Error>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:25f8\nsize 236572977\n",
        "text": b"not a model at all, but long enough to be taken for a header" * 3,
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "truncated", "head only", "html", "xml", "lfs", "text"])
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    hub.save_safetensors(STATE, tmp_path / "w.safetensors")
    torch.save(STATE, tmp_path / "w.pth")
    words = {"empty": "empty", "html": "web page", "xml": "web page", "lfs": "git lfs pull"}
    for name, load in (("w.safetensors", hub.load_safetensors), ("w.pth", hub.load_pickle)):
        path = tmp_path / name
        path.write_bytes(damaged(kind, path.read_bytes()))
        with pytest.raises(InvalidCheckpoint, match=words.get(kind, name)):
            load(path)


def test_absent_files(tmp_path: Path) -> None:
    for load in (hub.load_safetensors, hub.load_pickle):
        with pytest.raises(MissingFile):
            load(tmp_path / "nothing")
        with pytest.raises(MissingFile):
            load(tmp_path)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_never_run(form: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.pth"
    if form == "torch":
        torch.save({"state": STATE, "extra": Bomb(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(InvalidCheckpoint, match="refused"):
        hub.load_pickle(path)
    assert not mark.exists()


def test_keys_and_shapes_are_named() -> None:
    shapes = {"a.weight": (2, 3), "b": (4,)}
    hub.check_keys(STATE, shapes, "this encoder")
    with pytest.raises(InvalidCheckpoint, match=r"this encoder; got missing: c\."):
        hub.check_keys(STATE, {**shapes, "c": (1,)}, "this encoder")
    with pytest.raises(InvalidCheckpoint, match=r"unexpected: a\.weight"):
        hub.check_keys(STATE, {"b": (4,)}, "this encoder")
    with pytest.raises(InvalidCheckpoint, match=r"wrong shape: b \(4,\) instead of \(5,\)"):
        hub.check_keys(STATE, {**shapes, "b": (5,)}, "this encoder")
    with pytest.raises(InvalidCheckpoint, match="x0, x1, x2 and 7 more"):
        hub.check_keys(STATE, {**shapes, **{f"x{i}": (1,) for i in range(10)}}, "this encoder")


def test_is_cached_needs_every_file(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"config.json"}
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repo, name, revision: name if name in have else None
    )
    card = cards.find("dinov2-s14")
    assert not hub.is_cached(card)
    have.add("model.safetensors")
    assert hub.is_cached(card)
    assert not hub.is_cached(cards.find("ren-dino-b8"))
    assert not hub.is_cached(cards.find("xren-siglip2-g16"))
    have.add("checkpoint.pth")
    assert hub.is_cached(cards.find("xren-siglip2-g16"))
    assert hub.is_cached(ModelCard("x", "regions", "ren", source="embedded"))
