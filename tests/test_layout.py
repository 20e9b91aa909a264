"""The rooms of the house: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

RANKS = {
    "errors": 0, "records": 0, "yaml_lines": 0, "intervals": 0, "progress": 0, "markdown": 0,
    "artefacts": 1, "templates": 1, "results": 1, "results_table": 2, "recipe": 2, "gates": 2, "compressed": 2,
    "gguf": 2,
    "recipe_file": 3, "tasks": 3,
    "prompts": 4, "student": 4, "vocabulary": 4,
    "annotations": 5,
    "annotate": 6, "train": 6, "eval": 6, "report": 6, "export": 6, "serve": 6,
    "lint": 7, "compare_teachers": 7, "compress": 7,
    "check": 8, "desk": 8, "": 9, "cli": 10, "__main__": 11,
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
    stages = {"annotate", "train", "eval", "report", "export", "serve"}
    for path, room in rooms():
        if room in stages:
            met = {module.split(".")[1] for module, _ in imports(path) if module.startswith("dsbs.")}
            assert not (met & stages) - {room}, path


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    own = {
        "dsbs/train/causal.py",
        "dsbs/train/trainer.py",
        "dsbs/train/unpadded.py",
        "dsbs/train/passes.py",
        "dsbs/train/callbacks.py",
        "dsbs/train/board.py",
        "dsbs/eval/accuracy.py",
        "dsbs/serve/app.py",
        "dsbs/serve/http.py",
        "dsbs/student/low_rank.py",
        "dsbs/compress/importance.py",
        "dsbs/export/t5_graphs.py",
    }  # imported late themselves
    for path, _ in rooms():
        if str(path.relative_to(ROOT)) in own:
            continue
        at_top = {module.split(".")[0] for module, top in imports(path) if top}
        assert not at_top & HEAVY, f"{path}: {at_top & HEAVY}"


def test_every_file_has_a_rank() -> None:
    assert {room for _, room in rooms()} == set(RANKS)
