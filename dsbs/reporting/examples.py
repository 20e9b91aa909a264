"""Example browser data: the test rows with every system's answer, packed for the page.

The number of rows that fit depends on their size. Texts are stored row by row, so that a rationale
lies near the words that it repeats; answers, which repeat from row to row, are stored by system.
The result is gzipped JSON in base64, which the page's script unpacks.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsbs.records import Prediction
from dsbs.reporting.runs import EvaluatedRun, name_among
from dsbs.tasks import Task

# Maximum length of a text in characters, tried in this order until the examples fit; None: no cut.
_TEXT_LIMITS = (None, 20_000, 5_000, 2_000, 1_000, 600, 400, 300, 200, 120)
_RAW_LIMIT = 300  # characters of an unreadable output


@dataclass(frozen=True, slots=True)
class PackedExamples:
    """The examples for a page.

    ``text_limit`` is the length that texts were cut to (None: not cut). Rows on which all systems
    agree are left out first, and only where cutting texts was not enough.
    """

    data: str
    total_rows: int
    packed_rows: int
    text_limit: int | None


NO_EXAMPLES = PackedExamples("", 0, 0, None)


@dataclass(slots=True)
class _Row:
    id: str
    gold: str | None
    input: dict[str, Any] | None
    predictions: dict[tuple[int, int], Prediction] = field(default_factory=dict)
    """By the system's number and the seed's place."""

    def rationales(self) -> dict[int, str]:
        """A rationale by system: the first seed's, since all of them would take too much space."""
        return {
            system: prediction.rationale
            for (system, place), prediction in sorted(self.predictions.items())
            if place == 0 and prediction.rationale
        }

    def is_disputed(self) -> bool:
        return len({bool(prediction.correct) for prediction in self.predictions.values()}) > 1

    def texts(self) -> Iterator[str]:
        for value in (self.input or {}).values():
            yield _as_text(value)
        for prediction in self.predictions.values():
            if prediction.prediction is not None:
                yield prediction.prediction
        yield from self.rationales().values()


@dataclass(frozen=True, slots=True)
class _System:
    name: str
    run: EvaluatedRun
    kind: str
    members: list[str]


class _Parts:
    """The parts of the labels of one task, for showing in which of them two labels differ."""

    def __init__(self, task: Task, limit: int | None) -> None:
        self._task = task
        self._limit = limit
        self._numbers: dict[Hashable, int] = {}
        self._of: dict[str, dict[str, tuple[str, int]]] = {}

    def add(self, label: str, shown: str) -> None:
        """Add a label, which the page shows as ``shown``."""
        if shown not in self._of:
            self._of[shown] = {
                name: (_cut(value, self._limit), self._number(name, value))
                for name, value in self._task.parts(label).items()
                if value is not None
            }

    def _number(self, name: str, value: str) -> int:
        """Equal for values of a part that mean the same."""
        key = name, self._task.part_key(name, value)
        return self._numbers.setdefault(key, len(self._numbers))

    def packed(self) -> dict[str, Any]:
        return {"names": self._task.part_names, "of": self._of}


def pack_examples(runs: Sequence[EvaluatedRun], max_chars: int) -> PackedExamples:
    """Pack the rows of all runs into at most ``max_chars`` characters.

    The longest texts are cut first, then rows are left out on which the systems agree.
    """
    systems = [
        _System(system.name, run, system.kind, run.members(system))
        for run in runs
        for system in run.results.systems
    ]
    rows = _join_rows(runs, systems)
    longest = max((len(text) for row in rows for text in row.texts()), default=0)
    data = ""
    for limit in _TEXT_LIMITS:
        if limit is not None and limit >= longest:
            continue
        data = _pack(runs, systems, rows, limit)
        if len(data) <= max_chars:
            return PackedExamples(data, len(rows), len(rows), limit)
    packed = sorted(rows, key=lambda row: not row.is_disputed())  # stable: else in file order
    while len(data) > max_chars and packed:
        packed = packed[: int(len(packed) * min(0.9, max_chars / len(data)))]
        data = _pack(runs, systems, packed, _TEXT_LIMITS[-1])
    return PackedExamples(data, len(rows), len(packed), _TEXT_LIMITS[-1])


def _join_rows(runs: Sequence[EvaluatedRun], systems: Sequence[_System]) -> list[_Row]:
    """A row for each id; where two runs have different input under one id, a row for each input."""
    by_id: dict[str, list[_Row]] = {}
    for run in runs:
        inputs = None
        for number, system in enumerate(systems):
            if system.run is not run:
                continue
            for seed_place, member in enumerate(system.members):
                for row_id, prediction in run.predictions(member).items():
                    fields = prediction.input
                    if fields is None:
                        if inputs is None:
                            inputs = run.inputs()
                        fields = inputs.get(row_id)
                    row = _matching_row(by_id.setdefault(row_id, []), prediction, fields)
                    row.predictions[number, seed_place] = prediction
    return [row for rows in by_id.values() for row in rows]


def _matching_row(rows: list[_Row], prediction: Prediction, fields: dict[str, Any] | None) -> _Row:
    """The row of this input and gold label, added to ``rows`` if it is new."""
    for row in rows:
        if row.input == fields and row.gold == prediction.gold:
            return row
    rows.append(_Row(prediction.id, prediction.gold, fields))
    return rows[-1]


def _pack(
    runs: Sequence[EvaluatedRun],
    systems: Sequence[_System],
    rows: Sequence[_Row],
    limit: int | None,
) -> str:
    answers: dict[tuple[bool, str], int] = {}
    tasks = [(run, run.task) for run in runs]
    parts = [_Parts(task, limit) if task and task.part_names else None for _, task in tasks]
    shapes: dict[tuple[str, ...], int] = {}
    packed_rows = []
    for row in rows:
        fields = row.input or {}
        shape = shapes.setdefault(tuple(fields), len(shapes))
        values = [_cut(_as_text(value), limit) for value in fields.values()]
        rationales = {system: _cut(text, limit) for system, text in row.rationales().items()}
        packed_rows.append([row.id, row.gold, shape, values, rationales])
    packed_systems = []
    for number, system in enumerate(systems):
        numbers = [i for i, other in enumerate(systems) if other.run is system.run]
        teacher = next((i for i in numbers if systems[i].kind == "teacher"), None)
        versus = next(iter(system.run.results.systems[number - numbers[0]].versus), None)
        against = next((i for i in numbers if systems[i].name == versus), None)
        place = next(i for i, run in enumerate(runs) if run is system.run)
        members = [
            _pack_member(number, seed_place, systems, rows, answers, limit, parts[place])
            for seed_place in range(len(system.members))
        ]
        packed_systems.append(
            {
                "name": system.name,
                "run": name_among(system.run, runs),
                "kind": system.kind,
                "teacher": teacher,
                "against": against,
                "members": members,
                **({} if parts[place] is None else {"parts": place}),
            }
        )
    headlines = (
        i for i, system in enumerate(systems) if system.name == system.run.results.headline
    )
    data = {
        "systems": packed_systems,
        "answers": [{"text": text} if readable else {"raw": text} for readable, text in answers],
        "shapes": list(shapes),
        "rows": packed_rows,
        "headline": next(headlines, 0),
    }
    if any(parts):
        data["parts"] = [each and each.packed() for each in parts]
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 9, mtime=0)).decode()


def _pack_member(
    number: int,
    seed_place: int,
    systems: Sequence[_System],
    rows: Sequence[_Row],
    answers: dict[tuple[bool, str], int],
    limit: int | None,
    parts: _Parts | None,
) -> dict[str, Any]:
    """One seed's answers: numbers in the list of answers, right or wrong, and probabilities."""
    system = systems[number]
    predictions = [row.predictions.get((number, seed_place)) for row in rows]
    for row, prediction in zip(rows, predictions, strict=True):
        if parts is not None and prediction is not None:
            if row.gold is not None:
                parts.add(row.gold, row.gold)
            if prediction.prediction is not None:
                parts.add(prediction.prediction, _cut(prediction.prediction, limit))
    member: dict[str, Any] = {
        "name": system.members[seed_place].removeprefix(f"{system.name}-"),
        "answers": [_answer_number(prediction, answers, limit) for prediction in predictions],
        "correct": "".join(map(_correct_mark, predictions)),
    }
    probabilities = [_probability_percent(prediction) for prediction in predictions]
    if any(percent is not None for percent in probabilities):
        member["probability"] = probabilities
    return member


def _correct_mark(prediction: Prediction | None) -> str:
    if prediction is None:
        return "-"
    return str(int(bool(prediction.correct)))


def _probability_percent(prediction: Prediction | None) -> int | None:
    if prediction is None or prediction.probability is None:
        return None
    return round(100 * prediction.probability)


def _answer_number(
    prediction: Prediction | None, answers: dict[tuple[bool, str], int], limit: int | None
) -> int:
    """The answer's place in the page's list of answers; -1 where the system has no prediction."""
    if prediction is None:
        return -1
    if prediction.prediction is None:
        key = (False, _cut(prediction.raw, _RAW_LIMIT))
    else:
        key = (True, _cut(prediction.prediction, limit))
    return answers.setdefault(key, len(answers))


def _as_text(value: Any) -> str:
    """A field as text. A list of strings, such as choices, becomes a line for each."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return json.dumps(value, ensure_ascii=False)


def _cut(text: str, limit: int | None) -> str:
    if limit is None or len(text) <= limit:
        return text
    return f"{text[:limit]} […]"
