"""Gates: the least that ``dsbs eval`` must find for a pipeline to go on."""

from __future__ import annotations

from dsbs.errors import UserError
from dsbs.records.results import Comparison, Results, SystemResult

_ROUNDING = 1e-9  # a mean over seeds may miss the share that it is by less than this


def failed(
    results: Results, min_accuracy: float | None = None, min_delta: float | None = None
) -> list[str]:
    """A sentence for each gate that the headline system does not pass; [] where it passes all.

    ``min_accuracy`` and ``min_delta`` (to the system's first baseline) are fractions and held against the values found, not
    against their intervals; None: no such gate. Raises UserError where there is no headline system, or nothing that it is
    compared with.
    """
    if min_accuracy is None and min_delta is None:
        return []
    system = results.system(results.headline)
    if system is None:
        raise UserError(
            f"{results.name} has no headline system, a student of its first method that is no baseline, so no gate can be held",
            hint="train the first of train.methods that is not in eval.baseline, then evaluate again",
        )
    found = []
    if min_accuracy is not None and system.accuracy < min_accuracy - _ROUNDING:
        low, high = (100 * end for end in system.ci95)
        found.append(
            f"{system.name}: accuracy {100 * system.accuracy:.2f} % [{low:.1f}, {high:.1f}] is below the gate of "
            f"{100 * min_accuracy:g} %"
        )
    if min_delta is not None:
        other, versus = _first_comparison(system)
        if versus.delta < min_delta - _ROUNDING:
            low, high = (100 * end for end in versus.ci95)
            found.append(
                f"{system.name}: {100 * versus.delta:+.2f} points to {other} [{low:+.1f}, {high:+.1f}], p (Holm) "
                f"{versus.p_holm:.3f}, is below the gate of {100 * min_delta:+g} points"
            )
    return found


def _first_comparison(system: SystemResult) -> tuple[str, Comparison]:
    for other, versus in system.versus.items():
        return other, versus
    raise UserError(
        f"{system.name} is compared with nothing, so --min-delta cannot be held",
        hint="name in eval.baseline a method other than the first of train.methods, and train it, e.g. finetune",
    )
