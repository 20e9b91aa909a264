"""Peak memory of training a T5-base shape: batch 8 x accumulation 8, with and without gradient checkpointing.

    python benchmarks/memory.py                          # google/t5-v1_1-base's shape, AdamW, float32
    python benchmarks/memory.py --shape t5-base --optimizer adafactor

Random weights of the real shapes, dsbs's own trainer, e-SNLI's longest rows with PaLM's rationales (../shared/data), a process
for each line. Two steps: the first, on rows of one token, makes the optimizer's state, so that the second has all in memory at
once that a long training has. On a CPU the figure is the process's resident set at most, on a GPU what PyTorch held at most.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "esnli"
MICRO, ACCUMULATED = 8, 8
COMMON = {
    "d_model": 768,
    "d_kv": 64,
    "num_heads": 12,
    "num_layers": 12,
    "vocab_size": 32128,
    "decoder_start_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "t5-v1_1-base": COMMON
    | {"d_ff": 2048, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5-base": COMMON | {"d_ff": 3072},
}


def measure(shape: str, optimizer: str, *, checkpointing: bool, padding: str) -> None:
    """Train two steps and print what they took, in this process."""
    import torch
    from train import rows
    from transformers import (
        PrinterCallback,
        Seq2SeqTrainingArguments,
        T5Config,
        T5ForConditionalGeneration,
    )

    from dsbs.config import TrainSection
    from dsbs.training.callbacks import peak_memory
    from dsbs.training.encode import Encoded, collate
    from dsbs.training.methods import method_of
    from dsbs.training.trainer import StepTrainer

    def tokens(row: Encoded) -> int:
        return sum(len(source) + len(target) for pairs in row.values() for source, target in pairs)

    batch = MICRO * ACCUMULATED
    data, _ = rows(2000)
    longest = sorted(data["dsbs"], key=tokens)[-batch:]
    short: list[Encoded] = [{"label": [([3], [1])], "rationale": [([3], [1])]}] * batch
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SHAPES[shape]))
    if checkpointing:
        model.activation_checkpointing_enable()
    section = TrainSection(padding=padding, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        trainer = StepTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(
                output_dir=folder, per_device_train_batch_size=MICRO, gradient_accumulation_steps=ACCUMULATED, max_steps=2,
                optim="adafactor" if optimizer == "adafactor" else "adamw_torch_fused", save_strategy="no", report_to=[],
                logging_strategy="no", remove_unused_columns=False, disable_tqdm=True, train_sampling_strategy="sequential",
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=short + longest, data_collator=collate, validate=dict, section=section,
            views=method_of("step-by-step").views(section),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trainer.train()
    peak, of = peak_memory()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    means = sum(map(tokens, longest)) / batch
    print(
        f"{shape:14}{optimizer:11}{padding:>8}{'yes' if checkpointing else 'no':>15}{weights:12,.0f}{peak:10,.0f}"
        f"{time.perf_counter() - began:9.0f}   ({of}; {means:.0f} tokens a row)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="t5-v1_1-base")
    parser.add_argument("--optimizer", choices=["adamw", "adafactor"], default="adamw")
    parser.add_argument("--padding", choices=["none", "batch"], default="none")
    parser.add_argument(
        "--one",
        choices=["yes", "no"],
        help="only with, or only without checkpointing, in this process",
    )
    options = parser.parse_args()
    if not DATA.is_dir():
        sys.exit("real data is not beside this checkout (../shared/data): nothing to measure on")
    if options.one:
        measure(
            options.shape,
            options.optimizer,
            checkpointing=options.one == "yes",
            padding=options.padding,
        )
        return
    print(f"batch {MICRO} x accumulation {ACCUMULATED}")
    print(
        f"{'shape':14}{'optimizer':11}{'padding':>8}{'checkpointing':>15}{'weights MB':>12}{'peak MB':>10}{'s':>9}",
        flush=True,
    )
    for checkpointing in ("yes", "no"):
        subprocess.run([sys.executable, *sys.argv, "--one", checkpointing], check=True)


if __name__ == "__main__":
    main()
