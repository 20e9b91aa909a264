"""A run folder as the stages leave it, with made-up outcomes: what the report is tested on without any model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import write_jsonl

from dsbs.config import Recipe
from dsbs.records.compression import Compressed, Measurement
from dsbs.records.results import (
    Bin,
    BreakEven,
    Comparison,
    LabelEfficiency,
    Latency,
    Measure,
    Results,
    SystemResult,
)
from dsbs.records.rows import Annotation, Prediction, TeacherName

LABELS = ("entailment", "neutral", "contradiction")
TEACHER_USD = 0.0004


def make_run(
    folder: Path,
    *,
    name: str = "made",
    rows: int = 60,
    subsets: tuple[float, ...] = (0.25, 0.5, 1.0),
    seeds: tuple[int, ...] = (0, 1),
    texts: dict[int, str] | None = None,
    prose: Callable[[], str] | None = None,
    size: str = "nano",
) -> Path:
    """Write a run with a teacher, fine-tuning, standard distillation and step-by-step. ``texts`` takes the place of the text
    (and the rationale) of the rows with those numbers, ``prose`` writes all others, each student's rationales as well.
    """
    draw = random.Random(name)
    recipe = Recipe.model_validate(
        {
            "name": name,
            "task": {"name": "esnli", "data": {"train": "train.jsonl", "test": "test.jsonl"}},
            "teacher": {"kind": "openai", "model": "a-teacher"},
            "student": {"init": "scratch", "size": size},
            "train": {"subset": subsets, "seeds": seeds},
        }
    )
    examples = []
    for number in range(rows):
        text = (texts or {}).get(number) or (prose and prose())
        fields = {
            "premise": text or f"A dog number {number} runs over a field.",
            "hypothesis": f"An animal moves ({number}).",
        }
        examples.append(
            (
                f"made-{number}",
                fields,
                LABELS[number % 3],
                text or f"A dog is an animal, so {number} it is.",
            )
        )
    parameters = {"nano": 1_900_000, "mini": 11_000_000, "small": 40_000_000}[size]
    systems = [_system("teacher", 0.85, rows, usd=TEACHER_USD)]
    skill = {"finetune-gold": 0.55, "distill-teacher": 0.52, "step-by-step-gold": 0.62}
    for subset in sorted(subsets, reverse=True):
        for system, best in skill.items():
            method, _, labels = system.rpartition("-")
            full = system if subset == 1.0 else f"{system}-n{subset:g}"
            accuracy = best - 0.08 * (1 / subset) ** 0.5 + 0.08
            student: dict[str, Any] = {
                "method": method,
                "labels": labels,
                "subset": subset,
                "training_rows": int(800 * subset),
            }
            student |= {"seeds": list(seeds), "parameters": parameters}
            systems.append(
                _system(
                    full,
                    accuracy,
                    rows,
                    baseline=None if method == "finetune" else subset,
                    student=student,
                )
            )
    needed = LabelEfficiency(
        method="step-by-step",
        labels="gold",
        system="finetune-gold",
        accuracy=0.55,
        rows=310,
        ci95=(240, None),
        smallest=200,
        largest=800,
    )
    results = Results(
        recipe=recipe.model_dump(mode="json"),
        data={"test": "b" * 64},
        run=str(folder), name=name, task="esnli", split="test", n=rows, baseline="finetune-gold", headline="step-by-step-gold",
        reportable=True, systems=systems, label_efficiency=[needed],
        break_even=[
            BreakEven(system="step-by-step-gold", spent_usd=0.32, teacher_usd_per_prediction=TEACHER_USD, predictions=800)
        ],
    )  # fmt: skip
    (folder / "annotate").mkdir(parents=True)
    (folder / "eval" / "predictions").mkdir(parents=True)
    _json(folder / "eval" / "results.json", results.as_json())
    shared = {
        "status": "done",
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-01T00:10:00+00:00",
    }
    shared |= {
        "recipe": recipe.model_dump(mode="json"),
        "versions": {"python": "3.11.7", "dsbs": "0.1.0"},
    }
    usage = {"prompt_tokens": 120 * rows, "cached_tokens": 0, "completion_tokens": 40 * rows}
    split = {
        "rows": rows, "accepted": rows - 2, "without_rationale": 0, "rejected": {"truncated": 2}, "label_accuracy": 0.85,
        "label_accuracy_ci95": [0.74, 0.92], "label_accuracy_accepted": 0.87, "hinted": {}, "requests": rows, "wasted": {},
        "cached": 0, "usage": usage, "usd": 0.32, "wall_s": 12.0,
    }  # fmt: skip
    prompt = {
        "instruction": "Say what follows.",
        "template": "{{ premise }}",
        "exemplars": [],
        "anchor": ["Answer:"],
    }
    _json(
        folder / "annotate" / "manifest.json",
        shared | {"data": {"train": "a" * 64}, "splits": {"train": split}, "prompt": prompt},
    )
    _json(folder / "eval" / "manifest.json", shared | {"data": {"test": "b" * 64}})
    teacher = TeacherName(kind="openai", model="a-teacher")
    annotated = [
        Annotation(
            id=id_, input=fields, gold=gold, label=gold, own_label=gold, rationale=why, provenance="own", accepted=True,
            teacher=teacher, usd=TEACHER_USD,
        ).model_dump(mode="json", by_alias=True)
        for id_, fields, gold, why in examples
    ]  # fmt: skip
    write_jsonl(folder / "annotate" / "test.jsonl", annotated)
    for system in systems:
        for seed in system.seeds or [None]:
            member = system.name if seed is None else f"{system.name}-s{seed}"
            explains = system.kind == "teacher" or system.method == "step-by-step"
            lines = []
            for id_, fields, gold, why in examples:
                right = draw.random() < system.accuracy
                said = gold if right else draw.choice([label for label in LABELS if label != gold])
                lines.append(
                    Prediction(
                        id=id_, input=fields, gold=gold, raw=said, prediction=said, correct=right, truncated=False,
                        probability=round(draw.uniform(0.34, 1), 3), made_by="made", latency_ms=None if seed is None else 0.5,
                        rationale=(prose() if prose and system.kind == "student" else why) if explains else None,
                    ).model_dump(mode="json", by_alias=True)
                )  # fmt: skip
            write_jsonl(folder / "eval" / "predictions" / f"{member}.jsonl", lines)
            if seed is not None:
                _student(
                    folder / "train" / member, system, seed, recipe.task.model_dump(mode="json")
                )
    _json(
        folder / "train" / "manifest.json",
        shared | {"data": {"train": "a" * 64, "valid": "c" * 64}},
    )
    return folder


def compress(
    run: Path,
    student: str,
    chain: tuple[str, ...],
    accuracy: float,
    megabytes: float,
    ms: float,
    **more: Any,
) -> None:
    """Write the record of a compressed student; the one that it began with has 63.2 % of 1,000 rows, 7.4 MB and 9 ms."""

    def standing(accuracy: float, megabytes: float, ms: float) -> Measurement:
        times = [
            Latency(batch_size=size, calls=50, p50_ms=size**0.5 * ms, p95_ms=12 * ms, device="cpu")
            for size in (1, 64)
        ]
        return Measurement(accuracy=accuracy, megabytes=megabytes, latency=times)

    made = Compressed(
        student=student, chain=chain, compressed=standing(accuracy, megabytes, ms), max_drop=0.02,
        accepted=0.632 - accuracy <= 0.02, seconds=3.0,
        **{"fingerprint": "f" * 64, "n": 1000, "original": standing(0.632, 7.4, 9.0), "agreement": 0.95} | more,
    )  # fmt: skip
    folder = run / "compress" / student / made.name
    _json(folder / "compress.json", made.model_dump(mode="json", by_alias=True))


def _system(
    name: str,
    accuracy: float,
    rows: int,
    *,
    usd: float | None = None,
    baseline: float | None = None,
    student: dict[str, Any] | None = None,
) -> SystemResult:
    versus = {}
    if baseline is not None:
        other = "finetune-gold" + ("" if baseline == 1.0 else f"-n{baseline:g}")
        versus[other] = Comparison(
            delta=0.07 if "step" in name else -0.03, ci95=(0.01, 0.13) if "step" in name else (-0.08, 0.02),
            p=0.012 if "step" in name else 0.2, p_holm=0.036 if "step" in name else 0.4, test="sign-flip permutation",
            wins=9, losses=4, minimum_detectable_effect=0.08,
        )  # fmt: skip
    low, high = max(0.0, accuracy - 0.08), min(1.0, accuracy + 0.08)
    timed = {} if student is None else {
        "megabytes": 7.4, "ms_per_example": 0.6, "train_s": 90.0,
        "latency": [
            Latency(batch_size=size, calls=50, p50_ms=p50, p95_ms=2 * p50, device="cpu") for size, p50 in ((1, 9.0), (64, 60.0))
        ],
    }  # fmt: skip
    return SystemResult(
        name=name, kind="teacher" if student is None else "student", accuracy=accuracy, ci95=(low, high),
        interval="wilson" if student is None else "bootstrap over rows", unreadable=0.01,
        accuracy_per_seed=[accuracy] * len((student or {"seeds": [0]})["seeds"]), usd_per_prediction=usd,
        metrics={
            "exact_match": Measure(value=accuracy, ci95=(low, high), n=rows),
            "macro_f1": Measure(value=accuracy - 0.01, ci95=(low, high), n=rows),
            "ece": Measure(value=0.12, n=rows),
        },
        recall={label: Measure(value=accuracy, ci95=(low, high), n=rows // 3) for label in LABELS},
        calibration=[
            Bin(low=x / 10, high=(x + 1) / 10, n=2 * x, confidence=x / 10 + 0.05, accuracy=accuracy * x / 9)
            for x in range(3, 10)
        ],
        versus=versus, **(student or {}), **timed,
    )  # fmt: skip


def _student(folder: Path, system: SystemResult, seed: int, task: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    student = {
        "name": folder.name, "method": system.method, "labels": system.labels, "seed": seed, "path": str(folder),
        "valid_accuracy": system.accuracy, "best_step": 40, "steps": 60, "examples_per_s": 100.0, "wall_s": 90.0,
        "parameters": system.parameters, "fingerprint": "f" * 64, "subset": system.subset, "tuned": {"learning_rate": 0.001},
        "cost": {"device": "cpu", "processes": 1, "wall_s": 90.0, "tokens": 100_000, "tokens_per_s": 1111.0,
                 "peak_memory_mb": 700.0, "peak_memory_of": "process"},
    }  # fmt: skip
    trials = [
        {
            "setting": {"learning_rate": rate},
            "valid_accuracy": 0.5,
            "selection": 0.5,
            "best_step": 40,
            "path": "trials/x",
        }
        for rate in (0.001, 0.003)
    ]
    _json(
        folder / "train.json",
        {"student": student, "trials": trials, "rows": system.training_rows, "valid_rows": 100},
    )
    explains = system.method == "step-by-step"
    prefixes = {"label": "predict: ", "rationale": "explain: "} if explains else {"label": ""}
    card = {
        "name": folder.name,
        "method": system.method,
        "labels": system.labels,
        "seed": seed,
        "task": task,
    }
    _json(
        folder / "student.json",
        card | {"prefixes": prefixes, "max_input_tokens": 1024, "max_target_tokens": 256},
    )
    lines: list[dict[str, Any]] = []
    for step in range(10, 61, 10):
        line: dict[str, Any] = {
            "step": step,
            "elapsed_s": step / 10,
            "loss": 5.0 / step,
            "grad_norm": 1.0,
        }
        line |= {"learning_rate": 0.001, "label_loss": 4.0 / step} | (
            {"rationale_loss": 6.0 / step} if explains else {}
        )
        lines.append(line)
        if not step % 20:
            line = {
                "step": step,
                "elapsed_s": step / 10,
                "eval_accuracy": system.accuracy - 1 / step,
            }
            lines.append(line | {"eval_label_loss": 4.5 / step})
    write_jsonl(folder / "metrics.jsonl", lines)


def _json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
