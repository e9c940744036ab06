"""Model references to local files, files to tensors, and writing that is never half done.

References: a catalogue name, ``"hf:org/repo"`` or ``"hf:org/repo@revision"``, ``"dir:path"``, or an existing folder.
Downloads are cached and resumed by huggingface_hub. Pickles are never unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsin.cards import WEIGHTS, ModelCard, find
from opsin.errors import (
    GatedModel,
    InvalidCheckpoint,
    InvalidConfig,
    MissingFile,
    ModelError,
    ModelUnavailable,
    ResourceError,
    UnknownModel,
)

if TYPE_CHECKING:
    from torch import Tensor

CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
REGIONS = ("card.json", "regions.safetensors")  # a saved region model, with or without its backbone
INNER = ("backbone/config.json", "backbone/*.json", "backbone/model*.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[\w][\w./-]*")
_NETWORK = ("huggingface_hub", "httpx", "httpx2", "hf_xet", "requests")


def cache_dir() -> Path:
    """Where Opsin keeps what it makes itself, such as converted weights: ``OPSIN_CACHE`` or ``~/.cache/opsin``."""
    return Path(os.environ.get("OPSIN_CACHE") or "~/.cache/opsin").expanduser()


def is_offline() -> bool:
    """Whether ``OPSIN_OFFLINE``, ``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE`` forbids the network."""
    names = ("OPSIN_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on") for name in names)


def parse_hf(ref: str) -> tuple[str, str]:
    """``"hf:org/repo@revision"`` → ``("org/repo", "revision")``, the revision ``"main"`` when none is named."""
    repo, _, revision = ref.removeprefix("hf:").partition("@")
    escapes = ".." in repo or ".." in revision
    if not _REPO.fullmatch(repo) or escapes or ("@" in ref and not _REVISION.fullmatch(revision)):
        raise InvalidConfig('A hub reference is "hf:org/repo" or "hf:org/repo@revision"', got=f'"{ref}"')
    return repo, revision or "main"


def card_of(ref: str | Path) -> ModelCard | None:
    """What is known of ``ref`` before its files are read: a catalogue card, a folder's ``card.json``, or None."""
    kind, value = _split(ref)
    if kind == "name":
        return find(value)
    if kind == "dir":
        path = Path(value).expanduser() / "card.json"
        return ModelCard.load(path) if path.is_file() else None
    return None


def resolve(ref: str | Path, *, files: Sequence[str] | None = None) -> Path:
    """The local folder that holds the files of ``ref``, downloaded when they are not there.

    Args:
        ref: catalogue name, ``"hf:org/repo@revision"``, ``"dir:path"``, or an existing folder.
        files: names or patterns to have; by default what the card lists, else configs and weights.

    Raises:
        MissingFile: no such folder, or a named file is not in it.  UnknownModel, GatedModel, ModelUnavailable,
        InvalidConfig (malformed reference), InvalidCheckpoint (checksum).
    """
    kind, value = _split(ref)
    if kind == "dir":
        return _local(Path(value).expanduser(), files or ())
    if kind == "hf":
        repo, revision = parse_hf(value)
        return _snapshot(repo, revision, files)
    card = find(value)
    if card.embedded:
        return _local(WEIGHTS / card.name, files or ())
    if not card.source and (card.regions or card.kind == "segmentation"):
        return resolve(card.regions or card.backbone, files=files)
    wanted = files or card.files
    if card.sha256 and len(card.files) == 1 and not files:
        return fetch(card.repo, card.files[0], card.revision, card.sha256, card=card).parent
    return _snapshot(card.repo, card.revision, wanted, card)


def fetch(repo: str, filename: str, revision: str = "main", sha256: str = "", *, card: ModelCard | None = None) -> Path:
    """One file of a hub repository, from the cache or the network, its SHA-256 checked when one is given."""
    from huggingface_hub import hf_hub_download

    check_inside(filename)
    with hub_errors(repo, revision, (filename,), card):
        path = Path(hf_hub_download(repo, filename, revision=revision, local_files_only=is_offline()))
    if sha256:
        check_sha256(path, sha256)
    return path


def check_sha256(path: Path, expected: str) -> None:
    """``InvalidCheckpoint`` unless the file's SHA-256 is ``expected`` (hexadecimal)."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected.lower():
        raise InvalidCheckpoint(
            f"The SHA-256 of {path.name} must be {expected}", got=digest,
            remedy=f"Delete {path} and download it again; to use this file on purpose, name its folder with dir:.",
        )


def is_cached(card: ModelCard) -> bool:
    """Whether a model can be loaded without the network (its backbone not counted)."""
    from huggingface_hub import try_to_load_from_cache

    if card.embedded:
        return True
    if not card.repo:
        parts = (card.backbone,) if card.kind == "segmentation" else (card.regions, card.tokens)
        return all(is_cached(find(name)) for name in parts if name)

    def have(name: str) -> bool:
        return isinstance(try_to_load_from_cache(card.repo, name, revision=card.revision), str)

    if card.files:
        return all(have(name) for name in card.files)
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return have("config.json") and any(have(name) for name in weights)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write a file or a folder to; renamed to ``path`` on success, else removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    temporary = room / target.name
    try:
        yield temporary
        if not temporary.exists():
            raise MissingFile("Something must be written before it can be renamed", got=str(target))
        if temporary.is_dir() and target.is_dir():  # a folder cannot be replaced in one step: move the old one aside
            target.rename(room / "old")
            try:
                temporary.rename(target)
            except OSError:
                (room / "old").rename(target)
                raise
        else:
            if temporary.is_file():
                temporary.chmod(0o644)  # some writers make private files, which an installed package must not have
            os.replace(temporary, target)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def upload(write: Callable[[Path], object], repo: str, *, private: bool = False) -> str:
    """Put what ``write(folder)`` writes into the hub repository ``repo``, made when it is not there; its address."""
    from huggingface_hub import HfApi

    repo, revision = parse_hf(repo)
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder, hub_errors(repo, revision, (), None):
        write(Path(folder))
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    return f"https://huggingface.co/{repo}"


def check_file(path: str | Path) -> Path:
    """The path of a weight file that could be one: it exists, is not empty, not a web page, not a git-LFS pointer."""
    path = Path(path)
    if not path.is_file():
        raise MissingFile("A weight file must exist", got=str(path))
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    remedy = "Download it again."
    if not head:
        raise InvalidCheckpoint("A weight file must not be empty", got=f"0 bytes in {path}", remedy=remedy)
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InvalidCheckpoint("A weight file holds tensors", got=f"a web page in {path}", remedy=remedy)
    if text.startswith(b"version https://git-lfs"):
        raise InvalidCheckpoint(
            "A weight file holds tensors", got=f"a git-LFS pointer in {path}",
            remedy='Run "git lfs pull" in that repository, or download the file itself.',
        )
    return path


def load_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. ``InvalidCheckpoint`` when it is truncated or something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = check_file(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise InvalidCheckpoint(
            "A safetensors file must be whole", got=f"{path} ({error})", remedy="Download or copy it again."
        ) from error


def save_safetensors(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write named tensors, by rename."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, temporary, metadata={"format": "pt"})


def load_pickle(path: str | Path) -> Any:
    """The tensors, numbers and containers of a ``torch.save`` file, on the CPU; anything else is refused, never run."""
    import pickle

    import torch

    path = check_file(path)
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # the older format cannot be mapped into memory
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise InvalidCheckpoint(
            "A checkpoint may hold only tensors, numbers and containers",
            got=f"{path} ({str(error).splitlines()[0]})",
            remedy="Files that run code when they are read are refused; ask for safetensors.",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise InvalidCheckpoint(
            "A torch checkpoint must be whole", got=f"{path} ({(str(error) or type(error).__name__).splitlines()[0]})",
            remedy="Download or copy it again.",
        ) from error


def check_keys(state: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], what: str) -> None:
    """``InvalidCheckpoint`` unless ``state`` has exactly the ``expected`` names and shapes; names a few offenders."""
    problems = [
        _few("missing", [key for key in expected if key not in state]),
        _few("unexpected", [key for key in state if key not in expected]),
        _few("wrong shape", [
            f"{key} {tuple(state[key].shape)} instead of {tuple(shape)}"
            for key, shape in expected.items()
            if key in state and tuple(state[key].shape) != tuple(shape)
        ]),
    ]  # fmt: skip
    if any(problems):
        raise InvalidCheckpoint(f"The weights must fit {what}", got="; ".join(p for p in problems if p))


def _few(label: str, names: Sequence[str], limit: int = 3) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{label}: {', '.join(names[:limit])}{rest}" if names else ""


def _split(ref: str | Path) -> tuple[str, str]:
    if isinstance(ref, Path):
        return "dir", str(ref)
    if ref.startswith("dir:"):
        return "dir", ref.removeprefix("dir:")
    if ref.startswith("hf:"):
        return "hf", ref
    if os.sep in ref or (os.altsep and os.altsep in ref) or ref in (".", ".."):
        if Path(ref).expanduser().is_dir():
            return "dir", ref
        raise UnknownModel(
            'A model is a catalogue name, "hf:org/repo", "dir:path" or an existing folder', got=f'"{ref}"',
            remedy=f'Did you mean "hf:{ref}"?' if _REPO.fullmatch(ref) else "The folder does not exist.",
        )
    return "name", ref


def check_inside(name: str) -> None:
    """``InvalidConfig`` for a file name that leaves its folder."""
    parts = Path(name.replace("\\", "/"))
    if not name or parts.is_absolute() or ".." in parts.parts:
        raise InvalidConfig("A file name stays inside its model folder", got=f'"{name}"')


def _local(folder: Path, files: Sequence[str]) -> Path:
    if not folder.is_dir():
        raise MissingFile("A model folder must exist", got=str(folder))
    _require_files(folder, files)
    return folder.resolve()


def _require_files(folder: Path, files: Sequence[str]) -> None:
    for name in files:
        check_inside(name)
        if not any(folder.glob(name)):
            raise MissingFile(f"The model folder must hold {name}", got=str(folder))


def _snapshot(repo: str, revision: str, files: Sequence[str] | None, card: ModelCard | None = None) -> Path:
    from huggingface_hub import snapshot_download

    for name in files or ():
        check_inside(name)

    def download(patterns: Sequence[str]) -> Path:
        with hub_errors(repo, revision, patterns, card):
            allowed, offline = list(patterns), is_offline()
            return Path(snapshot_download(repo, revision=revision, allow_patterns=allowed, local_files_only=offline))

    def there(folder: Path, *patterns: str) -> bool:
        return any(any(folder.glob(pattern)) for pattern in patterns)

    wanted = tuple(files or (*CONFIGS, *SAFETENSORS, *REGIONS, *INNER))
    folder = download(wanted)
    if files or there(folder, REGIONS[1]):
        missing = [name for name in files or REGIONS if not there(folder, name)]
    else:
        if not there(folder, *SAFETENSORS):
            folder = download((*CONFIGS, *PICKLES))  # older repositories; still read with weights_only
        missing = [] if there(folder, "config.json") else ["config.json"]
        missing += [] if there(folder, *SAFETENSORS, *PICKLES) else ["weights"]
    if missing:
        raise unavailable(repo, revision, wanted, f"no {' and no '.join(missing)} in {folder}")
    return folder


def unavailable(repo: str, revision: str, files: Sequence[str], got: str) -> ModelUnavailable:
    """The error for files that are neither cached nor reachable, with the command that fetches them elsewhere."""
    names = " ".join(f'--include "{name}"' for name in files) if any("*" in name for name in files) else " ".join(files)
    return ModelUnavailable(
        f"The files of {repo} must be in the cache or reachable", got=got,
        remedy=f"Where there is a network, run: hf download {repo} --revision {revision} {names} ; then copy that "
        "machine's Hugging Face cache (HF_HOME) here, or name a copied folder with dir:.",
    )


@contextmanager
def hub_errors(repo: str, revision: str, files: Sequence[str], card: ModelCard | None) -> Iterator[None]:
    """What huggingface_hub raises, as our own errors with a remedy."""
    from huggingface_hub import errors

    try:
        yield
    except ModelError:
        raise
    except errors.GatedRepoError as error:
        page = (card and card.gate_url) or f"https://huggingface.co/{repo}"
        instead = f' Or use "{card.substitute}", which is open.' if card and card.substitute else ""
        raise GatedModel(
            f"The licence of {repo} has to be accepted first", got="no permission",
            remedy=f'Accept it on {page}, then run "hf auth login".{instead}',
        ) from error
    except errors.LocalEntryNotFoundError as error:
        reason = "the network is switched off (offline mode)" if is_offline() else "no network"
        raise unavailable(repo, revision, files, f"{reason} and not in the cache: {', '.join(files)}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        what = type(error).__name__.removesuffix("NotFoundError").removeprefix("Remote").lower()
        raise ModelUnavailable(
            f"{repo}@{revision} must exist on the hub and be readable", got=f"{what} not found",
            remedy=f'See https://huggingface.co/{repo}; a private one needs "hf auth login".',
        ) from error
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise ResourceError("The disk must have room for the weights", got=str(error)) from error
        # network libraries below huggingface_hub differ between its versions, and so do their exceptions
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _NETWORK:
            raise
        raise unavailable(repo, revision, files, str(error).splitlines()[0] if str(error) else repr(error)) from error
