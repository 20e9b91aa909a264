"""Figures of a run, as SVG. What they show stands in ``results.json`` and the students' records."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

# Distinct in grey and to colour-blind eyes (Okabe and Ito, 2008), each with a marker of its own.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))


def curve_svg(run: Path, results: dict[str, Any]) -> str | None:
    """Accuracy against training rows, a line for each method, 95 % intervals as bands, the teacher as a level.

    None where the students were all trained on the same share of the rows.
    """
    rows = _training_rows(run)
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    level = None
    for system in results["systems"]:
        point = (system["accuracy"], *system["ci95"])
        if not system["seeds"]:
            level = (system["name"], point)
        elif system["name"] in rows:
            title, count = rows[system["name"]]
            lines.setdefault(title, []).append((count, *point))
    if max((len(points) for points in lines.values()), default=0) < 2:
        return None

    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, PercentFormatter

    # text stays text, and equal results give an equal file
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dsbs", "font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.subplots()
        for (color, marker), (title, points) in zip(_STYLES * len(lines), sorted(lines.items()), strict=False):
            counts, heights, lows, highs = zip(*sorted(points), strict=True)
            axes.plot(counts, heights, color=color, marker=marker, label=title)
            axes.fill_between(counts, lows, highs, color=color, alpha=0.15, linewidth=0)
        if level is not None:
            name, (height, low, high) = level
            axes.axhline(height, color="#555", linestyle="--", label=name)
            axes.axhspan(low, high, color="#555", alpha=0.12, linewidth=0)
        ticks = sorted({count for points in lines.values() for count, *_ in points})
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("training rows")
        axes.set_ylabel(f"accuracy on {results['split']} ({results['n']:,} rows)")
        axes.grid(axis="y", color="#ddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def _training_rows(run: Path) -> dict[str, tuple[str, int]]:
    """Of each system its line in the curve and how many rows it was trained on."""
    found = {}
    for path in sorted((run / "train").glob("*/train.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        student = record["student"]
        found[student["name"].rpartition("-s")[0]] = (f"{student['method']}, {student['labels']} labels", record["rows"])
    return found
