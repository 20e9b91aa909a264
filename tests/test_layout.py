"""Layout: ranks of modules, heavy imports inside functions, names that say what a thing is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

RANKS = {
    "errors": 0, "files": 1, "progress": 1, "formatting": 1, "records": 2,
    "config": 3, "tasks": 4, "run_folder": 4, "prompting": 5, "students": 5,
    "annotation": 7, "training": 7, "evaluation": 7, "reporting": 7, "exporting": 7, "serving": 7,
    "compression": 8, "importing": 8, "project": 8, "review": 9,
    "": 10, "cli": 10, "sklearn": 10, "__main__": 11,
}  # fmt: skip
STAGES = {"annotation", "training", "evaluation", "reporting", "exporting", "serving"}
HEAVY = {
    "accelerate", "aiohttp", "cleanlab", "ctranslate2", "datasets", "datasketch", "evaluate",
    "fastapi", "gguf", "matplotlib", "onnx", "onnxruntime", "onnxscript", "openai", "peft",
    "presidio_analyzer", "pyarrow", "rapidfuzz", "ray", "scipy", "sentencepiece", "sklearn",
    "statsmodels", "torch", "transformers", "uvicorn", "xllamacpp",
}  # fmt: skip
# Names that do not say what a variable holds.
PLACEHOLDERS = {
    "one", "found", "said", "told", "taught", "kept", "made", "known", "own", "whole", "asked",
    "there", "others", "lost", "seen", "given", "wanted", "look", "looks", "room",
}  # fmt: skip


def modules() -> Iterator[tuple[Path, str]]:
    """Every file of the package with its top-level module or package."""
    for path in sorted((ROOT / "dsbs").rglob("*.py")):
        parts = path.relative_to(ROOT / "dsbs").with_suffix("").parts
        yield path, "" if parts == ("__init__",) else parts[0]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module, node in top


def test_every_module_has_a_rank() -> None:
    assert {name for _, name in modules()} == set(RANKS)


def test_a_file_imports_from_lower_ranks_or_its_own_package_only() -> None:
    violations = []
    for path, name in modules():
        for module, _ in imports(path):
            if module.split(".")[0] != "dsbs":
                continue
            imported = [*module.split("."), ""][1]
            if imported != name and RANKS[imported] >= RANKS[name]:
                violations.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not violations, "\n".join(violations)


def test_the_stages_never_import_each_other() -> None:
    for path, name in modules():
        if name in STAGES:
            imported = {
                module.split(".")[1] for module, _ in imports(path) if module.startswith("dsbs.")
            }
            assert not (imported & STAGES) - {name}, path


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    # Modules that are themselves imported inside functions.
    imported_late = {
        "dsbs/exporting/onnx.py",
        "dsbs/exporting/onnx_int8.py",
        "dsbs/review/app.py",
        "dsbs/serving/app.py",
        "dsbs/sklearn.py",  # by its users alone
        "dsbs/students/encoder_shapes.py",
        "dsbs/students/heads.py",
        "dsbs/students/low_rank.py",
        "dsbs/training/callbacks.py",
        "dsbs/training/packed/__init__.py",
        "dsbs/training/packed/decoder.py",
        "dsbs/training/packed/encoder.py",
        "dsbs/training/packed/label_head.py",
        "dsbs/training/packed/layout.py",
        "dsbs/training/packed/t5.py",
        "dsbs/training/tensorboard.py",
        "dsbs/training/trainer.py",
    }
    for path, _ in modules():
        if str(path.relative_to(ROOT)) in imported_late:
            continue
        at_top = {module.split(".")[0] for module, top in imports(path) if top}
        assert not at_top & HEAVY, f"{path}: {at_top & HEAVY}"


def test_names_say_what_a_thing_is() -> None:
    violations = []
    for path, _ in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.arg):
                name = node.arg
            else:
                continue
            if name in PLACEHOLDERS:
                violations.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not violations, "\n".join(violations)
