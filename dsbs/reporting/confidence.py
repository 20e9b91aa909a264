"""Confidence in a report: tables of selective prediction and of cascades."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsbs.formatting import dollars, interval, milliseconds_number, percent_number
from dsbs.records.measures import COVERAGES
from dsbs.records.results import SystemResult
from dsbs.reporting.runs import EvaluatedRun, name_among
from dsbs.reporting.tables import Column, RowGroup, Table, TableRow, cells, optional, system_table


def selective_table(runs: Sequence[EvaluatedRun]) -> Table | None:
    """Selective prediction. None if no system has a confidence."""
    columns = [
        Column(
            "confidence",
            lambda system: system.selective and ", ".join(system.selective.confidence),
            note="of a calibrated student, the kind with the lowest AURC on the validation rows",
            is_text=True,
        ),
        Column(
            "AURC,\u00a0%",
            _selective_cell("aurc"),
            note="area under the risk-coverage curve (Geifman et al., 2019); lower is better",
        ),
        Column(
            "excess,\u00a0%",
            _selective_cell("e_aurc"),
            note="AURC minus that of the best order of the same answers; lower is better",
        ),
    ]
    columns += [
        Column(
            f"accuracy on {100 * share:.0f}%",
            _selective_cell(f"accuracy_at_{100 * share:.0f}"),
            note="of the answers that the system is surest of, with its 95% CI (bootstrap)",
        )
        for share in COVERAGES
    ]
    return system_table(columns, runs)


def _selective_cell(name: str) -> Callable[[SystemResult], str | None]:
    def cell(system: SystemResult) -> str | None:
        if system.selective is None:
            return None
        measure = system.selective.measures[name]
        text = percent_number(measure.value)
        return text if measure.ci95 is None else f"{text} {interval(measure.ci95)}"

    return cell


def cascade_table(runs: Sequence[EvaluatedRun]) -> Table | None:
    """Students in front of their teacher. None without ``eval.cascade``."""
    columns = [
        Column("confidence", lambda cascade: cascade.confidence, is_text=True),
        Column("threshold", lambda cascade: optional("{:.4f}".format, cascade.threshold)),
        Column(
            "guaranteed,\u00a0%",
            lambda cascade: optional(percent_number, cascade.bound),
            note="the target's measure, at least (or, with a margin, the loss, at most)",
        ),
        Column("calibration rows", lambda cascade: f"{cascade.rows:,}"),
        Column(
            "coverage,\u00a0%",
            lambda cascade: percent_number(cascade.coverage.value),
            note="the share of the test rows that the student answers",
        ),
        Column(
            "agreement,\u00a0%",
            lambda cascade: percent_number(cascade.agreement.value),
            note="the share on which the answer does not differ from the teacher's",
        ),
        Column("95% CI", lambda cascade: optional(interval, cascade.agreement.ci95)),
        Column("accuracy,\u00a0%", lambda cascade: percent_number(cascade.accuracy.value)),
        Column("teacher alone", lambda cascade: percent_number(cascade.teacher_accuracy.value)),
        Column("student alone", lambda cascade: percent_number(cascade.student_accuracy.value)),
        Column(
            "cost of 1,000 requests",
            lambda cascade: optional(dollars, cascade.usd_per_1000),
            note="the teacher's price for the requests that it answers",
        ),
        Column(
            "ms per request", lambda cascade: optional(milliseconds_number, cascade.ms_per_request)
        ),
        Column("break-even, requests", lambda cascade: optional("{:,}".format, cascade.break_even)),
    ]
    groups = []
    for run in runs:
        rows = [
            TableRow(
                cascade.student, cells(columns, cascade), cascade.system == run.results.headline
            )
            for cascade in run.results.cascades
        ]
        if rows:
            groups.append(RowGroup(name_among(run, runs), rows))
    return Table(columns, groups) if groups else None
