"""Drift: how many audited rows until a served student is closed, against the expected number.

    python benchmarks/drift.py runs/rounds             # the run of benchmarks/rounds.py

`dsbs serve --fallback --audit 1` answers test rows of benchmarks/rounds.py in a random order. The
teacher of the first rows gives its recorded labels. Then its labels permute for one class: every
row of the class gets the label of another one. Counted are the audited rows from then on until the
audit closes the student.

Expected: the same test on 2,000 drawn sequences of audited rows, with the share of differing
answers before and after the change, which the recorded labels show. Each server has another order
of the rows. Without --label, the class is the largest one of the rows that the student answers.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from rounds import (
    RECIPE,
    STUDENT,
    LoopbackTeacher,
    TestRow,
    answered_rows,
    ask,
    counted,
    fetch,
    key,
    served,
    wait_for_audits,
)

from dsbs.formatting import percent
from dsbs.serving.cascade import FALSE_ALARMS, log_evidence
from dsbs.students.calibration import Threshold, read_threshold

DRAWS = 2000
BATCH = 100  # rows whose audits are waited for, so that no audit comes after the change


class DriftingTeacher:
    """Recorded labels, of which one class has another label once it has ``drifted``."""

    def __init__(self, rows: Sequence[TestRow], label: str, instead: str) -> None:
        self._labels = {key(row.input["text"]): row.teacher for row in rows}
        self._changed = {label: instead}
        self.drifted = False

    def answer(self, text: str) -> str:
        label = self._labels[text]
        return self._changed.get(label, label) if self.drifted else label


def closing_counts(risk: float, most: int) -> NDArray[np.int64]:
    """The fewest differing answers of 0, 1, … ``most`` audited rows that close the student."""
    limit = math.log(1 / FALSE_ALARMS)
    counts = [1]
    for n in range(1, most + 1):
        fewest = counts[-1]
        while fewest <= n and log_evidence(fewest, n, risk) < limit:
            fewest += 1
        counts.append(fewest)
    return np.array(counts)


def expected(
    before: int, after: int, rates: tuple[float, float], risk: float
) -> tuple[NDArray[np.float64], float]:
    """Audited rows from the change until the student is closed, (draws,), inf where ``after`` are
    too few; and the share of the draws in which it is closed before the change, which are left out.
    """
    rng = np.random.default_rng(0)
    n = before + after
    rate = np.where(np.arange(n) < before, rates[0], rates[1])
    differs = (rng.random((DRAWS, n)) < rate).cumsum(axis=1)
    is_closed = differs >= closing_counts(risk, n)[1:]
    first = np.where(is_closed.any(axis=1), is_closed.argmax(axis=1) + 1.0, np.inf)
    too_early = first <= before
    return first[~too_early] - before, float(too_early.mean())


def closed_after(
    run: Path, rows: Sequence[TestRow], change: int, teacher: DriftingTeacher, url: str
) -> tuple[int, int | None]:
    """The audited rows of the first ``change`` rows, and from there until the server closes the
    student. None: they were too few.
    """
    settings = ("teacher.kind=openai", "teacher.model=drifting", f"teacher.base_url={url}")
    changes = [argument for setting in settings for argument in ("--set", setting)]
    teacher.drifted = False
    before = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        served(
            run / "train" / STUDENT,
            *("--fallback", str(RECIPE), "--out", folder, "--audit", "1", *changes),
        ) as server,
    ):
        for begin in range(0, len(rows), BATCH):
            if begin >= change and not teacher.drifted:
                before = counted(server, "audited")
                teacher.drifted = True
            ask(server, [{"input": row.input} for row in rows[begin : begin + BATCH]])
            wait_for_audits(server)
            breach = json.loads(fetch(f"{server}/health"))["breach"]
            if breach is not None:
                (audited,) = re.findall(r"of (\d+) audited answers", breach)
                return before, int(audited) - before
    return before, None


def coverage(threshold: Threshold, rows: Sequence[TestRow]) -> float:
    """The coverage that the server reckons with: that of the calibration rows and these."""
    sure = threshold.coverage * threshold.rows + sum(row.is_answered for row in rows)
    return sure / (threshold.rows + len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--label", help="the class whose label changes")
    parser.add_argument("--before", type=int, default=600, help="rows until the change")
    parser.add_argument("--after", type=int, default=900, help="rows after it, at most")
    parser.add_argument("--servers", type=int, default=8)
    options = parser.parse_args()
    folder = options.run / "train" / STUDENT
    rows = answered_rows(options.run, folder)
    threshold = read_threshold(folder)
    assert threshold is not None
    assert threshold.target is not None
    answered = [row for row in rows if row.is_answered]
    classes = Counter(row.teacher for row in answered).most_common()
    label = options.label or classes[0][0]
    instead = next(name for name, _ in classes if name != label)
    # A row of the class on which the student differed may have another answer than ``instead``.
    differs = sum(not row.agrees for row in answered) / len(answered)
    drifted = sum(not row.agrees or row.teacher == label for row in answered) / len(answered)
    risk = (1 - threshold.target) / coverage(threshold, rows[: options.before])
    share = len(answered) / len(rows)
    before, after = round(options.before * share), round(options.after * share)
    print(
        f"{label} becomes {instead}; the target allows {percent(risk)} of the student's answers to "
        f"differ; {percent(differs)} differ before the change and {percent(drifted)} after it"
    )
    draws, too_early = expected(before, after, (differs, drifted), risk)
    quantiles = [float(q) for q in np.quantile(draws, (0.05, 0.5, 0.95), method="higher")]
    print(
        f"expected: median {quantiles[1]:g}, 90% of the draws {quantiles[0]:g} to "
        f"{quantiles[2]:g} audited rows after the first {before}; closed before the "
        f"change in {percent(too_early)}, never in {percent(float(np.isinf(draws).mean()))}"
    )
    teacher = DriftingTeacher(rows, label, instead)
    url = LoopbackTeacher(teacher.answer, 0).url
    numbers = []
    for seed in range(options.servers):
        order = random.Random(seed).sample(rows, options.before + options.after)
        audited, number = closed_after(options.run, order, options.before, teacher, url)
        print(f"server {seed + 1}: {audited} audited rows, then {number}", flush=True)
        numbers.append(math.inf if number is None else number)
    inside = sum(quantiles[0] <= number <= quantiles[2] for number in numbers)
    print(f"served: median {median(numbers):g}; {inside} of {len(numbers)} within the 90%")


if __name__ == "__main__":
    main()
