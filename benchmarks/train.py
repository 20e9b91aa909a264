"""Training speed: dsbs's trainer against a plain two-forward Seq2SeqTrainer: same rows, model and losses, paired in one run.

    python benchmarks/train.py                                   # nano, mini and T5-small shapes, batches of 16 and 64
    python benchmarks/train.py --shapes nano --batches 64 --profile

The plain loop is written as the published one works: each step pads a random batch of labels and of rationales to its longest
row, runs the model once on each, and averages the two losses. The rows are e-SNLI's with PaLM's rationales (../shared/data).
Each figure is examples a second of whole optimizer steps by the trainers themselves, after two steps of warm-up; the plain loop
runs before and after each of ours, and the ratio is against the mean of the two.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
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
from dsbs.students import learn_vocabulary, new_model
from dsbs.tasks.data import stream
from dsbs.training.encode import Encoded, collate, pad
from dsbs.training.losses import summed_nll
from dsbs.training.methods import method_of
from dsbs.training.trainer import StepTrainer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "esnli"
STEPS = {"nano": {16: 40, 64: 14}, "mini": {16: 14, 64: 6}, "t5-small": {16: 5, 64: 3}}
WARM_UP = 2
SECTIONS = {"dsbs": TrainSection(), "decoder": TrainSection(task_token="decoder")}


def rows(count: int) -> tuple[dict[str, list[Encoded]], Any]:
    """Encoded rows, as each way to tell the tasks reads them, and their tokenizer."""
    train = DATA / "valid.jsonl.gz"
    recipe = load_recipe(
        "recipes/esnli.yaml",
        ["teacher.kind=recorded", f"task.data.train={train}", f"task.limit={count}"],
    )
    work = Annotator(recipe)
    teacher = make_teacher(recipe)
    found = [
        (work.task.text(annotation.input), annotation.own_label, annotation.rationale)
        for annotation in teacher.annotations(stream(recipe, work.task, "train"), "train")
        if annotation.own_label and annotation.rationale
    ]
    texts = [
        part for text, label, why in found for part in ("predict: explain: " + text, label, why)
    ]
    tokenizer = learn_vocabulary(texts, 4000)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    encoded: dict[str, list[Encoded]] = {}
    for kind, section in SECTIONS.items():
        label_view, rationale_view = method_of("step-by-step").views(section)
        encoded[kind] = [
            {
                "label": [(ids(label_view.prefix + text), ids(label))],
                "rationale": [(ids(rationale_view.prefix + text), ids(why))],
            }
            for text, label, why in found
        ]
    return encoded, tokenizer


def model_of(shape: str, tokenizer: Any) -> Any:
    if shape != "t5-small":
        return new_model(StudentSection(size=shape), tokenizer, 0)
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=512,
            d_kv=64,
            num_heads=8,
            d_ff=2048,
            num_layers=6,
            decoder_start_token_id=0,
        )
    )


class PlainFormat(Seq2SeqTrainer):
    """Two forward passes over padded batches, α = 0.5."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return 0.5 * model(**inputs["label"]).loss + 0.5 * model(**inputs["rationale"]).loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


def padded(batch: list[Encoded]) -> dict[str, Any]:
    return {name: pad(flat, 0, 0) for name, flat in collate(batch).items()}


class Clock(TrainerCallback):
    """Seconds from the end of the warm-up to the end."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.began = time.perf_counter()
        self.ended = time.perf_counter()


def run(
    kind: str, shape: str, batch: int, data: dict[str, list[Encoded]], tokenizer: Any, folder: str
) -> float:
    """Examples a second."""
    steps = STEPS[shape][batch]
    arguments = Seq2SeqTrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch, max_steps=steps + WARM_UP, learning_rate=1e-4, report_to=[],
        save_strategy="no", logging_strategy="no", remove_unused_columns=False, disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    clock = Clock()
    how: dict[str, Any] = {
        "model": model_of(shape, tokenizer),
        "args": arguments,
        "callbacks": [clock],
    }
    if kind == "plain":
        trainer: Any = PlainFormat(data_collator=padded, train_dataset=data["dsbs"], **how)
    else:
        section = SECTIONS[kind]
        views = method_of("step-by-step").views(section)
        how |= {"train_dataset": data[kind], "views": views, "section": section}
        trainer = StepTrainer(data_collator=collate, validate=dict, **how)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return steps * batch / (clock.ended - clock.began)


def same_loss(data: list[Encoded], tokenizer: Any) -> tuple[float, float]:
    """The two objectives on one batch, without dropout."""
    from dsbs.training.losses import weighted_loss
    from dsbs.training.trainer import patch_forward

    model = model_of("nano", tokenizer).eval()
    batch = collate(data[:16])
    plain = sum(0.5 * float(model(**pad(flat, 0, 0)).loss.detach()) for flat in batch.values())
    patch_forward(model, method_of("step-by-step").views(SECTIONS["dsbs"]), without_padding=True)
    counts = {name: float(len(flat.target)) for name, flat in batch.items()}
    ours = float(
        weighted_loss(model(batch=batch), counts, {"label": 1.0, "rationale": 1.0}).detach()
    )
    return plain, ours


def profile(kind: str, data: list[Encoded], tokenizer: Any) -> str:
    """Where a step's time goes: nano, batch 64."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    from dsbs.training.trainer import patch_forward

    model = model_of("nano", tokenizer).train()
    patch_forward(
        model, method_of("step-by-step").views(SECTIONS["dsbs"]), without_padding=kind == "dsbs"
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with recording(activities=[ProfilerActivity.CPU]) as found:
        for i in range(3):
            batch = collate(data[64 * i : 64 * i + 64])
            if kind == "dsbs":
                sums = model(batch=batch)
            else:
                sums = {}
                for name, flat in batch.items():
                    one = pad(flat, 0, 0)
                    sums[name] = summed_nll(model(**one).logits, one["labels"])
            sum(sums.values()).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
    return str(
        found.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=36
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--batches", type=int, nargs="+", choices=[16, 64], default=[16, 64])
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if not DATA.is_dir():
        sys.exit("real data is not beside this checkout (../shared/data): nothing to measure on")
    data, tokenizer = rows(4000)
    plain, ours = same_loss(data["dsbs"], tokenizer)
    print(
        f"{len(data['dsbs'])} rows, {torch.get_num_threads()} threads; loss of one batch: plain {plain:.6f}, dsbs {ours:.6f}",
        flush=True,
    )
    print(
        "exact: the paper's objective and prefixes; decoder: train.task_token, another method (see the README)"
    )
    print(
        f"{'shape':10}{'batch':>6}{'plain ex/s':>18}{'exact':>8}{'ratio':>7}{'decoder':>9}{'ratio':>7}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            for batch in options.batches:
                before = run("plain", shape, batch, data, tokenizer, folder)
                mine, other = (
                    run(kind, shape, batch, data, tokenizer, folder) for kind in SECTIONS
                )
                after = run("plain", shape, batch, data, tokenizer, folder)
                peer = (before + after) / 2
                figures = f"{mine:8.1f}{mine / peer:7.2f}{other:9.1f}{other / peer:7.2f}"
                print(f"{shape:10}{batch:6}{f'{before:.1f}, {after:.1f}':>18}{figures}", flush=True)
    if options.profile:
        for kind in ("plain", "dsbs"):
            print(
                f"\n{kind}, nano, batch 64, three steps:\n{profile(kind, data['dsbs'], tokenizer)}"
            )


if __name__ == "__main__":
    main()
