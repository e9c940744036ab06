"""``opsin doctor``: what is installed, what is missing, what is broken, and what to do about it."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HELP = "check the installation: versions, devices, extras, cache, models"
EXAMPLE = "opsin doctor"

# the module of a distribution whose names differ
_MODULES = {"scikit-image": "skimage", "hydra-core": "hydra", "pillow": "PIL"}
_BUNDLES = ("all", "dev")  # extras made of other extras
_EMBEDDED = "opsin-tiny"


@dataclass(frozen=True)
class Check:
    """One finding. ``state``: ``"ok"``, ``"missing"`` (optional, not there) or ``"broken"`` (there but not working)."""

    group: str
    name: str
    state: str
    detail: str = ""
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``[--json]``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print all findings; 1 when something that is installed is broken, else 0."""
    checks = diagnose()
    broken = [check for check in checks if check.state == "broken"]
    if args.json:
        text = json.dumps({"healthy": not broken, "checks": [asdict(check) for check in checks]}, indent=2)
    else:
        text = _report(checks, len(broken))
    sys.stdout.write(text + "\n")
    return 1 if broken else 0


def diagnose() -> list[Check]:
    """All findings. One that fails in a way nobody foresaw is itself a finding."""
    checks: list[Check] = []
    for part in (_versions, _extras, _transformers, _devices, _caches, _gated, _embedded):
        try:
            checks.extend(part())
        except Exception as error:  # a broken package may raise anything
            checks.append(Check(part.__name__.removeprefix("_"), "check", "broken", _describe(error)))
    return checks


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _requirements() -> Iterator[tuple[str, str, str]]:
    """``(distribution, version range, extra)`` of what the package asks for."""
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("opsin") or ():
        wanted = Requirement(line)
        if wanted.name == "opsin":
            continue
        names = importlib.metadata.metadata("opsin").get_all("Provides-Extra") or []
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            yield wanted.name, str(wanted.specifier), ""
            continue
        for extra in names:
            if extra not in _BUNDLES and wanted.marker.evaluate({"extra": extra}):
                yield wanted.name, str(wanted.specifier), extra


def _package(group: str, name: str, wanted: str, absent: str, install: str) -> Check:
    """Whether a distribution is there, new enough, and importable."""
    from packaging.specifiers import SpecifierSet

    module = _MODULES.get(name, name.replace("-", "_"))
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(group, name, absent, "not installed", install)
    try:
        importlib.import_module(module)
    except Exception as error:
        detail = f"{version}; import fails: {_describe(error)}"
        return Check(group, name, "broken", detail, f"pip install --force-reinstall {name}")
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Check(group, name, "broken", f"{version}, but {wanted} is needed", f'pip install "{name}{wanted}"')
    return Check(group, name, "ok", version)


def _versions() -> Iterator[Check]:
    yield Check("versions", "python", "ok", f"{platform.python_version()} on {platform.platform()}")
    try:
        yield Check("versions", "opsin", "ok", importlib.metadata.version("opsin"))
    except importlib.metadata.PackageNotFoundError:
        yield Check("versions", "opsin", "broken", "runs from source without being installed", "pip install -e .")
        return
    for name, wanted, extra in _requirements():
        if not extra:
            yield _package("versions", name, wanted, "broken", f'pip install "{name}{wanted}"')


def _extras() -> Iterator[Check]:
    for name, wanted, extra in _requirements():
        if extra:
            yield _package(f"extra {extra}", name, wanted, "missing", f'pip install "opsin[{extra}]"')


def _transformers() -> Iterator[Check]:
    """The model classes load: a torchvision that does not pair with torch breaks exactly that."""
    from opsin.backbones.vit import FAMILIES

    remedy = ""
    if importlib.util.find_spec("torchvision") is not None:
        remedy = "pip uninstall torchvision (not needed here; one that does not pair with torch breaks transformers)"
        try:
            importlib.import_module("torchvision")
            yield Check("transformers", "torchvision", "ok", importlib.metadata.version("torchvision"))
        except Exception as error:
            yield Check("transformers", "torchvision", "broken", _describe(error), remedy)
    for family, facts in FAMILIES.items():
        try:
            getattr(importlib.import_module("transformers"), facts.model)
        except Exception as error:
            remedy = remedy or "pip install --force-reinstall transformers"
            yield Check("transformers", family, "broken", _describe(error), remedy)
        else:
            yield Check("transformers", family, "ok", facts.model)


def _devices() -> Iterator[Check]:
    import torch

    from opsin.runtime import has_fast_bfloat16

    names = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        names += [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
    for name in names:
        device = torch.device(name)
        try:
            ones = torch.ones(8, 8, device=device)
            works = float((ones @ ones).sum()) == 512
        except RuntimeError as error:
            yield Check("devices", name, "broken", _describe(error), "Check the driver; device='cpu' works meanwhile.")
            continue
        detail = f"bfloat16 {'in hardware' if has_fast_bfloat16(device) else 'emulated'}"
        detail += f", {torch.get_num_threads()} threads" if name == "cpu" else ""
        yield Check("devices", name, "ok" if works else "broken", detail)


def _caches() -> Iterator[Check]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from opsin.hub import cache_dir, is_offline

    for name, folder in (("downloads", Path(HF_HUB_CACHE)), ("opsin", cache_dir())):
        detail = f"{folder}: {_size(folder) / 1e9:.2f} GB" if folder.is_dir() else f"{folder}: not there yet"
        nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if os.access(nearest, os.W_OK):
            yield Check("cache", name, "ok", detail)
        else:
            remedy = "Set HF_HOME and OPSIN_CACHE to folders of yours."
            yield Check("cache", name, "broken", f"{detail}; not writable", remedy)
    yield Check("cache", "network", "ok", "off by environment variable" if is_offline() else "allowed")


def _size(folder: Path) -> int:
    """Bytes of the files below a folder, each counted once (snapshots are links to blobs)."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _gated() -> Iterator[Check]:
    from huggingface_hub import get_token

    from opsin.cards import catalogue

    if get_token() is None:
        yield Check("gated", "token", "missing", "needed for gated models only", "hf auth login")
    else:
        yield Check("gated", "token", "ok", "present")
    for card in catalogue().values():
        if card.gated:
            detail = f"accept its licence on {card.gate_url}; open substitute: {card.substitute}"
            yield Check("gated", card.name, "ok", detail)


def _embedded() -> Iterator[Check]:
    import torch

    from opsin.cards import catalogue

    if _EMBEDDED not in catalogue():
        yield Check("models", _EMBEDDED, "missing", "not in this installation", "pip install --force-reinstall opsin")
        return
    from opsin.regions import RegionModel

    model = RegionModel.from_pretrained(_EMBEDDED, device="cpu")
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = model.encode(image, prompts="grid", grid_size=4).tokens
    finite = bool(torch.isfinite(tokens).all()) and len(tokens) > 0
    yield Check("models", _EMBEDDED, "ok" if finite else "broken", f"loads, {model.dim} values a token")


def _report(checks: list[Check], broken: int) -> str:
    lines, group = [], ""
    for check in checks:
        if check.group != group:
            group = check.group
            lines.append(f"\n{group}")
        remedy = f"  →  {check.remedy}" if check.remedy else ""
        lines.append(f"  {check.state:8}{check.name:24}{check.detail}{remedy}".rstrip())
    lines.append(f"\n{broken} broken" if broken else "\nEverything that is installed works.")
    return "\n".join(lines).lstrip("\n")
