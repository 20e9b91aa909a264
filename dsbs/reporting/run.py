"""Report: a self-contained HTML page of one or several runs, CSV files, figures, model cards."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dsbs.config import Recipe
from dsbs.config.load import recorded
from dsbs.files import atomic_write, digest
from dsbs.formatting import ABSENT, count, percent
from dsbs.records.sentences import (
    break_even_sentence,
    floor_warnings,
    is_reliable,
    label_efficiency_sentence,
    review_sentences,
    student_sentences,
)
from dsbs.records.summary import (
    headline,
    headline_comparison,
    headline_details,
)
from dsbs.reporting.card import write_cards
from dsbs.reporting.comparisons import comparison_table, floor_definitions, floor_table
from dsbs.reporting.compression import (
    compression_table,
    healer_sentences,
    healing_sentences,
    outdated_sentences,
)
from dsbs.reporting.confidence import cascade_table, selective_table
from dsbs.reporting.csv_files import write_csv_files
from dsbs.reporting.examples import NO_EXAMPLES, PackedExamples, pack_examples
from dsbs.reporting.figures import Figure, draw_figures, write_figures
from dsbs.reporting.labels import (
    confusion_table,
    lists_labels,
    part_note,
    part_table,
    recall_note,
    recall_table,
)
from dsbs.reporting.runs import (
    EvaluatedRun,
    have_same_rows,
    load_runs,
    prefixed,
    recipe_differences,
)
from dsbs.reporting.tables import (
    accuracy_table,
    annotation_table,
    cost_table,
    rationale_table,
    tuning_table,
)
from dsbs.run_folder import RunFolder

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE_BYTES = 3_000_000  # maximum size of the page
_EXAMPLE_NOTES_BYTES = 1000  # reserved for the sentences about the examples
_MAX_NAME_LENGTH = 80  # of the default folder of a report of several runs


@dataclass(frozen=True, slots=True)
class Report:
    """The written files: the page, and CSV files, figures and model cards beside it."""

    page: Path
    runs: list[Path]
    files: list[Path]

    def as_json(self) -> dict[str, Any]:
        return {
            "report": str(self.page),
            "runs": [str(run) for run in self.runs],
            "files": [str(file) for file in self.files],
        }


def report(recipe: Recipe, *, out: str | Path | None = None) -> Path:
    """Write ``report.html`` into the recipe's run folder and return its path.

    Raises UserError if the run was not evaluated.
    """
    return report_runs([RunFolder.of(recipe, out).path])


def report_runs(folders: Sequence[str | Path], *, out: str | Path | None = None) -> Path:
    """Write one page for one or several run folders and return its path. See ``write_report``."""
    return write_report(folders, out=out).page


def write_report(folders: Sequence[str | Path], *, out: str | Path | None = None) -> Report:
    """Write the page of one or several run folders, and the files beside it.

    ``out`` is the folder to write to. Its default is the run folder of a single run, or
    ``runs/report-<names>`` for several. Raises UserError for a folder without results, and for one
    that is named twice.
    """
    paths = [Path(folder) for folder in folders]
    runs = load_runs(paths)
    if out is not None:
        folder = RunFolder(out)
    elif len(paths) == 1:
        folder = runs[0].folder
    else:
        folder = RunFolder(Path("runs") / _joint_name(runs))
    figures = draw_figures(runs)
    files = write_csv_files(runs, folder.report)
    files += write_figures(figures, folder.report / "figures")
    if len(runs) == 1:  # a report of several runs does not change their folders
        files += write_cards(runs[0])
    page = folder.path / "report.html"
    with atomic_write(page) as file:
        file.write(render(runs, figures))
    return Report(page, paths, files)


def _joint_name(runs: Sequence[EvaluatedRun]) -> str:
    names = "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", run.name) for run in runs)
    if len(names) > _MAX_NAME_LENGTH:
        names = f"{names[:_MAX_NAME_LENGTH]}-{digest(names)[:8]}"
    return f"report-{names}"


# --- the page


def render(runs: Sequence[EvaluatedRun], figures: Sequence[Figure]) -> str:
    """The page's HTML, at most PAGE_BYTES long: the examples fill the space that is left."""
    page = _render(runs, figures, NO_EXAMPLES)
    max_chars = PAGE_BYTES - len(page.encode()) - _EXAMPLE_NOTES_BYTES
    return _render(runs, figures, pack_examples(runs, max_chars))


def _render(
    runs: Sequence[EvaluatedRun], figures: Sequence[Figure], examples: PackedExamples
) -> str:
    from markupsafe import Markup

    style = template_text("base.css", "page.css")
    script = template_text("base.js", "page.js")
    drawings = [(figure, Markup(figure.svg)) for figure in figures]
    verdicts = [verdict(run) for run in runs]
    template = page_environment().get_template("page.html")
    return template.render(
        policy=_security_policy(script, style),
        style=Markup(style),
        script=Markup(script),
        title=", ".join(run.name for run in runs),
        runs=runs,
        descriptions=[(run.name, _description(run)) for run in runs],
        several=len(runs) > 1,
        has_several_students=any(each.students for each in verdicts),
        smoke=[run.name for run in runs if not run.results.reportable],
        verdicts=verdicts,
        differences=recipe_differences(runs),
        same_rows=have_same_rows(runs),
        accuracies=accuracy_table(runs),
        comparisons=comparison_table(runs),
        floors=floor_table(runs),
        floor_definitions=floor_definitions(runs),
        recalls=recall_table(runs),
        recall_note=recall_note(runs),
        recalls_by_label=lists_labels(runs),
        confusions=confusion_table(runs),
        parts=part_table(runs),
        part_note=part_note(runs),
        rationales=rationale_table(runs),
        costs=cost_table(runs),
        selective=selective_table(runs),
        cascades=cascade_table(runs),
        compressed=compression_table(runs),
        healing=healing_sentences(runs) + healer_sentences(runs) + outdated_sentences(runs),
        figures=[drawing for drawing in drawings if _section(drawing[0]) == "curves"],
        frontiers=[drawing for drawing in drawings if _section(drawing[0]) == "compressed"],
        confidence=[drawing for drawing in drawings if _section(drawing[0]) == "confidence"],
        label_efficiency=[
            prefixed(label_efficiency_sentence(item), run, runs)
            for run in runs
            for item in run.results.label_efficiency
        ],
        trials=tuning_table(runs),
        annotation=annotation_table(runs),
        break_even=[
            prefixed(break_even_sentence(item), run, runs)
            for run in runs
            for item in run.results.break_even
        ],
        reviews=[
            prefixed(sentence, run, runs)
            for run in runs
            for sentence in review_sentences(run.results)
        ],
        examples=examples,
        fewest_seeds=min(
            (len(s.seeds) for run in runs for s in run.results.systems if s.seeds), default=1
        ),
        provenance=[_provenance(run) for run in runs],
    )


def _section(figure: Figure) -> str:
    """The section of the page that shows a figure."""
    kind = figure.name.partition("-")[0]
    sections = {"frontier": "compressed", "risk": "confidence", "cascade": "confidence"}
    return sections.get(kind, "curves")


def _finalize(value: Any) -> Any:
    """Make control characters in data visible. Markup and numbers pass unchanged."""
    return visible(value) if type(value) is str else value


def page_environment(package: str = "dsbs.reporting") -> Environment:
    """Jinja over a package's ``templates`` folder, for pages that escape every text from data."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )


def template_text(*names: str, package: str = "dsbs.reporting") -> str:
    """The text of template files, one after the other."""
    folder = resources.files(package) / "templates"
    return "".join((folder / name).read_text(encoding="utf-8") for name in names)


def _security_policy(script: str, style: str) -> str:
    """The Content-Security-Policy: nothing is loaded, only this page's script and style apply.

    Figures set style attributes on their shapes, which a hash cannot name, so those are allowed; no
    data reaches one.
    """
    return (
        f"default-src 'none'; script-src {source_hash(script)}; "
        f"style-src-elem {source_hash(style)}; style-src-attr 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def source_hash(text: str) -> str:
    """An inline script's or style's source in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# --- text


@dataclass(frozen=True, slots=True)
class Verdict:
    """A run's headline, and the accuracies and caveats behind it."""

    run: str
    sentence: str
    details: str
    is_reliable: bool
    students: list[str]
    """Which of several students is best, and what each one's method adds."""


def verdict(run: EvaluatedRun) -> Verdict:
    """The headline system against its baseline."""
    results = run.results
    system, baseline = headline_comparison(results)
    sentence = headline(results)
    other = results.system(baseline)
    if system is None or baseline is None or other is None:
        details = " ".join(
            [
                "Without a baseline (eval.baseline) the report cannot say what the method "
                "contributes.",
                *headline_details(results),
            ]
        )
        return Verdict(run.name, sentence, details, False, student_sentences(results))
    details = (
        f"{system.name} labels {percent(system.accuracy)} of the rows correctly, "
        f"{other.name} {percent(other.accuracy)}."
    )
    details = " ".join([details, *headline_details(results)])
    is_clear = is_reliable(system.versus[baseline]) and not floor_warnings(results, system)
    return Verdict(run.name, sentence, details, is_clear, student_sentences(results))


# Control characters and halves of surrogate pairs, which have no glyph, as escapes.
_ESCAPES = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"
}
_ESCAPES |= {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}
# Begin and end of isolates: marks that an element's own end does not close.
_ISOLATES = re.compile("[\u2066-\u2069]")


def visible(text: str) -> str:
    """``text`` with control characters as escapes and with balanced bidirectional isolates.

    An open isolate would change the direction of the text beside it.
    """
    unopened = 0
    unclosed = 0
    for character in _ISOLATES.findall(text):
        if character != "\u2069":
            unclosed += 1
        elif unclosed:
            unclosed -= 1
        else:
            unopened += 1
    return "\u2068" * unopened + text.translate(_ESCAPES) + "\u2069" * unclosed


def _description(run: EvaluatedRun) -> list[str]:
    """The line below the title: task, rows, teacher and date."""
    results = run.results
    teacher = run.recipe.get("teacher", {})
    rows = f"{results.n:,} {results.split} rows"
    if results.clusters is not None:
        rows += f" in {count(results.clusters, 'group')} by {results.cluster}"
    parts = [f"task {results.task}", rows]
    if teacher:
        parts.append(f"teacher {teacher.get('model') or teacher.get('kind')}")
    if run.manifests["eval"].get("ended"):
        parts.append(f"evaluated {run.manifests['eval']['ended'][:10]}")
    return parts


def _provenance(run: EvaluatedRun) -> dict[str, Any]:
    manifests = {stage: manifest for stage, manifest in run.manifests.items() if manifest}
    stages = [
        (
            stage,
            manifest.get("status"),
            _utc_minute(manifest.get("started")),
            _utc_minute(manifest.get("ended")),
        )
        for stage, manifest in manifests.items()
    ]
    data: dict[str, str] = {}
    for manifest in manifests.values():
        data |= manifest.get("data", {})
    prompt = run.manifests["annotate"].get("prompt") or {}
    recipe = recorded({"recipe": run.recipe})
    return {
        "name": run.name,
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100),
        "stages": stages,
        "versions": _versions(manifests),
        "data": sorted(data.items()),
        "prompt": [(name, _prompt_text(value)) for name, value in prompt.items() if value],
    }


def _utc_minute(timestamp: str | None) -> str:
    """A manifest's timestamp, which is in UTC, to the minute."""
    return f"{timestamp[:16].replace('T', ' ')} UTC" if timestamp else ABSENT


def _prompt_text(value: Any) -> str:
    """An entry of a prompt file as text: a list has a line for each item, exemplars are JSON."""
    if isinstance(value, str):
        return value
    lines = []
    for item in value:
        is_text = isinstance(item, str)
        lines.append(item if is_text else json.dumps(item, indent=2, ensure_ascii=False))
    return "\n".join(lines)


def _versions(manifests: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Each package's version; where stages ran on different ones, all of them with their stages."""
    stages: dict[str, dict[str, list[str]]] = {}
    for stage, manifest in manifests.items():
        for package, version in manifest.get("versions", {}).items():
            stages.setdefault(package, {}).setdefault(version, []).append(stage)
    versions = []
    for package, by_version in stages.items():
        texts = [f"{version} ({', '.join(used_by)})" for version, used_by in by_version.items()]
        versions.append((package, ", ".join(texts if len(texts) > 1 else by_version)))
    return versions
