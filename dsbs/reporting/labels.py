"""Labels: the recall of each label, and the pairs of labels that are most often confused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsbs.formatting import percent_number
from dsbs.records.results import Confusion, SystemResult
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


def main_system(run: EvaluatedRun) -> SystemResult | None:
    """The headline system, or the most accurate one with a recall, floors last."""
    systems = [system for system in run.results.systems if system.recall]
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
