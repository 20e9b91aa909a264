"""Labels: the recall of each label, the pairs that are most often confused, and the measures of
each of several labels or fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsbs.formatting import ABSENT, interval, percent_number
from dsbs.records.results import Confusion, PartResult, SystemResult
from dsbs.reporting.runs import EvaluatedRun, name_among
from dsbs.reporting.tables import Column, RowGroup, Table, TableRow, measure_cell, system_table

FEW_LABELS = 10  # that are columns; more are rows, the worst of them
_MAX_ROWS = 20
_MAX_PAIRS = 15


def recall_table(runs: Sequence[EvaluatedRun]) -> Table | None:
    """Recall of each label of a closed set. None for other tasks.

    A row for each system and a column for each label; with many labels of one run, a row for each
    label, those with the lowest recall first.
    """
    labels = dict.fromkeys(
        label for run in runs for system in run.results.systems for label in system.recall
    )
    if not lists_labels(runs):
        return system_table([Column(label, _recall_cell(label)) for label in labels], runs)
    (run,) = runs
    systems = [system for system in run.results.systems if system.recall]
    main = main_system(run)
    by_recall = sorted(labels, key=lambda label: _recall_of(main, label))
    rows = [
        TableRow(label, [measure_cell(system.recall.get(label)) or "" for system in systems])
        for label in by_recall[:_MAX_ROWS]
    ]
    columns = [Column(system.name, lambda _: None) for system in systems]
    return Table(columns, [RowGroup(None, rows)])


def recall_note(runs: Sequence[EvaluatedRun]) -> str | None:
    """Which labels the table of recall leaves out, if any."""
    main = main_system(runs[0])
    if not lists_labels(runs) or main is None or len(main.recall) <= _MAX_ROWS:
        return None
    return (
        f"The {_MAX_ROWS} of {len(main.recall)} labels with the lowest recall of {main.name}; all "
        "are in report/metrics.csv."
    )


def lists_labels(runs: Sequence[EvaluatedRun]) -> bool:
    """Whether the table of recall has a row for each label."""
    labels = {label for run in runs for system in run.results.systems for label in system.recall}
    return len(labels) > FEW_LABELS and len(runs) == 1


def confusion_table(runs: Sequence[EvaluatedRun]) -> Table | None:
    """The pairs of labels that each run's main system confuses most. None if it confuses none."""
    groups = []
    for run in runs:
        main = main_system(run)
        if main is not None and main.confusions:
            rows = [_confusion_row(pair) for pair in main.confusions[:_MAX_PAIRS]]
            title = " ".join(filter(None, [name_among(run, runs), main.name]))
            groups.append(RowGroup(title, rows))
    columns = [
        Column("predicted as", lambda _: None, is_text=True),
        Column("rows", lambda _: None, note="mean over seeds"),
        Column("% of the label's rows", lambda _: None),
    ]
    return Table(columns, groups) if groups else None


def _confusion_row(pair: Confusion) -> TableRow:
    return TableRow(pair.gold, [pair.predicted, f"{pair.rows:,.4g}", percent_number(pair.share)])


def part_table(runs: Sequence[EvaluatedRun]) -> Table | None:
    """Measures of each of several labels, or of each field: those of each run's main system, of its
    baseline and of the teacher. None for other tasks.

    Of many labels, those with the lowest F1 of the main system.
    """
    groups = []
    mains = [(run, main_system(run)) for run in runs]
    has_confidence = any(
        part.ece is not None
        for run, main in mains
        if main is not None
        for system in _systems_with_parts(run, main)
        for part in system.parts.values()
    )
    for run, main in mains:
        if main is None or not main.parts:
            continue
        ordered = list(main.parts)
        if len(ordered) > _MAX_ROWS:
            ordered = sorted(ordered, key=lambda name: _f1_of(main.parts[name]))[:_MAX_ROWS]
        for system in _systems_with_parts(run, main):
            title = " ".join(filter(None, [name_among(run, runs), system.name]))
            rows = [
                TableRow(name, part_cells(system.parts[name], with_confidence=has_confidence))
                for name in ordered
            ]
            groups.append(RowGroup(title, rows))
    columns = part_columns(with_confidence=has_confidence)
    return Table(columns, groups) if groups else None


def part_columns(*, with_confidence: bool) -> list[Column]:
    """The columns of ``part_cells``."""
    columns = [
        Column("right,\u00a0%", lambda _: None, note="rows where it is right, or rightly absent"),
        Column(
            "precision,\u00a0%",
            lambda _: None,
            note="of the rows for which it is predicted, those where it is right",
        ),
        Column(
            "recall,\u00a0%",
            lambda _: None,
            note="of the rows that have it, those where it is found",
        ),
        Column("F1,\u00a0%", lambda _: None),
        Column("95% CI of F1", lambda _: None),
        Column("rows", lambda _: None, note="that have it by the gold labels"),
        Column("predicted", lambda _: None, note="rows for which it is predicted; mean over seeds"),
    ]
    if with_confidence:
        columns += [
            Column(
                "AUROC,\u00a0%",
                lambda _: None,
                note="the chance that a right value has a higher probability than a wrong one",
            ),
            Column("ECE,\u00a0%", lambda _: None, note="calibration error of the probabilities"),
        ]
    return columns


def part_note(runs: Sequence[EvaluatedRun]) -> str | None:
    """Which labels or fields the table leaves out, if any."""
    for run in runs:
        main = main_system(run)
        if main is not None and len(main.parts) > _MAX_ROWS:
            return (
                f"The {_MAX_ROWS} of {len(main.parts)} labels with the lowest F1 of {main.name}; "
                "all labels and systems are in report/metrics.csv."
            )
    return None


def _systems_with_parts(run: EvaluatedRun, main: SystemResult) -> list[SystemResult]:
    names = [main.name, next(iter(main.versus), None)]
    shown = [run.results.system(name) for name in dict.fromkeys(names)]
    shown += [each for each in run.results.systems if each.kind == "teacher" and each != main]
    return [system for system in shown if system is not None and system.parts]


def part_cells(result: PartResult, *, with_confidence: bool) -> list[str]:
    """Measures of a label or field, in percent, and its rows."""
    measures = (result.accuracy, result.precision, result.recall, result.f1)
    ci95 = None if result.f1 is None else result.f1.ci95
    cells = [
        *(measure_cell(measure) or ABSENT for measure in measures),
        ABSENT if ci95 is None else interval(ci95),
        f"{result.gold:,}",
        f"{result.predicted:,.4g}",
    ]
    if with_confidence:
        confidence = (result.confidence_auroc, result.ece)
        cells += [measure_cell(measure) or ABSENT for measure in confidence]
    return cells


def _f1_of(result: PartResult) -> float:
    return 1.0 if result.f1 is None else result.f1.value


def main_system(run: EvaluatedRun) -> SystemResult | None:
    """The headline system, or the most accurate one with measures by label, floors last."""
    systems = [system for system in run.results.systems if system.recall or system.parts]
    headline = run.results.headline
    return max(
        systems,
        key=lambda system: (system.name == headline, system.kind != "floor", system.accuracy),
        default=None,
    )


def _recall_of(system: SystemResult | None, label: str) -> float:
    if system is None or label not in system.recall:
        return 1.0
    return system.recall[label].value


def _recall_cell(label: str) -> Callable[[SystemResult], str | None]:
    return lambda system: measure_cell(system.recall.get(label))
