"""The curve of accuracy against training rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dsbs.eval.table import cells, verdict
from dsbs.report.figures import curve_svg


def run_of(folder: Path, shares: Sequence[float]) -> dict[str, Any]:
    """A run's files, as far as the curve reads them: two methods on parts of 800 rows, and the teacher."""
    systems: list[dict[str, Any]] = [{"name": "teacher", "accuracy": 0.7, "ci95": [0.65, 0.75], "seeds": [], "versus": {}}]
    for method in ("finetune", "step-by-step"):
        for share in shares:
            name = f"{method}-gold" + ("" if share == 1 else f"-n{share:g}")
            student = {"name": f"{name}-s0", "method": method, "labels": "gold"}
            record = folder / "train" / f"{name}-s0" / "train.json"
            record.parent.mkdir(parents=True)
            record.write_text(json.dumps({"student": student, "rows": int(800 * share)}), encoding="utf-8")
            height = 0.4 + 0.2 * share
            systems.append(
                {"name": name, "accuracy": height, "ci95": [height - 0.05, height + 0.05], "seeds": [0], "versus": {}}
            )
    return {"split": "test", "n": 500, "systems": systems}


def test_each_method_has_a_line_and_the_teacher_a_level(tmp_path: Path) -> None:
    results = run_of(tmp_path, (0.25, 0.5, 1.0))
    svg = curve_svg(tmp_path, results)
    assert svg is not None and svg == curve_svg(tmp_path, results), "equal results give an equal figure"
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"finetune, gold labels", "step-by-step, gold labels", "teacher"} <= set(texts)
    assert {"200", "400", "800", "training rows", "accuracy on test (500 rows)"} <= set(texts)
    assert "http://" not in svg.replace("http://www.w3.org/", "").replace("http://purl.org/", "").replace(
        "http://creativecommons.org/", ""
    ), "it loads nothing"


def test_one_share_alone_makes_no_curve(tmp_path: Path) -> None:
    assert curve_svg(tmp_path, run_of(tmp_path, (1.0,))) is None


def test_rows_name_their_baseline_where_there_are_several() -> None:
    def system(name: str, baseline: str | None) -> dict[str, Any]:
        gap = {"delta": 0.1, "ci95": [0.05, 0.15], "p": 0.001, "p_holm": 0.004, "test": "mcnemar-exact"}
        figures = {"accuracy": 0.5, "ci95": [0.4, 0.6], "seeds": [0], "parameters": None, "ms_per_example": None}
        return figures | {"name": name, "versus": {} if baseline is None else {baseline: gap}}

    one = {"baseline": "finetune-gold", "systems": [system("finetune-gold", None), system("a", "finetune-gold")]}
    headings, rows = cells(one)
    assert "to finetune-gold" in headings and rows[1][4] == "+10.0"
    two = one | {"systems": [*one["systems"], system("a-n0.5", "finetune-gold-n0.5")]}  # type: ignore[misc]
    headings, rows = cells(two)
    assert "to baseline" in headings
    assert [row[4] for row in rows[1:]] == ["+10.0 to finetune-gold", "+10.0 to finetune-gold-n0.5"]
    assert verdict(two)[1].startswith("a-n0.5: 10.0 points above finetune-gold-n0.5")
