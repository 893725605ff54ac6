"""Imports inside the package point one way: what stands left in ORDER never imports what stands right."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import equifast

ORDER = [
    {"_version", "_C"},
    {"_checks", "_capture", "_files", "_fingerprint", "_memory"},
    {"rng", "_allocator"},
    {"reference"},
    {"_step_triton"},
    {"ops"},
    {"views", "balls"},
    {"spatial"},
    {"objectives"},
    {"features", "nn"},
    {"_folded"},
    {"ascent", "_cheap"},
    {"purifier"},
    {"attacks"},
    {"train", "certify"},
    {"defenses", "detectors"},
    {"evaluate"},
    {"demo"},
    {"models"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
ROOT = Path(equifast.__file__).parent


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "equifast":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("equifast.")}
    return names


def test_direction() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        module = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if module in ("__init__", "__main__"):
            continue
        for name in imported(ast.parse(file.read_text())) - {"__version__"}:
            inside = module == name
            assert inside or LEVEL[name] < LEVEL[module], f"{file.name} imports {name}, which stands to its right"


def test_what_is_exported_exists() -> None:
    for name in equifast.__all__:
        assert hasattr(equifast, name)


def test_what_is_imported_when_it_is_named() -> None:
    code = "import equifast; print(equifast.evaluate.Evaluation, equifast.certify.clever, equifast.models.load_model)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "Evaluation" in done.stdout
    with pytest.raises(AttributeError, match="module 'equifast' has no attribute 'evaluation'"):
        _ = equifast.evaluation


def test_sources_that_are_not_compiled_say_so(tmp_path: Path) -> None:
    """Of the folder in which Python is started, where that is the checkout and what is installed lies elsewhere."""
    shutil.copytree(ROOT, tmp_path / "equifast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run([sys.executable, "-c", "import equifast"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"ImportError: equifast comes from {tmp_path / 'equifast'}, its sources")


def test_importing_takes_little_more_than_importing_torch() -> None:
    """What takes long, and is not wanted by every call, is imported where it is."""
    slow = {"torch._dynamo", "torch._inductor", "triton", "scipy.stats", "sklearn", "matplotlib", "torchvision"}
    code = f"import sys, torch; own = set(sys.modules); import equifast.cli; print({slow!r} & set(sys.modules) - own)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
