"""One student of the grid: trained, resumed where it stood, saved at its best step on valid."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dsbs.config import Recipe
from dsbs.errors import DsbsError, PartialError
from dsbs.files import canonical_json, digest, now, room, versions
from dsbs.progress import Progress, running
from dsbs.records.rows import TrainedStudent
from dsbs.run_folder import learned_source
from dsbs.students import Student, StudentCard, load_model, new_model, start_hash, tokenizer_hash
from dsbs.tasks import make_task
from dsbs.training import memory
from dsbs.training.distillation.base import terms_of
from dsbs.training.distillation.local_teachers import LocalTeacher, teachers_fingerprint
from dsbs.training.distillation.logprobs import cache_logprobs
from dsbs.training.distillation.objective import DistillationLoss
from dsbs.training.distributed import is_main_process, wait, world_size
from dsbs.training.encode import Drawn, Encoder, collate, encoded_hash, soft_hash
from dsbs.training.folder import StudentFolder
from dsbs.training.lora import adapt, merged, trainable
from dsbs.training.methods import View, method_of
from dsbs.training.rows import Data, taught_rationales
from dsbs.training.tokens import Tokens
from dsbs.training.tune import Job
from dsbs.training.validation import look


def per_process(batch: int, micro: int) -> int:
    """Examples of one process's forward pass: at most its share of ``micro``, and a part of its share of the batch."""
    share, most = batch // world_size(), max(1, micro // world_size())
    return max(size for size in range(1, most + 1) if share % size == 0)


class CellTraining:
    """One student's training, from encoding to the saved folder."""

    def __init__(
        self,
        recipe: Recipe,
        job: Job,
        data: Data,
        tokenizer: Any,
        tokens: Tokens,
        teachers: Sequence[LocalTeacher] = (),
        logprobs: Path | None = None,
    ) -> None:
        cell = job.cell
        self.name = job.name or cell.name
        self.settings = recipe.training_of(
            cell.method
        )  # as the run's recipe has it; what tuning chose comes on top
        recipe = recipe.model_copy(update={"train": job.section})
        self.recipe, self.job, self.cell, self.data, self.tokenizer = (
            recipe,
            job,
            cell,
            data,
            tokenizer,
        )
        self.wording = tokens.wording
        self.views: tuple[View, ...] = method_of(cell.method).views(recipe.train)
        student = recipe.student
        encoder = Encoder(tokens, student.max_input_tokens, student.max_target_tokens)
        self.rows = encoder.rows(data.part(cell.subset), self.views, cell.labels)
        self.valid = encoder.rows(data.valid, self.views[:1], data.valid_labels)
        self.teachers, self.terms = teachers, terms_of(recipe.train, cell.method)
        self.soft = (
            encoder.soft(data.part(cell.subset), self.views[0], cell.labels)
            if cell.learns_votes
            else {}
        )
        scored = any(term.needs_label_scores for term in self.terms)
        self.labels = encoder.texts(make_task(recipe.task).labels or ()) if scored else []
        self.logprobs = logprobs or job.folder.parent / "logprobs"
        self.folder = StudentFolder(job, self._fingerprint())

    def _fingerprint(self) -> str:
        """Hash of all that decides the student's weights: equal fingerprint, equal student."""
        return digest(
            self.recipe.training_of(self.cell.method),
            canonical_json(self.cell.identity),
            canonical_json([asdict(view) for view in self.views]),
            tokenizer_hash(self.tokenizer),
            encoded_hash(self.rows),
            encoded_hash(self.valid),
            *start_hash(self.recipe.train.init or self.recipe.student.source),
            *([teachers_fingerprint(self.teachers)] if self.teachers else []),
            *([soft_hash(self.soft)] if self.soft else []),
        )

    def run(self, progress: Progress) -> TrainedStudent:
        folder = self.folder
        if is_main_process():
            folder.make_room()
        wait()
        if folder.is_finished():
            progress.say(f"{self.job.title}: finished before, kept")
            if is_main_process():
                folder.follow_recipe(self._origin())
            wait()
            return folder.record()
        wait()
        if is_main_process():
            folder.begin({"settings": self.settings, "tuned": self.job.setting})
        wait()
        if folder.is_finished():
            return folder.record()
        try:
            with room(
                folder.path,
                "free some space, then run the same command: it goes on from the last checkpoint",
            ):
                return self._train(progress)
        except PartialError:
            folder.last_checkpoint()  # a half-written one only takes room
            raise

    def _origin(self) -> dict[str, Any]:
        """What of a student's record says by which recipe it came to be; ``source``: of which annotations, if of any."""
        source = (
            learned_source(self.recipe, make_task(self.recipe.task))
            if self.cell.needs_teacher
            else None
        )
        return {"settings": self.settings, "tuned": self.job.setting, "source": source}

    def _train(self, progress: Progress) -> TrainedStudent:
        """Train; where memory runs out, go on with smaller micro-batches, which change no objective."""
        micro = self.recipe.train.micro_batch_size or self.recipe.train.batch_size
        while (trained := self._attempt(progress, micro)) is None:
            smaller = self._smaller(micro)
            progress.say(
                f"{self.name}: memory is full with {micro} examples at a time; going on with {smaller}"
            )
            memory.free()
            micro = smaller
        return trained

    def _attempt(self, progress: Progress, micro: int) -> TrainedStudent | None:
        """Train from the last checkpoint to the end; None where memory runs out."""
        import torch
        from transformers import PrinterCallback, Seq2SeqTrainingArguments, TrainerState, set_seed

        from dsbs.training.callbacks import (
            KeepZeros,
            MetricsLogger,
            Patience,
            ResampleRationales,
            is_exhausted,
        )
        from dsbs.training.trainer import StepTrainer

        section, seed = self.recipe.train, self.cell.seed
        mine = per_process(section.batch_size, micro)
        set_seed(seed)
        model = new_model(self.recipe.student, self.tokenizer, seed, section.init)
        if section.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if section.lora:
            model = adapt(model, section.lora)
        student = Student.of(model, self.tokenizer, self._card())
        terms = self._distilling(model, progress, mine) if self.terms else None
        bf16 = (
            section.precision != "fp32"
            and torch.cuda.is_available()
            and torch.cuda.is_bf16_supported()
        )
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(self.folder.checkpoints),
            per_device_train_batch_size=mine,
            gradient_accumulation_steps=section.batch_size // (mine * world_size()),
            max_steps=section.max_steps,
            learning_rate=section.learning_rate,
            # the plain constant one knows no warm-up
            lr_scheduler_type="constant_with_warmup"
            if section.schedule == "constant"
            else section.schedule,
            optim="adafactor" if section.optimizer == "adafactor" else "adamw_torch_fused",
            train_sampling_strategy="random" if section.shuffle else "sequential",
            logging_nan_inf_filter=False,  # it would show 0 in place of a loss that is lost
            warmup_steps=section.warmup_steps,
            weight_decay=section.weight_decay,
            logging_steps=section.log_every,
            eval_strategy="steps",
            eval_steps=section.eval_steps,
            save_strategy="steps",
            save_steps=section.eval_steps,
            save_total_limit=1,
            metric_for_best_model="selection",
            greater_is_better=True,
            remove_unused_columns=False,
            bf16=bf16,
            seed=seed,
            data_seed=seed,
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        arguments._n_gpu = min(
            1, arguments.n_gpu
        )  # the stock trainer would multiply the batch by all that it sees
        if is_main_process():
            self.folder.last_checkpoint()  # removes what a kill left half-written, before anybody else looks
        wait()
        resume = self.folder.last_checkpoint()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # else an earlier student's peak is told as this one's
        follow = MetricsLogger(
            self.folder.path / "metrics.jsonl", progress, len(self.data.valid), resume
        )
        rows = Drawn(self.rows, seed) if section.rationales == "drawn" else self.rows
        trainer = StepTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=self.valid,
            data_collator=terms.collate if terms else collate,
            views=self.views,
            terms=terms,
            section=section,
            validate=lambda: self._validate(student),
            callbacks=[
                follow,
                Patience(section.patience),
                *([ResampleRationales(rows)] if isinstance(rows, Drawn) else []),
                *([KeepZeros(model)] if self.job.keep_zeros else []),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        if resume is not None:
            state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
            if state.global_step >= section.max_steps or is_exhausted(state, section.patience):
                return self._finish(
                    student, state, follow
                )  # only the saving was left; train() would step on
        told = (section.batch_size, "examples")
        with (
            running(
                progress, f"train {self.job.title}", section.max_steps, follow.first_step, told
            ),
            ExitStack() as stack,
        ):
            if self.recipe.report.tensorboard:
                trainer.add_callback(stack.enter_context(closing(self._board(student, follow))))
            try:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out_of_memory(error):
                    raise
                return None
        return self._finish(student, trainer.state, follow)

    def _distilling(self, model: Any, progress: Progress, size: int) -> DistillationLoss:
        """The student's terms, ready to learn by."""
        asked = self.terms, self.recipe.train, self.views
        kept = cache_logprobs(
            *asked,
            self.teachers,
            model.config.vocab_size,
            self.logprobs,
            self.rows,
            size,
            progress,
            self.job.title,
        )
        made = DistillationLoss(
            *asked,
            teachers=self.teachers,
            label_ids=self.labels,
            soft_labels=self.soft,
            cached=kept,
        )
        made.attach_projections(model, self.cell.seed)
        return made

    def _board(self, student: Student, follow: Any) -> Any:
        from dsbs.training.tensorboard import Board

        recipe, folder = self.recipe, self.folder.path / "tensorboard"
        new = partial(new_model, recipe.student, self.tokenizer, self.cell.seed, recipe.train.init)
        return Board(folder, follow, recipe, student, self.data, new)

    def _smaller(self, micro: int) -> int:
        """The next smaller micro-batch that divides the batch. Raises DsbsError where there is none, or it would not do."""
        batch, full = (
            self.recipe.train.batch_size,
            f"{self.name}: memory is full with {micro} examples at a time",
        )
        fitting = [size for size in range(1, micro) if batch % size == 0]
        bound = [term.title for term in self.terms if term.is_of_one_pass]
        bound += ["train.loss_mean: micro"] if self.recipe.train.loss_mean == "micro" else []
        if fitting and bound:
            raise DsbsError(
                f"{full}, and with fewer {' and '.join(bound)} would mean something else",
                hint="set train.gradient_checkpointing: true, which goes on from the last checkpoint; or a smaller "
                "train.micro_batch_size, which makes another student",
            )
        if not fitting:
            raise DsbsError(
                full,
                hint="set train.gradient_checkpointing: true, or take a smaller student; the last checkpoint is kept",
            )
        return max(size for size in fitting if size <= max(1, micro // 2))

    def _card(self) -> StudentCard:
        return StudentCard(
            name=self.name,
            method=self.cell.method,
            labels=self.cell.labels,
            seed=self.cell.seed,
            task=self.recipe.task,
            prefixes={view.target: view.prefix for view in self.views},
            starts={view.target: view.start for view in self.views},
            max_input_tokens=self.recipe.student.max_input_tokens,
            max_target_tokens=self.recipe.student.max_target_tokens,
            kind=self.wording.kind,
            template=self.wording.template,
        )

    def _validate(self, student: Student) -> dict[str, float]:
        return look(student, self.recipe, self.data, self.valid, self.views[0])

    def _finish(self, student: Student, state: Any, follow: Any) -> TrainedStudent:
        """Save the best step's checkpoint as the student; ``train.json``, written last, says that it is whole."""
        if is_main_process():
            self._save(student, state, follow)
        wait()
        return self.folder.record()

    def _trained(self, checkpoint: Path) -> Any:
        """The model of a checkpoint, plain even where adapters learned."""
        section = self.recipe.train
        if section.lora is None:
            return load_model(str(checkpoint))
        return merged(
            new_model(self.recipe.student, self.tokenizer, self.cell.seed, section.init), checkpoint
        )

    def _save(self, student: Student, state: Any, follow: Any) -> None:
        if state.best_global_step is None:
            raise DsbsError(
                f"{self.name}: no look at valid found a finite loss",
                hint="lower train.learning_rate and train again",
            )
        best, steps = int(state.best_global_step), int(state.global_step)
        looks = {
            row["step"]: row["eval_accuracy"] for row in state.log_history if "eval_accuracy" in row
        }
        learned = trainable(student.engine.model)
        seen = max((row["examples"] for row in state.log_history if "examples" in row), default=0)
        student = Student.of(
            self._trained(self.folder.checkpoints / f"checkpoint-{best}"),
            self.tokenizer,
            student.card,
        )
        student.save(self.folder.path)
        record = TrainedStudent(
            name=self.name,
            method=self.cell.method,
            labels=self.cell.labels,
            seed=self.cell.seed,
            subset=self.cell.subset,
            path=str(self.folder.path),
            valid_accuracy=looks[best],
            best_step=best,
            steps=steps,
            examples_per_s=round(seen / max(follow.elapsed_s, 1e-9), 2),
            wall_s=round(follow.elapsed_s, 2),
            parameters=int(student.engine.parameters or 0),
            trainable_parameters=learned,
            fingerprint=self.folder.fingerprint,
            **self._origin(),
            reportable=self.recipe.task.limit is None,
            cost=follow.cost(state),
        )
        self.folder.finish(
            record,
            {
                "selection": state.best_metric,
                "rows": len(self.rows),
                "rationales": taught_rationales(self.data, self.cell),
                "valid_rows": len(self.data.valid),
                "valid_labels": self.data.valid_labels,
                "ended": now(),
                "versions": versions(),
                **(
                    {"teachers": [teacher.record for teacher in self.teachers]}
                    if self.teachers
                    else {}
                ),
            },
        )
