"""One export: written beside its place, compared with the student, moved into its place whole."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from dsbs.errors import DsbsError, UserError
from dsbs.exporting.exported import RECORD, Equivalence, Exported, read_exported
from dsbs.exporting.formats import PLAIN, format_of, save_tokenizer
from dsbs.exporting.golden import GOLDEN, check_float, compare, golden_lines, golden_rows, texts_for
from dsbs.exporting.readme import readme
from dsbs.files import (
    digest,
    full_disk_as_partial,
    lock_folder,
    make_folder,
    versions,
    write_json,
    write_jsonl,
)
from dsbs.progress import NoProgress, Progress
from dsbs.run_folder import RunFolder
from dsbs.students import CARD, Searcher, Student, megabytes, read_card

_DECIDING = (
    ".safetensors",
    ".bin",
    ".json",
    ".model",
)  # suffixes of files that decide what a student writes
_NOT_DECIDING = {"train.json", "work.json", "compress.json"}
_MAKERS = (
    "python",
    "dsbs",
    "torch",
    "transformers",
    "tokenizers",
)  # what writes an export, beside the format's packages


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

    ``quantize`` is one of the format's own names, None its first; ``examples`` are inputs without prefix to compare on; None:
    the run's valid rows, or made texts. An export that fits is kept, another one in its place is moved to ``aside/``. Raises
    UserError for what cannot be exported, and DsbsError where float32 weights do not do what the student does.
    """
    folder, progress = Path(student), progress or NoProgress()
    chosen = format_of(format)
    card = read_card(folder)
    if card.format != "transformers":
        raise UserError(
            f"{folder} is an export itself ({card.format})",
            hint="export the student that it was made of",
        )
    if card.kind not in chosen.kinds:
        raise UserError(
            f"{card.name} is a {card.kind} model, which the format {format} does not carry here",
            hint="give --format ct2",
        )
    quantize = quantize or chosen.quantizations[0]
    if quantize not in chosen.quantizations:
        raise UserError(
            f"the format {format} has no quantisation {quantize!r}",
            hint=f"give --quantize {', '.join(chosen.quantizations)}",
        )
    place = (
        Path(out)
        if out is not None
        else folder / "export" / (format if quantize == PLAIN else f"{format}-{quantize}")
    )
    fingerprint = student_fingerprint(folder)
    asked = None if examples is None else digest(*examples)
    there = read_exported(place)
    if there is not None and (there.fingerprint, there.format, there.quantize) == (
        fingerprint,
        format,
        quantize,
    ):
        if asked in (None, there.examples) and _is_whole(there):
            return there
    elif there is None and place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(
            f"{place} is there, and is no export", hint="give another folder with --out"
        )

    if not place.name or place.is_symlink():
        raise UserError(
            f"--out {out}: an export is moved there whole, and cannot be",
            hint="name a folder that is to be made",
        )

    loaded = Student.load(folder)
    remark = chosen.check(loaded, quantize)
    if remark:
        progress.say(f"{format}: {remark}")
    partial = place.with_name(f".{place.name}.partial")
    make_folder(place.parent)
    with (
        lock_folder(partial),
        full_disk_as_partial(partial, hint="free some space, then run the same command"),
    ):
        if read_exported(place) != there:  # a second process that ended while this one loaded
            shutil.rmtree(partial)
            raise DsbsError(
                f"{place} has been written meanwhile",
                hint="run the same command: what fits is kept",
            )
        _empty(partial)
        chosen.write(loaded, partial, quantize)
        write_json(
            partial / CARD, card.model_copy(update={"format": format}).model_dump(mode="json")
        )
        save_tokenizer(loaded, partial)
        exported = Exported(
            path=place,
            student=card.name,
            fingerprint=fingerprint,
            format=card.model_copy(update={"format": format}).format,
            quantize=quantize,
            megabytes=megabytes(partial),
            student_megabytes=megabytes(folder),
            versions={name: version for name, version in versions().items() if name in _MAKERS}
            | {name: metadata.version(name) for name in chosen.packages},
            examples=asked,
            equivalence=_compared(loaded, folder, partial, examples),
        )
        if quantize == PLAIN:
            check_float(exported.equivalence, card.name, card.kind)
        (partial / "predict.py").write_text(chosen.script(loaded, quantize), encoding="utf-8")
        (partial / "README.md").write_text(readme(folder, exported, chosen), encoding="utf-8")
        write_json(partial / RECORD, exported.model_dump(mode="json", by_alias=True))
        _move(partial, place, there)
    return exported


def _compared(
    student: Student, folder: Path, partial: Path, examples: Sequence[str] | None
) -> Equivalence:
    made = Student.load(partial)
    texts, source = texts_for(student, folder, examples)
    rows = golden_rows(student, texts, beams=isinstance(made.engine, Searcher))
    write_jsonl(partial / GOLDEN, golden_lines(rows))
    return compare(made.engine, rows, source)


def student_fingerprint(folder: Path) -> str:
    """Of all files that decide what the student writes."""
    parts = []
    for path in sorted(folder.iterdir()):
        if path.suffix in _DECIDING and path.name not in _NOT_DECIDING:
            with path.open("rb") as file:
                parts += [path.name, hashlib.file_digest(file, "sha256").hexdigest()]
    return digest(*parts)


def _is_whole(there: Exported) -> bool:
    """Whether its weights are all there."""
    try:
        return megabytes(there.path) == there.megabytes
    except UserError:
        return False


def _empty(folder: Path) -> None:
    """Of what a killed export left behind, the lock excepted."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _move(partial: Path, place: Path, there: Exported | None) -> None:
    if there is not None:
        RunFolder.set_aside(place, there.fingerprint)
    (partial / ".lock").unlink()
    partial.rename(place)  # onto nothing, or onto an empty folder
