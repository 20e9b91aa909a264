"""An export's README: the student's model card, and what is true of the export."""

from __future__ import annotations

import re
from pathlib import Path

from dsbs.exporting.exported import Exported
from dsbs.exporting.formats import PLAIN, ExportFormat
from dsbs.formatting import escape_markdown


def readme(student: Path, exported: Exported, chosen: ExportFormat) -> str:
    """The student's card, if it has one, and a section on the export."""
    try:
        text = (student / "README.md").read_text(encoding="utf-8")
        card = (
            re.sub(r"<!-- dsbs wrote this card.*?-->", "", text).rstrip() + "\n\n"
        )  # it was, and is now longer
    except OSError:
        card = f"# {escape_markdown(exported.student)}\n\n"
    found = exported.equivalence
    rows = {
        "valid": "rows of valid",
        "examples": "given texts",
        "made": "texts made from the vocabulary",
    }[found.source]
    lines = [
        "## Export",
        "",
        f"Format {exported.format}, {'not quantised' if exported.quantize == PLAIN else exported.quantize}: "
        f"{exported.megabytes:.2f} MB of weights, {exported.smaller:.1f} times smaller than the student's "
        f"{exported.student_megabytes:.2f} MB.",
        "",
        f"Against transformers on {found.rows} {rows} (`golden.jsonl`):",
        "",
        "| what | found |",
        "| --- | --- |",
        f"| greedy decoding, equal texts | {100 * found.greedy_agreement:.1f} % |",
    ]
    if found.beam_agreement is not None:
        lines.append(
            f"| beam search of 4, equal texts or ties | {100 * found.beam_agreement:.1f} % |"
        )
    if found.score_difference is not None:
        lines.append(
            f"| log-probabilities of equal texts, largest difference | {found.score_difference:.2g} nats |"
        )
    made_with = ", ".join(
        f"{name} {version}" for name, version in sorted(exported.versions.items())
    )
    needs = " ".join(chosen.packages)
    lines += [
        "",
        f"Made with {made_with}.",
        "",
        f"`predict.py` reads a text in each line of stdin; it needs `pip install {needs}` and nothing else.",
        "Where a row has several fields, its text is written as the inputs in `golden.jsonl` are, without their prefix.",
        "",
    ]
    return card + "\n".join(lines)
