"""The shape of the house: public names, what an import costs, which way imports go, what no source file may hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import opsin

SOURCE = Path(opsin.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

# A module imports from rooms of a lower level, or from its own room.
LEVELS = (
    {"errors", "types", "geometry"},
    {"cards", "hub", "remote_tensors", "runtime", "images", "video", "clip", "report"},
    {"backbones"},
    {"regions", "segmentation", "codec", "masks"},
    {"models"},
    {"tracking"},
    {"vql"},
    {"localization"},
    {"vq2d"},
    {"training", "evaluation"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
BANNED = {"torchvision", "timm", "kornia", "cv2", "open_clip", "decord", "mmcv", "xformers"}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names if node.module == "opsin"]
    return found


def test_public_names_exist():
    for name in opsin.__all__:
        assert getattr(opsin, name) is not None
    with pytest.raises(AttributeError):
        _ = opsin.no_such_name


def test_import_is_quick_and_brings_no_torch():
    code = (
        "import time, sys; t = time.perf_counter(); import opsin; s = time.perf_counter() - t; "
        "heavy = {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules); "
        "raise SystemExit(f'{s:.2f} s, {heavy}' if s > 0.3 or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_module(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400, "no module over 400 lines"
    names = {name.split(".")[0] for name in imports(tree)}
    assert not names & BANNED, "these do not install everywhere"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), "raise a typed error instead"
        if isinstance(node, ast.Call):
            called = node.func
            assert not (isinstance(called, ast.Name) and called.id in {"print", "exit", "quit"}), ast.unparse(node)
            assert not (isinstance(called, ast.Attribute) and called.attr == "cuda"), ast.unparse(node)
    if "cuda" in text and path.name not in {"runtime.py", "doctor.py"}:
        code = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value == "cuda"]
        assert not code, "devices belong to runtime"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if room(p) != "__init__"], ids=lambda p: str(p.relative_to(SOURCE))
)
def test_imports_go_one_way(path):
    own = LEVEL[room(path)]
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "opsin" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != room(path):
            lower = LEVEL[parts[1]] < own or ({parts[1], room(path)} <= LEVELS[own] and own <= 1)
            assert lower, f"{room(path)} imports {parts[1]}"


def test_rooms_are_small():
    for folder in {p.parent for p in MODULES}:
        assert len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) <= 12, folder
        assert len(folder.relative_to(SOURCE).parts) <= 1, f"{folder}: depth two at most"


def test_public_functions_have_docstrings():
    for path in MODULES:
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
