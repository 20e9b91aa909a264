"""A sample run folder with invented results, so that reports are tested without any model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import write_jsonl

from dsbs.config import Recipe
from dsbs.records import Annotation, Prediction, TeacherName
from dsbs.records.measures import Measure
from dsbs.records.results import (
    Bin,
    BreakEven,
    Comparison,
    Compressed,
    LabelEfficiency,
    Latency,
    Measurement,
    Results,
    SystemResult,
)
from dsbs.reporting.runs import EvaluatedRun, load_run

LABELS = ("entailment", "neutral", "contradiction")
TEACHER_USD = 0.0004
TRAINING_ROWS = 800
ACCURACIES = {"finetune-gold": 0.55, "distill-teacher": 0.52, "step-by-step-gold": 0.62}
PARAMETERS = {"nano": 1_900_000, "mini": 11_000_000, "small": 40_000_000}
STAGE = {
    "status": "done",
    "started": "2026-01-01T00:00:00+00:00",
    "ended": "2026-01-01T00:10:00+00:00",
    "versions": {"python": "3.11.7", "dsbs": "0.1.0"},
}


def make_run(
    folder: Path,
    *,
    name: str = "sample",
    rows: int = 60,
    subsets: tuple[float, ...] = (0.25, 0.5, 1.0),
    seeds: tuple[int, ...] = (0, 1),
    texts: dict[int, str] | None = None,
    prose: Callable[[], str] | None = None,
    size: str = "nano",
    students: dict[str, str] | None = None,
) -> Path:
    """Write a run with a teacher, fine-tuning, standard distillation and step-by-step.

    ``texts`` replaces the text and the rationale of the rows with those numbers, ``prose`` writes
    all others and each student's rationales. ``students`` are the sizes of several students by
    name; the first is as accurate as a single one, and each later one 8 points less.
    """
    draw = random.Random(name)
    recipe = Recipe.model_validate(
        {
            "name": name,
            "task": {"name": "esnli", "data": {"train": "train.jsonl", "test": "test.jsonl"}},
            "teacher": {"kind": "openai", "model": "a-teacher"},
            "student": _student_sections(size, students),
            "train": {"subset": subsets, "seeds": seeds},
        }
    )
    examples = [_example(number, texts or {}, prose) for number in range(rows)]
    systems = [_system("teacher", 0.85, rows, usd=TEACHER_USD)]
    for student, its_size in (students or {"": size}).items():
        for subset in sorted(subsets, reverse=True):
            systems += [
                _student_system(system, subset, seeds, rows, PARAMETERS[its_size])
                for system in ACCURACIES
            ]
        if students:
            systems = [_named(system, student, students) for system in systems]
    prefix = f"{next(iter(students))}-" if students else ""
    results = Results(
        recipe=recipe.model_dump(mode="json"),
        data={"test": "b" * 64},
        run=str(folder),
        name=name,
        task="esnli",
        split="test",
        n=rows,
        baseline=f"{prefix}finetune-gold",
        headline=f"{prefix}step-by-step-gold",
        reportable=True,
        systems=systems,
        label_efficiency=[
            LabelEfficiency(
                method="step-by-step",
                labels="gold",
                system="finetune-gold",
                accuracy=0.55,
                rows=310,
                ci95=(240, None),
                smallest=200,
                largest=TRAINING_ROWS,
            )
        ],
        break_even=[
            BreakEven(
                system="step-by-step-gold",
                spent_usd=0.32,
                teacher_usd_per_prediction=TEACHER_USD,
                predictions=800,
            )
        ],
    )
    (folder / "eval" / "predictions").mkdir(parents=True)
    _write(folder / "eval" / "results.json", results.as_json())
    _write_manifests(folder, recipe, rows)
    _write_annotations(folder, examples)
    for system in systems:
        for seed in system.seeds or [None]:
            member = system.name if seed is None else f"{system.name}-s{seed}"
            predictions = _predictions(system, seed, examples, draw, prose)
            write_jsonl(folder / "eval" / "predictions" / f"{member}.jsonl", predictions)
            if seed is not None:
                task = recipe.task.model_dump(mode="json")
                _write_student(folder / "train" / member, system, seed, task)
    return folder


Example = tuple[str, dict[str, str], str, str]  # id, input, gold label, rationale


def _example(number: int, texts: dict[int, str], prose: Callable[[], str] | None) -> Example:
    text = texts.get(number) or (prose and prose())
    fields = {
        "premise": text or f"A dog number {number} runs over a field.",
        "hypothesis": f"An animal moves ({number}).",
    }
    rationale = text or f"A dog is an animal, so {number} it is."
    return f"sample-{number}", fields, LABELS[number % 3], rationale


def _write_manifests(folder: Path, recipe: Recipe, rows: int) -> None:
    stage = STAGE | {"recipe": recipe.model_dump(mode="json")}
    usage = {"prompt_tokens": 120 * rows, "cached_tokens": 0, "completion_tokens": 40 * rows}
    split = {
        "rows": rows,
        "accepted": rows - 2,
        "without_rationale": 0,
        "rejected": {"truncated": 2},
        "label_accuracy": 0.85,
        "label_accuracy_ci95": [0.74, 0.92],
        "label_accuracy_accepted": 0.87,
        "hinted": {},
        "requests": rows,
        "wasted": {},
        "cached": 0,
        "usage": usage,
        "usd": 0.32,
        "wall_s": 12.0,
    }
    prompt = {
        "instruction": "Say what follows.",
        "template": "{{ premise }}",
        "exemplars": [],
        "anchor": ["Answer:"],
    }
    annotate = {"data": {"train": "a" * 64}, "splits": {"train": split}, "prompt": prompt}
    _write(folder / "annotate" / "manifest.json", stage | annotate)
    train = {"data": {"train": "a" * 64, "valid": "c" * 64}}
    _write(folder / "train" / "manifest.json", stage | train)
    _write(folder / "eval" / "manifest.json", stage | {"data": {"test": "b" * 64}})


def _write_annotations(folder: Path, examples: list[Example]) -> None:
    annotations = [
        Annotation(
            id=row_id,
            input=fields,
            gold=gold,
            label=gold,
            own_label=gold,
            rationale=rationale,
            provenance="own",
            accepted=True,
            teacher=TeacherName(kind="openai", model="a-teacher"),
            usd=TEACHER_USD,
        ).model_dump(mode="json", by_alias=True)
        for row_id, fields, gold, rationale in examples
    ]
    write_jsonl(folder / "annotate" / "test.jsonl", annotations)


def _predictions(
    system: SystemResult,
    seed: int | None,
    examples: list[Example],
    draw: random.Random,
    prose: Callable[[], str] | None,
) -> list[dict[str, Any]]:
    explains = system.kind == "teacher" or system.method == "step-by-step"
    predictions = []
    for row_id, fields, gold, text in examples:
        label = gold
        if draw.random() >= system.accuracy:
            label = draw.choice([other for other in LABELS if other != gold])
        rationale = None
        if explains:
            rationale = prose() if prose and system.kind == "student" else text
        prediction = Prediction(
            id=row_id,
            input=fields,
            gold=gold,
            raw=label,
            prediction=label,
            correct=label == gold,
            truncated=False,
            probability=round(draw.uniform(0.34, 1), 3),
            made_by="sample",
            latency_ms=None if seed is None else 0.5,
            rationale=rationale,
        )
        predictions.append(prediction.model_dump(mode="json", by_alias=True))
    return predictions


def change_record(folder: Path, file: str, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit a JSON file of a run."""
    path = folder / file
    record = json.loads(path.read_text(encoding="utf-8"))
    edit(record)
    _write(path, record)


def change_results(folder: Path, edit: Callable[[dict[str, Any]], None]) -> EvaluatedRun:
    """Edit a run's results.json and load the run."""
    change_record(folder, "eval/results.json", edit)
    return load_run(folder)


def compress(
    run: Path,
    student: str,
    chain: tuple[str, ...],
    accuracy: float,
    megabytes: float,
    ms: float,
    **fields: Any,
) -> None:
    """Write the record of a compressed student.

    Its original has an accuracy of 63.2% on 1,000 rows, 7.4 MB and 9 ms.
    """
    values = {
        "fingerprint": "f" * 64,
        "n": 1000,
        "original": _measurement(0.632, 7.4, 9.0),
        "agreement": 0.95,
    }
    record = Compressed(
        student=student,
        chain=chain,
        compressed=_measurement(accuracy, megabytes, ms),
        max_drop=0.02,
        accepted=0.632 - accuracy <= 0.02,
        seconds=3.0,
        **values | fields,
    )
    path = run / "compress" / student / record.name / "compress.json"
    _write(path, record.model_dump(mode="json", by_alias=True))


def _measurement(accuracy: float, megabytes: float, ms: float) -> Measurement:
    latency = [
        Latency(batch_size=size, calls=50, p50_ms=size**0.5 * ms, p95_ms=12 * ms, device="cpu")
        for size in (1, 64)
    ]
    return Measurement(accuracy=accuracy, megabytes=megabytes, latency=latency)


def _student_system(
    system: str, subset: float, seeds: tuple[int, ...], rows: int, parameters: int
) -> SystemResult:
    method, _, labels = system.rpartition("-")
    suffix = "" if subset == 1.0 else f"-n{subset:g}"
    accuracy = ACCURACIES[system] - 0.08 * (1 / subset) ** 0.5 + 0.08
    versus = {}
    if method != "finetune":
        is_better = "step" in method
        versus[f"finetune-gold{suffix}"] = Comparison(
            delta=0.07 if is_better else -0.03,
            ci95=(0.01, 0.13) if is_better else (-0.08, 0.02),
            p=0.012 if is_better else 0.2,
            p_holm=0.036 if is_better else 0.4,
            test="sign-flip permutation",
            wins=9,
            losses=4,
            minimum_detectable_effect=0.08,
            delta_per_seed=dict.fromkeys(seeds, 0.07 if is_better else -0.03),
        )
    latency = [
        Latency(batch_size=size, calls=50, p50_ms=p50, p95_ms=2 * p50, device="cpu")
        for size, p50 in ((1, 9.0), (64, 60.0))
    ]
    return _system(
        system + suffix,
        accuracy,
        rows,
        kind="student",
        interval="bootstrap over rows",
        method=method,
        labels=labels,
        subset=subset,
        training_rows=int(TRAINING_ROWS * subset),
        seeds=list(seeds),
        accuracy_per_seed=[accuracy] * len(seeds),
        parameters=parameters,
        megabytes=7.4,
        ms_per_example=0.6,
        train_s=90.0,
        latency=latency,
        versus=versus,
    )


def _student_sections(size: str, students: dict[str, str] | None) -> dict[str, Any]:
    if students is None:
        return {"init": "scratch", "size": size}
    return {name: {"init": "scratch", "size": its_size} for name, its_size in students.items()}


def _named(system: SystemResult, student: str, students: dict[str, str]) -> SystemResult:
    """One of several students' systems; others are returned as they are."""
    if system.kind != "student" or system.student is not None:
        return system
    number = list(students).index(student)
    lower = 0.08 * number
    (comparison,) = _student_system("step-by-step-gold", 1.0, (0,), 60, 1).versus.values()
    later = list(students)[number + 1 :] if system.subset == 1.0 else []
    return system.model_copy(
        update={
            "name": f"{student}-{system.name}",
            "student": student,
            "accuracy": system.accuracy - lower,
            "ci95": tuple(end - lower for end in system.ci95),
            "latency": [
                latency.model_copy(
                    update={
                        "p50_ms": latency.p50_ms / 3**number,
                        "p95_ms": latency.p95_ms / 3**number,
                    }
                )
                for latency in system.latency
            ],
            "versus": {f"{student}-{name}": value for name, value in system.versus.items()},
            "versus_students": {f"{other}-{system.name}": comparison for other in later},
            "settings_tried": 2,
        }
    )


def _system(
    name: str, accuracy: float, rows: int, *, usd: float | None = None, **fields: Any
) -> SystemResult:
    ci95 = (max(0.0, accuracy - 0.08), min(1.0, accuracy + 0.08))
    values = {
        "name": name,
        "kind": "teacher",
        "accuracy": accuracy,
        "ci95": ci95,
        "interval": "wilson",
        "unreadable": 0.01,
        "accuracy_per_seed": [accuracy],
        "usd_per_prediction": usd,
        "metrics": {
            "exact_match": Measure(value=accuracy, ci95=ci95, n=rows),
            "macro_f1": Measure(value=accuracy - 0.01, ci95=ci95, n=rows),
            "ece": Measure(value=0.12, n=rows),
        },
        "recall": {label: Measure(value=accuracy, ci95=ci95, n=rows // 3) for label in LABELS},
        "calibration": [
            Bin(
                low=tenth / 10,
                high=(tenth + 1) / 10,
                n=2 * tenth,
                confidence=tenth / 10 + 0.05,
                accuracy=accuracy * tenth / 9,
            )
            for tenth in range(3, 10)
        ],
    }
    return SystemResult.model_validate(values | fields)


def _write_student(folder: Path, system: SystemResult, seed: int, task: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    identity = {
        "name": folder.name,
        "method": system.method,
        "labels": system.labels,
        "seed": seed,
    }
    cost = {
        "device": "cpu",
        "processes": 1,
        "wall_s": 90.0,
        "tokens": 100_000,
        "tokens_per_s": 1111.0,
        "peak_memory_mb": 700.0,
        "peak_memory_of": "process",
    }
    student = identity | {
        "student": system.student,
        "path": str(folder),
        "valid_accuracy": system.accuracy,
        "best_step": 40,
        "steps": 60,
        "examples_per_s": 100.0,
        "wall_s": 90.0,
        "parameters": system.parameters,
        "fingerprint": "f" * 64,
        "subset": system.subset,
        "tuned": {"learning_rate": 0.001},
        "cost": cost,
    }
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
    record = {
        "student": student,
        "trials": trials,
        "rows": system.training_rows,
        "valid_rows": 100,
    }
    _write(folder / "train.json", record)
    prefixes = {"label": ""}
    if system.method == "step-by-step":
        prefixes = {"label": "predict: ", "rationale": "explain: "}
    card = {
        "task": task,
        "prefixes": prefixes,
        "max_input_tokens": 1024,
        "max_target_tokens": 256,
    }
    _write(folder / "student.json", identity | card)
    write_jsonl(folder / "metrics.jsonl", _metrics_lines(system))


def _metrics_lines(system: SystemResult) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(10, 61, 10):
        start = {"step": step, "elapsed_s": step / 10}
        line = start | {
            "loss": 5.0 / step,
            "grad_norm": 1.0,
            "learning_rate": 0.001,
            "label_loss": 4.0 / step,
        }
        if system.method == "step-by-step":
            line["rationale_loss"] = 6.0 / step
        lines.append(line)
        if not step % 20:
            validation = {
                "eval_accuracy": system.accuracy - 1 / step,
                "eval_label_loss": 4.5 / step,
            }
            lines.append(start | validation)
    return lines


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
