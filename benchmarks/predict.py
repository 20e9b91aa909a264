"""Speed of exports compared with transformers: labels by greedy decoding on the CPU.

    python benchmarks/predict.py --student runs/esnli/train/step-by-step-gold-s0
    python benchmarks/predict.py --random t5-small --variants ct2-int8 ct2 --rows 200

All variants run in one process on the same rows with the same number of threads. Agreement is the
share of equal texts on rows of e-SNLI's test split (../shared/data). A call includes tokenization.
Each round of a variant is between two rounds of transformers; a ratio is the mean of those two over
the variant's. The median of the rounds is printed. A call has one row at batch 1, and 64 rows of
similar length at batch 64. Target for ct2 int8: 98% agreement, 3 times faster at both batch sizes,
3.5 times smaller.
"""

from __future__ import annotations

import argparse
import operator
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--student", type=Path, help="the folder of a trained student on e-SNLI")
parser.add_argument(
    "--random",
    choices=["t5-small"],
    help="random weights of this shape instead of a student: sizes and times only",
)
parser.add_argument(
    "--variants", nargs="+", default=["ct2-int8", "ct2", "onnx", "onnx-int8", "torch-int8"]
)
parser.add_argument("--rows", type=int, default=1000)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--tokens", type=int, default=8, help="maximum of a label (default: 8)")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument(
    "--clock",
    choices=["wall", "cpu"],
    default="wall",
    help="cpu: CPU time of all threads, for a machine that others use",
)
args = parser.parse_args()
# Read by torch, CTranslate2 and the ONNX backend.
os.environ["OMP_NUM_THREADS"] = str(args.threads)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402 - after the number of threads is set

from dsbs import Student, export, load_recipe  # noqa: E402
from dsbs.students.backends import Backend  # noqa: E402
from dsbs.students.card import StudentCard  # noqa: E402
from dsbs.students.tokenizer import learn_vocabulary  # noqa: E402
from dsbs.tasks import make_task  # noqa: E402
from dsbs.tasks.data import stream  # noqa: E402

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "esnli"
CALLS = 60  # at batch 1, in a round
T5_SMALL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "num_heads": 8,
    "d_ff": 2048,
    "num_layers": 6,
    "decoder_start_token_id": 0,
    "initializer_factor": 0.5,
}


def texts_of_test(count: int) -> list[str]:
    files = [
        f"task.data.{split}={DATA / name}"
        for split, name in (("train", "valid.jsonl.gz"), ("test", "test.jsonl.gz"))
    ]
    recipe = load_recipe("recipes/esnli.yaml", ["teacher.kind=recorded", *files])
    task = make_task(recipe.task)
    return [task.text(row.input) for row in islice(stream(recipe, task, "test"), count)]


def random_student(folder: Path, texts: Sequence[str]) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    recipe = load_recipe("recipes/esnli.yaml", ["teacher.kind=recorded"])
    tokenizer = learn_vocabulary(texts, 4000)
    torch.manual_seed(0)
    config = T5Config(**T5_SMALL)
    card = StudentCard(
        name="random-t5-small",
        method="finetune",
        labels="gold",
        seed=0,
        task=recipe.task,
        prefixes={"label": ""},
        max_input_tokens=128,
        max_target_tokens=64,
    )
    folder.mkdir()
    Student.of(T5ForConditionalGeneration(config), tokenizer, card).save(folder)
    return folder


def milliseconds(backend: Backend, batches: Sequence[Sequence[str]]) -> float:
    """Mean time of a call over the batches."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    began = clock()
    for batch in batches:
        backend.generate(batch, args.tokens)
    return 1000 * (clock() - began) / len(batches)


def decode(backend: Backend, batches: Sequence[Sequence[str]]) -> list[str]:
    return [output.text for batch in batches for output in backend.generate(batch, args.tokens)]


def main() -> None:
    if args.student is None and args.random is None:
        sys.exit(
            "nothing to measure: pass a trained student with --student FOLDER, or --random t5-small"
        )
    if not DATA.is_dir():
        sys.exit(f"nothing to measure: e-SNLI is not in {DATA}")
    torch.set_num_threads(args.threads)
    texts = texts_of_test(args.rows)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.student or random_student(Path(temporary) / "student", texts)
        reference = Student.load(folder)
        prefix = next(iter(reference.card.prefixes.values()))
        texts = sorted((prefix + text for text in texts), key=lambda text: -len(text))
        wide = [texts[first : first + 64] for first in range(0, len(texts), 64)]
        step = max(1, len(texts) // CALLS)
        single = [[text] for text in texts[::step][:CALLS]]
        few = wide[:: max(1, len(wide) // 6)][:6]
        expected = decode(reference.backend, wide)
        print(
            f"{reference.card.name}: {len(texts)} rows, at most {args.tokens} tokens, "
            f"{args.threads} thread(s)"
        )
        times = [
            heading
            for size in (1, 64)
            for heading in (f"{args.clock} ms at {size} (theirs)", f"faster at {size}")
        ]
        print(f"| variant | MB | smaller | agreement | {' | '.join(times)} |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for variant in args.variants:
            form, _, quantize = variant.partition("-")
            done = export(
                folder,
                form,
                quantize=quantize or "float32",
                out=Path(temporary) / variant,
                examples=[text.removeprefix(prefix) for text in texts[:8]],
            )
            backend = Student.load(done.path).backend
            outputs = decode(backend, wide)
            agreed = sum(map(operator.eq, expected, outputs)) / len(expected)
            cells = []
            for batches in (single, few):
                for warmed in (reference.backend, backend):
                    milliseconds(warmed, batches[:3])  # the first calls pay for start-up
                theirs = [milliseconds(reference.backend, batches)]
                ours: list[float] = []
                ratios: list[float] = []
                for _ in range(args.rounds):
                    ours.append(milliseconds(backend, batches))
                    theirs.append(milliseconds(reference.backend, batches))
                    ratios.append((theirs[-2] + theirs[-1]) / 2 / ours[-1])
                cells += [
                    f"{statistics.median(ours):.2f} ({statistics.median(theirs):.2f})",
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
                ]
            print(
                f"| {variant} | {done.megabytes:.2f} of {done.student_megabytes:.2f} "
                f"| {done.times_smaller:.2f} | "
                f"{100 * agreed:.1f}% | {' | '.join(cells)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
