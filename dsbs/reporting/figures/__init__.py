"""Figures of one or several runs as SVG. A figure without data is left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsbs.files import atomic_write
from dsbs.reporting.figures.calibration import recall_figure, reliability_figure
from dsbs.reporting.figures.canvas import Figure, is_own_file
from dsbs.reporting.figures.confidence import cascade_figure, risk_figure
from dsbs.reporting.figures.curves import break_even, learning_curve, training_curves
from dsbs.reporting.figures.scatter import frontier_figure, size_figure, speed_figure
from dsbs.reporting.runs import EvaluatedRun

__all__ = ["Figure", "draw_figures", "write_figures"]


def draw_figures(runs: Sequence[EvaluatedRun]) -> list[Figure]:
    """All figures that the runs have data for, in the order of the page. Their names are unique."""
    drawers = (
        learning_curve,
        size_figure,
        speed_figure,
        frontier_figure,
        break_even,
        recall_figure,
        reliability_figure,
        cascade_figure,
        risk_figure,
        training_curves,
    )
    return [figure for draw in drawers for figure in draw(runs)]


def write_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write each figure as a standalone SVG file, and remove own files of earlier figures."""
    paths = [folder / f"{figure.name}.svg" for figure in figures]
    for path, figure in zip(paths, figures, strict=True):
        with atomic_write(path) as file:
            file.write(figure.standalone)
    for path in set(folder.glob("*.svg")) - set(paths):
        if is_own_file(path):
            path.unlink()
    return paths
