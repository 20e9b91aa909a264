"""Golden rows: inputs, and what transformers writes to them, which an export must write as well."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dsbs.config.load import read_recorded
from dsbs.errors import DsbsError, UserError
from dsbs.exporting.exported import Equivalence
from dsbs.students import Engine, GeneratedText, Kind, Searcher, Start, Student, Target
from dsbs.tasks.data import load

GOLDEN = "golden.jsonl"
ROWS = 48  # inputs of the label's prefix
_OTHER_ROWS = 12  # inputs of every other prefix, whose outputs are long
_MOST_TOKENS = 64  # of an output
BEAMS = 4
_BATCH = 16
SCORE_TOLERANCE = 1e-3  # nats, of a text's joint log-probability in float32
_DEEP_TOLERANCE = (
    5e-3  # the same of a decoder alone: 12 tokens of SmolLM2's 30 layers came to 1.3e-3 by rounding
)
_FLOAT_AGREEMENT = 0.95  # a float export may differ in a tie of two tokens, no more

Source = Literal["valid", "examples", "made"]


@dataclass(frozen=True, slots=True)
class GoldenRow:
    """One line of ``golden.jsonl``; log-probabilities are in nats, of the text's tokens and its end token together."""

    target: Target
    start: Start
    input: str  # with its prefix
    max_tokens: int
    greedy: str
    greedy_log_probability: float
    beam: str | None  # of a beam search of `BEAMS`, without length penalty
    beam_log_probability: float | None


def texts_for(
    student: Student, folder: Path, given: Sequence[str] | None
) -> tuple[list[str], Source]:
    """Inputs without prefix: those given, else the valid rows of the run that ``folder`` lies in, else made ones."""
    if given is not None:
        if not given:
            raise UserError(
                "there are no examples to compare on",
                hint="give a file with a text or a JSON row in each line",
            )
        return list(given[:ROWS]), "examples"
    rows = _valid_texts(student, folder.resolve().parent / "manifest.json")
    return (rows[:ROWS], "valid") if rows else (_made_texts(student), "made")


def _valid_texts(student: Student, manifest: Path) -> list[str]:
    try:
        recipe = read_recorded(json.loads(manifest.read_text(encoding="utf-8")))
        return (
            []
            if recipe is None
            else [student.task.text(row.input) for row in load(recipe, student.task, "valid")]
        )
    except (
        OSError,
        ValueError,
        AttributeError,
        DsbsError,
    ):  # a student that was moved away from its run or its data
        return []


def _made_texts(student: Student) -> list[str]:
    """Random pieces of the vocabulary: no language, but every length and the same for the same student."""
    tokenizer = student.engine.tokenizer
    special = set(tokenizer.all_special_ids)
    pieces = [index for index in sorted(tokenizer.get_vocab().values()) if index not in special]
    chance = random.Random(0)
    longest = max(2, min(64, student.card.max_input_tokens // 2))
    texts = (
        tokenizer.decode(chance.choices(pieces, k=chance.randint(1, longest))) for _ in range(ROWS)
    )
    return [" ".join(text.split()) for text in texts]


def golden_rows(student: Student, texts: Sequence[str], *, beams: bool) -> list[GoldenRow]:
    """What transformers writes to ``texts`` after every prefix of the student."""
    rows: list[GoldenRow] = []
    most = min(student.card.max_target_tokens, _MOST_TOKENS)
    for number, (target, prefix) in enumerate(student.card.prefixes.items()):
        start = student.card.starts.get(target, "pad")
        inputs = [prefix + text for text in texts[: None if number == 0 else _OTHER_ROWS]]
        greedy = _written(student.engine, inputs, most, start)
        beam: Sequence[GeneratedText | None] = [None] * len(inputs)
        if beams and isinstance(student.engine, Searcher):
            beam = _searched(student.engine, inputs, most, start)
        for text, one, other in zip(inputs, greedy, beam, strict=True):
            rows.append(
                GoldenRow(
                    target, start, text, most, one.text, _log(one.probability),
                    other.text if other else None, _log(other.probability) if other else None,
                )
            )  # fmt: skip
    return rows


def _log(probability: float | None) -> float:
    return math.log(max(probability or 0.0, 1e-300))


def _written(engine: Engine, inputs: Sequence[str], most: int, start: Start) -> list[GeneratedText]:
    found = []
    for first in range(0, len(inputs), _BATCH):
        found += engine.write(inputs[first : first + _BATCH], most, start, probabilities=True)
    return found


def _searched(
    engine: Searcher, inputs: Sequence[str], most: int, start: Start
) -> list[GeneratedText]:
    found: list[GeneratedText] = []
    for first in range(0, len(inputs), _BATCH):
        found += engine.search(inputs[first : first + _BATCH], most, start, BEAMS)
    return found


def compare(engine: Engine, rows: Sequence[GoldenRow], source: Source) -> Equivalence:
    """What an export's engine writes to the golden rows' inputs, against what stands there."""
    equal, searched, same_beam = 0, 0, 0
    differences = []
    for (start, most), chosen in _alike(rows).items():
        inputs = [row.input for row in chosen]
        for row, said in zip(chosen, _written(engine, inputs, most, start), strict=True):
            equal += said.text == row.greedy
            if said.text == row.greedy and said.probability is not None:
                differences.append(abs(_log(said.probability) - row.greedy_log_probability))
        if not isinstance(engine, Searcher):
            continue
        for row, said in zip(chosen, _searched(engine, inputs, most, start), strict=True):
            if row.beam_log_probability is None:
                continue
            searched += 1
            apart = abs(_log(said.probability) - row.beam_log_probability)
            same_beam += (
                said.text == row.beam or apart < SCORE_TOLERANCE
            )  # equally likely texts are both right
            if said.text == row.beam:
                differences.append(apart)
    return Equivalence(
        rows=len(rows),
        source=source,
        greedy_agreement=equal / len(rows),
        beam_agreement=same_beam / searched if searched else None,
        score_difference=max(differences) if differences else None,
    )


def _alike(rows: Sequence[GoldenRow]) -> dict[tuple[Start, int], list[GoldenRow]]:
    found: dict[tuple[Start, int], list[GoldenRow]] = {}
    for row in rows:
        found.setdefault((row.start, row.max_tokens), []).append(row)
    return found


def check_float(found: Equivalence, name: str, kind: Kind = "seq2seq") -> None:
    """Raise DsbsError where an export in float32 does not do what the student does."""
    wrong, allowed = [], _DEEP_TOLERANCE if kind == "causal" else SCORE_TOLERANCE
    if found.greedy_agreement < _FLOAT_AGREEMENT:
        wrong.append(
            f"greedy texts agree on {100 * found.greedy_agreement:.1f} % of {found.rows} rows"
        )
    if found.beam_agreement is not None and found.beam_agreement < _FLOAT_AGREEMENT:
        wrong.append(f"beam search agrees on {100 * found.beam_agreement:.1f} %")
    if found.score_difference is not None and found.score_difference > allowed:
        wrong.append(
            f"log-probabilities differ by up to {found.score_difference:.2g}, allowed are {allowed:g}"
        )
    if wrong:
        raise DsbsError(
            f"the export of {name} does not do what the student does: {'; '.join(wrong)}",
            hint="this model's shape is not one that the format carries: try --format torch",
        )


def golden_lines(rows: Sequence[GoldenRow]) -> list[str]:
    return [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
