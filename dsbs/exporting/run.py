"""Export: write a student in another format, compare it with the student, move it into place."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError, UserError
from dsbs.exporting import (
    FLOAT32,
    RECORD,
    Equivalence,
    Exported,
    ExportFormat,
    export_format,
    read_exported,
    save_tokenizer,
)
from dsbs.exporting.golden import (
    GOLDEN,
    check_float32,
    comparison_texts,
    golden_lines,
    golden_rows,
    label_prefixes,
    measure_equivalence,
)
from dsbs.files import (
    digest,
    full_disk_as_partial,
    lock_folder,
    make_folder,
    move,
    versions,
    write_json,
    write_jsonl,
)
from dsbs.formatting import escape_markdown, markdown_table, percent
from dsbs.progress import NoProgress, Progress
from dsbs.run_folder import RunFolder
from dsbs.students.backends import BeamSearchBackend
from dsbs.students.calibration import (
    THRESHOLD,
    read_threshold,
    write_record,
)
from dsbs.students.card import CARD, StudentCard, read_card
from dsbs.students.student import Student
from dsbs.students.weights import file_hash, weights_megabytes

# Suffixes of the files that decide what a student writes.
_STUDENT_SUFFIXES = (".safetensors", ".bin", ".json", ".model")
_RECORDS = {"train.json", "work.json", "compress.json", THRESHOLD}
# What writes an export, beside the format's own packages.
_WRITERS = ("python", "dsbs", "torch", "transformers", "tokenizers")
_SOURCES = {
    "valid": "rows of valid",
    "examples": "given texts",
    "made": "texts made from the vocabulary",
}


def export(
    student: str | Path,
    format: str,
    *,
    quantize: str | None = None,
    out: str | Path | None = None,
    examples: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a student in a format that runs without dsbs, and compare it with the student.

    ``quantize`` is one of the format's own names; None: its first. ``examples`` are inputs without
    prefix for the comparison; None: the run's valid rows, or made texts. An export that fits is
    kept; another one in its place is moved to ``aside/``. Raises UserError for what cannot be
    exported, and DsbsError where float32 weights do not do what the student does.
    """
    folder = Path(student)
    progress = progress or NoProgress()
    chosen = export_format(format)
    card = read_card(folder)
    quantize = _check_request(folder, card, chosen, format, quantize)
    target = _target(folder, format, quantize, out)
    fingerprint = student_fingerprint(folder)
    examples_digest = None if examples is None else digest(*examples)
    existing = read_exported(target)
    request = (fingerprint, format, quantize)
    if existing is not None and _fits(existing, request, examples_digest):
        _copy_threshold(folder, target, quantize, format)
        return existing
    _check_target(target, existing, out)
    loaded = Student.load(folder)
    if not loaded.backend.tokenizer.is_fast:
        raise UserError(
            f"{card.name} has a tokenizer in Python ({type(loaded.backend.tokenizer).__name__}), "
            "which no export can hold",
            hint="use the student as it is: dsbs predict, dsbs serve and Python read it",
        )
    remark = chosen.check(loaded, quantize)
    if remark:
        progress.say(f"{format}: {remark}")
    work = target.with_name(f".{target.name}.partial")
    partial = work / "export"  # not the locked folder, which Windows would not move
    with (
        lock_folder(work, remove=True),
        full_disk_as_partial(partial, hint="free some space, then run the same command"),
    ):
        if read_exported(target) != existing:  # a second process ended while this one loaded
            raise DsbsError(
                f"another process has written {target}",
                hint="run the same command: an export that fits is kept",
            )
        shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted export
        make_folder(partial)
        chosen.write(loaded, partial, quantize)
        exported_card = _exported_card(card, format)
        write_json(partial / CARD, exported_card.model_dump(mode="json"))
        _copy_calibration(loaded, partial)
        _copy_threshold(folder, partial, quantize, format)
        save_tokenizer(loaded, partial)
        writers = {name: version for name, version in versions().items() if name in _WRITERS}
        packages = {name: metadata.version(name) for name in chosen.packages}
        exported = Exported(
            path=target,
            student=card.name,
            fingerprint=fingerprint,
            format=exported_card.format,
            quantize=quantize,
            megabytes=weights_megabytes(partial),
            student_megabytes=weights_megabytes(folder),
            versions=writers | packages,
            examples=examples_digest,
            equivalence=_compare(loaded, folder, partial, examples),
        )
        if quantize == FLOAT32:
            check_float32(exported.equivalence, card.name, card.kind)
        script = chosen.script(loaded, quantize)
        texts = {"README.md": _readme(folder, exported, chosen, script)}
        if script is not None:
            texts["predict.py"] = script
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8", newline="\n")
        write_json(partial / RECORD, exported.model_dump(mode="json", by_alias=True))
        if existing is not None:
            RunFolder.set_aside(target, existing.fingerprint)
        move(partial, target)  # replaces nothing, or an empty folder
    return exported


def _check_request(
    folder: Path, card: StudentCard, chosen: ExportFormat, format: str, quantize: str | None
) -> str:
    """The quantization to use. Raises UserError for a request that cannot be met."""
    if card.format != "transformers":
        raise UserError(
            f"{folder} is already an export ({card.format})",
            hint="export the original student",
        )
    if card.scores_choices:
        raise UserError(
            f"{card.name} scores the choices of each row, and no export format does",
            hint="use the student as it is: dsbs predict, dsbs serve and Python read it",
        )
    if card.reads_windows:
        raise UserError(
            f"{card.name} reads long texts in windows, and no export format does",
            hint="train it with task.max_input: {strategy: head+tail}, or use it as it is",
        )
    if card.head == "labels" and "labels" not in chosen.kinds:
        raise UserError(
            f"{card.name} has a label head, which the format {format} does not support",
            hint="use --format onnx or ct2",
        )
    if card.runtime not in chosen.kinds:
        raise UserError(
            f"{card.name} is a {card.kind} model, which the format {format} does not support",
            hint="use --format ct2",
        )
    quantize = quantize or chosen.quantizations[0]
    if quantize not in chosen.quantizations:
        raise UserError(
            f"the format {format} has no quantization {quantize!r}",
            hint=f"give --quantize {', '.join(chosen.quantizations)}",
        )
    return quantize


def _exported_card(card: StudentCard, format: str) -> StudentCard:
    """The card of an export. A label head's has no rationales: it leaves their decoder out."""
    changes: dict[str, Any] = {"format": format}
    if card.head == "labels":
        changes["prefixes"] = label_prefixes(card)
    return card.model_copy(update=changes)


def _copy_calibration(student: Student, target: Path) -> None:
    if student.calibration is not None:
        write_record(target, student.calibration)


def _copy_threshold(folder: Path, target: Path, quantize: str, format: str) -> None:
    """Give an export the student's threshold, if its answers are the same.

    Those of quantized weights differ, an export does not score labels, and CTranslate2 has no
    probability of each field.
    """
    threshold = read_threshold(folder)
    lacks_fields = format == "ct2" and read_card(folder).task.fields is not None
    if threshold is None or threshold.scores_labels or quantize != FLOAT32 or lacks_fields:
        (target / THRESHOLD).unlink(missing_ok=True)
    else:
        write_record(target, threshold)


def _target(folder: Path, format: str, quantize: str, out: str | Path | None) -> Path:
    if out is not None:
        return Path(out)
    if quantize == FLOAT32:
        return folder / "export" / format
    return folder / "export" / f"{format}-{quantize}"


def _check_target(target: Path, existing: Exported | None, out: str | Path | None) -> None:
    """Raises UserError where an export cannot be moved to ``target``."""
    if existing is None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"{target} exists and is not an export", hint="give another folder with --out"
        )
    if not target.name or target.is_symlink():
        raise UserError(
            f"--out {out}: an export cannot be moved there", hint="name a folder to be created"
        )


def _fits(existing: Exported, request: tuple[str, str, str], examples_digest: str | None) -> bool:
    if (existing.fingerprint, existing.format, existing.quantize) != request:
        return False
    return examples_digest in (None, existing.examples) and _is_complete(existing)


def _compare(
    student: Student, folder: Path, partial: Path, examples: Sequence[str] | None
) -> Equivalence:
    exported = Student.load(partial)
    texts, source = comparison_texts(student, folder, examples)
    rows = golden_rows(student, texts, beams=isinstance(exported.backend, BeamSearchBackend))
    write_jsonl(partial / GOLDEN, golden_lines(rows))
    return measure_equivalence(exported.backend, rows, source)


def student_fingerprint(folder: Path) -> str:
    """Hash of all files that decide what the student writes."""
    parts = []
    for path in sorted(folder.iterdir()):
        if path.suffix in _STUDENT_SUFFIXES and path.name not in _RECORDS:
            parts += [path.name, file_hash(path)]
    return digest(*parts)


def _is_complete(exported: Exported) -> bool:
    """Whether all weight files are present."""
    try:
        return weights_megabytes(exported.path) == exported.megabytes
    except UserError:
        return False


def _readme(student: Path, exported: Exported, chosen: ExportFormat, script: str | None) -> str:
    """The student's model card, if it has one, followed by a section on the export.

    ``script`` is its ``predict.py``; None: it has none.
    """
    try:
        text = (student / "README.md").read_text(encoding="utf-8")
        # The export's card has a section more, so the note that dsbs may overwrite it must go.
        card = re.sub(r"<!-- dsbs wrote this card.*?-->", "", text).rstrip() + "\n\n"
    except OSError:
        card = f"# {escape_markdown(exported.student)}\n\n"
    equivalence = exported.equivalence
    quantization = exported.quantize
    if quantization == FLOAT32:
        quantization = "not quantized"
    compared = "greedy decoding: equal texts"
    scored = "equal texts"
    if read_card(student).head == "labels":
        compared = "equal labels"
        scored = "all labels"
    rows = [[compared, percent(equivalence.greedy_agreement)]]
    if equivalence.beam_agreement is not None:
        rows.append(["beam search of 4: equal texts or ties", percent(equivalence.beam_agreement)])
    if equivalence.score_difference is not None:
        difference = f"{equivalence.score_difference:.2g} nats"
        rows.append([f"largest difference of the log-probabilities of {scored}", difference])
    made_with = ", ".join(
        f"{name} {version}" for name, version in sorted(exported.versions.items())
    )
    usage = "Only dsbs can load this model: `dsbs predict` and `dsbs serve` read the folder."
    if script is not None:
        usage = (
            "`predict.py` reads one text per line of stdin. It needs "
            f"`pip install {' '.join(chosen.packages)}` and nothing else."
        )
    lines = [
        "## Export",
        "",
        f"Format {exported.format}, {quantization}: {exported.megabytes:.2f} MB of weights, "
        f"{exported.times_smaller:.1f} times smaller than the student's "
        f"{exported.student_megabytes:.2f} MB.",
        "",
        f"Compared with transformers on {equivalence.rows} {_SOURCES[equivalence.source]} "
        "(`golden.jsonl`):",
        "",
        *markdown_table(["measure", "result"], rows),
        "",
        f"Made with {made_with}.",
        "",
        usage,
        "A row with several fields is written as one text, like the inputs in `golden.jsonl` "
        "without their prefix.",
        "",
    ]
    return card + "\n".join(lines)
