"""Trainer callbacks: metrics.jsonl, progress, early stopping, resampling, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import yaml
from transformers import TrainerCallback

from dsbs.config import Recipe
from dsbs.errors import needs_extra
from dsbs.files import write_jsonl
from dsbs.formatting import markdown_table, one_line, percent
from dsbs.progress import Progress
from dsbs.records import TrainingCost
from dsbs.students.student import Student
from dsbs.students.weights import device, device_name
from dsbs.training.distributed import is_main_process, world_size
from dsbs.training.encode import ResampledRows
from dsbs.training.rows import Data

MemoryOf = Literal["process", "gpu"]

# TensorBoard groups of metrics.jsonl's keys; all other keys of a line of losses are in "train".
_GROUPS = {
    "step_ms": "speed",
    "examples_per_s": "speed",
    "tokens_per_s": "speed",
    "peak_memory_mb": "cost",
    "elapsed_s": "cost",
    "tokens": "cost",
    "examples": "cost",
}
_SAMPLE_LENGTH = 400  # characters of a text in a sample's cell
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")


class MetricsLogger(TrainerCallback):
    """Appends to ``metrics.jsonl`` and updates the progress bar.

    A line has ``step``, the totals so far, interrupted runs included (``elapsed_s``, ``tokens``,
    ``examples``, ``peak_memory_mb``), and one of two sets of keys. Training: the losses in nats per
    token (``loss``, ``label_loss``, ``rationale_loss``, each term's), ``learning_rate``,
    ``grad_norm`` and, since the line before and without validating and saving, ``step_ms``,
    ``examples_per_s`` and ``tokens_per_s``. Validation: ``eval_accuracy`` and ``eval_label_loss``.
    Lines after the checkpoint that a run resumes from are dropped: their steps are repeated.
    """

    def __init__(
        self, path: Path, progress: Progress, valid_rows: int, resume: Path | None
    ) -> None:
        self.first_step = int(resume.name.rpartition("-")[2]) if resume else 0
        self.accuracies: dict[int, float] = {}
        self.best = -1.0
        self.row: dict[str, Any] = {}
        """The newest line."""
        self._path = path
        self._progress = progress
        self._valid_rows = valid_rows
        self._earlier_s = 0.0
        self._earlier_mb = 0.0
        self.stepping_s = 0.0
        """Seconds of all steps up to the last line of losses, without validating and saving."""
        self._began = time.monotonic()
        self._step_began = self._began
        # Of the steps since the last line of losses; and the totals at that line.
        self._new_stepping_s = 0.0
        self._steps = 0
        self._examples = 0
        self._tokens = 0
        self._note = ""
        if is_main_process():
            write_jsonl(path, self._resume(path))
        else:
            self._resume(path)

    def _resume(self, path: Path) -> list[str]:
        """The lines up to the checkpoint, after taking their totals over."""
        lines = []
        logged_step = 0
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            if row["step"] <= self.first_step:
                lines.append(line)
                self._earlier_s = row["elapsed_s"]
                self._earlier_mb = max(self._earlier_mb, row.get("peak_memory_mb", 0.0))
                self._examples = row.get("examples", 0)
                self._tokens = row.get("tokens", 0)
                if "step_ms" in row:
                    self.stepping_s += row["step_ms"] * (row["step"] - logged_step) / 1000
                    logged_step = row["step"]
                self._remember(row)
        return lines

    @property
    def elapsed_s(self) -> float:
        return self._earlier_s + time.monotonic() - self._began

    def cost(self, state: Any) -> TrainingCost:
        """The training's cost so far; ``state`` is the trainer's, whose log has the tokens."""
        tokens = max((row["tokens"] for row in state.log_history if "tokens" in row), default=0)
        return TrainingCost(
            device=device_name(),
            processes=world_size(),
            wall_s=round(self.elapsed_s, 2),
            tokens=tokens,
            tokens_per_s=round(tokens / max(self.stepping_s, 1e-9), 1),
            peak_memory_mb=round(self.peak_memory_mb, 1),
            peak_memory_of=peak_memory()[1],
        )

    @property
    def peak_memory_mb(self) -> float:
        self._earlier_mb = max(self._earlier_mb, peak_memory()[0])
        return self._earlier_mb

    def _remember(self, row: dict[str, Any]) -> None:
        if "eval_accuracy" in row:
            self.accuracies[row["step"]] = row["eval_accuracy"]
            self.best = max(self.best, row["eval_accuracy"])

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "train_runtime" in logs:
            return
        row: dict[str, Any] = {"step": state.global_step, "elapsed_s": round(self.elapsed_s, 3)}
        hidden = ("epoch", "eval_selection")
        row |= {name: value for name, value in logs.items() if name not in hidden}
        row["peak_memory_mb"] = round(self.peak_memory_mb, 1)
        if "loss" in logs:
            row |= self._speed(row["examples"], row["tokens"])
            losses = [
                f"{name.removesuffix('_loss')} {value:.3f}"
                for name, value in logs.items()
                if name.endswith("_loss")
            ]
            if losses:
                self._note = "loss: " + ", ".join(losses)
        if is_main_process():
            with self._path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(row) + "\n")
        self._remember(row)
        self.row = row

    def _speed(self, examples: int, tokens: int) -> dict[str, float]:
        """Speed since the last line of losses, given the totals now."""
        seconds = max(self._new_stepping_s, 1e-9)
        self.stepping_s += self._new_stepping_s
        speed = {
            "step_ms": round(1000 * seconds / max(self._steps, 1), 3),
            "examples_per_s": round((examples - self._examples) / seconds, 2),
            "tokens_per_s": round((tokens - self._tokens) / seconds, 1),
        }
        self._new_stepping_s = 0.0
        self._steps = 0
        self._examples = examples
        self._tokens = tokens
        return speed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_began = time.monotonic()

    on_evaluate = on_save = on_train_begin  # their time does not count as the steps'

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self._new_stepping_s += now - self._step_began
        self._steps += 1
        self._step_began = now
        best = f"; best valid {percent(self.best)}" if self.best >= 0 else ""
        self._progress.update(state.global_step, self._note + best)
        if state.global_step >= state.max_steps:  # the last step is always a candidate
            control.should_log = control.should_evaluate = control.should_save = True


def peak_memory() -> tuple[float, MemoryOf]:
    """Peak megabytes, and of what: PyTorch's GPU tensors, or this process since it started."""
    kind = device()
    if kind == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6, "gpu"
    if kind == "mps":  # what the driver holds; it seldom gives any back
        return torch.mps.driver_allocated_memory() / 1e6, "gpu"
    return _peak_process_memory() / 1e6, "process"


def _peak_process_memory() -> int:
    """Bytes."""
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class EarlyStopping(TrainerCallback):
    """Ends a training after ``patience`` validations without a better one. None: never."""

    def __init__(self, patience: int | None) -> None:
        self._patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_exhausted(state, self._patience):
            control.should_save = control.should_training_stop = True


def is_exhausted(state: Any, patience: int | None) -> bool:
    """Whether patience has run out, by the log alone, which a checkpoint carries."""
    scores = [row["eval_selection"] for row in state.log_history if "eval_selection" in row]
    if patience is None or not scores:
        return False
    return len(scores) - 1 - scores.index(max(scores)) >= patience


class ResampleRationales(TrainerCallback):
    """Samples one target for each row anew in each epoch."""

    def __init__(self, rows: ResampledRows) -> None:
        self._rows = rows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = state.epoch or 0.0  # a resumed run begins within one
        self._rows.epoch = int(epoch + 1e-6)


class KeepZeros(TrainerCallback):
    """Keeps weights at zero that are zero when it is made, as magnitude pruning needs it."""

    def __init__(self, model: Any) -> None:
        masks = ((parameter, parameter.detach() == 0) for parameter in model.parameters())
        self._masks = [(parameter, mask) for parameter, mask in masks if bool(mask.any())]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, mask in self._masks:
            parameter.data.masked_fill_(mask.to(parameter.device), 0.0)


def check_trackers(recipe: Recipe) -> None:
    """Raises UserError where a tracker's package is missing."""
    for tracker in recipe.report.trackers:
        module = "torch.utils.tensorboard" if tracker == "tensorboard" else tracker
        with needs_extra(tracker, f"report.trackers: [{tracker}]"):
            import_module(module)


def remote_trackers(recipe: Recipe) -> list[str]:
    """The trackers that transformers logs to; TensorBoard has a logger of its own."""
    return [tracker for tracker in recipe.report.trackers if tracker != "tensorboard"]


@contextmanager
def tracked(recipe: Recipe) -> Iterator[None]:
    """One training, which is one run of each tracker: named after the recipe, and ended even if the
    training fails. A run that the caller has started goes on.

    transformers sends the training's arguments and the model's configuration, never the recipe.
    """
    names = {
        variable: recipe.name
        for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME")
        if variable not in os.environ
    }
    runs = {name: _tracker_run(name) for name in remote_trackers(recipe)}
    os.environ.update(names)
    try:
        yield
    finally:
        for variable in names:
            del os.environ[variable]
        for name, run_before in runs.items():
            if run_before is None and _tracker_run(name) is not None:
                module: Any = import_module(name)
                module.end_run() if name == "mlflow" else module.finish()


def _tracker_run(name: str) -> Any:
    """A tracker's active run, or None."""
    module: Any = import_module(name)
    if name == "mlflow":
        return module.active_run()
    if name == "trackio":
        return module.context_vars.current_run.get()
    return module.run


class TensorBoardLogger(TrainerCallback):
    """Writes TensorBoard events: metrics, sample predictions, the recipe, the graph on request.

    List it after ``metrics``, whose lines it draws, and close it at the end. ``student`` is the one
    in training; at each validation it predicts the first rows of ``data.valid``. Every process
    predicts, since a sharded model needs all of them; the main one alone writes. ``new_model``
    returns a model as the training began with. Points after the checkpoint that a run resumes from
    are dropped by the readers (``purge_step``). Raises UserError without the package tensorboard.
    """

    def __init__(
        self,
        folder: Path,
        metrics: MetricsLogger,
        recipe: Recipe,
        student: Student,
        data: Data,
        new_model: Callable[[], Any],
    ) -> None:
        with needs_extra("tensorboard", "report.trackers: [tensorboard]"):
            from torch.utils.tensorboard import SummaryWriter
        self._metrics = metrics
        self._student = student
        self._data = data
        self._max_label_tokens = recipe.eval.max_label_tokens
        self._rows = data.valid[: recipe.report.tensorboard_samples]
        self._writer: Any = None
        if not is_main_process():
            return
        first_step = metrics.first_step
        earlier = list(folder.glob("events.*"))
        if not first_step:  # events from before the first checkpoint are written again
            for path in earlier:
                path.unlink()
        purge_step = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        if not (first_step and earlier):
            values = recipe.model_dump(mode="json")
            text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
            self._writer.add_text("recipe", _code_block(text), first_step)
            if recipe.report.tensorboard_graph:
                self._add_graph(new_model)
        self._writer.flush()

    def _add_graph(self, new_model: Callable[[], Any]) -> None:
        """Trace one forward pass of a model of its own: the trained one is left alone."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, about branches that it fixes
            model = new_model()
            ids = torch.ones((1, 1), dtype=torch.long)
            inputs = [ids, torch.ones_like(ids)]
            if self._student.card.head == "text" and model.config.is_encoder_decoder:
                inputs.append(ids)
            self._writer.add_graph(ForwardPass(model), tuple(inputs), use_strict_trace=False)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        row = self._metrics.row
        if self._writer is None or not logs or "train_runtime" in logs:
            return
        if row.get("step") != state.global_step:
            return
        for name, value in row.items():
            tag = _tag(name, of_losses="loss" in row)
            if tag is not None and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(tag, value, state.global_step)
        # Before the checkpoint is written, so that its events are complete when it is resumed from.
        self._writer.flush()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        cells = [[_escape(text) for text in sample] for sample in self._samples()]
        if self._writer is not None and cells:
            headings = ["input", self._data.valid_labels, "label", "rationale"]
            text = "\n".join(markdown_table(headings, cells))
            self._writer.add_text("samples/valid", text, state.global_step)
            self._writer.flush()

    def _samples(self) -> Iterator[tuple[str, str, str, str]]:
        """Input, valid's label, and the student's label and rationale now.

        Greedy decoding: no random number is drawn.
        """
        predictions = self._student.predict(
            [self._data.fields[row.id] for row in self._rows],
            rationale=self._student.card.explains,
            max_label_tokens=self._max_label_tokens,
            canonical=True,
        )
        for row, prediction in zip(self._rows, predictions, strict=True):
            label = prediction.label
            if label is None:
                label = f"{prediction.raw} (no label)"
            rationale = prediction.rationale or "–"
            yield row.text, str(row.label(self._data.valid_labels)), label, rationale

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _tag(name: str, *, of_losses: bool) -> str | None:
    """The tag of a key of metrics.jsonl. None: not drawn, or drawn from the line of losses."""
    if name.startswith("eval_"):
        return f"valid/{name.removeprefix('eval_')}"
    if name == "step" or not of_losses:
        return None
    return f"{_GROUPS.get(name, 'train')}/{name}"


def _escape(text: str) -> str:
    """Text for TensorBoard's Markdown, which knows few escapes but every HTML entity."""
    text = one_line(text, _SAMPLE_LENGTH)
    return _PUNCTUATION.sub(lambda match: f"&#{ord(match[0])};", text)


def _code_block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


class ForwardPass(torch.nn.Module):
    """A forward pass that returns the logits alone, (B, T, V), as the tracer needs it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, decoder_ids: torch.Tensor | None = None
    ) -> Any:
        inputs = {"input_ids": ids, "attention_mask": mask}
        if decoder_ids is not None:
            inputs["decoder_input_ids"] = decoder_ids
        return self.model(**inputs, use_cache=False).logits
