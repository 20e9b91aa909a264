"""One student of the grid: trained, resumed where it stood, saved at its best step on valid."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dsbs.annotations import learned_source
from dsbs.artefacts import canonical, digest, now, room, versions, write_json
from dsbs.errors import DsbsError, PartialError
from dsbs.progress import Meter, running
from dsbs.recipe import Recipe
from dsbs.records import TrainedStudent, Unread
from dsbs.student import (
    Student,
    StudentCard,
    load_model,
    new_model,
    start_hash,
    start_token,
    take_apart,
    tokenizer_hash,
)
from dsbs.tasks import make_task
from dsbs.train.checkpoints import is_out_of_memory, last_checkpoint
from dsbs.train.distil import Distilling
from dsbs.train.encode import Drawn, Encoder, collate, encoded_hash, pad, soft_hash
from dsbs.train.logprobs import keep
from dsbs.train.lora import adapt, merged, trainable
from dsbs.train.methods import View, method_of
from dsbs.train.processes import leads, wait, world
from dsbs.train.rows import Data, taught_rationales
from dsbs.train.teachers import LocalTeacher, teachers_fingerprint
from dsbs.train.tokens import Tokens
from dsbs.train.tune import RECORD, Job, adopt


def per_process(batch: int, micro: int) -> int:
    """Examples of one process's forward pass: at most its share of ``micro``, and a part of its share of the batch."""
    share, most = batch // world(), max(1, micro // world())
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
        self.settings = recipe.training_of(cell.method)  # as the run's recipe has it; what tuning chose comes on top
        recipe = recipe.model_copy(update={"train": job.section})
        self.recipe, self.job, self.cell, self.data, self.tokenizer = recipe, job, cell, data, tokenizer
        self.wording = tokens.wording
        self.views: tuple[View, ...] = method_of(cell.method).views(recipe.train)
        student = recipe.student
        encoder = Encoder(tokens, student.max_input_tokens, student.max_target_tokens)
        self.rows = encoder.rows(data.part(cell.subset), self.views, cell.labels)
        self.valid = encoder.rows(data.valid, self.views[:1], data.valid_labels)
        self.teachers, self.terms = teachers, recipe.train.terms_of(cell.method)
        self.soft = encoder.soft(data.part(cell.subset), self.views[0], cell.labels) if cell.learns_votes else {}
        self.labels = encoder.texts(make_task(recipe.task).labels or ())
        self.folder, self.logprobs = job.folder, logprobs or job.folder.parent / "logprobs"
        self.checkpoints = self.folder / "checkpoints"
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        """Hash of all that decides the student's weights: equal fingerprint, equal student."""
        return digest(
            self.recipe.training_of(self.cell.method),
            canonical(self.cell.identity),
            canonical([asdict(view) for view in self.views]),
            tokenizer_hash(self.tokenizer),
            encoded_hash(self.rows),
            encoded_hash(self.valid),
            *start_hash(self.recipe.train.init or self.recipe.student.model),
            *([teachers_fingerprint(self.teachers)] if self.teachers else []),
            *([soft_hash(self.soft)] if self.soft else []),
        )

    def run(self, meter: Meter) -> TrainedStudent:
        if leads():
            self._make_room()
        wait()
        if (self.folder / RECORD).is_file():
            meter.say(f"{self.job.title}: finished before, kept")
            if leads():
                self._follow_recipe()
            wait()
            return self._record()
        wait()
        if leads():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "work.json", {"fingerprint": self.fingerprint})
            self._adopt()
        wait()
        if (self.folder / RECORD).is_file():
            return self._record()
        try:
            with room(self.folder, "free some space, then run the same command: it goes on from the last checkpoint"):
                return self._train(meter)
        except PartialError:
            last_checkpoint(self.checkpoints)  # a half-written one only takes room
            raise

    def _adopt(self) -> None:
        """Take the trial that is this very student, where tuning has trained it."""
        trial = self.job.chosen
        if trial is None:
            return
        folder = Path(trial.path)
        if json.loads((folder / "work.json").read_text(encoding="utf-8"))["fingerprint"] == self.fingerprint:
            adopt(folder, self.job, {"path": str(self.folder), "settings": self.settings, "tuned": self.job.setting})

    def _follow_recipe(self) -> None:
        """A kept student is this recipe's now: equal weights may come of another grid of settings."""
        said = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        now_said = {"settings": self.settings, "tuned": self.job.setting, "source": self._source()}
        changed = said | {"student": said["student"] | now_said, "trials": [asdict(trial) for trial in self.job.trials]}
        if changed != said:
            write_json(self.folder / RECORD, changed)

    def _source(self) -> str | None:
        """Of the annotations that the student learned from; None: it needed none."""
        return learned_source(self.recipe, make_task(self.recipe.task)) if self.cell.needs_teacher else None

    def _record(self) -> TrainedStudent:
        return TrainedStudent(**json.loads((self.folder / RECORD).read_text(encoding="utf-8"))["student"])

    def _make_room(self) -> None:
        """Another recipe's or other data's student under this name moves aside, and ours comes back if it was aside."""
        try:
            there = json.loads((self.folder / "work.json").read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError):
            there = None
        if there == self.fingerprint:
            return
        aside = self.folder.parent / "aside"
        if self.folder.exists():
            target = aside / f"{self.folder.name}-{(there or 'unknown')[:12]}"
            while target.exists():
                target = target.with_name(target.name + "+")
            target.parent.mkdir(parents=True, exist_ok=True)
            self.folder.rename(target)
        mine = aside / f"{self.folder.name}-{self.fingerprint[:12]}"
        if mine.exists():
            mine.rename(self.folder)

    def _train(self, meter: Meter) -> TrainedStudent:
        """Train; where memory runs out, go on with smaller micro-batches, which change no objective."""
        import torch

        micro = self.recipe.train.micro_batch_size or self.recipe.train.batch_size
        while (trained := self._attempt(meter, micro)) is None:
            smaller = self._smaller(micro)
            meter.say(f"{self.name}: memory is full with {micro} examples at a time; going on with {smaller}")
            gc.collect()
            torch.cuda.empty_cache()
            micro = smaller
        return trained

    def _attempt(self, meter: Meter, micro: int) -> TrainedStudent | None:
        """Train from the last checkpoint to the end; None where memory runs out."""
        import torch
        from transformers import PrinterCallback, Seq2SeqTrainingArguments, TrainerState, set_seed

        from dsbs.train.callbacks import Draw, Follow, KeepZeros, Patience, is_exhausted
        from dsbs.train.trainer import StepTrainer

        section, seed = self.recipe.train, self.cell.seed
        mine = per_process(section.batch_size, micro)
        set_seed(seed)
        model = new_model(self.recipe.student, self.tokenizer, seed, section.init)
        if section.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if section.lora:
            model = adapt(model, section.lora)
        student = Student.of(model, self.tokenizer, self._card())
        terms = self._distilling(model, meter, mine) if self.terms else None
        bf16 = section.precision != "fp32" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(self.checkpoints),
            per_device_train_batch_size=mine,
            gradient_accumulation_steps=section.batch_size // (mine * world()),
            max_steps=section.max_steps,
            learning_rate=section.learning_rate,
            # the plain constant one knows no warm-up
            lr_scheduler_type="constant_with_warmup" if section.schedule == "constant" else section.schedule,
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
        arguments._n_gpu = min(1, arguments.n_gpu)  # the stock trainer would multiply the batch by all that it sees
        if leads():
            last_checkpoint(self.checkpoints)  # removes what a kill left half-written, before anybody else looks
        wait()
        resume = last_checkpoint(self.checkpoints)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # else an earlier student's peak is told as this one's
        follow = Follow(self.folder / "metrics.jsonl", meter, len(self.data.valid), resume)
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
                *([Draw(rows)] if isinstance(rows, Drawn) else []),
                *([KeepZeros(model)] if self.job.keep_zeros else []),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        if resume is not None:
            state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
            if state.global_step >= section.max_steps or is_exhausted(state, section.patience):
                return self._finish(student, state, follow)  # only the saving was left; train() would step on
        told = (section.batch_size, "examples")
        with running(meter, f"train {self.job.title}", section.max_steps, follow.first_step, told), ExitStack() as stack:
            if self.recipe.report.tensorboard:
                trainer.add_callback(stack.enter_context(closing(self._board(student, follow))))
            try:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return None
        return self._finish(student, trainer.state, follow)

    def _distilling(self, model: Any, meter: Meter, size: int) -> Distilling:
        """The student's terms, ready to learn by."""
        asked = self.terms, self.recipe.train, self.views
        kept = keep(*asked, self.teachers, model.config.vocab_size, self.logprobs, self.rows, size, meter, self.job.title)
        made = Distilling(*asked, teachers=self.teachers, labels=self.labels, soft=self.soft, kept=kept)
        made.attach(model, self.cell.seed)
        return made

    def _board(self, student: Student, follow: Any) -> Any:
        from dsbs.train.board import Board

        recipe, folder = self.recipe, self.folder / "tensorboard"
        new = partial(new_model, recipe.student, self.tokenizer, self.cell.seed, recipe.train.init)
        return Board(folder, follow, recipe, student, self.data, new)

    def _smaller(self, micro: int) -> int:
        """The next smaller micro-batch that divides the batch. Raises DsbsError where there is none."""
        batch = self.recipe.train.batch_size
        fitting = [size for size in range(1, micro) if batch % size == 0]
        if not fitting or self.recipe.train.loss_mean == "micro":
            raise DsbsError(
                f"{self.name}: memory is full with {micro} examples at a time",
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
        """Accuracy on valid, the label loss there (nats per token), and what the best step is chosen by.

        ``selection`` orders steps by accuracy and, among equals, by lower loss: half a row's worth at most.
        """
        accuracy = self._accuracy(student)
        loss = self._valid_loss(student)
        return {
            "accuracy": accuracy,
            "label_loss": loss,
            "selection": accuracy + 0.5 / len(self.data.valid) / (1.0 + loss),
        }

    def _accuracy(self, student: Student) -> float:
        task, rows = student.task, self.data.valid
        target, prefix = self.views[0].target, self.views[0].prefix
        whole = target == "rationale-then-label"  # the label comes last
        most = self.recipe.student.max_target_tokens if whole else self.recipe.eval.max_label_tokens
        written = student.generate([prefix + row.text for row in rows], most, self.recipe.eval.batch_size)
        right = 0
        for one, row in zip(written, rows, strict=True):
            label = task.read_label(take_apart(target, one.text)[0], self.data.fields[row.id])
            right += not isinstance(label, Unread) and task.correct(label, str(row.label(self.data.valid_labels)))
        return right / len(rows)

    def _valid_loss(self, student: Student) -> float:
        import torch

        from dsbs.train import causal
        from dsbs.train.losses import summed_nll

        size, model = self.recipe.eval.batch_size, student.engine.model
        total, tokens = 0.0, 0
        name, start = self.views[0].target, self.views[0].start
        rows = sorted(self.valid, key=lambda row: len(row[name][0][0]))
        with torch.inference_mode():
            for first in range(0, len(rows), size):
                flat = collate(rows[first : first + size])[name]
                tokens += len(flat["target"])
                if causal.is_causal(model):
                    there = {k: v.to(model.device) for k, v in flat.items()}
                    total += float(causal.summed(model, {name: there}, without_padding=False)[name])
                    continue
                padded = pad(flat, self.tokenizer.pad_token_id, start_token(model.config, start))
                batch = {k: v.to(model.device) for k, v in padded.items()}
                total += float(summed_nll(model(**batch).logits, batch["labels"]))
        return total / tokens

    def _finish(self, student: Student, state: Any, follow: Any) -> TrainedStudent:
        """Save the best step's checkpoint as the student; ``train.json``, written last, says that it is whole."""
        if leads():
            self._save(student, state, follow)
        wait()
        return self._record()

    def _trained(self, checkpoint: Path) -> Any:
        """The model of a checkpoint, plain even where adapters learned."""
        section = self.recipe.train
        if section.lora is None:
            return load_model(str(checkpoint))
        return merged(new_model(self.recipe.student, self.tokenizer, self.cell.seed, section.init), checkpoint)

    def _save(self, student: Student, state: Any, follow: Any) -> None:
        if state.best_global_step is None:
            raise DsbsError(
                f"{self.name}: no look at valid found a finite loss", hint="lower train.learning_rate and train again"
            )
        best, steps = int(state.best_global_step), int(state.global_step)
        looks = {row["step"]: row["eval_accuracy"] for row in state.log_history if "eval_accuracy" in row}
        learned = trainable(student.engine.model)
        seen = max((row["examples"] for row in state.log_history if "examples" in row), default=0)
        student = Student.of(self._trained(self.checkpoints / f"checkpoint-{best}"), self.tokenizer, student.card)
        student.save(self.folder)
        record = TrainedStudent(
            name=self.name,
            method=self.cell.method,
            labels=self.cell.labels,
            seed=self.cell.seed,
            subset=self.cell.subset,
            path=str(self.folder),
            valid_accuracy=looks[best],
            best_step=best,
            steps=steps,
            examples_per_s=round(seen / max(follow.elapsed_s, 1e-9), 2),
            wall_s=round(follow.elapsed_s, 2),
            parameters=int(student.engine.parameters or 0),
            trainable_parameters=learned,
            fingerprint=self.fingerprint,
            settings=self.settings,
            tuned=self.job.setting,
            source=self._source(),
            reportable=self.recipe.task.limit is None,
            cost=follow.cost(state),
        )
        write_json(
            self.folder / RECORD,
            {
                "student": record.model_dump(),
                "selection": state.best_metric,
                "trials": [asdict(trial) for trial in self.job.trials],
                "rows": len(self.rows),
                "rationales": taught_rationales(self.data, self.cell),
                "valid_rows": len(self.data.valid),
                "valid_labels": self.data.valid_labels,
                "ended": now(),
                "versions": versions(),
                **({"teachers": [teacher.said for teacher in self.teachers]} if self.teachers else {}),
            },
        )
        shutil.rmtree(self.checkpoints, ignore_errors=True)  # the best one is the student; the rest served resuming
