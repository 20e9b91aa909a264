"""End-to-end fine-tuning of body and head with SetFit, for benchmarks/students.py.

    python -m venv setfit && setfit/bin/pip install setfit
    setfit/bin/python benchmarks/peers/setfit_peer.py --model <folder> --rows rows.json --batch 32

Rows are a JSON list of [text, label]. One epoch over them is timed, tokenization included, and the
steps per second are printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", required=True)
parser.add_argument("--rows", type=Path, required=True)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402 - after the number of threads is set
from setfit import SetFitModel  # noqa: E402

torch.set_num_threads(args.threads)
rows = json.loads(args.rows.read_text(encoding="utf-8"))
labels = sorted({label for _, label in rows})
model = SetFitModel.from_pretrained(
    args.model,
    use_differentiable_head=True,
    head_params={"out_features": len(labels)},
    device="cpu",
)
model.unfreeze("body")
warm_up = rows[: 2 * args.batch]


def fit(chosen: list[list[str]]) -> float:
    """Seconds of one epoch."""
    began = time.perf_counter()
    model.fit(
        [text for text, _ in chosen],
        [labels.index(label) for _, label in chosen],
        num_epochs=1,
        batch_size=args.batch,
        body_learning_rate=1e-4,
        head_learning_rate=1e-3,
        end_to_end=True,
        show_progress_bar=False,
    )
    return time.perf_counter() - began


fit(warm_up)
elapsed = fit(rows)
print(json.dumps({"steps_per_s": -(-len(rows) // args.batch) / elapsed}))
