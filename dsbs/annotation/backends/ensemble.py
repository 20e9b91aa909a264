"""Ensemble teacher: finished annotation runs over the same rows, combined by a weighted vote.

Sources: the vote is that of self-consistency (Wang et al. 2023, arXiv:2203.11171), over models in
place of samples; the weights follow Hinton et al. 2015, arXiv:1503.02531, section 1, where an
ensemble's predictions are averaged.
"""

from __future__ import annotations

import math
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsbs.annotation.backends import Teacher, teacher_class, total_usage
from dsbs.annotation.vote import Vote, weighted_majority
from dsbs.config import MemberSection, Recipe
from dsbs.errors import UserError
from dsbs.files import canonical_json, digest
from dsbs.records import Annotation, Example, Provenance, Sample, TeacherName
from dsbs.run_folder import RunFolder, read_annotations
from dsbs.tasks import make_task

# the task's keys that must agree between two runs for their labels to mean the same
_TASK_KEYS = ("name", "labels", "range", "step", "fields", "numeric")


@dataclass(frozen=True, slots=True)
class Member:
    """A finished run that votes.

    ``run`` is its name in the recipe, ``source`` the fingerprint of its annotations.
    """

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
    """The recipe's members, by their manifests.

    Raises UserError for a run that is missing, unfinished or of another task, and for one that is
    named twice.
    """
    members: list[Member] = []
    for section in recipe.teacher.members:
        member = _read_member(recipe, section)
        for earlier in members:
            if earlier.folder.resolve() == member.folder.resolve():
                raise UserError(
                    f"teacher.members: {earlier.run} and {member.run} are the same run",
                    hint="give it a larger weight instead",
                )
        members.append(member)
    return members


def _read_member(recipe: Recipe, section: MemberSection) -> Member:
    run = section.run
    folder = RunFolder.of_member(recipe, section).path
    record = RunFolder(folder).manifest("annotate")
    again = f"run `dsbs annotate` with the recipe of {run} first"
    if not record:
        searched = f"looked from {Path.cwd()}"
        if recipe.folder is not None:
            searched += f" and beside {recipe.folder}"
        raise UserError(
            f"teacher.members: {run} is not a run with annotations ({searched})",
            hint=f"name a run folder that has annotate/manifest.json, or {again}",
        )
    status = str(record.get("status"))
    if status not in ("done", "partial"):
        raise UserError(
            f"teacher.members: the annotation of {run} is {status}, not done", hint=again
        )
    try:
        task = record["recipe"]["task"]
        teacher = record["recipe"]["teacher"]
        source = record["source"]
        kind = str(teacher["kind"])
        model = teacher["model"]
        provenance = teacher_class(kind).provenance
    except (KeyError, TypeError):
        raise UserError(
            f"{folder}/annotate/manifest.json was written by another version of dsbs", hint=again
        ) from None
    _check_task(recipe, run, task)
    if provenance == "human":
        raise UserError(
            f"teacher.members: {run} has people's rationales, and their labels are the gold labels",
            hint="leave it out: its votes would give the answers away",
        )
    splits = record.get("splits") or ()
    missing = [
        split
        for split in recipe.annotate.splits
        if split not in splits or not RunFolder(folder).annotations(split).is_file()
    ]
    if missing:
        raise UserError(
            f"teacher.members: {run} has no annotations of {' and '.join(missing)}",
            hint="annotate that split there too, or set annotate.splits to those that all members "
            "have",
        )
    name = _short_name(model or kind)
    if kind == "ensemble":
        name = " + ".join(member["model"] for member in record["members"])
    return Member(run, section.weight, folder, kind, name, source, status)


def _check_task(recipe: Recipe, run: str, theirs: dict[str, Any]) -> None:
    """Raises UserError where a member's labels mean something else than the recipe's."""
    ours = recipe.task.model_dump(mode="json")
    differences = [
        f"task.{key} {theirs.get(key)} there and {ours[key]} here"
        for key in _TASK_KEYS
        if _unordered(theirs.get(key, ours[key])) != _unordered(ours[key])
    ]
    if differences:
        raise UserError(
            f"teacher.members: {run} was annotated for another task ({', '.join(differences)})",
            hint="an ensemble votes on one task",
        )


class EnsembleTeacher(Teacher):
    """The members' annotations by row. Raises UserError for what is wrong with them."""

    title = "ensemble"
    is_asked = False

    def __init__(self, recipe: Recipe) -> None:
        self.members = read_members(recipe)
        self._task = make_task(recipe.task)
        self._score_vote = recipe.annotate.score_vote
        self._name = TeacherName(
            kind="ensemble", model=" + ".join(member.model for member in self.members)
        )
        self._rows_found: Counter[tuple[str, str]] = Counter()  # by member's run and split
        # a temporary file that is deleted with the connection: the rows need not fit into memory
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute(
            "CREATE TABLE annotations (id TEXT, split TEXT, member INT, row TEXT,"
            " PRIMARY KEY (id, split, member)) WITHOUT ROWID"
        )
        self._db.execute("BEGIN")
        for number, member in enumerate(self.members):
            for split in recipe.annotate.splits:
                self._insert(number, split, RunFolder(member.folder).annotations(split))
        self._db.execute("COMMIT")

    def _insert(self, member: int, split: str, path: Path) -> None:
        for row in read_annotations(path):
            try:
                self._db.execute(
                    "INSERT INTO annotations VALUES (?, ?, ?, ?)",
                    (row.id, split, member, row.model_dump_json(by_alias=True)),
                )
            except sqlite3.IntegrityError:
                raise UserError(
                    f"{path}: id {row.id!r} occurs twice", hint="run `dsbs annotate` there again"
                ) from None

    def check_run_folder(self, run: Path) -> None:
        for member in self.members:
            if member.folder.resolve() == run.resolve():
                raise UserError(
                    f"teacher.members: {member.run} is this recipe's own run folder, and its "
                    "annotations would be overwritten",
                    hint="rename the recipe, or set another folder with --out",
                )

    def manifest_entries(self) -> dict[str, Any]:
        return {"members": [member.as_json() for member in self.members]}

    def annotations(self, examples: Iterable[Example], split: str) -> Iterator[Annotation]:
        """See ``Teacher``; at the end, UserError for a member that has none of these rows."""
        has_rows = False
        for example in examples:
            has_rows = True
            yield self._annotation(example, split)
        for member in self.members:
            if has_rows and not self._rows_found[member.run, split]:
                raise UserError(
                    f"teacher.members: {member.run} has none of this recipe's {split} rows: "
                    "no id matches",
                    hint="the members must have annotated the same rows; check task.data and the "
                    "id column",
                )

    def warnings(self, split: str, rows: int) -> list[str]:
        missing = {
            member.run: rows - self._rows_found[member.run, split] for member in self.members
        }
        return [
            f"{split}: {run} has no annotation of {count} of {rows} rows: it does not vote there"
            for run, count in missing.items()
            if count
        ]

    def no_annotations(self) -> UserError:
        return UserError(
            "no member of the ensemble has a reply to any row",
            hint="run `dsbs annotate` of the members first",
        )

    def _annotation(self, example: Example, split: str) -> Annotation:
        cursor = self._db.execute(
            "SELECT member, row FROM annotations WHERE id = ? AND split = ? ORDER BY member",
            (example.id, split),
        )
        rows: list[Annotation] = []
        samples: list[Sample] = []
        for number, text in cursor.fetchall():
            member = self.members[number]
            row = Annotation.model_validate_json(text)
            if canonical_json(row.input) != canonical_json(example.input):
                path = RunFolder(member.folder).annotations(split)
                raise UserError(
                    f"row {example.id!r} of {split} has another input in {path} than here",
                    hint="the members must have annotated the same rows; check task.data, or leave "
                    "that member out",
                )
            self._rows_found[member.run, split] += 1
            rows.append(row)
            samples += _votes(member, row)
        vote = weighted_majority(samples, self._task, self._score_vote)
        accepted = vote.reason is None
        return Annotation(
            id=example.id,
            input=example.input,
            gold=example.label,
            label=vote.label if accepted else None,
            own_label=vote.label,
            rationale=vote.rationale if accepted else None,
            provenance=self._provenance(vote),
            samples=samples,
            vote_share=vote.share,
            part_shares=vote.part_shares,
            label_logprob=vote.logprob,
            accepted=accepted,
            reject_reason=vote.reason,
            usage=total_usage([row.usage for row in rows]),
            usd=_total_usd(rows),
            teacher=self._name,
            request_key=_request_key(rows),
        )

    def _provenance(self, vote: Vote) -> Provenance:
        if vote.reason is not None:
            return "none"
        for member in self.members:
            if member.run == vote.run:
                return teacher_class(member.kind).provenance
        return "own"


def _votes(member: Member, row: Annotation) -> list[Sample]:
    """A member's samples of a row that had no hint, with the weight of each one's vote.

    The member's weight is divided among the readable samples, in the proportion of their votes.
    """
    samples = [sample for sample in row.samples if not sample.hinted]
    total = math.fsum(sample.vote for sample in samples if sample.label is not None)
    votes = []
    for sample in samples:
        weight = None
        if sample.label is not None:
            weight = member.weight * sample.vote / total
        votes.append(sample.model_copy(update={"run": member.run, "weight": weight}))
    return votes


def _request_key(rows: Sequence[Annotation]) -> str | None:
    """Equal for rows whose requests are the same for every member, which share their replies."""
    keys = [row.request_key or "" for row in rows]
    hints = [str(row.gold) for row in rows if row.samples and row.samples[-1].hinted]
    return digest(*keys, *hints) if any(keys) else None


def _total_usd(rows: Iterable[Annotation]) -> float | None:
    """US dollars that the members' replies to a row cost; None: one of the prices is not known."""
    costs = []
    for row in rows:
        if row.usd is None:
            return None
        costs.append(row.usd)
    return math.fsum(costs)


def _unordered(value: Any) -> Any:
    if isinstance(value, list):
        return sorted(map(str, value))
    return value


def _short_name(model: str) -> str:
    """A model's name; of a file's path its last component, so that several fit on one line."""
    if model.endswith(".gguf") or Path(model).is_absolute():
        return Path(model).name
    return model
