"""What a format of export must give, and the registry of those there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from dsbs.config.registry import EXPORT_FORMATS, entry
from dsbs.errors import UserError
from dsbs.files import write_json
from dsbs.students import WORDING, Kind, Student, start_token

PLAIN = "float32"


class FirstTask(NamedTuple):
    """What ``predict.py`` does with a text: the task that holds the label."""

    prefix: str
    start: int  # the id that the decoder begins with
    most: int  # tokens that it writes at most


def first_task(student: Student) -> FirstTask:
    target, prefix = next(iter(student.card.prefixes.items()))
    start = start_token(student.engine.model.config, student.card.starts.get(target, "pad"))
    return FirstTask(prefix, start, student.card.max_target_tokens)


def write_wording(student: Student, folder: Path) -> None:
    """``wording.json`` of a decoder-only student: what stands around its texts."""
    write_json(folder / WORDING, student.engine.wording.around.model_dump(mode="json"))  # type: ignore[attr-defined]


def save_tokenizer(student: Student, folder: Path) -> None:
    """``tokenizer.json``, which the package tokenizers reads alone, cutting where the student cuts."""
    tokenizer = student.engine.tokenizer
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    if student.card.kind == "causal":
        backend.no_truncation()  # its prompt is cut in the text, not at its end
    else:
        backend.enable_truncation(student.card.max_input_tokens)
    backend.no_padding()
    backend.save(str(folder / "tokenizer.json"))


class ExportFormat(Protocol):
    """How students are written in one format."""

    kinds: Sequence[Kind]
    quantizations: Sequence[str]  # the first one is taken where none is asked for
    packages: Sequence[str]  # whose versions decide what the export does

    def check(self, student: Student, quantize: str) -> str | None:
        """A remark for the user, if there is one. Raises UserError where a package is missing or the model does not fit."""
        ...

    def write(self, student: Student, folder: Path, quantize: str) -> None:
        """Put the model into ``folder``, which may not alter the student's own weights in memory."""
        ...

    def script(self, student: Student, quantize: str) -> str:
        """``predict.py``: reads inputs from stdin, a line each, and prints what the model writes to them."""
        ...


def format_of(name: str) -> ExportFormat:
    """Raises UserError for a name that is none."""
    if name not in EXPORT_FORMATS:
        raise UserError(
            f"there is no export format {name!r}", hint=f"give --format {', '.join(EXPORT_FORMATS)}"
        )
    made: ExportFormat = entry(EXPORT_FORMATS, name)()
    return made
