"""Students with a label head: training and prediction against transformers and SetFit, on a CPU.

    python benchmarks/students.py                              # Banking77 (../shared/data), MiniLM
    python benchmarks/students.py --student runs/banking/train/finetune-gold-s0 --skip-training
    python benchmarks/students.py --setfit setfit/bin/python   # an environment with SetFit
    python benchmarks/students.py --tiny                       # does it run? figures mean nothing

Training: optimizer steps of whole batches of 32 random rows, which differ in length, after two
steps of warm-up. The plain trainer is transformers' Trainer with a sequence classifier and batches
padded to their longest row; it runs before and after each of ours, and the ratio is to the mean of
the two. SetFit fine-tunes body and head end to end (benchmarks/peers/setfit_peer.py). Step-by-step
trains label and rationale on e-SNLI's pairs with PaLM's rationales; it has no peer.

Prediction: rows of the test split in their order, one and 64 at a time, tokenization included. Each
round of an export is between two rounds of transformers in float32, which pads each batch to its
longest row. Agreement is the share of test rows with the same label. Without --student a student is
trained first. Printed are the median and the range of all runs. Targets: 1.3 times the steps of the
plain trainer; 3 and 2 times the rows of transformers at batch 1 and 64; 99% agreement.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads would take the cores of others

import argparse
import gzip
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--student", type=Path, help="a trained MiniLM student on Banking77")
parser.add_argument("--save", type=Path, help="where to keep the student that is trained")
parser.add_argument("--variants", nargs="+", default=["onnx-int8", "ct2-int8"])
parser.add_argument("--runs", type=int, default=5, help="of each figure (default: 5)")
parser.add_argument("--steps", type=int, default=30, help="of a timed training (default: 30)")
parser.add_argument("--train-steps", type=int, default=600, help="of the student that predicts")
parser.add_argument("--rows", type=int, default=1000, help="of the test split (default: 1000)")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--setfit", type=Path, help="the Python of an environment with SetFit")
parser.add_argument("--skip-training", action="store_true", help="measure prediction alone")
parser.add_argument("--tiny", action="store_true", help="two labels, made-up rows, few steps")
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read by torch, CTranslate2 and the ONNX backend

import torch  # noqa: E402 - after the number of threads is set
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from dsbs import Student, export  # noqa: E402
from dsbs.config import StudentSection, TaskSection, TrainSection  # noqa: E402
from dsbs.students.card import StudentCard  # noqa: E402
from dsbs.students.formats import PAIR_SEPARATOR, EncoderFormat  # noqa: E402
from dsbs.students.tokenizer import load_tokenizer  # noqa: E402
from dsbs.students.weights import expand_local, new_model  # noqa: E402
from dsbs.training.encode import collate  # noqa: E402
from dsbs.training.methods import views_of  # noqa: E402
from dsbs.training.trainer import StepTrainer  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
DATA = SHARED / "banking77"
MODEL = "minilm-l6"
BATCH = 32
WARM_UP = 2
MAX_TOKENS = 128
MAX_TARGET_TOKENS = 64
SECTION = TrainSection(learning_rate=1e-4, batch_size=BATCH, max_steps=1).resolved(is_scratch=False)
PEER = Path(__file__).parent / "peers" / "setfit_peer.py"
Rows = list[tuple[str, str]]  # texts with their labels


def read_rows(split: str) -> Rows:
    with gzip.open(DATA / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [(row["input"]["text"], row["label"]) for row in map(json.loads, file)]


def explained_rows() -> tuple[Rows, list[str]]:
    """e-SNLI's pairs with their labels, and the first line of PaLM's completion for each."""
    rows: Rows = []
    rationales = []
    with gzip.open(SHARED / "esnli" / "valid.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            pair = PAIR_SEPARATOR.join((row["input"]["premise"], row["input"]["hypothesis"]))
            rows.append((pair, row["label"]))
            rationales.append(row["teacher"]["completion"].partition("\n")[0])
    return rows, rationales


def tiny_rows(count: int) -> Rows:
    words = [
        "card",
        "money",
        "transfer",
        "balance",
        "lost",
        "pin",
        "fee",
        "cash",
        "machine",
        "abroad",
        "please",
        "when",
    ]
    chance = random.Random(0)
    rows = []
    for i in range(count):
        text = " ".join(chance.choices(words, k=2 + i % 12))
        rows.append((text, "card" if "card" in text else "other"))
    return rows


# --- training


class Stopwatch(TrainerCallback):
    """Seconds from the end of the warm-up to the end."""

    began = 0.0
    ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.began = time.perf_counter()
        self.ended = time.perf_counter()


def arguments(folder: str, steps: int) -> Any:
    return Seq2SeqTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-4,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )


class Data:
    """The rows, encoded once for both trainers. With ``rationales``, for step-by-step."""

    def __init__(self, train: Rows, test: Rows, rationales: Sequence[str] = ()) -> None:
        self.train = train
        self.test = test
        self.labels = sorted({label for _, label in train})
        self.tokenizer = load_tokenizer(MODEL)
        form = EncoderFormat(self.tokenizer)
        ids = form.read([text for text, _ in train], MAX_TOKENS)
        classes = [self.labels.index(label) for _, label in train]
        self.views = views_of("step-by-step" if rationales else "finetune", SECTION, "labels")
        self.ours = [{"label": [(row, [label])]} for row, label in zip(ids, classes, strict=True)]
        targets = form.write(rationales, MAX_TARGET_TOKENS)
        for encoded, row, target in zip(self.ours, ids, targets, strict=False):
            encoded["rationale"] = [(row, target)]
        self.plain = [
            {"input_ids": row, "labels": label} for row, label in zip(ids, classes, strict=True)
        ]

    def model(self) -> Any:
        section = StudentSection(model=MODEL, max_target_tokens=MAX_TARGET_TOKENS)
        explains = any(view.target == "rationale" for view in self.views)
        return new_model(section, self.tokenizer, 0, labels=len(self.labels), explains=explains)


def train_ours(data: Data, folder: str, steps: int) -> tuple[float, Any]:
    """Steps a second, and the trained model."""
    stopwatch = Stopwatch()
    model = data.model()
    trainer = StepTrainer(
        model=model,
        args=arguments(folder, steps + WARM_UP),
        train_dataset=data.ours,
        data_collator=collate,
        validate=dict,
        views=data.views,
        section=SECTION,
        callbacks=[stopwatch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return steps / (stopwatch.ended - stopwatch.began), model


def train_plain(data: Data, folder: str, steps: int) -> float:
    """Steps a second."""
    stopwatch = Stopwatch()
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            expand_local(MODEL), num_labels=len(data.labels)
        ),
        args=arguments(folder, steps + WARM_UP),
        train_dataset=data.plain,
        data_collator=DataCollatorWithPadding(data.tokenizer),
        callbacks=[stopwatch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return steps / (stopwatch.ended - stopwatch.began)


def train_setfit(data: Data, folder: str, steps: int) -> float:
    """Steps a second, by SetFit in its own environment."""
    rows = Path(folder) / "rows.json"
    chosen = random.Random(0).sample(data.train, min(len(data.train), BATCH * steps))
    rows.write_text(json.dumps(chosen), encoding="utf-8")
    command = [str(args.setfit), str(PEER), "--model", expand_local(MODEL), "--rows", str(rows)]
    done = subprocess.run(
        [*command, "--batch", str(BATCH), "--threads", str(args.threads)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1])["steps_per_s"])


def compare_training(data: Data, folder: str) -> None:
    plain: list[float] = []
    ours: list[float] = []
    setfit: list[float] = []
    ratios: list[float] = []
    setfit_ratios: list[float] = []
    for _ in range(args.runs):
        before = train_plain(data, folder, args.steps)
        speed = train_ours(data, folder, args.steps)[0]
        after = train_plain(data, folder, args.steps)
        ours.append(speed)
        plain += [before, after]
        ratios.append(speed / ((before + after) / 2))
        if args.setfit:
            setfit.append(train_setfit(data, folder, args.steps))
            setfit_ratios.append(speed / setfit[-1])
    lengths = sorted(len(row["label"][0][0]) for row in data.ours)
    print(
        f"training, batches of {BATCH}; tokens of a row: median {statistics.median(lengths):.0f}, "
        f"longest {lengths[-1]}"
    )
    print("| trainer | steps/s | dsbs is faster |")
    print("| --- | --- | --- |")
    print(f"| dsbs | {summary(ours)} | |")
    print(f"| transformers | {summary(plain)} | {summary(ratios)} |")
    if setfit:
        print(f"| SetFit | {summary(setfit)} | {summary(setfit_ratios)} |")


def measure_step_by_step(data: Data, folder: str) -> None:
    speeds = [train_ours(data, folder, args.steps)[0] for _ in range(args.runs)]
    tokens = [len(target) for row in data.ours for _, target in row["rationale"]]
    print(
        f"\nstep-by-step, batches of {BATCH}; tokens of a rationale: "
        f"median {statistics.median(tokens):.0f}: {summary(speeds)} steps/s"
    )


# --- prediction


def student_of(data: Data, folder: Path) -> Path:
    _, model = train_ours(data, str(folder), 4 if args.tiny else args.train_steps)
    section = {"name": "classification", "labels": data.labels, "data": {"train": "train.csv"}}
    card = StudentCard(
        name="minilm",
        method="finetune",
        labels="gold",
        seed=0,
        task=TaskSection.model_validate(section),
        prefixes={"label": ""},
        max_input_tokens=MAX_TOKENS,
        max_target_tokens=8,
        kind="encoder",
        head="labels",
        classes=tuple(data.labels),
    )
    folder.mkdir(parents=True, exist_ok=True)
    Student.of(model, data.tokenizer, card).save(folder)
    return folder


def plain_predictor(student: Student) -> Callable[[Sequence[str]], list[str]]:
    """Tokenize, pad, run: what a user of transformers writes."""
    model = student.backend.model.eval()
    tokenizer = student.backend.tokenizer
    classes = student.card.classes

    def predict(texts: Sequence[str]) -> list[str]:
        batch = tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        with torch.inference_mode():
            logits = model(batch["input_ids"], batch["attention_mask"])
        return [classes[index] for index in logits.argmax(-1).tolist()]

    return predict


def compare_prediction(data: Data, folder: Path) -> None:
    source = args.student or student_of(data, args.save or folder / "student")
    student = Student.load(source)
    texts = [text for text, _ in data.test[: args.rows]]
    gold = [label for _, label in data.test[: args.rows]]
    theirs = plain_predictor(student)
    batches = {
        1: [[text] for text in texts[:200]],
        64: [texts[first : first + 64] for first in range(0, len(texts), 64)],
    }
    expected = [label for batch in batches[64] for label in theirs(batch)]
    accuracy = statistics.mean(map(str.__eq__, expected, gold))
    print(f"\nprediction: {len(texts)} test rows, of which transformers has {accuracy:.1%} right")
    print("| variant | MB | agreement | rows/s at 1 (theirs) | faster | rows/s at 64 | faster |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for variant in args.variants:
        form, _, quantize = variant.partition("-")
        exported = export(
            source, form, quantize=quantize or "float32", out=folder / variant, examples=texts[:48]
        )
        backend = Student.load(exported.path).backend

        def ours(batch: Sequence[str], backend: Any = backend) -> list[str]:
            return [output.text for output in backend.generate(batch, 1)]

        labels = [label for batch in batches[64] for label in ours(batch)]
        agreed = statistics.mean(map(str.__eq__, expected, labels))
        cells = []
        for calls in batches.values():
            seconds(theirs, calls[:4])
            seconds(ours, calls[:4])
            their_times = [seconds(theirs, calls)]
            our_times: list[float] = []
            ratios: list[float] = []
            for _ in range(args.runs):
                our_times.append(seconds(ours, calls))
                their_times.append(seconds(theirs, calls))
                ratios.append((their_times[-2] + their_times[-1]) / 2 / our_times[-1])
            rows = sum(map(len, calls))
            speed = rows / statistics.median(our_times)
            their_speed = rows / statistics.median(their_times)
            cells += [f"{speed:.0f} ({their_speed:.0f})", summary(ratios)]
        print(
            f"| {variant} | {exported.megabytes:.1f} of {exported.student_megabytes:.1f} "
            f"| {agreed:.1%} | {' | '.join(cells)} |",
            flush=True,
        )


def seconds(predict: Callable[[Sequence[str]], list[str]], calls: Sequence[Sequence[str]]) -> float:
    began = time.perf_counter()
    for batch in calls:
        predict(batch)
    return time.perf_counter() - began


def summary(values: Sequence[float]) -> str:
    """Median and range, e.g. ``2.28 (2.21–2.33)``."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    if args.tiny:
        args.steps = 2
        data = Data(tiny_rows(96), tiny_rows(80))
        explained = Data(tiny_rows(96), [], [text for text, _ in tiny_rows(96)])
    elif DATA.is_dir():
        data = Data(read_rows("train"), read_rows("test"))
        rows, rationales = explained_rows()
        explained = Data(rows, [], rationales)
    else:
        sys.exit("the real data are not beside this checkout (../shared/data); try --tiny")
    torch.set_num_threads(args.threads)
    print(f"{MODEL}, {len(data.labels)} labels, {args.threads} threads, {args.runs} runs")
    with tempfile.TemporaryDirectory() as folder:
        if not args.skip_training:
            compare_training(data, folder)
            measure_step_by_step(explained, folder)
        compare_prediction(data, Path(folder))


if __name__ == "__main__":
    main()
