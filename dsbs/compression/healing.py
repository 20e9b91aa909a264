"""Healing: fine-tunes a pruned student for a short while, with the original's rows and method."""

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

_IMPORTANCE_ROWS = 256
_BATCH_SIZE = 32
_EXPORT_EXAMPLES = 64  # texts on which an export is compared with its student
_VALIDATIONS = 4  # while a student heals


class FineTuneData:
    """Rows and settings of the original's training. Raises UserError where they have changed.

    Healing uses the method alone, without LoRA adapters and without distillation terms.
    """

    def __init__(self, source: SourceStudent, progress: Progress, *, needs_train: bool) -> None:
        self._source = source
        self._progress = progress
        self._needs_train = needs_train
        student = source.student
        method = base_of(student.method)
        section = source.recipe.resolved_train.tuned(student.tuned)
        self.section: ResolvedTrainSection = section.model_copy(
            update={
                "methods": (method,),
                "lora": None,
                "terms": (),
                "teachers": (),
                "patience": None,
            }
        )
        labels: LabelSource = "teacher" if student.labels == "teacher" else "gold"
        self.spec = StudentSpec(method, labels, student.seed, self.section, student.subset)
        self.views: tuple[View, ...] = method_of(method).views(self.section)
        card = read_card(student.path)
        if {view.target: view.prefix for view in self.views} != card.prefixes:
            raise UserError(
                f"{student.name} learned other views than the recipe in "
                f"{source.run.path}/train/manifest.json has",
                hint="run `dsbs train` with the recipe that trained it",
            )

    @cached_property
    def recipe(self) -> Recipe:
        return self._source.recipe.model_copy(update={"train": self.section})

    @cached_property
    def data(self) -> Data:
        task = make_task(self.recipe.task)
        specs = [self.spec] if self._needs_train else []
        return gather(self.recipe, task, self._source.run.path, specs)

    def _tokens(self, tokenizer: Any) -> Tokens:
        return Tokens(tokenizer, self._source.run.stage("train") / "tokens", self._progress)

    def batches(self, model: Any, tokenizer: Any) -> Iterator[Mapping[str, Any]]:
        """See ``Examples``: up to 256 train rows, the first ones by a hash of their ids."""
        student = self.recipe.student
        count = min(_IMPORTANCE_ROWS, len(self.data.subset(self.spec.subset)))
        chosen = [self.data.train[i] for i in self.data.order[:count]]
        encoder = Encoder(
            self._tokens(tokenizer), student.max_input_tokens, student.max_target_tokens
        )
        rows = encoder.rows(chosen, self.views, self.spec.labels)
        for first in range(0, len(rows), _BATCH_SIZE):
            packed = collate(rows[first : first + _BATCH_SIZE])
            for view in self.views:
                if view.target in packed:
                    yield pad(
                        packed[view.target],
                        tokenizer.pad_token_id,
                        start_token(model.config, view.start),
                    )

    def inputs(self) -> list[str]:
        """See ``Examples``."""
        return [row.text for row in self.data.valid[:_EXPORT_EXAMPLES]]

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
        """Train the student in ``start`` further into ``folder``, which is returned.

        The step with the best validation is kept. An interrupted healing resumes.
        """
        section = self.section.model_copy(
            update={
                "init": str(start),
                "max_steps": steps,
                "learning_rate": learning_rate,
                "warmup_steps": min(self.section.warmup_steps, steps // 10),
                "eval_every": max(1, steps // _VALIDATIONS),
                "log_every": min(self.section.log_every, max(1, steps // 10)),
            }
        )
        tokenizer = load_tokenizer(str(start))
        spec = replace(
            self.spec, section=section, heading=title, directory=str(folder), keep_zeros=keep_zeros
        )
        recipe = self.recipe.model_copy(update={"train": section})
        train_folder = self._source.run.stage("train")
        student_run = StudentRun(
            recipe, spec, self.data, tokenizer, self._tokens(tokenizer), train_folder
        )
        student_run.run(self._progress)
        return folder
