"""What a run of the trainer leaves behind while it runs, metrics.jsonl and progress; and when it ends."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dsbs.files import device_name, write_jsonl
from dsbs.progress import Progress
from dsbs.records.rows import TrainingCost
from dsbs.training.cost import energy, peak_memory
from dsbs.training.distributed import is_main_process, world_size
from dsbs.training.encode import Drawn

_COUNT_EVERY_S = 60.0  # a counter of energy may begin anew several times between two lines


class MetricsLogger(TrainerCallback):
    """Appends to ``metrics.jsonl`` and moves the meter.

    A line has ``step``, the totals so far, earlier runs included (``elapsed_s``, ``tokens`` and ``examples``, ``energy_j``
    where the machine tells it, ``peak_memory_mb``), and either losses in nats per token (``loss``, ``label_loss``,
    ``rationale_loss``, each term's, ``learning_rate``, ``grad_norm``) and, since the line before, ``step_ms``,
    ``examples_per_s`` and ``tokens_per_s``, looks at valid and saving left out, or ``eval_accuracy`` and ``eval_label_loss``.
    Lines after the checkpoint that a run resumes from are dropped: they come again.
    """

    def __init__(
        self, path: Path, progress: Progress, valid_rows: int, resume: Path | None
    ) -> None:
        self.first_step = int(resume.name.rpartition("-")[2]) if resume else 0
        self.accuracies: dict[int, float] = {}
        self.best = -1.0
        self.row: dict[str, Any] = {}  # the newest line
        self._path, self._progress, self._valid_rows = path, progress, valid_rows
        self._energy, self._before_j = energy(), None if resume else 0.0
        self._before_s, self._before_mb = 0.0, 0.0
        self._began = self._marked = self._counted = time.monotonic()
        self._stepping_s, self._steps = 0.0, 0  # of the steps since the last line of losses
        self._examples, self._tokens = 0, 0  # seen by then
        self._note = ""
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut
            if row["step"] <= self.first_step:
                kept.append(line)
                self._before_s, self._before_j = row["elapsed_s"], row.get("energy_j")
                self._before_mb = max(self._before_mb, row.get("peak_memory_mb", 0.0))
                self._examples, self._tokens = row.get("examples", 0), row.get("tokens", 0)
                self._remember(row)
        if is_main_process():
            write_jsonl(path, kept)

    @property
    def elapsed_s(self) -> float:
        return self._before_s + time.monotonic() - self._began

    @property
    def energy_j(self) -> float | None:
        """None where the machine does not tell it, or did not in an earlier run of this training."""
        here = self._energy.joules()
        return None if here is None or self._before_j is None else self._before_j + here

    def cost(self, state: Any) -> TrainingCost:
        """What the training took up to now. ``state`` is the trainer's: what a checkpoint holds of the tokens counts."""
        tokens = max((row["tokens"] for row in state.log_history if "tokens" in row), default=0)
        joules, elapsed_s = self.energy_j, self.elapsed_s
        return TrainingCost(
            device=device_name(),
            processes=world_size(),
            wall_s=round(elapsed_s, 2),
            tokens=tokens,
            tokens_per_s=round(tokens / max(elapsed_s, 1e-9), 1),
            peak_memory_mb=round(self.peak_memory_mb, 1),
            peak_memory_of=peak_memory()[1],
            energy_j=None if joules is None else round(joules, 3),
            energy_of=None if joules is None else self._energy.of,
        )

    @property
    def peak_memory_mb(self) -> float:
        return max(self._before_mb, peak_memory()[0])

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
        row |= {
            name: value for name, value in logs.items() if name not in ("epoch", "eval_selection")
        }
        joules = self.energy_j
        row |= {
            "energy_j": None if joules is None else round(joules, 3),
            "peak_memory_mb": round(self.peak_memory_mb, 1),
        }
        if "loss" in logs:
            seconds = max(self._stepping_s, 1e-9)
            row["step_ms"] = round(1000 * seconds / max(self._steps, 1), 3)
            row["examples_per_s"] = round((row["examples"] - self._examples) / seconds, 2)
            row["tokens_per_s"] = round((row["tokens"] - self._tokens) / seconds, 1)
            self._stepping_s, self._steps = 0.0, 0
            self._examples, self._tokens = row["examples"], row["tokens"]
        if is_main_process():
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self._remember(row)
        self.row = row
        losses = [
            f"{key.removesuffix('_loss')} {value:.3f}"
            for key, value in logs.items()
            if key.endswith("_loss")
        ]
        losses = losses if "loss" in logs else []
        if losses:
            self._note = "loss: " + ", ".join(losses)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._marked = time.monotonic()

    on_evaluate = on_save = on_train_begin  # what they took is not the steps'

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self._stepping_s += now - self._marked
        self._steps += 1
        self._marked = now
        if now - self._counted > _COUNT_EVERY_S:
            self._energy.joules()
            self._counted = now
        best = f"; best valid {100 * self.best:.1f} %" if self.best >= 0 else ""
        self._progress.update(state.global_step, self._note + best)
        if (
            state.global_step >= state.max_steps
        ):  # the last step is a candidate too, whatever eval_every divides
            control.should_log = control.should_evaluate = control.should_save = True


class Patience(TrainerCallback):
    """Ends a student's training after so many looks at valid without a better one (None: never)."""

    def __init__(self, patience: int | None) -> None:
        self._patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_exhausted(state, self._patience):
            control.should_save = control.should_training_stop = True


class ResampleRationales(TrainerCallback):
    """A new draw of each row's target with each epoch."""

    def __init__(self, rows: Drawn) -> None:
        self._rows = rows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rows.epoch = int(
            (state.epoch or 0.0) + 1e-6
        )  # within one, where a resumed run begins


class KeepZeros(TrainerCallback):
    """Weights that are zero when it is made are zero after each step, as pruning by magnitude needs it."""

    def __init__(self, model: Any) -> None:
        self._zeros = [
            (parameter, zeros)
            for parameter in model.parameters()
            if bool((zeros := parameter.detach() == 0).any())
        ]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, zeros in self._zeros:
            parameter.data.masked_fill_(zeros.to(parameter.device), 0.0)


def is_exhausted(state: Any, patience: int | None) -> bool:
    """Told from the log alone, which a checkpoint carries: a resumed training ends where an undisturbed one does."""
    looks = [row["eval_selection"] for row in state.log_history if "eval_selection" in row]
    return (
        patience is not None
        and bool(looks)
        and len(looks) - 1 - looks.index(max(looks)) >= patience
    )
