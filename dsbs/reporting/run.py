"""``report.html``: one self-contained page from what the other stages wrote, with tables and figures as files beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dsbs.config import Recipe
from dsbs.files import atomic, digest
from dsbs.records.summary import break_even_sentence, label_efficiency_sentence
from dsbs.reporting import compression as smaller
from dsbs.reporting import sections
from dsbs.reporting import text as words
from dsbs.reporting.browser import Examples, examples
from dsbs.reporting.card import write_cards
from dsbs.reporting.compare_runs import differences, gather_all, same_rows
from dsbs.reporting.figures import Figure, figures, write_figures
from dsbs.reporting.gather import Run
from dsbs.reporting.tables import write_tables
from dsbs.run_folder import run_folder

PAGE_BYTES = 3_000_000  # of the whole page, at most
_LONGEST_NAME = 80  # characters of the default folder's name


@dataclass(frozen=True, slots=True)
class Report:
    """Where everything was written."""

    page: Path
    runs: list[Path]
    files: list[Path]  # results.md, CSVs, figures and model cards

    def as_json(self) -> dict[str, Any]:
        return {
            "report": str(self.page),
            "runs": [str(run) for run in self.runs],
            "files": [str(file) for file in self.files],
        }


def report(recipe: Recipe, *, out: str | Path | None = None) -> Path:
    """Write ``report.html`` into the recipe's run folder and return its path. Raises UserError without results."""
    return report_runs([run_folder(recipe, out)]).page


def report_runs(folders: Sequence[str | Path], *, out: str | Path | None = None) -> Report:
    """Report one or several run folders on one page.

    ``out`` is the folder to write to; by default that of a run alone, or ``runs/report-<names>`` of several. Raises UserError
    where a folder has no results, or is given twice.
    """
    paths = [Path(folder) for folder in folders]
    runs = gather_all(paths)
    folder = (
        Path(out)
        if out is not None
        else paths[0]
        if len(paths) == 1
        else Path("runs") / _joint_name(runs)
    )
    drawn = figures(runs)
    files = write_tables(runs, folder / "report")
    files += write_figures(drawn, folder / "report" / "figures")
    if len(runs) == 1:  # several are only read
        files += write_cards(runs[0])
    page = folder / "report.html"
    with atomic(page) as file:
        file.write(render(runs, drawn))
    return Report(page, paths, files)


def render(runs: Sequence[Run], drawn: Sequence[Figure]) -> str:
    """The page's text, of PAGE_BYTES at most: the examples take the room that all else leaves."""
    bare = _render(runs, drawn, Examples("", 0, 0, None))
    room = PAGE_BYTES - len(bare.encode()) - 1000  # what is said of the examples takes some, too
    return _render(runs, drawn, examples(runs, room))


def _render(runs: Sequence[Run], drawn: Sequence[Figure], packed: Examples) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("dsbs.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    style, script = (_template(name) for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        policy=_policy(script, style),
        style=Markup(style),
        script=Markup(script),
        title=", ".join(run.name for run in runs),
        runs=runs,
        abouts=[(run.name, _about(run)) for run in runs],
        several=len(runs) > 1,
        smoke=[run.name for run in runs if not run.results.reportable],
        verdicts=[words.verdict(run) for run in runs],
        differences=differences(runs),
        same_rows=same_rows(runs),
        accuracies=sections.accuracies(runs),
        comparisons=sections.comparisons(runs),
        recalls=sections.recalls(runs),
        rationales=sections.rationales(runs),
        costs=sections.costs(runs),
        smaller=smaller.frontier(runs),
        healing=smaller.healing_sentences(runs) + smaller.outdated(runs),
        figures=[
            (figure, Markup(figure.svg))
            for figure in drawn
            if not figure.name.startswith("frontier")
        ],
        frontiers=[
            (figure, Markup(figure.svg)) for figure in drawn if figure.name.startswith("frontier")
        ],
        needed=[
            _of(run, runs, label_efficiency_sentence(one))
            for run in runs
            for one in run.results.label_efficiency
        ],
        trials=sections.trials(runs),
        annotation=sections.annotation(runs),
        pay_off=[
            _of(run, runs, break_even_sentence(one))
            for run in runs
            for one in run.results.break_even
        ],
        packed=packed,
        fewest_seeds=min(
            (len(s.seeds) for run in runs for s in run.results.systems if s.seeds), default=1
        ),
        provenance=[_provenance(run) for run in runs],
    )


def _shown(value: Any) -> Any:
    """What an expression of the template prints: data's text with control characters made visible, the page's own as it is."""
    return words.visible(value) if type(value) is str else value


def _template(name: str) -> str:
    return (resources.files("dsbs.reporting") / "templates" / name).read_text(encoding="utf-8")


def _policy(script: str, style: str) -> str:
    """The Content-Security-Policy: nothing is loaded, and nothing but this page's own script and style sheet is applied.

    Figures set attributes of style on their shapes, which no hash can name: they are allowed, and no data reaches one.
    """
    return (
        f"default-src 'none'; script-src {_hash(script)}; style-src-elem {_hash(style)}; style-src-attr 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _joint_name(runs: Sequence[Run]) -> str:
    names = "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", run.name) for run in runs)
    return (
        f"report-{names}"
        if len(names) <= _LONGEST_NAME
        else f"report-{names[:_LONGEST_NAME]}-{digest(names)[:8]}"
    )


def _of(run: Run, runs: Sequence[Run], sentence: str) -> str:
    """Among several runs a sentence names its own."""
    return f"{run.name}: {sentence}" if len(runs) > 1 else sentence


def _about(run: Run) -> list[str]:
    """What the run is of, below the title."""
    results, teacher = run.results, run.recipe.get("teacher", {})
    rows = f"{results.n:,} {results.split} rows"
    if results.clusters is not None:
        rows += f" in {results.clusters:,} groups by {results.cluster}"
    said = [f"task {results.task}", rows]
    if teacher:
        said.append(f"teacher {teacher.get('model') or teacher.get('kind')}")
    if run.evaluated.get("ended"):
        said.append(f"evaluated {run.evaluated['ended'][:10]}")
    return said


def _provenance(run: Run) -> dict[str, Any]:
    stages = {"annotate": run.annotated, "train": run.trained, "eval": run.evaluated}
    stages = {name: record for name, record in stages.items() if record}
    times = [
        (one.get("status"), words.moment(one.get("started")), words.moment(one.get("ended")))
        for one in stages.values()
    ]
    data: dict[str, str] = {}
    for record in stages.values():
        data |= record.get("data", {})
    prompt = run.annotated.get("prompt")
    return {
        "name": run.name,
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100),
        "stages": [(name, *told) for name, told in zip(stages, times, strict=True)],
        "versions": _versions(stages),
        "data": sorted(data.items()),
        "prompt": [(part, _prompt_part(value)) for part, value in prompt.items() if value]
        if prompt
        else None,
    }


def _prompt_part(value: Any) -> str:
    """A part of a prompt as text: lists with a line for each entry, exemplars as they are written in a prompt file."""
    if isinstance(value, str):
        return value
    return "\n".join(
        one if isinstance(one, str) else json.dumps(one, indent=2, ensure_ascii=False)
        for one in value
    )


def _versions(stages: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Each package's version; where stages ran on different ones, all of them with their stages."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage, record in stages.items():
        for package, version in record.get("versions", {}).items():
            found.setdefault(package, {}).setdefault(version, []).append(stage)
    return [
        (
            package,
            next(iter(versions))
            if len(versions) == 1
            else ", ".join(
                f"{version} ({', '.join(where)})" for version, where in versions.items()
            ),
        )
        for package, versions in found.items()
    ]
