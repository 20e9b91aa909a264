"""TensorBoard's events of one training: figures, samples of what the student writes, the recipe, and its graph on request."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.formatting import markdown_table, one_line
from dsbs.students import Student
from dsbs.training.callbacks import MetricsLogger
from dsbs.training.distributed import is_main_process
from dsbs.training.rows import Data

_GROUPS = {
    "step_ms": "speed",
    "examples_per_s": "speed",
    "tokens_per_s": "speed",
    "peak_memory_mb": "cost",
    "energy_j": "cost",
    "elapsed_s": "cost",
    "tokens": "cost",
    "examples": "cost",
}  # of metrics.jsonl's keys; all others of a line of losses are of `train`
_MOST = 400  # characters of a text in a sample's cell
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")


class Board(TrainerCallback):
    """Writes events into ``folder``; to be listed after ``follow``, whose lines it draws, and closed in the end.

    ``student`` is the one in training and ``data`` has the rows of valid that it answers at each look. Every process decodes
    them, for a divided model needs all of them; the leading one alone writes. ``new`` makes a model as the training began with.
    Points after the checkpoint that a run resumes from are dropped by the readers of the events (``purge_step``): they come
    again. Raises UserError where TensorBoard's package is missing.
    """

    def __init__(
        self,
        folder: Path,
        follow: MetricsLogger,
        recipe: Recipe,
        student: Student,
        data: Data,
        new: Callable[[], Any],
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "report.tensorboard needs the package tensorboard",
                hint="pip install 'dsbs[tensorboard]'",
            ) from None
        self._follow, self._student, self._data = follow, student, data
        self._most = recipe.eval.max_label_tokens
        self._rows = data.valid[: recipe.report.tensorboard_samples]
        self._writer: Any = None
        if not is_main_process():
            return
        first, earlier = follow.first_step, list(folder.glob("events.*"))
        if not first:  # what stopped before its first checkpoint comes again as a whole
            for path in earlier:
                path.unlink()
        self._writer = SummaryWriter(str(folder), purge_step=first + 1 if first else None)
        if not (first and earlier):
            said = yaml.safe_dump(
                recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True
            )
            self._writer.add_text("recipe", _block(said), first)
            if recipe.report.tensorboard_graph:
                self._graph(new)
        self._writer.flush()

    def _graph(self, new: Callable[[], Any]) -> None:
        """Trace one forward pass of a model of its own: the trained one is neither traced nor gathered for it."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # the tracer's: branches that it took are taken for good
            model = new()
            one = torch.tensor([[model.config.eos_token_id]])
            ids = (one, torch.ones_like(one)) + ((one,) if model.config.is_encoder_decoder else ())
            self._writer.add_graph(ForwardPass(model), ids, use_strict_trace=False)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        row = self._follow.row
        if (
            self._writer is None
            or not logs
            or "train_runtime" in logs
            or row.get("step") != state.global_step
        ):
            return
        for name, value in row.items():
            tag = _tag(name, of_losses="loss" in row)
            if tag is not None and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(tag, value, state.global_step)
        self._writer.flush()  # before the checkpoint is written: what is resumed from it has all points up to it

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        cells = [[_shown(text) for text in sample] for sample in self._samples()]
        if self._writer is not None and cells:
            text = "\n".join(
                markdown_table(["input", self._data.valid_labels, "label", "rationale"], cells)
            )
            self._writer.add_text("samples/valid", text, state.global_step)
            self._writer.flush()

    def _samples(self) -> Iterator[tuple[str, str, str, str]]:
        """Input, the label that valid has for it, and what the student makes of it now.

        Greedy decoding: no random number is drawn.
        """
        fields = [self._data.fields[row.id] for row in self._rows]
        answers = self._student.predict(
            fields,
            rationale=self._student.card.explains,
            max_label_tokens=self._most,
            canonical=True,
        )
        for row, answer in zip(self._rows, answers, strict=True):
            label = f"{answer.raw} (no label)" if answer.label is None else answer.label
            yield row.text, str(row.label(self._data.valid_labels)), label, answer.rationale or "–"

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _tag(name: str, *, of_losses: bool) -> str | None:
    """Where a key of metrics.jsonl is drawn; None: it is not, or in the line of losses of the same step."""
    if name.startswith("eval_"):
        return f"valid/{name.removeprefix('eval_')}"
    if name == "step" or not of_losses:
        return None
    return f"{_GROUPS.get(name, 'train')}/{name}"


def _shown(text: str) -> str:
    """A text of data in TensorBoard's Markdown, which knows fewer escapes than others but every entity of HTML."""
    return _PUNCTUATION.sub(lambda found: f"&#{ord(found[0])};", one_line(text, _MOST))


def _block(text: str) -> str:
    """A text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


class ForwardPass(torch.nn.Module):
    """A forward pass whose output is the logits alone, (B, T, V): a tracer takes no other classes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, written: torch.Tensor | None = None
    ) -> Any:
        more = {} if written is None else {"decoder_input_ids": written}
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
