"""Golden rows: inputs with the outputs of transformers, by which an export is checked."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from dsbs.config.load import read_recorded
from dsbs.errors import DsbsError, UserError
from dsbs.exporting import Equivalence
from dsbs.formatting import percent
from dsbs.run_folder import RunFolder
from dsbs.students.backends import Backend, BeamSearchBackend, GeneratedText
from dsbs.students.card import Architecture, Start, StudentCard, Target
from dsbs.students.student import Student
from dsbs.tasks.data import load

GOLDEN = "golden.jsonl"
ROWS = 48  # inputs with the label's prefix
_OTHER_ROWS = 12  # inputs with each other prefix, whose outputs are long
_MAX_TOKENS = 64  # of an output
BEAMS = 4
_BATCH_SIZE = 16
SCORE_TOLERANCE = 1e-3  # nats, of a text's joint log-probability in float32
# The same for decoders: rounding in SmolLM2's 30 layers gave 1.3e-3 over 12 tokens.
_DECODER_TOLERANCE = 5e-3
_SMALLEST = 1e-12  # smaller probabilities of a label are compared as this
_MIN_AGREEMENT = 0.95  # a float32 export may differ where two tokens tie, and nowhere else

Source = Literal["valid", "examples", "made"]


@dataclass(frozen=True, slots=True)
class GoldenRow:
    """One line of ``golden.jsonl``.

    Log-probabilities are in nats, of all the text's tokens and its end token.
    """

    target: Target
    start: Start
    input: str  # with its prefix
    max_tokens: int
    greedy: str
    greedy_log_probability: float
    beam: str | None  # of a beam search of `BEAMS` without length penalty
    beam_log_probability: float | None
    distribution: tuple[float, ...] | None = None  # of a label head, in its classes' order


def comparison_texts(
    student: Student, folder: Path, examples: Sequence[str] | None
) -> tuple[list[str], Source]:
    """Inputs without prefix: the given ones, or the run's valid rows, or made ones."""
    if examples is not None:
        if not examples:
            raise UserError(
                "there are no examples to compare on",
                hint="give a file with one text or JSON row per line",
            )
        return list(examples[:ROWS]), "examples"
    texts = _valid_texts(student, folder)
    if texts:
        return texts[:ROWS], "valid"
    return _made_texts(student), "made"


def _valid_texts(student: Student, folder: Path) -> list[str]:
    """The run's valid rows; none where the student was moved away from its run or its data."""
    run = RunFolder(folder.resolve().parent.parent)
    try:
        recipe = read_recorded(run.manifest(folder.resolve().parent.name))
        if recipe is None:
            return []
        return [student.task.text(row.input) for row in load(recipe, student.task, "valid")]
    except (OSError, ValueError, AttributeError, DsbsError):
        return []


def _made_texts(student: Student) -> list[str]:
    """Random pieces of the vocabulary, of all lengths, and the same for the same student."""
    tokenizer = student.backend.tokenizer
    special_ids = set(tokenizer.all_special_ids)
    piece_ids = [
        index for index in sorted(tokenizer.get_vocab().values()) if index not in special_ids
    ]
    generator = random.Random(0)
    longest = max(2, min(64, student.card.max_input_tokens // 2))
    texts = (
        tokenizer.decode(generator.choices(piece_ids, k=generator.randint(1, longest)))
        for _ in range(ROWS)
    )
    return [" ".join(text.split()) for text in texts]


def label_prefixes(card: StudentCard) -> dict[Target, str]:
    """The prefix of the label alone."""
    return dict(islice(card.prefixes.items(), 1))


def golden_rows(student: Student, texts: Sequence[str], *, beams: bool) -> list[GoldenRow]:
    """The outputs of transformers for ``texts`` with every prefix of the student."""
    rows: list[GoldenRow] = []
    backend = student.backend
    max_tokens = min(student.card.max_target_tokens, _MAX_TOKENS)
    prefixes = student.card.prefixes
    if student.card.head == "labels":
        prefixes = label_prefixes(student.card)  # an export has no rationales
    for number, (target, prefix) in enumerate(prefixes.items()):
        start = student.card.starts.get(target, "pad")
        chosen = texts if number == 0 else texts[:_OTHER_ROWS]
        inputs = [prefix + text for text in chosen]
        greedy_outputs = _generate(backend, inputs, max_tokens, start)
        beam_outputs: Sequence[GeneratedText | None] = [None] * len(inputs)
        if beams and isinstance(backend, BeamSearchBackend):
            beam_outputs = _beam_search(backend, inputs, max_tokens, start)
        for text, greedy, beam in zip(inputs, greedy_outputs, beam_outputs, strict=True):
            rows.append(
                GoldenRow(
                    target=target,
                    start=start,
                    input=text,
                    max_tokens=max_tokens,
                    greedy=greedy.text,
                    greedy_log_probability=_log(greedy.probability),
                    beam=beam.text if beam else None,
                    beam_log_probability=_log(beam.probability) if beam else None,
                    distribution=greedy.distribution,
                )
            )
    return rows


def _log(probability: float | None) -> float:
    return math.log(max(probability or 0.0, 1e-300))


def _generate(
    backend: Backend, inputs: Sequence[str], max_tokens: int, start: Start
) -> list[GeneratedText]:
    outputs: list[GeneratedText] = []
    for first in range(0, len(inputs), _BATCH_SIZE):
        batch = inputs[first : first + _BATCH_SIZE]
        outputs += backend.generate(batch, max_tokens, start, probabilities=True)
    return outputs


def _beam_search(
    backend: BeamSearchBackend, inputs: Sequence[str], max_tokens: int, start: Start
) -> list[GeneratedText]:
    outputs: list[GeneratedText] = []
    for first in range(0, len(inputs), _BATCH_SIZE):
        batch = inputs[first : first + _BATCH_SIZE]
        outputs += backend.beam_search(batch, max_tokens, start, BEAMS)
    return outputs


def measure_equivalence(backend: Backend, rows: Sequence[GoldenRow], source: Source) -> Equivalence:
    """Compare an export's outputs with the golden rows."""
    equal = 0
    searched = 0
    equal_beams = 0
    differences = []
    for (start, max_tokens), group in _by_settings(rows).items():
        inputs = [row.input for row in group]
        outputs = _generate(backend, inputs, max_tokens, start)
        for row, output in zip(group, outputs, strict=True):
            equal += output.text == row.greedy
            if row.distribution is not None:
                differences.append(_largest_difference(row.distribution, output.distribution or ()))
            elif output.text == row.greedy and output.probability is not None:
                differences.append(abs(_log(output.probability) - row.greedy_log_probability))
        if not isinstance(backend, BeamSearchBackend):
            continue
        outputs = _beam_search(backend, inputs, max_tokens, start)
        for row, output in zip(group, outputs, strict=True):
            if row.beam_log_probability is None:
                continue
            searched += 1
            difference = abs(_log(output.probability) - row.beam_log_probability)
            # Equally likely texts are both right.
            equal_beams += output.text == row.beam or difference < SCORE_TOLERANCE
            if output.text == row.beam:
                differences.append(difference)
    return Equivalence(
        rows=len(rows),
        source=source,
        greedy_agreement=equal / len(rows),
        beam_agreement=equal_beams / searched if searched else None,
        score_difference=max(differences, default=None),
    )


def _largest_difference(expected: Sequence[float], actual: Sequence[float]) -> float:
    """The largest difference of two distributions' log-probabilities, in nats."""
    return max(
        abs(math.log(max(a, _SMALLEST)) - math.log(max(b, _SMALLEST)))
        for a, b in zip(expected, actual, strict=True)
    )


def _by_settings(rows: Sequence[GoldenRow]) -> dict[tuple[Start, int], list[GoldenRow]]:
    groups: dict[tuple[Start, int], list[GoldenRow]] = {}
    for row in rows:
        groups.setdefault((row.start, row.max_tokens), []).append(row)
    return groups


def check_float32(
    equivalence: Equivalence, student: str, architecture: Architecture = "seq2seq"
) -> None:
    """Raises DsbsError where a float32 export differs from the student."""
    tolerance = _DECODER_TOLERANCE if architecture == "causal" else SCORE_TOLERANCE
    problems = []
    if equivalence.greedy_agreement < _MIN_AGREEMENT:
        problems.append(
            f"greedy texts agree on {percent(equivalence.greedy_agreement)} of "
            f"{equivalence.rows} rows"
        )
    if equivalence.beam_agreement is not None and equivalence.beam_agreement < _MIN_AGREEMENT:
        problems.append(f"beam search agrees on {percent(equivalence.beam_agreement)}")
    if equivalence.score_difference is not None and equivalence.score_difference > tolerance:
        problems.append(
            f"log-probabilities differ by up to {equivalence.score_difference:.2g} "
            f"(allowed: {tolerance:g})"
        )
    if problems:
        raise DsbsError(
            f"the export of {student} differs from the student: {'; '.join(problems)}",
            hint="the format may not support this model's shape: try --format torch",
        )


def golden_lines(rows: Sequence[GoldenRow]) -> list[str]:
    return [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
