"""The original's training once more, for a short while: the rows, method and labels that a pruned student heals by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dsbs.compression.source import SourceStudent
from dsbs.config import LabelSource, Recipe, ResolvedTrainSection, base_of
from dsbs.errors import UserError
from dsbs.progress import Progress
from dsbs.students import load_tokenizer, read_card, start_token
from dsbs.tasks import make_task
from dsbs.training.encode import Encoder, collate, pad
from dsbs.training.grid import StudentSpec
from dsbs.training.methods import View, method_of
from dsbs.training.rows import Data, gather
from dsbs.training.student_run import StudentRun
from dsbs.training.tokens import Tokens

_ROWS = 256  # that importance is estimated on
_AT_ONCE = 32
_COMPARED = 64  # texts by which an export is compared with its student, beam search included
_LOOKS = 4  # at valid while a student heals


class FineTuneData:
    """Rows and settings of the original's training. Raises UserError where they are not there any more.

    Healing is by the plain method: LoRA's adapters and terms that compare with other models do not come back for it.
    """

    def __init__(self, origin: SourceStudent, progress: Progress, *, needs_train: bool) -> None:
        self._origin, self._progress, self._needs_train = origin, progress, needs_train
        student = origin.student
        plain = base_of(student.method)
        section = origin.recipe.resolved_train.tuned(student.tuned)
        self.section: ResolvedTrainSection = section.model_copy(
            update={
                "methods": (plain,),
                "lora": None,
                "terms": (),
                "teachers": (),
                "patience": None,
            }
        )
        labels: LabelSource = "teacher" if student.labels == "teacher" else "gold"
        self.spec = StudentSpec(plain, labels, student.seed, self.section, student.subset)
        self.views: tuple[View, ...] = method_of(plain).views(self.section)
        card = read_card(student.path)
        if {view.target: view.prefix for view in self.views} != card.prefixes:
            raise UserError(
                f"{student.name} learned other tasks than the recipe in {origin.run}/train/manifest.json has",
                hint="run `dsbs train` with the recipe that it was trained by",
            )

    @cached_property
    def recipe(self) -> Recipe:
        return self._origin.recipe.model_copy(update={"train": self.section})

    @cached_property
    def data(self) -> Data:
        task = make_task(self.recipe.task)
        return gather(self.recipe, task, self._origin.run, [self.spec] if self._needs_train else [])

    def _tokens(self, tokenizer: Any) -> Tokens:
        return Tokens(tokenizer, self._origin.run / "train" / "tokens", self._progress)

    def batches(self, model: Any, tokenizer: Any) -> Iterator[Mapping[str, Any]]:
        """See ``Examples``: `_ROWS` train rows at most, those that come first by a hash of their ids."""
        student = self.recipe.student
        most = min(_ROWS, len(self.data.subset(self.spec.subset)))
        chosen = [self.data.train[i] for i in self.data.order[:most]]
        encoder = Encoder(
            self._tokens(tokenizer), student.max_input_tokens, student.max_target_tokens
        )
        rows = encoder.rows(chosen, self.views, self.spec.labels)
        for first in range(0, len(rows), _AT_ONCE):
            flats = collate(rows[first : first + _AT_ONCE])
            for view in self.views:
                if view.target in flats:
                    yield pad(
                        flats[view.target],
                        tokenizer.pad_token_id,
                        start_token(model.config, view.start),
                    )

    def inputs(self) -> list[str]:
        """See ``Examples``."""
        return [row.text for row in self.data.valid[:_COMPARED]]

    def heal(
        self,
        start: Path,
        folder: Path,
        *,
        title: str,
        steps: int,
        learning_rate: float,
        keep_zeros: bool,
    ) -> Path:
        """Train ``start`` on into ``folder``, which is returned: its best look at valid, resumed where it stood."""
        section = self.section.model_copy(
            update={
                "init": str(start),
                "max_steps": steps,
                "learning_rate": learning_rate,
                "warmup_steps": min(self.section.warmup_steps, steps // 10),
                "eval_every": max(1, steps // _LOOKS),
                "log_every": min(self.section.log_every, max(1, steps // 10)),
            }
        )
        tokenizer = load_tokenizer(str(start))
        spec = replace(
            self.spec, section=section, heading=title, directory=str(folder), keep_zeros=keep_zeros
        )
        recipe = self.recipe.model_copy(update={"train": section})
        train_folder = self._origin.run / "train"
        healed = StudentRun(
            recipe, spec, self.data, tokenizer, self._tokens(tokenizer), train_folder
        )
        healed.run(self._progress)
        return folder
