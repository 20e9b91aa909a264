"""``README.md`` beside every student: a model card with the Hugging Face Hub's metadata."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsbs.config.terms import base_of, names_of_terms
from dsbs.errors import UserError
from dsbs.files import atomic
from dsbs.formatting import (
    confidence_interval,
    escape_markdown,
    markdown_table,
    milliseconds,
    percent,
)
from dsbs.records.results import Measure, SystemResult
from dsbs.records.rows import TrainedStudent
from dsbs.records.summary import system_sentences
from dsbs.reporting.card_causal import causal_call
from dsbs.reporting.card_recipe import (
    Sections,
    hub_model,
    hub_source,
    input_text,
    placeholder,
    sections,
    source_of,
)
from dsbs.reporting.card_terms import (
    annotator,
    explains,
    is_governed,
    local_teachers,
    said_of,
    setting,
    terms_of,
)
from dsbs.reporting.gather import Run
from dsbs.students import CARD, StudentCard
from dsbs.students.gguf import is_gguf
from dsbs.tasks import make_task

_MARK = re.compile(r"<!-- dsbs wrote this card, sha256 ([0-9a-f]{64}): .*? -->\n\Z")
_LABELS = 50  # named in a card
_PAPER = "Distilling Step-by-Step (Hsieh et al., 2023, arXiv:2305.02301)"
_ABOUT = {
    "step-by-step": f"It learned labels and rationales as two tasks, told apart by a prefix or the decoder's start: {_PAPER}.",
    "finetune": f"It learned labels alone: standard fine-tuning, a baseline of {_PAPER}.",
    "distill": f"It learned the teacher's labels alone: standard distillation, a baseline of {_PAPER}.",
    "rationale-then-label": f"It writes a rationale and then the label in one sequence: the single-task ablation of {_PAPER}.",
    "label-then-rationale": f"It writes the label and then a rationale in one sequence: the single-task ablation of {_PAPER}.",
}
_TERMS = (
    "The teacher's terms of use, and its model's licence, govern what may be done with its outputs and with what learned from "
    "them. They are not known here: read them before you publish or sell this student, and set `license` above accordingly."
)
_OWN_TERMS = "The licences of the data and of the base model govern this student: set `license` above accordingly."


class _Written(str):
    """Markdown as it is; every other text is escaped on its way into a card."""

    __slots__ = ()


def write_cards(run: Run) -> list[Path]:
    """Write the card of every student that the results speak of; return the paths of those written.

    A README.md that is not ours as we wrote it is left alone, and a warning says so.
    """
    written = []
    for system in run.results.systems:
        for seed in system.seeds:
            member = f"{system.name}-s{seed}"
            path = run.path / "train" / member / "README.md"
            if member not in run.students:
                continue
            if not is_ours(path):
                logging.getLogger(__name__).warning(
                    "%s was written or edited by hand and is left as it is", path
                )
                continue
            with atomic(path) as file:
                file.write(card(run, system, seed))
            written.append(path)
    return written


def is_ours(path: Path) -> bool:
    """Whether a card may be written there: there is none, or it is one of ours that nobody has changed."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return True
    except (UnicodeDecodeError, OSError):
        return False
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _hash(text[: mark.start()])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def card(run: Run, system: SystemResult, seed: int) -> str:
    """The whole text of a student's card."""
    recipe = sections(run)
    name = f"{system.name}-s{seed}"
    record = run.students[name]
    try:
        student = TrainedStudent.model_validate(record["student"])
    except (KeyError, ValidationError) as error:
        said = str(error).splitlines()[0]
        raise UserError(
            f"{run.path / 'train' / name / 'train.json'} is no record of a student ({said})",
            hint="train that student again",
        ) from None
    reportable = run.results.reportable and student.reportable
    meta = _metadata(run, recipe, system, student, reportable=reportable)
    body = _body(run, recipe, system, student, record, reportable=reportable)
    text = f"---\n{meta}\n---\n\n{body.strip()}\n\n"
    return f"{text}<!-- dsbs wrote this card, sha256 {_hash(text)}: it writes it anew unless it was changed -->\n"


# --- metadata


def _metadata(
    run: Run, recipe: Sections, system: SystemResult, student: TrainedStudent, *, reportable: bool
) -> str:
    """YAML as https://huggingface.co/docs/hub/model-cards says. What is not known is left out: the language, a local data set.

    The license of weights hangs on the base model's, the data's and the teacher's: `unknown` until a person decides.
    """
    from huggingface_hub import EvalResult, ModelCardData

    trained_on, evaluated_on = (
        hub_source(source_of(recipe, split)) for split in ("train", run.results.split)
    )
    own = _own_accuracy(system, student)
    values: list[tuple[str, str, float]] = []
    if reportable and own is not None:
        values.append(("accuracy", "accuracy", own))
    if reportable and "macro_f1" in system.metrics:
        of = f", mean over {len(system.seeds)} seeds" if len(system.seeds) > 1 else ""
        values.append(("f1", f"macro-F1{of}", system.metrics["macro_f1"].value))
    repository, config, split = evaluated_on or (None, None, run.results.split)
    pipeline = "text-generation" if _is_causal(run, student) else "text2text-generation"
    results = [
        EvalResult(
            task_type=pipeline,
            task_name=run.results.task,
            dataset_type=repository or run.results.task,
            dataset_name=repository or f"{run.results.name} ({run.results.task})",
            dataset_config=config,
            dataset_split=split,
            metric_type=kind,
            metric_name=title,
            metric_value=round(value, 6),
        )
        for kind, title, value in values
    ]
    data = ModelCardData(
        license="unknown",
        library_name="transformers",
        pipeline_tag=pipeline,
        base_model=hub_model(recipe),
        datasets=[trained_on[0]] if trained_on else None,
        tags=[
            "dsbs",
            "distillation",
            base_of(student.method),
            *names_of_terms(student.method),
            "arxiv:2305.02301",
        ],
        metrics=sorted({kind for kind, _, _ in values}) or None,
        model_name=student.name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


# --- what people read


def _body(
    run: Run,
    recipe: Sections,
    system: SystemResult,
    student: TrainedStudent,
    record: Mapping[str, Any],
    *,
    reportable: bool,
) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dsbs.reporting"),
        autoescape=False,  # of HTML; `finalize` does it for Markdown
        finalize=_written,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    rows = [_measure(name, measure) for name, measure in system.metrics.items()]
    rows += [
        _measure(f"recall of {label}", measure)
        for label, measure in list(system.recall.items())[:_LABELS]
    ]
    over = " (mean over seeds)" if len(system.seeds) > 1 else ""
    times = [
        [f"{one.batch_size:,}", milliseconds(one.p50_ms), milliseconds(one.p95_ms), one.device]
        for one in system.latency
    ]
    described = f": {recipe.task.description}" if recipe.task.description else "."
    version = record.get("versions", {}).get("dsbs")
    kind = "A decoder-only language model" if _is_causal(run, student) else "A T5"
    about = _ABOUT.get(base_of(student.method), f"It was trained by the method {student.method}.")
    about = " ".join([about, *(said_of(term) for term in terms_of(recipe, student))])
    return environment.get_template("card.md").render(
        student=student,
        stamp=None if reportable else "task.limit was set",
        summary=f"{kind} of {student.parameters:,} parameters for the task {recipe.task.name}{described}",
        about=f"{about} Made with dsbs{f' {version}' if version else ''}.",
        answers=_answers(recipe),
        input=input_text(recipe),
        training=_table(["", ""], _training(recipe, student, record)),
        teacher=_teacher(recipe, student),
        terms=_Written(_TERMS if is_governed(recipe, student, record) else _OWN_TERMS),
        result=_result(run, system, student),
        comparisons=system_sentences(system),
        measures=rows and _table([f"metric{over}", "value", "95 % interval", "rows"], rows),
        latency=times
        and _table(["rows at once", "median", "95 % are done within", "device"], times),
        limits=_limits(run, recipe, system, student, reportable=reportable),
        fenced=fenced,
        **_use(run, recipe, student),
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> _Written:
    return _Written(
        "\n".join(
            markdown_table(headings, [[escape_markdown(cell) for cell in row] for row in rows])
        )
    )


def _answers(recipe: Sections) -> str:
    labels = make_task(recipe.task).labels
    if labels is None:
        return "It answers with text that is not of a closed set."
    more = f" and {len(labels) - _LABELS} more" if len(labels) > _LABELS else ""
    return f"It answers with one of the labels {', '.join(labels[:_LABELS])}{more}."


def _result(run: Run, system: SystemResult, student: TrainedStudent) -> str:
    where = f"{run.results.split} ({run.results.n:,} rows)"
    spread = f"{confidence_interval(system.ci95)} ({system.interval})"
    own = _own_accuracy(system, student)
    if len(system.seeds) == 1 or own is None:
        said = f"{system.name} is right on {percent(system.accuracy)} of {where}, {spread}."
    else:
        said = f"This student is right on {percent(own)} of {where}; over its {len(system.seeds)} seeds {system.name} is on "
        said += f"{percent(system.accuracy)}, {spread}."
    teacher = next((one for one in run.results.systems if one.kind == "teacher"), None)
    return (
        said
        if teacher is None
        else f"{said} The teacher is right on {percent(teacher.accuracy)} of the same rows."
    )


def _own_accuracy(system: SystemResult, student: TrainedStudent) -> float | None:
    """Of this seed; None: the results do not say."""
    place = system.seeds.index(student.seed)
    return system.accuracy_per_seed[place] if place < len(system.accuracy_per_seed) else None


def _written(value: Any) -> str:
    return value if isinstance(value, _Written) else escape_markdown(str(value))


def fenced(text: str, language: str = "") -> _Written:
    """A block of code that holds any text: its fence is longer than all in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return _Written(f"{fence}{language}\n{text}\n{fence}")


def _measure(name: str, measure: Measure) -> list[str]:
    return [
        name,
        f"{measure.value:.3f}",
        "–" if measure.ci95 is None else "{:.3f} to {:.3f}".format(*measure.ci95),
        f"{measure.n:,}",
    ]


def _training(
    recipe: Sections, student: TrainedStudent, record: Mapping[str, Any]
) -> list[tuple[str, str]]:
    train = recipe.train.tuned(student.tuned)
    start = train.init or recipe.student.model
    if start is None:
        began = f"random weights ({recipe.student.size}), vocabulary learned from the training text"
    elif is_gguf(start):
        began = f"a GGUF file, {Path(start).name}"
    else:
        began = hub_model(recipe) or f"a local folder, {Path(start).name}"
    source = hub_source(recipe.task.data.train)
    rows = [
        ("method", student.method),
        ("local teachers", ", ".join(teacher["name"] for teacher in record.get("teachers", ()))),
        ("labels", "gold" if student.labels == "gold" else "the teacher's"),
        ("started from", began),
        ("data", source[0] if source else Path(recipe.task.data.train).name),
        (
            "training rows",
            f"{record['rows']:,}"
            + ("" if student.subset == 1 else f", {100 * student.subset:g} % of all"),
        ),
        ("rationales learned", f"{record['rationales']:,}" if record.get("rationales") else ""),
        ("validation rows", f"{record['valid_rows']:,}" if "valid_rows" in record else ""),
        (
            "λ, the rationales' weight",
            _weight(recipe) if base_of(student.method) == "step-by-step" else "",
        ),
        *((f"further term {term.title}", setting(term)) for term in terms_of(recipe, student)),
        (
            "steps",
            f"{student.best_step:,} of {student.steps:,}, the best on valid ({percent(student.valid_accuracy)})",
        ),
        ("batch", f"{train.batch_size:,} examples"),
        ("learning rate", f"{train.learning_rate:g}, {train.schedule}; {train.optimizer}"),
        (
            "chosen on valid",
            ", ".join(f"{name} {value:g}" for name, value in student.tuned.items()),
        ),
        (
            "LoRA",
            ""
            if train.lora is None
            else f"rank {train.lora.rank}, alpha {train.lora.alpha}; merged",
        ),
        ("seed", str(student.seed)),
        (
            "took",
            f"{student.wall_s:,.0f} s" + (f" on {student.cost.device}" if student.cost else ""),
        ),
    ]
    return [(name, value) for name, value in rows if value]


def _weight(recipe: Sections) -> str:
    train = recipe.train
    if train.rationale_schedule == "constant":
        return f"{train.rationale_weight:g}"
    return (
        f"{train.rationale_weight:g} to {train.rationale_weight_end:g}, {train.rationale_schedule}"
    )


def _teacher(recipe: Sections, student: TrainedStudent) -> str:
    return " ".join([annotator(recipe, student), *local_teachers(recipe, student)])


def _limits(
    run: Run, recipe: Sections, system: SystemResult, student: TrainedStudent, *, reportable: bool
) -> list[str]:
    said = []
    if not reportable:
        said.append(
            "It was trained or measured on a limited part of the data to try things out: its numbers are not to be reported."
        )
    method = base_of(student.method)
    if method == "step-by-step":
        said.append(
            "Rationale and label are decoded apart: the rationale is not the reason for the label, however it reads."
        )
    elif method == "label-then-rationale":
        said.append("The rationale is written after the label, which did not depend on it.")
    elif method == "rationale-then-label":
        said.append(
            "The label is written after the rationale and with it in view; that does not make the rationale its cause."
        )
    said.append(
        f"The numbers speak of {run.results.split}'s rows, this teacher and these seeds alone."
    )
    said.append(
        f"{percent(system.unreadable)} of such students' outputs on {run.results.split} were no label of the task."
    )
    said.append(f"Inputs are cut after {recipe.student.max_input_tokens:,} tokens.")
    if recipe.student.is_scratch and recipe.train.init is None:
        said.append(
            "It began with random weights: it knows no more language than its training rows taught it."
        )
    return said


# --- how it is used


def _use(run: Run, recipe: Sections, student: TrainedStudent) -> dict[str, str | None]:
    item = placeholder(recipe)
    folder = student.name
    wants = ", rationale=True" if explains(student) else ""
    python = [
        "import dsbs",
        "",
        f"student = dsbs.Student.load({json.dumps(folder)})  # this folder",
        f"(answer,) = student.predict([{json.dumps(item, ensure_ascii=False)}]{wants})",
        "print(answer.label)" + ("" if not wants else "\nprint(answer.rationale)"),
    ]
    line = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
    quoted = line.replace("'", "'\\''")
    return {
        "in_python": "\n".join(python),
        "in_shell": f"echo '{quoted}' | dsbs predict {folder}" + (" --rationale" if wants else ""),
        "in_transformers": _in_transformers(run, recipe, student),
    }


def _own(run: Run, student: TrainedStudent) -> StudentCard | None:
    """What the student's folder says of it; None where it is gone."""
    try:
        return StudentCard.model_validate_json(
            (run.path / "train" / student.name / CARD).read_text(encoding="utf-8")
        )
    except (OSError, ValueError):
        return None


def _is_causal(run: Run, student: TrainedStudent) -> bool:
    own = _own(run, student)
    return own is not None and own.kind == "causal"


def _in_transformers(run: Run, recipe: Sections, student: TrainedStudent) -> str | None:
    """Only what writes its label first, by a prefix, is read by one plain call."""
    own, text = _own(run, student), input_text(recipe)
    if (
        own is None
        or "label" not in own.prefixes
        or own.starts.get("label", "pad") != "pad"
        or text is None
    ):
        return None
    if own.kind == "causal":
        return "\n".join(causal_call(student.name, own, text, recipe.max_label_tokens))
    return "\n".join(
        [
            "from transformers import AutoModelForSeq2SeqLM, T5Tokenizer",
            "",
            f"tokenizer = T5Tokenizer.from_pretrained({json.dumps(student.name)})  # this folder",
            f"model = AutoModelForSeq2SeqLM.from_pretrained({json.dumps(student.name)})",
            f"text = {json.dumps(own.prefixes['label'] + text, ensure_ascii=False)}",
            f'inputs = tokenizer(text, truncation=True, max_length={own.max_input_tokens}, return_tensors="pt")',
            f"ids = model.generate(**inputs, max_new_tokens={recipe.max_label_tokens}, num_beams=1, do_sample=False)",
            "print(tokenizer.decode(ids[0], skip_special_tokens=True))",
        ]
    )
