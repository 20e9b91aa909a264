"""The test rows with every system's answer, packed for the page's example browser.

What a row takes decides how many fit a page: texts stand row by row, so that a rationale lies near the words that it repeats;
answers, which repeat from row to row, by system. The whole is gzipped JSON in base64, unpacked by the browser.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsbs.reporting.gather import Run

# Characters of a text shown, tried in this order until the examples fit; None: whole.
_CUTS = (None, 20_000, 5_000, 2_000, 1_000, 600, 400, 300, 200, 120)
_RAW = 300  # characters shown of an output that could not be read


@dataclass(frozen=True, slots=True)
class Examples:
    """What goes into the page. ``cut`` is the length at which texts were cut (None: none was); of ``rows`` some are left out
    only where cutting was not enough: those on which all systems agree.
    """

    data: str
    rows: int
    kept: int
    cut: int | None


@dataclass(slots=True)
class _Row:
    id: str
    gold: str | None
    input: dict[str, Any] | None
    said: dict[tuple[int, int], dict[str, Any]] = field(
        default_factory=dict
    )  # (system, seed's place) -> prediction

    def rationales(self) -> dict[int, str]:
        """One of each system that gave any: the first seed's, for the others' would take as much room again."""
        found: dict[int, str] = {}
        for (system, _), prediction in sorted(self.said.items(), key=lambda pair: pair[0]):
            if prediction.get("rationale"):
                found.setdefault(system, prediction["rationale"])
        return found


@dataclass(frozen=True, slots=True)
class _System:
    name: str
    run: Run
    kind: str
    members: list[str]


def examples(runs: Sequence[Run], room: int) -> Examples:
    """Pack the rows of all runs into at most ``room`` characters: first the longest texts are cut, then rows left out on
    which the systems agree.
    """
    systems = [
        _System(s.name, run, s.kind, run.members(s)) for run in runs for s in run.results.systems
    ]
    rows = _join(runs, systems)
    longest = max((len(text) for row in rows for text in _texts(row)), default=0)
    data = ""
    for cut in _CUTS:
        if cut is not None and cut >= longest:
            continue
        data = _pack(runs, systems, rows, cut)
        if len(data) <= room:
            return Examples(data, len(rows), len(rows), cut)
    kept = sorted(rows, key=lambda row: not _disagree(row))  # stable: the file's order within both
    while len(data) > room and kept:
        kept = kept[: int(len(kept) * min(0.9, room / len(data)))]
        data = _pack(runs, systems, kept, _CUTS[-1])
    return Examples(data, len(rows), len(kept), _CUTS[-1])


def _join(runs: Sequence[Run], systems: Sequence[_System]) -> list[_Row]:
    """One row for each id; where two runs have other input under one id, one for each."""
    found: dict[str, list[_Row]] = {}
    for run in runs:
        asked = None
        for number, system in enumerate(systems):
            if system.run is not run:
                continue
            for place, member in enumerate(system.members):
                for row_id, prediction in run.predictions(member).items():
                    fields = prediction.get("input")
                    if fields is None:
                        asked = run.inputs() if asked is None else asked
                        fields = asked.get(row_id)
                    alike = found.setdefault(row_id, [])
                    row = next(
                        (
                            one
                            for one in alike
                            if (one.input, one.gold) == (fields, prediction.get("gold"))
                        ),
                        None,
                    )
                    if row is None:
                        row = _Row(row_id, prediction.get("gold"), fields)
                        alike.append(row)
                    row.said[number, place] = prediction
    return [row for alike in found.values() for row in alike]


def _texts(row: _Row) -> Iterator[str]:
    yield from (_text(value) for value in (row.input or {}).values())
    yield from (
        str(one["prediction"]) for one in row.said.values() if one.get("prediction") is not None
    )
    yield from row.rationales().values()


def _disagree(row: _Row) -> bool:
    return len({bool(one.get("correct")) for one in row.said.values()}) > 1


def _pack(
    runs: Sequence[Run], systems: Sequence[_System], rows: Sequence[_Row], cut: int | None
) -> str:
    answers: dict[tuple[bool, str], int] = {}
    shapes: dict[tuple[str, ...], int] = {}
    shown = []
    for row in rows:
        fields = row.input or {}
        shape = shapes.setdefault(tuple(fields), len(shapes))
        why = {system: _cut(text, cut) for system, text in row.rationales().items()}
        shown.append(
            [row.id, row.gold, shape, [_cut(_text(value), cut) for value in fields.values()], why]
        )
    described = []
    for number, system in enumerate(systems):
        first = next(i for i, one in enumerate(systems) if one.run is system.run)
        teacher = next(
            (i for i, one in enumerate(systems) if one.run is system.run and one.kind == "teacher"),
            None,
        )
        names = [one.name for one in systems if one.run is system.run]
        results = system.run.results
        versus = next(iter(results.systems[number - first].versus), None)
        members = []
        for place, member in enumerate(system.members):
            predictions = [row.said.get((number, place)) for row in rows]
            members.append(
                {
                    "name": member.removeprefix(f"{system.name}-"),
                    "said": [_answer(one, answers, cut) for one in predictions],
                    "right": "".join(
                        "-" if one is None else str(int(bool(one.get("correct"))))
                        for one in predictions
                    ),
                    "sure": [
                        None if one is None else _percent(one.get("probability"))
                        for one in predictions
                    ],
                }
            )
            if all(value is None for value in members[-1]["sure"]):
                del members[-1]["sure"]
        described.append(
            {
                "name": system.name,
                "run": system.run.name if len(runs) > 1 else None,
                "kind": system.kind,
                "teacher": teacher,
                "against": first + names.index(versus) if versus in names else None,
                "members": members,
            }
        )
    headline = next((i for i, one in enumerate(systems) if one.name == one.run.results.headline), 0)
    whole = {
        "systems": described,
        "answers": [{"text": text} if read else {"raw": text} for read, text in answers],
        "shapes": list(shapes),
        "rows": shown,
        "headline": headline,
    }
    text = json.dumps(whole, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 9, mtime=0)).decode()


def _answer(
    prediction: dict[str, Any] | None, answers: dict[tuple[bool, str], int], cut: int | None
) -> int:
    """The number of an answer in the page's list of answers; -1 where the system was not asked."""
    if prediction is None:
        return -1
    read = prediction.get("prediction")
    key = (
        read is not None,
        _cut(str(read), cut) if read is not None else _cut(str(prediction.get("raw", "")), _RAW),
    )
    return answers.setdefault(key, len(answers))


def _percent(probability: float | None) -> int | None:
    return None if probability is None else round(100 * probability)


def _text(value: Any) -> str:
    """A field as text: a list, such as of choices, a line for each."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "\n".join(value)
    return json.dumps(value, ensure_ascii=False)


def _cut(text: str, most: int | None) -> str:
    return text if most is None or len(text) <= most else f"{text[:most]} […]"
