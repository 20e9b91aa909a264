"""Gates of an evaluation: what its headline system has to reach, for exit code 4."""

from __future__ import annotations

from dsbs.errors import UserError
from dsbs.formatting import confidence_interval, p_value, signed, signed_confidence_interval
from dsbs.records.results import Results
from dsbs.records.sentences import headline_cascade
from dsbs.records.summary import first_comparison

_ROUNDING = 1e-9  # a mean over seeds may differ from the exact share by less than this


def gate_failures(
    results: Results,
    min_accuracy: float | None = None,
    min_delta: float | None = None,
    min_coverage: float | None = None,
) -> list[str]:
    """A sentence for each gate that the headline system misses; empty if it passes all.

    ``min_accuracy``, ``min_delta`` (against its first baseline) and ``min_coverage`` (the share of
    the requests that it answers in a cascade) are fractions, compared with the point estimates, not
    with their intervals; None: no such gate. Raises UserError if there is no headline system,
    nothing that it is compared with, or no cascade.
    """
    if min_accuracy is None and min_delta is None and min_coverage is None:
        return []
    system = results.system(results.headline)
    if system is None:
        raise UserError(
            f"{results.name} has no headline system (a student of the first method that is not a "
            "baseline), so no gate can be checked",
            hint="train the first of train.methods that is not in eval.baseline, "
            "then evaluate again",
        )
    failures = []
    if min_accuracy is not None and system.accuracy < min_accuracy - _ROUNDING:
        failures.append(
            f"{system.name}: accuracy {100 * system.accuracy:.2f}% "
            f"({confidence_interval(system.ci95)}) is below the gate of {100 * min_accuracy:g}%"
        )
    if min_coverage is not None:
        failures += _coverage_failures(results, min_coverage)
    if min_delta is None:
        return failures
    baseline, comparison = first_comparison(system)
    if comparison is None:
        raise UserError(
            f"{system.name} is not compared with any system, so --min-delta cannot be checked",
            hint="name in eval.baseline a method other than the first of train.methods, "
            "and train it, e.g. finetune",
        )
    if comparison.delta < min_delta - _ROUNDING:
        delta = signed(100 * comparison.delta, 2)
        failures.append(
            f"{system.name}: {delta} points against {baseline} "
            f"({signed_confidence_interval(comparison.ci95)}, {p_value(comparison.p_holm)}) "
            f"is below the gate of {100 * min_delta:+g} points"
        )
    return failures


def _coverage_failures(results: Results, min_coverage: float) -> list[str]:
    cascade = headline_cascade(results)
    if cascade is None:
        raise UserError(
            f"{results.headline} is not in front of its teacher, so --min-coverage cannot be "
            "checked",
            hint="set eval.cascade, e.g. eval.cascade.target=0.98, and evaluate again",
        )
    if cascade.coverage.value >= min_coverage - _ROUNDING:
        return []
    return [
        f"{cascade.student}: it can answer {100 * cascade.coverage.value:.2f}% of the requests, "
        f"which is below the gate of {100 * min_coverage:g}%"
    ]
