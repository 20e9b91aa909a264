"""What people see of a running stage."""

from __future__ import annotations

import time

import pytest

from dsbs import progress as progress_module
from dsbs.progress import Lines, running


def test_a_line_has_the_rate_in_what_people_count_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 100.0, *[110.0] * 9])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", 5.0)
    progress = Lines()
    with running(progress, "train step-by-step-gold-s0", 120, 20, (64, "examples")):
        progress.update(70, "loss: label 0.301, rationale 1.250; best valid 85.0 %")
    line = capsys.readouterr().err
    assert line.startswith(
        "train step-by-step-gold-s0 70/120 320.0 examples/s "
        "loss: label 0.301, rationale 1.250; best valid"
    )
    assert "about 10 s left" in line
