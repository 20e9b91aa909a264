"""Peak memory of training a T5-base: batch 8 x accumulation 8, gradient checkpointing on and off.

    python benchmarks/memory.py              # google/t5-v1_1-base's shape, AdamW, float32
    python benchmarks/memory.py --shape t5-base --optimizer adafactor
    python benchmarks/memory.py --tiny       # does it run? its figures mean nothing

Random weights of the real shapes, dsbs's trainer, e-SNLI's longest rows with PaLM's rationales
(../shared/data), and a process for each run. Two steps: the first, on rows of one token, creates
the optimizer's state, so that the second has in memory all that a long training has. On a CPU the
figure is the process's peak resident set, on a GPU PyTorch's peak. Printed are the median and the
range of all runs.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads would take the cores of others

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

MICRO_BATCH = 8
ACCUMULATION = 8
T5_BASE: dict[str, Any] = {
    "d_model": 768,
    "d_kv": 64,
    "num_heads": 12,
    "num_layers": 12,
    "vocab_size": 32128,
    "decoder_start_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "t5-v1_1-base": T5_BASE
    | {"d_ff": 2048, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5-base": T5_BASE | {"d_ff": 3072},
    "tiny": {"d_model": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "d_ff": 32}
    | {"vocab_size": 4000, "decoder_start_token_id": 0},
}


def measure(shape: str, optimizer: str, *, checkpointing: bool, padding: str) -> dict[str, Any]:
    """Train two steps in this process and return what they took."""
    import torch
    from train import encode, read_texts, tiny_texts
    from transformers import (
        PrinterCallback,
        Seq2SeqTrainingArguments,
        T5Config,
        T5ForConditionalGeneration,
    )

    from dsbs.config import TrainSection
    from dsbs.training.callbacks import peak_memory
    from dsbs.training.encode import Encoded, collate
    from dsbs.training.methods import STEP_BY_STEP
    from dsbs.training.trainer import StepTrainer

    def count_tokens(row: Encoded) -> int:
        return sum(len(source) + len(target) for pairs in row.values() for source, target in pairs)

    batch = MICRO_BATCH * ACCUMULATION
    texts = tiny_texts(80) if shape == "tiny" else read_texts(2000)
    data, _ = encode(list(texts))
    longest = sorted(data["exact"], key=count_tokens)[-batch:]
    shortest: list[Encoded] = [{"label": [([3], [1])], "rationale": [([3], [1])]}] * batch
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SHAPES[shape]))
    if checkpointing:
        model.activation_checkpointing_enable()
    section = TrainSection.model_validate(
        {"padding": padding, "gradient_checkpointing": checkpointing}
    ).resolved(is_scratch=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = StepTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=MICRO_BATCH,
                gradient_accumulation_steps=ACCUMULATION,
                max_steps=2,
                optim="adafactor" if optimizer == "adafactor" else "adamw_torch_fused",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                remove_unused_columns=False,
                disable_tqdm=True,
                train_sampling_strategy="sequential",
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=shortest + longest,
            data_collator=collate,
            validate=dict,
            section=section,
            views=STEP_BY_STEP.views(section),
        )
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trainer.train()
    peak_mb, peak_of = peak_memory()
    return {
        "weights_mb": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
        "peak_mb": peak_mb,
        "peak_of": peak_of,
        "seconds": time.perf_counter() - began,
        "tokens_per_row": sum(map(count_tokens, longest)) / batch,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = [shape for shape in SHAPES if shape != "tiny"]
    parser.add_argument("--shape", choices=shapes, default="t5-v1_1-base")
    parser.add_argument("--optimizer", choices=["adamw", "adafactor"], default="adamw")
    parser.add_argument("--padding", choices=["none", "batch"], default="none")
    parser.add_argument("--runs", type=int, default=3, help="of each figure (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on made-up rows")
    parser.add_argument(
        "--measure",
        choices=["yes", "no"],
        help="one run in this process, with or without checkpointing; prints JSON",
    )
    options = parser.parse_args()
    shape = "tiny" if options.tiny else options.shape
    if options.measure:
        checkpointing = options.measure == "yes"
        result = measure(
            shape, options.optimizer, checkpointing=checkpointing, padding=options.padding
        )
        print(json.dumps(result))
        return
    from train import DATA, summary

    if not (options.tiny or DATA.is_dir()):
        sys.exit("the real data are not beside this checkout (../shared/data); try --tiny")
    print(f"batch {MICRO_BATCH} x accumulation {ACCUMULATION}, {options.runs} runs")
    print(
        f"{'shape':14}{'optimizer':11}{'padding':>8}{'checkpointing':>15}{'weights MB':>12}"
        f"{'peak MB':>24}{'s':>20}",
        flush=True,
    )
    for checkpointing in ("yes", "no"):
        command = [sys.executable, *sys.argv, "--measure", checkpointing]
        results: list[dict[str, Any]] = []
        for _ in range(options.runs):
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
        peaks = summary([result["peak_mb"] for result in results], 0)
        seconds = summary([result["seconds"] for result in results], 1)
        last = results[-1]
        print(
            f"{shape:14}{options.optimizer:11}{options.padding:>8}{checkpointing:>15}"
            f"{last['weights_mb']:12,.0f}{peaks:>24}{seconds:>20}"
            f"   ({last['peak_of']}; {last['tokens_per_row']:.0f} tokens a row)",
            flush=True,
        )


if __name__ == "__main__":
    main()
