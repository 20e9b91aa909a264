"""``report.html``: one self-contained page from what the other stages wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbs.annotations import annotation_file, read_annotations, read_manifest, run_folder
from dsbs.artefacts import atomic, read_jsonl
from dsbs.errors import UserError
from dsbs.recipe import Recipe
from dsbs.report.figures import curve_svg

EXAMPLES = 60  # rows shown of those on which systems disagree
_CUT = 1200  # characters of a text shown


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A test row that some systems got right and others wrong."""

    id: str
    text: str
    gold: str
    rationale: str | None
    answers: list[tuple[str, str, bool]]  # system, its answer, whether correct


def report(recipe: Recipe, *, out: str | Path | None = None) -> Path:
    """Write ``report.html`` into the run folder and return its path. Raises UserError where there are no results yet."""
    run = run_folder(recipe, out)
    results_file = run / "eval" / "results.json"
    try:
        results = json.loads(results_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{results_file} does not exist", hint="run `dsbs eval` with this recipe first") from None
    except ValueError:
        raise UserError(f"{results_file} is not JSON", hint="run `dsbs eval` again: it is rebuilt from the files") from None
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("dsbs.report"), autoescape=True, undefined=StrictUndefined)
    annotate, train = read_manifest(run / "annotate"), read_manifest(run / "train")
    page = environment.get_template("page.html").render(
        name=recipe.name,
        results=results,
        table=_table(results),
        curve=curve_svg(run, results),
        trials=_trials(run),
        annotation=annotate.get("splits", {}),
        teacher=recipe.teacher,
        examples=_disagreements(run, results, EXAMPLES),
        recipe=json.dumps(recipe.model_dump(mode="json"), indent=2, ensure_ascii=False),
        versions=(train or annotate).get("versions", {}),
        data=train.get("data", {}) | read_manifest(run / "eval").get("data", {}),
        prompt=annotate.get("prompt"),
    )
    path = run / "report.html"
    with atomic(path) as file:
        file.write(page)
    return path


def _table(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for system in results["systems"]:
        baseline, versus = next(iter(system["versus"].items()), (None, None))
        reliable = versus is not None and versus["p_holm"] < 0.05
        rows.append(system | {"baseline": baseline, "gap": versus, "reliable": reliable})
    return rows


def _trials(run: Path) -> list[dict[str, Any]]:
    """What tuning tried, a line for every trial; the chosen one of each system is marked."""
    lines = []
    seen = set()
    for record in sorted((run / "train").glob("*/train.json")):
        said = json.loads(record.read_text(encoding="utf-8"))
        system = said["student"]["name"].rpartition("-s")[0]
        if system not in seen:
            seen.add(system)
            for trial in said.get("trials", ()):
                setting = ", ".join(f"{key} {value:g}" for key, value in trial["setting"].items())
                chosen = trial["setting"] == said["student"]["tuned"]
                lines.append(trial | {"system": system, "setting": setting, "chosen": chosen})
    return lines


def _disagreements(run: Path, results: dict[str, Any], most: int) -> list[Disagreement]:
    """Rows on which systems differ, those with the most even division first."""
    split = results["split"]
    by_system: dict[str, dict[str, dict[str, Any]]] = {}
    for system in results["systems"]:
        for name in [f"{system['name']}-s{seed}" for seed in system["seeds"]] or [system["name"]]:
            path = run / "eval" / "predictions" / f"{name}.jsonl"
            if path.is_file():  # a later evaluation may have set it aside
                by_system[name] = {row["id"]: row for _, row in read_jsonl(path)}
    rationales: dict[str, str | None] = {}
    texts: dict[str, str] = {}
    file = annotation_file(run, split)
    if file.is_file():
        for annotation in read_annotations(file):
            rationales[annotation.id] = annotation.rationale
            texts[annotation.id] = "\n".join(f"{name}: {value}" for name, value in annotation.input.items())
    found: list[tuple[float, Disagreement]] = []
    first = next(iter(by_system.values()), {})
    for row_id, row in first.items():
        answers = [
            (name, rows[row_id].get("prediction") or "(unreadable)", bool(rows[row_id].get("correct")))
            for name, rows in by_system.items()
            if row_id in rows
        ]
        share = sum(correct for _, _, correct in answers) / len(answers)
        if 0 < share < 1:
            text = texts.get(row_id, "")
            shown = text if len(text) <= _CUT else text[:_CUT] + " …"
            found.append((abs(share - 0.5), Disagreement(row_id, shown, str(row["gold"]), rationales.get(row_id), answers)))
    return [example for _, example in sorted(found, key=lambda pair: (pair[0], pair[1].id))[:most]]
