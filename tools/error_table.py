"""Error table: the part of docs/teachers.md that says what dsbs does about an endpoint's errors.

    python tools/error_table.py

It is written from the tables in dsbs/annotation/backends/faults.py. A test checks that the
committed page is up to date.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from dsbs.annotation.backends.faults import ACTIONS, FAULTS, FINISH_REASONS, Fault
from dsbs.files import atomic_write

PAGE = Path(__file__).resolve().parent.parent / "docs" / "teachers.md"
BEGIN = "<!-- written by tools/error_table.py -->\n"
END = "<!-- end -->\n"
ENDINGS = {
    "whole": "read",
    "cut": "read where the answer is complete; asked again once `annotate.max_tokens` is raised",
    "broken off": "never read; asked again, at most twice where it is billed",
    "filtered": "rejects that row (`refused`)",
}


def page(text: str) -> str:
    """The page with its part rewritten."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + tables() + "\n" + END + after


def tables() -> str:
    lines = ["| whose fault | what dsbs does |", "| --- | --- |"]
    lines += [f"| {blame} | {action} |" for blame, action in ACTIONS.items()]
    lines += ["", "The first line that applies decides:", ""]
    lines += ["| HTTP status | code, or words of the message | fault | providers |"]
    lines += ["| --- | --- | --- | --- |"]
    lines += [line(fault) for fault in FAULTS]
    lines += ["| any other 4xx | a request parameter is named | parameter | all |"]
    lines += ["| any other 4xx | | unclear | all |"]
    lines += ["| anything else | | endpoint | all |"]
    lines += ["", "Finish reasons, in upper or lower case:", ""]
    lines += ["| reply | finish reasons | what dsbs does |", "| --- | --- | --- |"]
    names: dict[str, list[str]] = defaultdict(list)
    for name, (ending, _, _) in FINISH_REASONS.items():
        names[ending].append(f"`{name}`")
    lines += [
        f"| {ending} | {', '.join(names[ending])} | {ENDINGS[ending]} |" for ending in ENDINGS
    ]
    return "\n".join(lines) + "\n"


def line(fault: Fault) -> str:
    statuses = ", ".join(map(str, fault.statuses)) or "any"
    marks = [f"`{code}`" for code in fault.codes] + [f"“{word}”" for word in fault.words]
    text = ", ".join(marks).replace("|", "\\|").replace("`_", "`_")
    source = f"[{fault.providers}]({fault.source})" if fault.source else fault.providers
    return f"| {statuses} | {text} | {fault.blame} | {source} |"


if __name__ == "__main__":
    written = page(PAGE.read_text(encoding="utf-8"))
    with atomic_write(PAGE) as file:
        file.write(written)
    print(PAGE, file=sys.stderr)
