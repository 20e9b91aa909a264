"""Size and latency after each step of `dsbs compress`, relative to the original student.

    python benchmarks/compress.py                      # nano, mini and t5-small's shape
    python benchmarks/compress.py --sizes mini --calls 20

Random weights: a shape decides size and speed, what was learned does not. Each smaller model takes
turns with its original on the same texts, about as long as e-SNLI's; each call decodes eight
tokens. Figures are shares of the original's: 0.50 is half. Times: median and range of the calls.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads would take the cores of others

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsbs.compression import attentions, feed_forwards
from dsbs.compression.layers import evenly_spaced, keep_layers
from dsbs.compression.low_rank import LowRankStep, factorize
from dsbs.compression.pruning import keep_heads, keep_units
from dsbs.records.results import BATCH_SIZES
from dsbs.students.weights import SIZES, weights_megabytes

VOCABULARY = {"nano": 4000, "mini": 4000, "t5-small": 32128}
SHAPES: dict[str, dict[str, Any]] = {name: SIZES[name] for name in ("nano", "mini")} | {
    "t5-small": {
        "d_model": 512,
        "d_kv": 64,
        "num_heads": 8,
        "d_ff": 2048,
        "num_layers": 6,
        "num_decoder_layers": 6,
    }
}
TOKENS, WRITTEN = 32, 8


def heads(model: Any) -> Any:
    import torch

    return keep_heads(
        model, {name: torch.arange(model.config.num_heads // 2) for name, _ in attentions(model)}
    )


def units(model: Any) -> Any:
    import torch

    return keep_units(
        model, {name: torch.arange(model.config.d_ff // 2) for name, _ in feed_forwards(model)}
    )


def layers(model: Any) -> Any:
    totals = {"encoder": model.config.num_layers, "decoder": model.config.num_decoder_layers}
    kept = {stack: evenly_spaced(total, total - total // 2) for stack, total in totals.items()}
    return keep_layers(model, kept)


def low_rank(model: Any) -> Any:
    factorized = factorize(model, LowRankStep("0.25"))
    assert factorized is not None
    return factorized


STEPS: dict[str, Callable[[Any], Any]] = {
    "prune-heads=0.5": heads,
    "prune-ff=0.5": units,
    "drop-layers=0.5": layers,
    "low-rank=0.25": low_rank,
    "drop-layers=0.5+prune-ff=0.5": lambda model: units(layers(model)),
}


def call(model: Any, ids: Any) -> float:
    import torch

    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=WRITTEN,
            max_new_tokens=WRITTEN,
        )
    return 1000 * (time.perf_counter() - began)


def size(model: Any) -> float:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return weights_megabytes(Path(folder))


def main() -> None:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration
    from transformers.utils import logging

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--calls", type=int, default=10)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    for name in arguments.sizes:
        torch.manual_seed(0)
        settings: dict[str, Any] = {"vocab_size": VOCABULARY[name], "decoder_start_token_id": 0}
        config = T5Config(**SHAPES[name], **settings)
        model = T5ForConditionalGeneration(config).eval()
        print(f"{name}: {size(model):.1f} MB", flush=True)
        for step, make in STEPS.items():
            smaller = make(model)
            line = f"  {step}: {size(smaller) / size(model):.2f} of the file"
            for rows in BATCH_SIZES:
                ids = torch.tensor(
                    [
                        [random.randrange(3, VOCABULARY[name]) for _ in range(TOKENS)]
                        for _ in range(rows)
                    ]
                )
                pairs = [
                    (call(model, ids), call(smaller, ids)) for _ in range(arguments.calls + 1)
                ][1:]
                ratios = [ours / original for original, ours in pairs]
                line += (
                    f", {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) "
                    f"of the time at batch {rows}"
                )
            print(line, flush=True)


if __name__ == "__main__":
    main()
