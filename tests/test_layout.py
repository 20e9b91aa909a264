"""The rooms of the house: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

RANKS = {
    "errors": 0, "files": 1, "progress": 1, "formatting": 1, "records": 2,
    "config": 3, "tasks": 4, "run_folder": 4, "prompting": 5, "students": 5,
    "annotation": 7, "training": 7, "evaluation": 7, "reporting": 7, "exporting": 7, "serving": 7,
    "compression": 8, "project": 8,
    "": 9, "cli": 9, "__main__": 10,
}  # fmt: skip
HEAVY = {
    "aiohttp",
    "ray",
    "torch",
    "transformers",
    "datasets",
    "evaluate",
    "openai",
    "sentencepiece",
    "scipy",
    "statsmodels",
    "pyarrow",
    "rapidfuzz",
    "sklearn",
    "ctranslate2",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "gguf",
    "fastapi",
    "uvicorn",
    "peft",
}


def rooms() -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / "dsbs").rglob("*.py")):
        parts = path.relative_to(ROOT / "dsbs").with_suffix("").parts
        yield path, "" if parts == ("__init__",) else parts[0]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file names in an import, and whether at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module, node in top


def test_a_file_imports_from_lower_ranks_or_its_own_room_only() -> None:
    wrong = []
    for path, room in rooms():
        for module, _ in imports(path):
            if not module.startswith("dsbs"):
                continue
            other = [*module.split("."), ""][1]
            if other != room and RANKS[other] >= RANKS[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_stages_never_import_each_other() -> None:
    stages = {"annotation", "training", "evaluation", "reporting", "exporting", "serving"}
    for path, room in rooms():
        if room in stages:
            met = {
                module.split(".")[1] for module, _ in imports(path) if module.startswith("dsbs.")
            }
            assert not (met & stages) - {room}, path


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    own = {
        "dsbs/training/packed/decoder.py",
        "dsbs/training/trainer.py",
        "dsbs/training/packed/t5.py",
        "dsbs/training/packed/forward.py",
        "dsbs/training/callbacks.py",
        "dsbs/training/tensorboard.py",
        "dsbs/serving/app.py",
        "dsbs/serving/http.py",
        "dsbs/students/low_rank.py",
        "dsbs/compression/importance.py",
        "dsbs/exporting/t5_graphs.py",
    }  # imported late themselves
    for path, _ in rooms():
        if str(path.relative_to(ROOT)) in own:
            continue
        at_top = {module.split(".")[0] for module, top in imports(path) if top}
        assert not at_top & HEAVY, f"{path}: {at_top & HEAVY}"


def test_every_file_has_a_rank() -> None:
    assert {room for _, room in rooms()} == set(RANKS)
