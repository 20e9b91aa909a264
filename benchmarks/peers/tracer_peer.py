"""TRACER (tracer-llm on PyPI) on the rows and splits of benchmarks/cascade.py --export.

    pip install tracer-llm                     # in an environment of its own
    python benchmarks/peers/tracer_peer.py FOLDER --splits 5 > tracer.jsonl

It learns its own students on sentence embeddings, from the train rows and the calibration rows of
a split, and is tested on the split's test rows. Its target is the agreement on the rows that its
student answers, at a confidence of 90%. Prints a line for each split and target.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from tracer.api import fit
from tracer.config import FitConfig
from tracer.fit.pipeline import route_pipeline
from tracer.policy.artifacts import load_pipeline

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--splits", type=int, default=20)
parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.95, 0.98])
parser.add_argument("--skip", nargs="*", default=["gbt"], help="slow candidates to leave out")
args = parser.parse_args()

rows = json.loads((args.folder / "rows.json").read_text(encoding="utf-8"))
embeddings = np.load(args.folder / "embeddings.npy")
splits = json.loads((args.folder / "splits.json").read_text(encoding="utf-8"))
num_train = min(min(part) for part in splits[0])

for calibration, test in splits[: args.splits]:
    known = [*range(num_train), *calibration]
    for target in args.targets:
        with tempfile.TemporaryDirectory() as folder:
            traces = Path(folder) / "traces.jsonl"
            lines = [json.dumps(rows[i]) for i in known]
            traces.write_text("\n".join(lines) + "\n", encoding="utf-8")
            config = FitConfig(
                target_teacher_agreement=target,
                frontier_targets=(target,),
                skip_candidates=tuple(args.skip),
                verbose=False,
            )
            fitted = fit(traces, folder, embeddings=embeddings[known], config=config)
            handled = np.zeros(len(test), dtype=bool)
            agrees = np.zeros(len(test), dtype=bool)
            if fitted.manifest.selected_method is not None:
                bundle = load_pipeline(Path(folder))
                labels = bundle["label_space"]
                stages = bundle["pipeline"]["stages"]
                predicted, handled, _ = route_pipeline(stages, embeddings[test])
                answers = [labels[i] if i >= 0 else None for i in predicted]
                agrees = np.array(
                    [answer == rows[i]["teacher"] for answer, i in zip(answers, test, strict=True)]
                )
        line = {
            "method": "TRACER",
            "target": target,
            "coverage": float(handled.mean()),
            "n": len(test),
            "agreement": float((~handled | agrees).mean()),
            "answered_agreement": float(agrees[handled].mean()) if handled.any() else None,
        }
        print(json.dumps(line), flush=True)
