"""``annotate/<split>.jsonl`` as the later stages see it: where it lies, whether it fits the recipe, its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsbs.config import MemberSection, Recipe
from dsbs.errors import UserError
from dsbs.files import canonical_json, digest, read_jsonl
from dsbs.prompting import load_prompt
from dsbs.records.rows import Annotation
from dsbs.tasks.base import Task

# The keys of `annotate` that decide what a row's annotation is.
SAMPLING = {
    "samples",
    "stop_early",
    "temperature",
    "logprobs",
    "hint",
    "min_rationale_words",
    "max_tokens",
    "rationale_from",
}


def run_folder(recipe: Recipe, out: str | Path | None = None) -> Path:
    return Path(out) if out is not None else Path("runs") / recipe.name


def annotation_file(run: Path, split: str) -> Path:
    return run / "annotate" / f"{split}.jsonl"


def member_folder(recipe: Recipe, member: MemberSection) -> Path:
    """The run folder of an ensemble's member: as given, else beside the recipe's file; it need not be there."""
    given = Path(member.run).expanduser()
    beside = (recipe.folder or Path()) / given
    return beside if not given.is_dir() and beside.is_dir() else given


def source_fingerprint(recipe: Recipe, task: Task) -> str:
    """Hash of all in a recipe that decides the annotations of a row: the teacher, the prompt, the sampling."""
    if (
        recipe.teacher.kind == "ensemble"
    ):  # a changed member is another teacher; where its run lies does not matter
        records = [
            read_manifest(member_folder(recipe, one) / "annotate") for one in recipe.teacher.members
        ]
        votes = [
            [one.weight, record.get("source")]
            for one, record in zip(recipe.teacher.members, records, strict=True)
        ]
        return digest("ensemble", canonical_json(votes))
    teacher = recipe.teacher.model_dump(
        mode="json",
        include={"kind", "model", "base_url", "endpoints", "endpoint", "extra_body", "completions"},
    )
    for one in teacher[
        "endpoints"
    ]:  # which endpoints answer decides; how often each, or with whose key, does not
        for name in ("weight", "api_key_env", "rpm", "tpm"):
            del one[name]
    prompt = load_prompt(recipe, task).hash if recipe.teacher.is_prompted else ""
    sampling = recipe.annotate.model_dump(mode="json", include=SAMPLING)
    return digest(canonical_json(teacher), prompt, canonical_json(sampling))


def learned_source(recipe: Recipe, task: Task) -> str:
    """Hash of all in a recipe that decides which annotations a student learns from."""
    return digest(
        source_fingerprint(recipe, task),
        canonical_json(recipe.train.select.model_dump(mode="json")),
    )


def read_annotations(path: Path) -> Iterator[Annotation]:
    """Yield the rows of an annotation file. Raises UserError with file and line."""
    for number, row in read_jsonl(path):
        try:
            yield Annotation.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{path}:{number}: not an annotation ({field}: {first['msg']})",
                hint="run `dsbs annotate` again: it rebuilds the file from the replies, without asking anew",
            ) from None


def load_annotations(recipe: Recipe, task: Task, run: Path, split: str) -> dict[str, Annotation]:
    """The split's annotations by id. Raises UserError where they are missing, unfinished, or of another teacher or prompt."""
    path = annotation_file(run, split)
    again = f"run `dsbs annotate` with this recipe first (annotate.splits must name {split})"
    if not path.is_file():
        raise UserError(f"{path} does not exist", hint=again)
    record = read_manifest(path.parent)
    if record.get("status") not in ("done", "partial"):
        raise UserError(
            f"the annotation in {path.parent} is not finished ({record.get('status', 'no manifest')})",
            hint=again,
        )
    if record.get("source") != source_fingerprint(recipe, task):
        raise UserError(
            f"{path} comes from another teacher, prompt or sampling than this recipe's", hint=again
        )
    return {row.id: row for row in read_annotations(path)}


def read_manifest(stage: Path) -> dict[str, Any]:
    """A stage's ``manifest.json``, or {} where there is none yet."""
    try:
        record = json.loads((stage / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
