"""Training speed: dsbs's trainer against a plain Seq2SeqTrainer with two forward passes.

    python benchmarks/train.py                       # nano, mini and T5-small; batches of 16 and 64
    python benchmarks/train.py --shapes nano --batches 64 --profile
    python benchmarks/train.py --terms               # response on a decoder, of SmolLM2's shapes
    python benchmarks/train.py --tiny                # does it run? its figures mean nothing

Both train the same rows, model and losses in one process. The plain loop works as the published
code does: each step pads a random batch of labels and of rationales to its longest row, runs the
model once on each, and averages the two losses. The rows are e-SNLI's with PaLM's rationales
(../shared/data). A run measures examples per second of whole optimizer steps after two steps of
warm-up: the plain loop before and after each of ours, and the ratio to the mean of the two. Printed
are the median and the range of all runs.

``--terms`` compares steps of a decoder-only student that learns a larger one's distributions with
plain steps and the teacher's forward pass, in turns on the same batches; and the peak memory of
each kind of step, in a process of its own.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads would take the cores of others

import argparse
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from dsbs import load_recipe
from dsbs.annotation.annotator import Annotator
from dsbs.annotation.backends import make_teacher
from dsbs.config import StudentSection, TrainSection
from dsbs.progress import NoProgress
from dsbs.students.tokenizer import learn_vocabulary
from dsbs.students.weights import new_model
from dsbs.tasks.data import stream
from dsbs.training.distillation import StepTotals
from dsbs.training.distillation.cached_logprobs import ModelOutputs, cache_logprobs
from dsbs.training.distillation.local_teachers import LocalTeacher, teacher_runners
from dsbs.training.distillation.objective import DistillationLoss
from dsbs.training.distillation.response import ResponseTerm
from dsbs.training.encode import Encoded, collate, pad
from dsbs.training.losses import summed_nll, weighted_loss
from dsbs.training.methods import STEP_BY_STEP
from dsbs.training.trainer import StepTrainer, patch_forward

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "esnli"
# Steps of a run, by shape and batch size.
STEPS = {
    "tiny": {16: 2, 64: 1},
    "nano": {16: 40, 64: 14},
    "mini": {16: 14, 64: 6},
    "t5-small": {16: 5, 64: 3},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1},
    "t5-small": {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 2048, "num_layers": 6},
}
WARM_UP = 2
# Layers, width, width of the feed-forward layers, attention heads and key-value heads, of a student
# and its teacher; and the vocabulary entries of both.
DECODERS = {
    "tiny": ((2, 32, 48, 4, 2), (3, 48, 64, 4, 2), 4000),
    "smollm2": ((30, 576, 1536, 9, 3), (32, 960, 2560, 15, 5), 49152),  # 135 and 360 million
}
STEP_KINDS = ("plain", "teacher", "response", "top_k")
SECTIONS = {
    "exact": TrainSection().resolved(is_scratch=True),
    "decoder": TrainSection(task_token="decoder").resolved(is_scratch=True),
}


def read_texts(count: int) -> Iterator[tuple[str, str, str]]:
    """Input, label and rationale of e-SNLI rows with PaLM's completions."""
    train = DATA / "valid.jsonl.gz"
    recipe = load_recipe(
        "recipes/esnli.yaml",
        ["teacher.kind=recorded", f"task.data.train={train}", f"task.limit={count}"],
    )
    task = Annotator(recipe).task
    teacher = make_teacher(recipe)
    for annotation in teacher.annotations(stream(recipe, task, "train"), "train"):
        if annotation.own_label and annotation.rationale:
            yield task.text(annotation.input), annotation.own_label, annotation.rationale


def tiny_texts(count: int) -> Iterator[tuple[str, str, str]]:
    """Made-up rows of different lengths."""
    words = ["a", "premise", "and", "its", "hypothesis", "say", "the", "same", "of", "two", "dogs"]
    generator = random.Random(0)
    for i in range(count):
        text = " ".join(generator.choices(words, k=5 + i % 9))
        yield text, ("yes", "no")[i % 2], f"It says {words[i % len(words)]}."


def encode(texts: Sequence[tuple[str, str, str]]) -> tuple[dict[str, list[Encoded]], Any]:
    """The rows, encoded for each task token, and their tokenizer."""
    vocabulary = [
        part
        for text, label, rationale in texts
        for part in ("predict: explain: " + text, label, rationale)
    ]
    tokenizer = learn_vocabulary(vocabulary, 4000)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    encoded: dict[str, list[Encoded]] = {}
    for kind, section in SECTIONS.items():
        label_view, rationale_view = STEP_BY_STEP.views(section)
        encoded[kind] = [
            {
                "label": [(ids(label_view.prefix + text), ids(label))],
                "rationale": [(ids(rationale_view.prefix + text), ids(rationale))],
            }
            for text, label, rationale in texts
        ]
    return encoded, tokenizer


def make_model(shape: str, tokenizer: Any) -> Any:
    if shape not in CONFIGS:
        return new_model(StudentSection(size=shape), tokenizer, 0)
    torch.manual_seed(0)
    config: dict[str, Any] = {"vocab_size": len(tokenizer), "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**config, **CONFIGS[shape]))


class PlainTrainer(Seq2SeqTrainer):
    """Two forward passes over padded batches, α = 0.5."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return 0.5 * model(**inputs["label"]).loss + 0.5 * model(**inputs["rationale"]).loss

    def floating_point_ops(self, _inputs: Any) -> int:
        return 0


def collate_padded(batch: list[Encoded]) -> dict[str, Any]:
    return {name: pad(packed, 0, 0) for name, packed in collate(batch).items()}


class Stopwatch(TrainerCallback):
    """Seconds from the end of the warm-up to the end."""

    began = 0.0
    ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.began = time.perf_counter()
        self.ended = time.perf_counter()


def measure(
    kind: str, shape: str, batch: int, data: dict[str, list[Encoded]], tokenizer: Any, folder: str
) -> float:
    """Examples per second of one training; ``kind`` is plain, exact or decoder."""
    steps = STEPS[shape][batch]
    stopwatch = Stopwatch()
    settings: dict[str, Any] = {
        "model": make_model(shape, tokenizer),
        "args": Seq2SeqTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=steps + WARM_UP,
            learning_rate=1e-4,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        ),
        "callbacks": [stopwatch],
    }
    trainer: Seq2SeqTrainer
    if kind == "plain":
        trainer = PlainTrainer(
            data_collator=collate_padded, train_dataset=data["exact"], **settings
        )
    else:
        section = SECTIONS[kind]
        trainer = StepTrainer(
            data_collator=collate,
            validate=dict,
            train_dataset=data[kind],
            views=STEP_BY_STEP.views(section),
            section=section,
            **settings,
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return steps * batch / (stopwatch.ended - stopwatch.began)


def compare_losses(data: list[Encoded], tokenizer: Any, shape: str) -> tuple[float, float]:
    """The two objectives on one batch, without dropout."""
    model = make_model(shape, tokenizer).eval()
    batch = collate(data[:16])
    losses = [float(model(**pad(packed, 0, 0)).loss.detach()) for packed in batch.values()]
    plain = sum(losses) / 2
    patch_forward(model, STEP_BY_STEP.views(SECTIONS["exact"]), without_padding=True)
    counts = {name: float(len(packed.target)) for name, packed in batch.items()}
    weights = {"label": 1.0, "rationale": 1.0}
    exact = float(weighted_loss(model(batch=batch), counts, weights).detach())
    return plain, exact


def profile(kind: str, data: list[Encoded], tokenizer: Any) -> str:
    """The time of a step's operations: nano, batch 64."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    model = make_model("nano", tokenizer).train()
    views = STEP_BY_STEP.views(SECTIONS["exact"])
    patch_forward(model, views, without_padding=kind == "exact")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with record(activities=[ProfilerActivity.CPU]) as recorded:
        for i in range(3):
            batch = collate(data[64 * i : 64 * i + 64])
            sums: dict[str, torch.Tensor] = {}
            if kind == "exact":
                sums = model(batch=batch)
            else:
                for name, packed in batch.items():
                    padded = pad(packed, 0, 0)
                    sums[name] = summed_nll(model(**padded).logits, padded["labels"])
            torch.stack(list(sums.values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    averages = recorded.key_averages()
    table = averages.table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=36)
    return str(table)


def decoder(shape: tuple[int, int, int, int, int], vocabulary: int) -> Any:
    torch.manual_seed(0)
    layers, width, inner, heads, key_value_heads = shape
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


class TermSteps:
    """Optimizer steps of a decoder-only student, of the ``kinds`` in STEP_KINDS."""

    def __init__(
        self, shape: str, rows: list[Encoded], batch: int, folder: str, kinds: Sequence[str]
    ) -> None:
        student_shape, teacher_shape, vocabulary = DECODERS[shape]
        section = SECTIONS["exact"]
        self.views = STEP_BY_STEP.views(section)
        self.model = decoder(student_shape, vocabulary).train()
        self.forward = self.model.forward
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.batches = [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]
        self.losses: dict[str, DistillationLoss] = {}
        if kinds == ("plain",):
            return
        frozen = decoder(teacher_shape, vocabulary).eval().requires_grad_(False)
        teacher = LocalTeacher("teacher", Path(folder), 1.0, "teacher", frozen)
        shared = (section, self.views, [teacher])
        term = ResponseTerm(kind="response", temperature=2.0)
        self.losses["response"] = DistillationLoss([term], *shared[:2], teachers=[teacher])
        (self.run_teacher,) = teacher_runners([teacher], self.views, section, "cpu")
        if "top_k" not in kinds:
            return
        term = term.model_copy(update={"top_k": 32})
        outputs = ModelOutputs("text", vocabulary)
        cached = cache_logprobs(
            [term], *shared, outputs, Path(folder), rows, batch, NoProgress(), "top_k"
        )
        self.losses["top_k"] = DistillationLoss(
            [term], *shared[:2], teachers=[teacher], cached=cached
        )
        if kinds == ("top_k",):  # as in training: the teacher is not needed any more
            teacher.release()
            del self.run_teacher, self.losses["response"], frozen

    def seconds(self, kind: str, number: int) -> float:
        """The time of one step on a batch, collation included."""
        rows = self.batches[number % len(self.batches)]
        began = time.perf_counter()
        if kind == "teacher":
            with torch.no_grad():
                self.run_teacher(collate(rows))
            return time.perf_counter() - began
        terms = self.losses.get(kind)
        self.model.forward = self.forward
        patch_forward(self.model, self.views, without_padding=True, terms=terms)
        batch = terms.collate(rows) if terms else collate(rows)
        counts = {name: float(len(packed.target)) for name, packed in batch.items()}
        weights = {"label": 1.0, "rationale": 1.0}
        step = {"step": StepTotals(counts | terms.counts(batch), weights)} if terms else {}
        losses = self.model(batch=batch, **step)
        loss = weighted_loss({name: losses[name] for name in batch}, counts, weights)
        if terms:
            loss = loss + losses["response"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def compare_terms(options: argparse.Namespace, rows: list[Encoded], folder: str) -> None:
    """Print ratios of steps in turns, and the peak memory of each kind, in its own process."""
    shape = "tiny" if options.tiny else "smollm2"
    batch = options.batch
    rows = rows[: 4 * batch]
    if options.peak:
        steps = TermSteps(shape, rows[:batch], batch, folder, (options.peak,))
        for _ in range(2):
            steps.seconds(options.peak, 0)
        print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
        return
    # First: on Linux a process's peak is at least that of its parent when it was started.
    command = [sys.executable, __file__, "--terms", "--batch", str(batch)]
    command += ["--tiny"] if options.tiny else []
    for kind in ("plain", "response", "top_k"):
        done = subprocess.run(
            [*command, "--peak", kind], stdout=subprocess.PIPE, text=True, check=True
        )
        print(f"peak memory, {kind}: {done.stdout.strip()}", flush=True)
    steps = TermSteps(shape, rows, batch, folder, STEP_KINDS)
    seconds: dict[str, list[float]] = {kind: [] for kind in STEP_KINDS}
    for number in range(-1, options.runs):
        for kind in STEP_KINDS if number % 2 else STEP_KINDS[::-1]:
            elapsed = steps.seconds(kind, max(0, number))
            if number >= 0:  # the first turn warms up
                seconds[kind].append(elapsed)
    del steps
    turns = list(zip(*(seconds[kind] for kind in STEP_KINDS), strict=True))
    response = [with_term / (plain + teacher) for plain, teacher, with_term, _ in turns]
    kept = [with_term / plain for plain, _, _, with_term in turns]
    cells = ", ".join(f"{kind} {statistics.median(seconds[kind]):.3f} s" for kind in STEP_KINDS)
    print(f"{shape}, batch {batch}: {cells}")
    print(f"response / (plain + teacher): {summary(response, 2)}")
    print(f"kept top-k / plain: {summary(kept, 2)}", flush=True)


def summary(values: Sequence[float], digits: int) -> str:
    """Median and range, e.g. ``2.28 (2.21–2.33)``."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = [shape for shape in STEPS if shape != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes)
    parser.add_argument("--batches", type=int, nargs="+", choices=[16, 64], default=[16, 64])
    parser.add_argument("--runs", type=int, default=5, help="of each figure (default: 5)")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on made-up rows")
    parser.add_argument("--terms", action="store_true", help="a response term on a decoder")
    parser.add_argument("--batch", type=int, default=8, help="of --terms (default: 8)")
    parser.add_argument("--peak", choices=STEP_KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.shapes = ["tiny"]
        texts = list(tiny_texts(80))
    elif DATA.is_dir():
        texts = list(read_texts(4000))
    else:
        sys.exit("the real data are not beside this checkout (../shared/data); try --tiny")
    data, tokenizer = encode(texts)
    if options.terms:
        with tempfile.TemporaryDirectory() as folder:
            compare_terms(options, data["exact"], folder)
        return
    plain_loss, exact_loss = compare_losses(data["exact"], tokenizer, options.shapes[0])
    print(f"{len(texts)} rows, {torch.get_num_threads()} threads, {options.runs} runs")
    print(f"loss of one batch: plain {plain_loss:.6f}, dsbs {exact_loss:.6f}")
    print("exact: the paper's objective and prefixes; decoder: train.task_token: decoder")
    print(
        f"{'shape':10}{'batch':>6}{'plain ex/s':>24}{'exact ratio':>22}{'decoder ratio':>22}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            for batch in options.batches:
                speeds: list[float] = []
                ratios: dict[str, list[float]] = {kind: [] for kind in SECTIONS}
                for _ in range(options.runs):
                    before = measure("plain", shape, batch, data, tokenizer, folder)
                    ours = {
                        kind: measure(kind, shape, batch, data, tokenizer, folder)
                        for kind in SECTIONS
                    }
                    after = measure("plain", shape, batch, data, tokenizer, folder)
                    speeds += [before, after]
                    for kind, speed in ours.items():
                        ratios[kind].append(speed / ((before + after) / 2))
                cells = [f"{summary(ratios[kind], 2):>22}" for kind in SECTIONS]
                print(f"{shape:10}{batch:6}{summary(speeds, 1):>24}{''.join(cells)}", flush=True)
    if options.profile:
        for kind in ("plain", "exact"):
            print(f"\n{kind}, nano, batch 64, three steps:")
            print(profile(kind, data["exact"], tokenizer))


if __name__ == "__main__":
    main()
