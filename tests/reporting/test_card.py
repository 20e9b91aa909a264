"""Model cards: metadata for the Hub, escaped text, and cards of people that are kept."""

from __future__ import annotations

import io
import json
import logging
import re
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from sample_run import change_record, change_results, make_run

from dsbs import Student, UserError
from dsbs.config import StudentSection, TaskSection, registry
from dsbs.config.terms import TermSettings
from dsbs.records.measures import Measure
from dsbs.records.results import PartResult, SystemResult
from dsbs.reporting.card import fenced, is_own_card, part_table, write_cards
from dsbs.reporting.runs import load_run
from dsbs.students.card import StudentCard
from dsbs.students.tokenizer import learn_vocabulary
from dsbs.students.weights import new_model
from dsbs.tasks import make_task
from dsbs.training.methods import FINETUNE

TOY_METHOD = replace(
    FINETUNE, name="toy", description="It learned by playing.", citation="Toy, 2026"
)


class ToyTerm(TermSettings):
    """An additional loss term that is registered by a test."""

    kind: Literal["toy-term"]
    description: ClassVar[str] = "It was also drawn towards toys."
    citation: ClassVar[str] = "Blocks, 2026"


HOSTILE = "<script>alert(1)</script> | {{ 7*7 }} [x](http://y.z) ```\n# big\n---"


def card_text(folder: Path, name: str = "step-by-step-gold-s0") -> str:
    write_cards(load_run(folder))
    return (folder / "train" / name / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", rows=12, subsets=(0.5, 1.0))


def test_every_student_has_a_card_that_the_hubs_library_reads(folder: Path) -> None:
    paths = write_cards(load_run(folder))
    assert len(paths) == 12
    assert {path.name for path in paths} == {"README.md"}
    data = ModelCard.load(folder / "train" / "step-by-step-gold-s1" / "README.md").data
    assert (data.library_name, data.license) == ("transformers", "unknown")
    assert data.pipeline_tag == "text2text-generation"
    # unknown facts are left out
    assert data.language is None
    assert data.base_model is None
    assert data.datasets is None
    assert {"dsbs", "step-by-step"} <= set(data.tags)


def test_a_card_describes_the_training_and_the_results(folder: Path) -> None:
    card = card_text(folder)
    for text in (
        "Its labels are entailment, neutral, contradiction.",
        "Method step-by-step, gold labels, seed 0.",
        "Data: train.jsonl, 800 training rows.",
        "learning rate 0.001",
        "It learned rationales from a-teacher (openai).",
        "The terms of use and licenses of these models,",
        "The mean over 2 seeds is 62.0% (95% CI \\[54.0, 70.0\\]).",
        "- step-by-step-gold: 7.0 points more accurate than finetune-gold "
        "(95% CI \\[+1.0, +13.0\\], p = .036).",
        "- recall of neutral: 0.620, 95% CI \\[0.540, 0.700\\]",
        "the rationale is not the reason for the label",
        'dsbs.Student.load("step-by-step-gold-s0")',
        "rationale=True",
    ):
        assert text in card, text
    half = card_text(folder, "finetune-gold-n0.5-s0")
    assert "400 training rows" in half
    assert "It learned no teacher's labels or rationales." in half
    assert "these models" not in half
    assert "rationale=True" not in half
    assert "It learned labels from a-teacher" in card_text(folder, "distill-teacher-s0")


def test_hub_sources_are_named_and_local_paths_are_not(folder: Path) -> None:
    def use_hub(results: dict[str, Any]) -> None:
        results["recipe"]["task"]["data"]["train"] = "hub://owner/rows:plain/train"
        results["recipe"]["student"] |= {"model": "google/t5-v1_1-base", "init": None}

    change_results(folder, use_hub)
    card_text(folder)
    data = ModelCard.load(folder / "train" / "finetune-gold-s0" / "README.md").data
    assert data.base_model == "google/t5-v1_1-base"
    assert data.datasets == ["owner/rows"]

    def use_local_files(results: dict[str, Any]) -> None:
        results["recipe"]["task"]["data"] |= {"train": "/home/me/secret/rows.csv", "test": None}
        results["recipe"]["student"]["model"] = str(folder)
        results["recipe"]["teacher"] |= {"model": "/home/me/models/big.gguf", "kind": "llamacpp"}

    change_results(folder, use_local_files)
    card = card_text(folder)
    assert "/home/me" not in card
    assert str(folder) not in card
    assert "base_model" not in card
    assert "Data: rows.csv" in card
    assert "from big.gguf (llamacpp)" in card


def test_a_card_names_the_models_of_an_ensemble(folder: Path) -> None:
    def use_ensemble(results: dict[str, Any]) -> None:
        results["recipe"]["teacher"] = {
            "kind": "ensemble",
            "model": None,
            "members": [{"run": "runs/a"}, {"run": "runs/b"}],
        }

    members = [{"model": "gpt-4.1-mini"}, {"model": "other"}]
    change_record(folder, "annotate/manifest.json", lambda record: record.update(members=members))
    change_results(folder, use_ensemble)
    assert "from gpt-4.1-mini and other (ensemble)" in card_text(folder)


def test_a_smoke_run_is_stamped(folder: Path) -> None:
    assert "smoke" not in card_text(folder)
    change_results(folder, lambda results: results.update(reportable=False))
    assert "**smoke: not reportable**" in card_text(folder)


def test_a_card_that_a_person_wrote_or_edited_is_kept(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = load_run(folder)
    write_cards(run)
    edited, written, binary = (
        folder / "train" / f"{name}-s0" / "README.md"
        for name in ("finetune-gold", "distill-teacher", "step-by-step-gold")
    )
    text = edited.read_text(encoding="utf-8").replace("license: unknown", "license: mit")
    edited.write_text(text, encoding="utf-8")
    written.write_text("# mine\n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe")
    before = {path: path.read_bytes() for path in (edited, written, binary)}
    with caplog.at_level(logging.WARNING):
        paths = write_cards(run)
    assert len(paths) == 9
    assert {path: path.read_bytes() for path in before} == before
    assert all(str(path) in caplog.text for path in before)
    assert not is_own_card(edited)
    assert is_own_card(paths[0])
    assert is_own_card(folder / "none")


def test_an_own_card_is_rewritten_and_equal_results_give_an_equal_card(folder: Path) -> None:
    first = card_text(folder)
    assert card_text(folder) == first

    def lower(results: dict[str, Any]) -> None:
        for system in results["systems"]:
            system["accuracy_per_seed"] = [0.25] * len(system["seeds"])

    change_results(folder, lower)
    assert "This student labels 25.0% of the 12 test rows correctly." in card_text(folder)


def test_text_from_data_is_escaped(folder: Path) -> None:
    def add_hostile_text(results: dict[str, Any]) -> None:
        results["recipe"]["task"] |= {
            "name": "classification",
            "labels": [HOSTILE, "b"],
            "description": HOSTILE,
            "input": "Read: {{ a }} {{ b }}",
            "columns": {"a": HOSTILE},
        }
        results["recipe"]["teacher"]["model"] = HOSTILE
        for system in results["systems"]:
            system["recall"] = {HOSTILE: {"value": 0.5, "n": 3}}

    change_results(folder, add_hostile_text)
    card = card_text(folder)
    page = MarkdownIt("gfm-like", {"linkify": False}).render(card.split("---\n", 2)[2])
    assert "<script" not in page
    assert "<h1>big" not in page
    assert "<a " not in page
    assert len(re.findall("<h2>", page)) == 5, "no block was closed early"
    assert len(re.findall("<pre>", page)) == 1
    assert "{{ 7*7 }}" in page


def test_a_fence_is_longer_than_the_backticks_inside() -> None:
    assert fenced("a ```` b", "sh") == "`````sh\na ```` b\n`````"


def test_records_of_another_version_are_refused(folder: Path) -> None:
    again = make_run(folder / "again")
    change_results(folder, lambda results: results["recipe"].update(unknown=1))
    with pytest.raises(UserError, match="another version") as refusal:
        card_text(folder)
    assert "dsbs eval" in str(refusal.value.hint)
    path = again / "train" / "finetune-gold-s0" / "train.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="finetune-gold-s0"):
        card_text(again)


def test_the_code_of_a_card_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student_folder = folder / "train" / "step-by-step-gold-s0"
    record = json.loads((student_folder / "student.json").read_text(encoding="utf-8"))
    texts = [
        f"predict: explain: <premise> <hypothesis> number {n} runs over fields" for n in range(60)
    ]
    tokenizer = learn_vocabulary(texts, 100)
    card = StudentCard(**record | {"task": TaskSection.model_validate(record["task"])})
    model = new_model(StudentSection(init="scratch", vocab_size=100), tokenizer, 0)
    student = Student.of(model, tokenizer, card)
    student.save(student_folder)
    monkeypatch.chdir(folder / "train")
    (code,) = re.findall(r"```python\n(.*?)\n```", card_text(folder), re.DOTALL)
    item = {"premise": "<premise>", "hypothesis": "<hypothesis>"}
    (answer,) = student.predict([item], rationale=True)
    output = io.StringIO()
    with redirect_stdout(output):
        exec(code, {})
    assert output.getvalue().strip() == str(answer.label).strip()


def test_a_card_names_additional_loss_terms_and_local_teachers(folder: Path) -> None:
    method = "finetune+soft+labels"

    def set_method(record: dict[str, Any]) -> None:
        record["student"]["method"] = method
        record["teachers"] = [{"name": "big", "path": "/secret/place/big"}]

    def add_terms(results: dict[str, Any]) -> None:
        soft = {"kind": "response", "name": "soft", "weight": 0.5, "temperature": 2.0}
        results["recipe"]["train"] |= {
            "terms": [{"kind": "labels"}, soft],
            "teachers": [{"model": "/secret/place/big"}],
            "methods": [method],
        }

    change_record(folder, "train/finetune-gold-s0/train.json", set_method)
    change_results(folder, add_terms)
    card = card_text(folder, "finetune-gold-s0")
    assert "loss term soft: response, weight 0.5; loss term labels: labels, weight 1.0" in card
    assert "It learned label distributions from a-teacher (openai)." in card
    assert "compared it with local models: big." in card
    assert "The terms of use and licenses of these models," in card
    assert "/secret" not in card
    tags = ModelCard.load(folder / "train" / "finetune-gold-s0" / "README.md").data.tags
    assert {"finetune", "soft", "labels"} <= set(tags)
    assert "loss term" not in card_text(folder, "step-by-step-gold-s0")


def test_a_new_method_and_a_new_term_describe_themselves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.METHODS, "toy", "test_card:TOY_METHOD")
    monkeypatch.setitem(registry.TERMS, "toy-term", "test_card:ToyTerm")
    method = "toy+toy-term"

    def set_recipe(results: dict[str, Any]) -> None:
        terms = {"methods": [method], "terms": [{"kind": "toy-term", "weight": 0.3}]}
        results["recipe"]["train"] |= terms

    def set_method(record: dict[str, Any]) -> None:
        record["student"]["method"] = method

    change_record(folder, "train/finetune-gold-s0/train.json", set_method)
    change_results(folder, set_recipe)
    card = card_text(folder, "finetune-gold-s0")
    assert "It learned by playing. (Toy, 2026)" in card
    assert "It was also drawn towards toys. (Blocks, 2026)" in card
    assert "loss term toy-term: toy-term, weight 0.3" in card


def test_a_card_says_how_many_labels_it_does_not_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(folder)
    task = make_task(TaskSection.model_validate(run.recipe["task"]))
    monkeypatch.setattr(type(task), "labels", tuple(f"l{number}" for number in range(77)))
    (first, *_) = write_cards(run)
    assert "l48, l49 and 27 more." in first.read_text(encoding="utf-8")


def test_a_card_has_a_table_of_labels_and_of_the_points_of_a_scale() -> None:
    def table(section: dict[str, Any], **results: Any) -> list[str]:
        task = make_task(TaskSection.model_validate(section | {"data": {"train": "-"}}))
        return part_table(SystemResult.model_construct(**results), task).splitlines()

    half = Measure(value=0.5, ci95=(0.25, 0.75), n=8)
    part = PartResult(accuracy=half, precision=None, recall=half, f1=half, gold=8, predicted=3.5)
    tags = {"name": "multilabel", "labels": ["a|b", "c"]}
    *_, row, last = table(tags, parts={"a|b": part, "c": part}, recall={})
    assert row == "| a\\|b | 50.0 | – | 50.0 | 50.0 | [25.0, 75.0] | 8 | 3.5 |"
    assert last.startswith("| c | 50.0")
    scale = {"name": "score", "range": [1, 2]}
    heading, _, first, _ = table(scale, parts={}, recall={"1": half, "2": half})
    assert heading.startswith("| score | recall") and first == "| 1 | 50.0 | [25.0, 75.0] | 8 |"
    assert not table({"name": "classification", "labels": ["a", "b"]}, parts={}, recall={"a": half})
