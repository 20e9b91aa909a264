"""Export formats: their protocol, the export record, and what the formats' scripts share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from dsbs.config.registry import EXPORT_FORMATS, entry
from dsbs.errors import DsbsError, UserError
from dsbs.files import write_json
from dsbs.students.card import Format, Runtime
from dsbs.students.formats import PROMPT_FORMAT_FILE, start_token
from dsbs.students.student import Student

FLOAT32 = "float32"
RECORD = "export.json"


class Equivalence(BaseModel):
    """The export compared with transformers on ``golden.jsonl``. Shares are fractions in [0, 1]."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    rows: int
    source: Literal["valid", "examples", "made"]
    """The run's valid rows, texts that were given, or texts made from the vocabulary."""
    greedy_agreement: float
    """Share of equal texts with greedy decoding, or of equal labels of a label head."""
    beam_agreement: float | None = None
    """Share of equal texts, or of equal scores, with a beam search of 4. None: no beam search."""
    score_difference: float | None = None
    """Largest difference of the log-probabilities of equal texts, in nats; of a label head, of all
    its labels. None: no scores."""


class Exported(BaseModel):
    """One export. Its folder is a student's folder: ``Student.load`` reads it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True
    )

    schema_: Literal["dsbs.export/1"] = Field("dsbs.export/1", alias="schema")
    path: Path = Field(exclude=True)
    """Where it is now; a folder may be moved."""
    student: str
    """The name on its card."""
    fingerprint: str
    """Fingerprint of the student's files."""
    format: Format
    quantize: str
    """float32: not quantized."""
    megabytes: float
    """Size of the weight files."""
    student_megabytes: float
    """Size of the student's weight files."""
    versions: dict[str, str]
    examples: str | None = None
    """Digest of the texts that were given for the comparison."""
    equivalence: Equivalence

    @property
    def times_smaller(self) -> float:
        """The student's size divided by the export's."""
        return self.student_megabytes / self.megabytes


def read_exported(folder: Path) -> Exported | None:
    """The record in an export's folder; None where this version can read none."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Exported.model_validate(record | {"path": folder})
    except (OSError, ValueError, TypeError):
        return None


class ExportFormat(Protocol):
    """How students are written in one format."""

    kinds: Sequence[Runtime]
    quantizations: Sequence[str]  # the first is the default
    packages: Sequence[str]  # whose versions decide what the export does

    def check(self, student: Student, quantize: str) -> str | None:
        """A remark for the user, or None.

        Raises UserError where a package is missing or the model is not supported.
        """
        ...

    def write(self, student: Student, folder: Path, quantize: str) -> None:
        """Write the model into ``folder``, without changing the student's weights in memory."""
        ...

    def script(self, student: Student, quantize: str) -> str | None:
        """``predict.py``: reads one input per line of stdin and prints the model's output. None:
        only dsbs can load the export.
        """
        ...


def export_format(name: str) -> ExportFormat:
    """Raises UserError for an unknown format."""
    if name not in EXPORT_FORMATS:
        raise UserError(
            f"unknown export format {name!r}", hint=f"give --format {', '.join(EXPORT_FORMATS)}"
        )
    chosen: ExportFormat = entry(EXPORT_FORMATS, name)()
    return chosen


# --- files and scripts


class LabelView(NamedTuple):
    """The view that ``predict.py`` uses: the one with the label."""

    prefix: str
    start_id: int  # the decoder's first token
    max_tokens: int  # of the output


def label_view(student: Student) -> LabelView:
    target, prefix = next(iter(student.card.prefixes.items()))
    start = student.card.starts.get(target, "pad")
    start_id = start_token(student.backend.model.config, start)
    return LabelView(prefix, start_id, student.card.max_target_tokens)


def write_prompt_format(student: Student, folder: Path) -> None:
    """Write ``wording.json``: what surrounds the texts of a decoder-only student."""
    prompt_format = student.backend.input_format.prompt_format  # type: ignore[attr-defined]
    write_json(folder / PROMPT_FORMAT_FILE, prompt_format.model_dump(mode="json"))


def save_tokenizer(student: Student, folder: Path) -> None:
    """Write ``tokenizer.json`` for the package tokenizers, which truncates like the student."""
    fast_tokenizer = student.backend.tokenizer.backend_tokenizer
    tokenizer = type(fast_tokenizer).from_str(fast_tokenizer.to_str())
    if student.card.kind == "causal":
        tokenizer.no_truncation()  # a prompt is truncated in its text, not at its end
    else:
        tokenizer.enable_truncation(student.card.max_input_tokens)
    tokenizer.no_padding()
    tokenizer.save(str(folder / "tokenizer.json"))


def convert_ct2(
    student: Student, folder: Path, quantize: str, load_spec: Callable[[], Any]
) -> None:
    """Write what a loader of CTranslate2's converter made of a model."""
    import torch
    from ctranslate2.converters.converter import Converter

    class StudentConverter(Converter):  # type: ignore[misc]
        def _load(self) -> Any:
            with torch.no_grad():
                return load_spec()

    converted = folder / "ct2"  # the converter empties the folder that it writes to
    quantization = None if quantize == FLOAT32 else quantize
    try:
        StudentConverter().convert(str(converted), quantization=quantization)
    except (ValueError, NotImplementedError) as error:
        other = "onnx" if student.card.head == "labels" else "torch"
        raise DsbsError(
            f"CTranslate2 cannot convert {student.card.name} ({type(error).__name__}: {error})",
            hint=f"try --format {other} --quantize int8",
        ) from error
    for path in converted.iterdir():
        path.rename(folder / path.name)
    converted.rmdir()


_DECODER_SCRIPT = '''"""Print the student's output for each line of stdin."""
import json
import sys
from pathlib import Path

{imports}

here = Path(__file__).resolve().parent
prompt_format = json.loads((here / "wording.json").read_text(encoding="utf-8"))
head, tail = prompt_format["head"], prompt_format["tail"]
tokenizer = tokenizers.Tokenizer.from_file(str(here / "tokenizer.json"))
text_tokenizer = tokenizers.Tokenizer.from_file(str(here / "tokenizer.json"))
text_tokenizer.encode_special_tokens = True  # special tokens belong to the prompt format alone
head_ids = tokenizer.encode(head, add_special_tokens=False).ids
tail_ids = tokenizer.encode(tail, add_special_tokens=False).ids
max_text_tokens = {max_input_tokens} - len(head_ids) - len(tail_ids)
{load}
sys.stdout.reconfigure(encoding="utf-8")
for line in open(0, encoding="utf-8-sig"):
    text = {prefix} + line.strip()
    ids = tokenizer.encode(head + text + tail, add_special_tokens=False).ids
    if len(ids) > {max_input_tokens} or any(token in text for token in prompt_format["special"]):
        text_ids = text_tokenizer.encode(text, add_special_tokens=False).ids
        ids = head_ids + text_ids[:max_text_tokens] + tail_ids
{write}
'''


def decoder_script(student: Student, *, imports: str, load: str, write: str) -> str:
    """``predict.py`` of a decoder-only student.

    ``imports``, ``load`` (the model) and ``write`` are the runtime's own lines. ``write`` is in a
    loop, and prints what follows ``ids``, at most MAX_TOKENS tokens.
    """
    card = student.card
    return _DECODER_SCRIPT.format(
        imports=imports,
        load=load,
        prefix=repr(next(iter(card.prefixes.values()))),
        max_input_tokens=card.max_input_tokens,
        write=write.replace("MAX_TOKENS", str(card.max_target_tokens)),
    )
