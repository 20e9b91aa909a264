"""The smallest difference that a test set can show."""

from __future__ import annotations

import math

import numpy as np

from dsbs.evaluation.bootstrap import Floats


def minimum_detectable_effect(sums: Floats, sizes: Floats) -> float | None:
    """The true difference that a two-sided test at .05 shows with 80 % power, as a fraction.

    ``sums`` (units,): a cluster's summed differences, or a row's difference; ``sizes`` (units,): its rows. The paired t test's
    power (Cohen, 1988, section 2.3.5) on the standard deviation seen; for clusters, that of what a sum differs from its rows'
    share of the mean difference. None where the units do not vary, and where even a difference of 1 would not show.
    """
    from scipy.optimize import brentq
    from statsmodels.stats.power import TTestPower

    units = len(sums)
    if units < 2:
        return None
    spread = float(np.std(sums - sizes * (sums.sum() / sizes.sum()), ddof=1))
    if math.isclose(spread, 0.0, abs_tol=1e-12):
        return None
    power = TTestPower().power
    # of one tail at .025: the other one adds under a millionth, and is NaN for some units, where statsmodels' own solver then
    # returns the negative root. 20 / sqrt(units) has 80 % power even with two units
    effect = brentq(
        lambda x: float(power(x, units, 0.025, alternative="larger")) - 0.8,
        0.0,
        20 / math.sqrt(units),
        xtol=1e-12,
    )
    found = float(effect) * spread * units / float(sizes.sum())
    return found if found <= 1 else None
