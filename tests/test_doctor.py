"""``opsin doctor`` and ``opsin models``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from opsin import cards, hub
from opsin.cards import ModelCard
from opsin.cli import doctor, models
from opsin.cli.doctor import Check
from opsin.errors import UnknownModel


def run(verb: ModuleType, *words: str) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return int(verb.run(parser.parse_args(list(words))))


def fail_import(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    true_import = importlib.import_module

    def import_module(name: str, package: str | None = None) -> ModuleType:
        if name == broken:
            raise OSError("undefined symbol: _ZN3c10")
        return true_import(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)


def forget(monkeypatch: pytest.MonkeyPatch, *gone: str) -> None:
    true_version = importlib.metadata.version

    def version(name: str) -> str:
        if name in gone:
            raise importlib.metadata.PackageNotFoundError(name)
        return true_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def only(monkeypatch: pytest.MonkeyPatch, *checks: str) -> None:
    for name in ("_versions", "_extras", "_transformers", "_devices", "_caches", "_gated", "_embedded"):
        if name not in checks:
            monkeypatch.setattr(doctor, name, lambda: iter(()))


def test_a_sound_installation_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    code = run(doctor, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"], [c for c in report["checks"] if c["state"] == "broken"]
    assert code == 0
    found = {(c["group"], c["name"]): c for c in report["checks"]}
    for key in [("versions", "python"), ("versions", "torch"), ("devices", "cpu"), ("transformers", "dinov2"),
                ("cache", "downloads"), ("gated", "dinov3-b16"), ("extra wandb", "wandb")]:  # fmt: skip
        assert key in found
    assert "bfloat16" in found["devices", "cpu"]["detail"]
    assert "dinov2-b14-reg" in found["gated", "dinov3-b16"]["detail"]
    assert not any(group in ("extra all", "extra dev") for group, _ in found)


def test_a_missing_extra_is_not_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    only(monkeypatch, "_extras")
    forget(monkeypatch, "scikit-image")
    assert run(doctor) == 0
    out = capsys.readouterr().out
    assert "missing scikit-image" in out
    assert 'pip install "opsin[regions]"' in out


def test_a_missing_requirement_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    only(monkeypatch, "_versions")
    forget(monkeypatch, "av")
    assert run(doctor) == 1
    assert "broken  av" in capsys.readouterr().out


@pytest.mark.parametrize(("module", "group"), [("scipy", "versions"), ("skimage", "extra regions")])
def test_what_is_installed_but_does_not_import_is_broken(
    module: str, group: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, "_versions", "_extras")
    fail_import(monkeypatch, module)
    assert run(doctor, "--json") == 1
    broken = [c for c in json.loads(capsys.readouterr().out)["checks"] if c["state"] == "broken"]
    assert [c["group"] for c in broken] == [group]
    assert "undefined symbol" in broken[0]["detail"]
    assert "pip install --force-reinstall" in broken[0]["remedy"]


def test_too_old_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    true_version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "av" else true_version(name))
    (check,) = [c for c in doctor._versions() if c.name == "av"]
    assert check.state == "broken"
    assert ">=13" in check.detail


def test_a_torchvision_that_breaks_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    true_find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name == "torchvision" else true_find(name, *rest)
    )
    fail_import(monkeypatch, "torchvision")
    found = {c.name: c for c in doctor._transformers()}
    assert found["torchvision"].state == "broken"
    assert "pip uninstall torchvision" in found["torchvision"].remedy
    fail_import(monkeypatch, "transformers")
    assert {c.state for c in doctor._transformers() if c.name == "dinov2"} == {"broken"}


def test_a_check_that_fails_unforeseen_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def surprise() -> Iterator[Check]:
        yield Check("gated", "token", "ok")
        raise ZeroDivisionError("odd")

    surprise.__name__ = "_gated"
    only(monkeypatch)
    monkeypatch.setattr(doctor, "_gated", surprise)
    (check,) = [c for c in doctor.diagnose() if c.state == "broken"]
    assert (check.group, check.detail) == ("gated", "ZeroDivisionError: odd")


def test_unwritable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *args: False)
    assert {c.state for c in doctor._caches() if c.name in ("downloads", "opsin")} == {"broken"}


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tiny untrained model where the package keeps the one it ships."""
    from opsin.regions import RegionEncoder, RegionModel
    from tests.conformance.tiny import make

    backbone = make("resnet")
    card = ModelCard("opsin-tiny", "regions", "ren", dim=72, patch_size=8, image_size=64, grid_size=8, licence="MIT")
    RegionModel(backbone, RegionEncoder(72), card).save_pretrained(tmp_path / "opsin-tiny", embed_backbone=True)
    monkeypatch.setattr(cards, "WEIGHTS", tmp_path)
    monkeypatch.setattr(hub, "WEIGHTS", tmp_path)
    cards._read_catalogue.cache_clear()
    yield tmp_path / "opsin-tiny"
    monkeypatch.undo()
    cards._read_catalogue.cache_clear()


def test_the_embedded_model_is_tried(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (check,) = doctor._embedded()
    assert (check.state, check.detail) == ("ok", "loads, 72 values a token")
    assert run(models, "opsin-tiny", "--json") == 0
    assert json.loads(capsys.readouterr().out)["where"] == "embedded"
    weights = embedded / "regions.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    (check,) = [c for c in doctor.diagnose() if c.state == "broken"]
    assert check.group == "embedded"
    assert "regions.safetensors" in check.detail


def test_models_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(cards.catalogue()) + 1
    (row,) = [line for line in lines if line.startswith("dinov3-b16 ")]
    assert "yes" in row.split()
    assert run(models, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(cards.catalogue())
    assert run(models, "ren-dinov2-l14", "--json") == 0
    card: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert card["backbone"] == "dinov2-l14"
    assert run(models, "ren-dinov2-l14") == 0
    assert "0.975" in capsys.readouterr().out
    with pytest.raises(UnknownModel, match="ren-dinov2-l14"):
        run(models, "ren-dinov2-14")
