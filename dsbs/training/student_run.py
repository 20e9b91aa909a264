"""Student run: trains one student, resumes it, and saves its best step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsbs.config import StudentRecipe
from dsbs.errors import DsbsError, PartialError
from dsbs.files import full_disk_as_partial, now, versions
from dsbs.progress import Progress, running
from dsbs.prompting import learned_source
from dsbs.records import TrainedStudent
from dsbs.students.calibration import Calibration
from dsbs.students.card import StudentCard
from dsbs.students.student import Student
from dsbs.students.weights import device, load_model, new_model
from dsbs.tasks import make_task
from dsbs.training.adapters import add_adapters, count_trainable, merge_adapters
from dsbs.training.distillation.cached_logprobs import ModelOutputs, cache_logprobs
from dsbs.training.distillation.local_teachers import LocalTeacher
from dsbs.training.distillation.objective import DistillationLoss
from dsbs.training.distributed import (
    free_memory,
    is_main_process,
    is_out_of_memory,
    per_device_batch_size,
    wait,
)
from dsbs.training.encode import ResampledRows, collate
from dsbs.training.grid import DivergedError, StudentFolder, StudentSpec, Trial
from dsbs.training.rows import Data, count_rationales
from dsbs.training.tokens import Tokens
from dsbs.training.training_set import TrainingSet
from dsbs.training.validation import (
    calibrated,
    follow_eval_section,
    max_new_tokens,
    novelty_of,
    validate,
    validation_interval,
)

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from dsbs.training.callbacks import MetricsLogger, TensorBoardLogger
    from dsbs.training.trainer import StepTrainer


class StudentRun:
    """One student's training, from encoding to the saved directory."""

    def __init__(
        self,
        recipe: StudentRecipe,
        spec: StudentSpec,
        data: Data,
        tokenizer: Any,
        tokens: Tokens,
        train_folder: Path,
        teachers: Sequence[LocalTeacher] = (),
    ) -> None:
        # The hash of the recipe's own settings; tuned ones are recorded beside it.
        self.settings = recipe.training_of(spec.method)
        self.spec = spec
        self.data = data
        self.tokenizer = tokenizer
        self.input_format = tokens.input_format
        self.teachers = teachers
        self.training_set = TrainingSet(recipe, spec, data, tokens, teachers)
        section = spec.section.in_steps(len(self.training_set.rows))
        self.recipe = recipe.model_copy(update={"train": section})
        self._logprobs = train_folder / "logprobs"
        fingerprint = self.training_set.fingerprint(self.recipe.training_of(spec.method), tokenizer)
        self.folder = StudentFolder(spec.path(train_folder), fingerprint, spec)

    def trial(self) -> Trial:
        """The result of this student as a trial of its setting."""
        record = self.folder.read_record()
        student = record["student"]
        return Trial(
            self.spec.setting,
            student["valid_accuracy"],
            record["selection"],
            student["best_step"],
            str(self.folder.path),
        )

    def _origin(self) -> dict[str, Any]:
        """The record's fields on the recipe that the student comes from."""
        origin = {"settings": self.settings, "tuned": self.spec.setting, "source": None}
        if self.spec.needs_teacher:
            origin["source"] = learned_source(self.recipe, make_task(self.recipe.task))
        return origin | {"reviews": self.data.reviews}

    # --- training

    def run(self, progress: Progress) -> TrainedStudent:
        """Train, or keep what is finished; returns the student's record."""
        if is_main_process():
            self.folder.claim()
        wait()
        if self.folder.is_finished():
            progress.say(f"{self.spec.title}: already trained, kept")
            if is_main_process():
                self.folder.follow_recipe(self._origin())
                view = self.training_set.views[0]
                follow_eval_section(self.folder.path, self.recipe, self.data, view, progress)
            wait()
            return self.folder.student()
        wait()
        if is_main_process():
            self.folder.begin(self.settings)
        wait()
        if self.folder.is_finished():
            return self.folder.student()
        hint = "free some space, then run the same command: it continues from the last checkpoint"
        try:
            with full_disk_as_partial(self.folder.path, hint):
                return self._train(progress)
        except PartialError:
            self.folder.last_checkpoint()  # removes a half-written one, which takes space
            raise

    def _train(self, progress: Progress) -> TrainedStudent:
        """Train, with smaller micro-batches when memory runs out: the objective stays the same."""
        micro = self.recipe.train.micro_batch_size or self.recipe.train.batch_size
        while (student := self._attempt(progress, micro)) is None:
            smaller = self._smaller(micro)
            progress.say(
                f"{self.spec.name}: out of memory with {micro} examples at a time; "
                f"continuing with {smaller}"
            )
            free_memory()
            micro = smaller
        return student

    def _attempt(self, progress: Progress, micro: int) -> TrainedStudent | None:
        """Train from the last checkpoint to the end. None: out of memory."""
        import torch
        from transformers import TrainerState, set_seed

        from dsbs.training.callbacks import MetricsLogger, is_exhausted, tracked

        section = self.recipe.resolved_train
        batch_size = per_device_batch_size(section.batch_size, micro)
        set_seed(self.spec.seed)
        model = self._new_model()
        student = Student.of(model, self.tokenizer, self._card())
        terms = (
            self._distillation_loss(model, progress, batch_size)
            if self.training_set.terms
            else None
        )
        if is_main_process():
            self.folder.last_checkpoint()  # removes a half-written one before the others look
        wait()
        resume = self.folder.last_checkpoint()
        if device() == "cuda":
            torch.cuda.reset_peak_memory_stats()  # it would hold an earlier student's peak
        metrics = MetricsLogger(
            self.folder.path / "metrics.jsonl", progress, len(self.data.valid), resume
        )
        trainer = self._trainer(student, terms, metrics, batch_size)
        if resume is not None:
            state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
            if state.global_step >= section.max_steps or is_exhausted(state, section.patience):
                # Only saving was left; train() would take another step.
                return self._finish(student, state, metrics)
        bar = running(
            progress,
            f"train {self.spec.title}",
            section.max_steps,
            metrics.first_step,
            (section.batch_size, "examples"),
        )
        with bar, ExitStack() as stack:
            stack.enter_context(tracked(self.recipe))
            if "tensorboard" in self.recipe.report.trackers:
                board = stack.enter_context(closing(self._tensorboard(student, metrics)))
                trainer.add_callback(board)
            try:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return None
        return self._finish(student, trainer.state, metrics)

    def _new_model(self) -> Any:
        section = self.recipe.resolved_train
        model = self._start_model()
        if section.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if section.lora:
            model = add_adapters(model, section.lora)
        return model

    def _start_model(self) -> Any:
        """The model before training, without adapters."""
        return new_model(
            self.recipe.student,
            self.tokenizer,
            self.spec.seed,
            self.recipe.train.init,
            labels=self.training_set.outputs,
            classes=self.training_set.classes,
            explains=self.training_set.learns_rationales,
        )

    def _trainer(
        self,
        student: Student,
        terms: DistillationLoss | None,
        metrics: MetricsLogger,
        batch_size: int,
    ) -> StepTrainer:
        from transformers import PrinterCallback

        from dsbs.training.callbacks import (
            EarlyStopping,
            KeepZeros,
            ResampleRationales,
            remote_trackers,
        )
        from dsbs.training.trainer import StepTrainer, training_arguments

        section = self.recipe.resolved_train
        callbacks: list[TrainerCallback] = [metrics, EarlyStopping(section.patience)]
        rows: Sequence[Any] | ResampledRows = self.training_set.rows
        if section.rationales == "drawn":
            rows = ResampledRows(self.training_set.rows, self.spec.seed)
            callbacks.append(ResampleRationales(rows))
        if self.spec.keep_zeros:
            callbacks.append(KeepZeros(student.backend.model))
        trainer = StepTrainer(
            model=student.backend.model,
            args=training_arguments(
                section,
                self.folder.checkpoints,
                self.spec.seed,
                batch_size=batch_size,
                eval_steps=self.eval_every,
                tracking={
                    "report_to": remote_trackers(self.recipe),
                    "project": self.recipe.name,
                    "run_name": self.spec.title,
                },
            ),
            train_dataset=rows,
            eval_dataset=self.training_set.valid,
            data_collator=terms.collate if terms else collate,
            views=self.training_set.views,
            terms=terms,
            without_targets=self.spec.without_targets,
            section=section,
            class_weights=self.training_set.class_weights,
            scores_choices=self.training_set.scores_choices,
            label_sets=self.training_set.label_sets,
            reads_windows=self.training_set.reads_windows,
            validate=lambda: self._validate(student),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    @property
    def eval_every(self) -> int:
        """Optimizer steps between validations."""
        tokens = (
            0
            if self.training_set.head == "labels"
            else max_new_tokens(self.recipe, self.training_set.views[0])
        )
        return validation_interval(
            self.recipe.resolved_train, self.training_set.rows, self.training_set.valid, tokens
        )

    def _distillation_loss(
        self, model: Any, progress: Progress, batch_size: int
    ) -> DistillationLoss:
        """The loss of the student's terms, attached to its model."""
        section = self.recipe.resolved_train
        cached = cache_logprobs(
            self.training_set.terms,
            section,
            self.training_set.views,
            self.teachers,
            ModelOutputs(
                self.training_set.head, self.training_set.outputs or model.config.vocab_size
            ),
            self._logprobs,
            self.training_set.rows,
            batch_size,
            progress,
            self.spec.title,
        )
        loss = DistillationLoss(
            self.training_set.terms,
            section,
            self.training_set.views,
            teachers=self.teachers,
            label_ids=self.training_set.label_ids,
            head=self.training_set.head,
            soft_labels=self.training_set.soft_labels,
            cached=cached,
        )
        loss.attach_projections(model, self.spec.seed)
        if not loss.needs_teachers:  # their log-probabilities are on disk
            for teacher in self.teachers:
                teacher.release()
            free_memory()
        return loss

    def _tensorboard(self, student: Student, metrics: MetricsLogger) -> TensorBoardLogger:
        from dsbs.training.callbacks import TensorBoardLogger

        folder = self.folder.path / "tensorboard"
        return TensorBoardLogger(
            folder, metrics, self.recipe, student, self.data, self._start_model
        )

    def _smaller(self, micro: int) -> int:
        """The next smaller micro-batch that divides the batch.

        Raises DsbsError where there is none, or where it would change the objective.
        """
        batch = self.recipe.train.batch_size
        problem = f"{self.spec.name}: out of memory with {micro} examples at a time"
        sizes = [size for size in range(1, micro) if batch % size == 0]
        if not sizes:
            raise DsbsError(
                problem,
                hint="set train.gradient_checkpointing: true, or use a smaller student; the last "
                "checkpoint is kept",
            )
        fixed = [term.title for term in self.training_set.terms if term.is_of_one_pass]
        if self.recipe.train.loss_mean == "micro":
            fixed.append("train.loss_mean: micro")
        if fixed:
            raise DsbsError(
                f"{problem}, and a smaller micro-batch would change {' and '.join(fixed)}",
                hint="set train.gradient_checkpointing: true, which continues from the last "
                "checkpoint; or a smaller train.micro_batch_size, which trains another student",
            )
        return max(size for size in sizes if size <= max(1, micro // 2))

    def _card(self) -> StudentCard:
        return StudentCard(
            name=self.spec.name,
            method=self.spec.method,
            labels=self.spec.labels,
            seed=self.spec.seed,
            task=self.recipe.task,
            prefixes={view.target: view.prefix for view in self.training_set.views},
            starts={view.target: view.start for view in self.training_set.views},
            max_input_tokens=self.training_set.max_input_tokens,
            max_target_tokens=self.training_set.max_target_tokens,
            max_label_tokens=self.recipe.eval.max_label_tokens,
            max_text_tokens=self.data.max_text_tokens,
            kind=self.input_format.kind,
            head=self.training_set.head,
            classes=self.training_set.classes,
            template=self.input_format.template,
        )

    def _validate(self, student: Student) -> dict[str, float]:
        view = self.training_set.views[0]
        try:
            return validate(student, self.recipe, self.data, self.training_set.valid, view)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        raise DsbsError(
            f"{self.spec.name}: out of memory in validation, which reads "
            f"{self.recipe.eval.batch_size} rows at a time",
            hint="lower eval.batch_size: training continues from the last checkpoint",
        )

    # --- saving

    def _finish(self, student: Student, state: Any, metrics: MetricsLogger) -> TrainedStudent:
        """Save the best step's checkpoint as the student, and its record last."""
        if is_main_process():
            self._save(student, state, metrics)
        wait()
        return self.folder.student()

    def _load_checkpoint(self, checkpoint: Path) -> Any:
        """The plain model of a checkpoint, adapters merged."""
        section = self.recipe.resolved_train
        if section.lora is not None:
            return merge_adapters(self._start_model(), checkpoint)
        return load_model(str(checkpoint), labels=self.training_set.outputs)

    def _save(self, student: Student, state: Any, metrics: MetricsLogger) -> None:
        if state.best_global_step is None:
            raise DivergedError(
                f"{self.spec.name}: the validation loss was never finite",
                hint="lower train.learning_rate and train again",
            )
        best = int(state.best_global_step)
        log = state.log_history
        accuracies = {row["step"]: row["eval_accuracy"] for row in log if "eval_accuracy" in row}
        examples = max((row["examples"] for row in log if "examples" in row), default=0)
        trainable = count_trainable(student.backend.model)
        model = self._load_checkpoint(self.folder.checkpoints / f"checkpoint-{best}")
        student = Student.of(model, self.tokenizer, student.card)
        student.calibration = self._calibration(student)
        student.novelty = novelty_of(student, self.recipe, self.data, self.training_set.views[0])
        student.save(self.folder.path)
        trained = TrainedStudent(
            name=self.spec.name,
            student=self.spec.student,
            **self.spec.identity,
            path=str(self.folder.path),
            valid_accuracy=accuracies[best],
            best_step=best,
            steps=int(state.global_step),
            examples_per_s=round(examples / max(metrics.stepping_s, 1e-9), 2),
            wall_s=round(metrics.elapsed_s, 2),
            parameters=int(student.backend.parameters or 0),
            trainable_parameters=trainable,
            fingerprint=self.folder.fingerprint,
            **self._origin(),
            reportable=self.recipe.task.limit is None,
            cost=metrics.cost(state),
        )
        record: dict[str, Any] = {
            "student": trained.model_dump(),
            "selection": state.best_metric,
            "eval_every": self.eval_every,
            "rows": len(self.training_set.rows),
            "rationales": count_rationales(self.data, self.spec),
            "valid_rows": len(self.data.valid),
            "valid_labels": self.data.valid_labels,
            "ended": now(),
            "versions": versions(),
        }
        if self.teachers:
            record["teachers"] = [teacher.record for teacher in self.teachers]
        self.folder.finish(record)

    def _calibration(self, student: Student) -> Calibration | None:
        """The finished student's calibration, on the CPU where the GPU is full."""
        view = self.training_set.views[0]
        try:
            student.backend.model.to(device())
            return calibrated(student, self.recipe, self.data, view)
        except (RuntimeError, MemoryError) as error:
            if device() == "cpu" or not is_out_of_memory(error):
                raise
        free_memory()
        student.backend.model.to("cpu")
        return calibrated(student, self.recipe, self.data, view)
