"""Several annotators as one teacher: the annotations of finished runs over the same rows, put to a weighted vote. Asks nobody.

Sources: the vote is that of self-consistency (Wang et al. 2023, arXiv:2203.11171), over models in place of samples; weights as
in Hinton et al. 2015, arXiv:1503.02531, section 1, where an ensemble's predictions are averaged.
"""

from __future__ import annotations

import math
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsbs.annotation.annotator import total_usage
from dsbs.annotation.vote import weighted_majority
from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.files import canonical_json
from dsbs.records.rows import Annotation, Example, Sample, TeacherName
from dsbs.run_folder import RunFolder, annotation_file, read_annotations, read_manifest
from dsbs.tasks import make_task

_OF_TASK = (
    "name",
    "labels",
    "numeric",
)  # what two runs' tasks must have in common for their labels to mean the same


@dataclass(frozen=True, slots=True)
class Member:
    """A finished run that votes: ``run`` is its name in the recipe, ``source`` what the annotations' fingerprint is there."""

    run: str
    weight: float
    folder: Path
    kind: str
    model: str
    source: str
    status: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}


def read_members(recipe: Recipe) -> list[Member]:
    """The recipe's members, by their manifests. Raises UserError for a run that is missing, unfinished, or of another task."""
    found: list[Member] = []
    for section in recipe.teacher.members:
        folder = RunFolder.of_member(recipe, section).path
        record = read_manifest(folder / "annotate")
        again = f"run `dsbs annotate` with the recipe of {section.run} first"
        if not record:
            where = f"looked from {Path.cwd()}" + (
                "" if recipe.folder is None else f" and beside {recipe.folder}"
            )
            raise UserError(
                f"teacher.members: {section.run} is no run with annotations ({where})",
                hint=f"name a run folder that has annotate/manifest.json, or {again}",
            )
        if record.get("status") not in ("done", "partial"):
            raise UserError(
                f"teacher.members: the annotation of {section.run} is {record.get('status')}, not done",
                hint=again,
            )
        made_with, splits = record.get("recipe"), record.get("splits")
        try:
            task, teacher, source = made_with["task"], made_with["teacher"], record["source"]  # type: ignore[index]
            kind, model = str(teacher["kind"]), teacher["model"]
        except (KeyError, TypeError):
            raise UserError(
                f"{folder}/annotate/manifest.json was written by another version of dsbs",
                hint=again,
            ) from None
        ours = recipe.task.model_dump(mode="json")
        apart = [
            name
            for name in _OF_TASK
            if _same_order(task.get(name, ours[name])) != _same_order(ours[name])
        ]
        if apart:
            told = ", ".join(
                f"task.{name} {task.get(name)} there and {ours[name]} here" for name in apart
            )
            raise UserError(
                f"teacher.members: {section.run} is of another task ({told})",
                hint="an ensemble votes on one task",
            )
        if kind == "human":
            raise UserError(
                f"teacher.members: {section.run} has people's rationales, and their labels are the gold ones",
                hint="leave it out: its votes would give the answers away",
            )
        missing = [
            split
            for split in recipe.annotate.splits
            if split not in (splits or ()) or not _has(folder, split)
        ]
        if missing:
            raise UserError(
                f"teacher.members: {section.run} has no annotations of {' and '.join(missing)}",
                hint="annotate that split there too, or set annotate.splits here to those that all members have",
            )
        same = next((one for one in found if one.folder.resolve() == folder.resolve()), None)
        if same is not None:
            raise UserError(
                f"teacher.members: {same.run} and {section.run} are one run",
                hint="give it a larger weight instead",
            )
        name = (
            " + ".join(one["model"] for one in record["members"])
            if kind == "ensemble"
            else _short(model or kind)
        )
        found.append(
            Member(section.run, section.weight, folder, kind, name, source, record["status"])
        )
    return found


class EnsembleTeacher:
    """The members' annotations at hand, by row. Raises UserError for what the user can mend in them."""

    def __init__(self, recipe: Recipe) -> None:
        self.members = read_members(recipe)
        self._task = make_task(recipe.task)
        self.name = TeacherName(
            kind="ensemble", model=" + ".join(one.model for one in self.members)
        )
        self._met: Counter[tuple[str, str]] = Counter()  # rows of a split that a member has
        self._rows = sqlite3.connect(
            "", isolation_level=None
        )  # a temporary file that goes with the connection
        self._rows.execute("PRAGMA synchronous=OFF")
        self._rows.execute(
            "CREATE TABLE said (id TEXT, split TEXT, member INT, row TEXT, PRIMARY KEY (id, split, member)) WITHOUT ROWID"
        )
        self._rows.execute("BEGIN")
        for number, member in enumerate(self.members):
            for split in recipe.annotate.splits:
                path = annotation_file(member.folder, split)
                for row in read_annotations(path):
                    try:
                        self._rows.execute(
                            "INSERT INTO said VALUES (?, ?, ?, ?)",
                            (row.id, split, number, row.model_dump_json(by_alias=True)),
                        )
                    except sqlite3.IntegrityError:
                        raise UserError(
                            f"{path}: id {row.id!r} occurs twice",
                            hint="run `dsbs annotate` there again",
                        ) from None
        self._rows.execute("COMMIT")

    def refuse(self, run: Path) -> None:
        """Raises UserError where ``run``, about to be written, is a member."""
        same = next(
            (one.run for one in self.members if one.folder.resolve() == run.resolve()), None
        )
        if same is not None:
            raise UserError(
                f"teacher.members: {same} is this recipe's own run folder, and its annotations would be overwritten",
                hint="rename the recipe, or give another folder with --out",
            )

    def annotations(self, examples: Iterable[Example], split: str) -> Iterator[Annotation]:
        """One annotation for every example; in the end, UserError for a member that has none of these rows."""
        empty = True
        for example in examples:
            empty = False
            yield self._annotation(example, split)
        strange = [one.run for one in self.members if not empty and not self._met[one.run, split]]
        if strange:
            raise UserError(
                f"teacher.members: {strange[0]} has none of this recipe's {split} rows: no id is the same",
                hint="the members must have annotated the same rows; check task.data and the id column",
            )

    def lacking(self, split: str, rows: int) -> list[str]:
        """What to tell of members that lack some of the split's ``rows``, once ``annotations`` has been through them."""
        lacks = [(one.run, rows - self._met[one.run, split]) for one in self.members]
        return [
            f"{split}: {run} has no annotation of {lack} of {rows} rows: no vote there"
            for run, lack in lacks
            if lack
        ]

    def _annotation(self, example: Example, split: str) -> Annotation:
        found = self._rows.execute(
            "SELECT member, row FROM said WHERE id = ? AND split = ? ORDER BY member",
            (example.id, split),
        ).fetchall()
        rows = {
            self.members[number].run: Annotation.model_validate_json(text) for number, text in found
        }
        samples: list[Sample] = []
        for member in self.members:
            if member.run not in rows:
                continue
            row = rows[member.run]
            if canonical_json(row.input) != canonical_json(example.input):
                raise UserError(
                    f"row {example.id!r} of {split} has another input in {annotation_file(member.folder, split)} than here",
                    hint="the members must have annotated the same rows; check task.data, or leave that member out",
                )
            self._met[member.run, split] += 1
            samples += _votes(member, row)
        vote = weighted_majority(samples, self._task)
        accepted = vote.reason is None
        kinds = {one.run: one.kind for one in self.members}
        return Annotation(
            id=example.id,
            input=example.input,
            gold=example.label,
            label=vote.label if accepted else None,
            own_label=vote.label,
            rationale=vote.rationale if accepted else None,
            provenance="none"
            if not accepted
            else "recorded"
            if vote.run and kinds[vote.run] == "recorded"
            else "own",
            samples=samples,
            vote_share=vote.share,
            label_logprob=vote.logprob,
            accepted=accepted,
            reject_reason=vote.reason,
            usage=total_usage([row.usage for row in rows.values()]),
            usd=_paid(rows.values()),
            teacher=self.name,
        )


def _votes(member: Member, row: Annotation) -> list[Sample]:
    """A member's own samples of a row, its weight divided among those that can be read; an ensemble's in its proportion."""
    own = [sample for sample in row.samples if not sample.hinted]
    total = math.fsum(sample.vote for sample in own if sample.label is not None)
    return [
        sample.model_copy(
            update={
                "run": member.run,
                "weight": None if sample.label is None else member.weight * sample.vote / total,
            }
        )
        for sample in own
    ]


def _paid(rows: Iterable[Annotation]) -> float | None:
    """US dollars for the members' replies to one row, spent when they were bought; None: one of the prices is not known."""
    spent = [row.usd for row in rows]
    known = [usd for usd in spent if usd is not None]
    return math.fsum(known) if len(known) == len(spent) else None


def _has(folder: Path, split: str) -> bool:
    return annotation_file(folder, split).is_file()


def _same_order(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _short(model: str) -> str:
    """A model's name; of a file on some machine its last part alone, so that several can stand in one line."""
    return Path(model).name if model.endswith(".gguf") or Path(model).is_absolute() else model
