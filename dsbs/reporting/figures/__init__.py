"""Figures of one run or several, as SVG, from their records alone. What has no data has no figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsbs.files import atomic_write
from dsbs.reporting.figures.calibration import recall, reliability
from dsbs.reporting.figures.canvas import Figure, is_ours
from dsbs.reporting.figures.cost import pay_off, speed
from dsbs.reporting.figures.curves import curve, size
from dsbs.reporting.figures.frontier import frontier
from dsbs.reporting.figures.training import training
from dsbs.reporting.gather import Run

__all__ = ["Figure", "figures", "write_figures"]


def figures(runs: Sequence[Run]) -> list[Figure]:
    """All figures that the runs have data for, in the order in which a page shows them; each has a name of its own."""
    return [
        figure
        for draw in (curve, size, speed, frontier, pay_off, recall, reliability, training)
        for figure in draw(runs)
    ]


def write_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write each figure as an SVG file that stands alone; files of figures that are no more are removed."""
    paths = [folder / f"{figure.name}.svg" for figure in figures]
    for path, figure in zip(paths, figures, strict=True):
        with atomic_write(path) as file:
            file.write(figure.alone)
    for path in set(folder.glob("*.svg")) - set(paths):
        if is_ours(path):
            path.unlink()
    return paths
