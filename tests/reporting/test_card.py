"""A student's card: metadata that the Hub reads, text that is no markup, and a person's own card that stays."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import causal_models
import pytest
from huggingface_hub import ModelCard
from made_run import make_run
from markdown_it import MarkdownIt

from dsbs import Student, UserError
from dsbs.config import StudentSection, TaskSection
from dsbs.reporting.card import fenced, is_ours, write_cards
from dsbs.reporting.gather import Run, gather
from dsbs.students import StudentCard, learn_vocabulary, new_model

HOSTILE = "<script>alert(1)</script> | {{ 7*7 }} [x](http://y.z) ```\n# big\n---"


def changed(
    run: Path, stage: str, change: Callable[[dict[str, Any]], None], file: str | None = None
) -> Run:
    """What is recorded of a stage after a change; of the evaluation, in its results."""
    path = run / stage / (file or ("results.json" if stage == "eval" else "manifest.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")
    return gather(run)


def text_of(run: Run, name: str = "step-by-step-gold-s0") -> str:
    write_cards(run)
    return (run.path / "train" / name / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", rows=12, subsets=(0.5, 1.0))


def test_every_student_has_a_card_that_the_hubs_library_reads(folder: Path) -> None:
    run = gather(folder)
    paths = write_cards(run)
    assert len(paths) == 12 and {path.name for path in paths} == {"README.md"}
    loaded = ModelCard.load(folder / "train" / "step-by-step-gold-s1" / "README.md")
    data = loaded.data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "text2text-generation",
        "unknown",
    )
    assert data.language is None and data.base_model is None and data.datasets is None, (
        "what is not known is left out"
    )
    assert {"dsbs", "step-by-step"} <= set(data.tags)
    (accuracy, macro) = data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_split) == (
        "accuracy",
        0.62,
        "test",
    )
    assert (macro.metric_type, macro.metric_name) == ("f1", "macro-F1, mean over 2 seeds")
    assert data.model_name == "step-by-step-gold-s1"


def test_a_card_says_how_the_student_was_made_and_how_good_it_is(folder: Path) -> None:
    card = text_of(gather(folder))
    for said in (
        "It answers with one of the labels entailment, neutral, contradiction.",
        "| training rows | 800 |",
        "| λ, the rationales' weight | 1 |",
        "| chosen on valid | learning\\_rate 0.001 |",
        "Its rationales were written by a-teacher (openai).",
        "The teacher's terms of use",
        "over its 2 seeds step-by-step-gold is on 62.0 %, 95 % interval 54.0 to 70.0 %",
        "- step-by-step-gold: 7.0 points above finetune-gold (95 % interval +1.0 to +13.0, p = 0.036).",
        "| recall of neutral | 0.620 | 0.540 to 0.700 | 4 |",
        "| 1 | 9 ms | 18 ms | cpu |",
        "the rationale is not the reason for the label",
        'dsbs.Student.load("step-by-step-gold-s0")',
        "dsbs predict step-by-step-gold-s0 --rationale",
    ):
        assert said in card, said
    half = text_of(gather(folder), "finetune-gold-n0.5-s0")
    assert (
        "| training rows | 400, 50 % of all |" in half
        and "It learned no teacher's labels or rationales." in half
    )
    assert (
        "The teacher's terms" not in half
        and "not the reason" not in half
        and "--rationale" not in half
    )
    distilled = text_of(gather(folder), "distill-teacher-s0")
    assert "Its labels were written by a-teacher" in distilled


def test_what_comes_from_the_hub_is_named_and_what_is_local_is_not_told(folder: Path) -> None:
    def hub(record: dict[str, Any]) -> None:
        record["recipe"]["task"]["data"] |= {
            "train": "hub://owner/rows:plain/train",
            "test": "hub://owner/other/validation",
        }
        record["recipe"]["student"] |= {"model": "google/t5-v1_1-base", "init": None}

    write_cards(changed(folder, "eval", hub))
    data = ModelCard.load(folder / "train" / "finetune-gold-s0" / "README.md").data
    assert data.base_model == "google/t5-v1_1-base" and data.datasets == ["owner/rows"]
    assert (data.eval_results[0].dataset_type, data.eval_results[0].dataset_split) == (
        "owner/other",
        "validation",
    )

    def local(record: dict[str, Any]) -> None:
        record["recipe"]["task"]["data"] |= {"train": "/home/me/secret/rows.csv", "test": None}
        record["recipe"]["student"]["model"] = str(folder)
        record["recipe"]["teacher"] |= {"model": "/home/me/models/big.gguf", "kind": "llamacpp"}

    card = text_of(changed(folder, "eval", local))
    assert "/home/me" not in card and str(folder) not in card and "base_model" not in card
    assert "| data | rows.csv |" in card and "written by big.gguf (llamacpp)" in card


def test_a_card_names_the_models_of_an_ensemble(folder: Path) -> None:
    def voted(record: dict[str, Any]) -> None:
        record["recipe"]["teacher"] = {
            "kind": "ensemble",
            "model": None,
            "members": [{"run": "runs/a"}, {"run": "runs/b"}],
        }

    changed(
        folder,
        "annotate",
        lambda record: record.update(members=[{"model": "gpt-4.1-mini"}, {"model": HOSTILE}]),
    )
    card = text_of(changed(folder, "eval", voted))
    assert (
        "Its rationales were chosen by the vote of gpt-4.1-mini" in card and "<script>" not in card
    )
    assert "The teacher's terms of use" in card


def test_a_smoke_run_puts_no_numbers_into_the_hubs_index(folder: Path) -> None:
    run = changed(folder, "eval", lambda record: record.update(reportable=False), "results.json")
    card = text_of(run)
    assert "smoke: not reportable" in card and "not to be reported" in card
    data = ModelCard.load(folder / "train" / "step-by-step-gold-s0" / "README.md").data
    assert data.eval_results is None and data.model_name is None and data.metrics is None


def test_a_card_that_a_person_wrote_or_edited_stays(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = gather(folder)
    train = folder / "train"
    write_cards(run)
    edited, own, odd = (
        train / f"{name}-s0" / "README.md"
        for name in ("finetune-gold", "distill-teacher", "step-by-step-gold")
    )
    edited.write_text(
        edited.read_text(encoding="utf-8").replace("license: unknown", "license: mit"),
        encoding="utf-8",
    )
    own.write_text("# mine\n", encoding="utf-8")
    odd.write_bytes(b"\xff\xfe")
    before = {path: path.read_bytes() for path in (edited, own, odd)}
    with caplog.at_level(logging.WARNING):
        paths = write_cards(run)
    assert len(paths) == 9 and not set(paths) & set(before)
    assert {path: path.read_bytes() for path in before} == before
    assert all(str(path) in caplog.text for path in before)
    assert not is_ours(edited) and is_ours(paths[0]) and is_ours(folder / "none")


def test_our_own_card_is_written_anew_and_equal_results_give_an_equal_one(folder: Path) -> None:
    first = text_of(gather(folder))
    assert text_of(gather(folder)) == first

    def worse(results: dict[str, Any]) -> None:
        for system in results["systems"]:
            system["accuracy_per_seed"] = [0.25] * len(system["seeds"])

    assert "This student is right on 25.0 %" in text_of(
        changed(folder, "eval", worse, "results.json")
    )


def test_text_of_data_is_shown_as_text(folder: Path) -> None:
    def hostile(record: dict[str, Any]) -> None:
        own = {
            "name": "classification",
            "labels": [HOSTILE, "b"],
            "description": HOSTILE,
            "input": "Read: {{ a }} {{ b }}",
        }
        record["recipe"]["task"] |= own | {"columns": {"a": HOSTILE}}
        record["recipe"]["teacher"]["model"] = HOSTILE

    def labelled(results: dict[str, Any]) -> None:
        for system in results["systems"]:
            system["recall"] = {HOSTILE: {"value": 0.5, "n": 3}}

    changed(folder, "eval", labelled, "results.json")
    card = text_of(changed(folder, "eval", hostile))
    ModelCard(card)
    page = MarkdownIt("gfm-like", {"linkify": False}).render(card.split("---\n", 2)[2])
    assert "<script" not in page and "<h1>big" not in page and "<a " not in page
    assert len(re.findall("<h2>", page)) == 6 and len(re.findall("<pre>", page)) == 4, (
        "no block was closed early"
    )
    assert page.count("<tr>") == 14 + 5 + 3 and "{{ 7*7 }}" in page, "of training, metrics and time"


def test_a_fence_is_longer_than_the_ticks_inside() -> None:
    assert fenced("a ```` b", "sh") == "`````sh\na ```` b\n`````"


def test_a_template_that_needs_real_values_is_left_out(folder: Path) -> None:
    def odd(record: dict[str, Any]) -> None:
        record["recipe"]["task"] |= {"name": "generation", "input": "{{ 10 // a }}"}

    assert "What it reads" not in text_of(changed(folder, "eval", odd))


def test_a_run_of_another_version_says_what_to_do(folder: Path) -> None:
    with pytest.raises(UserError, match="dsbs eval"):
        write_cards(changed(folder, "eval", lambda record: record["recipe"].pop("train")))
    make_run(folder / "again")
    path = folder / "again" / "train" / "finetune-gold-s0" / "train.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="train that student again"):
        write_cards(gather(folder / "again"))


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_the_card_of_a_decoder_only_student_says_so_and_its_code_does_what_the_student_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, template: Any
) -> None:
    where = folder / "train" / "step-by-step-gold-s0"
    told = json.loads((where / "student.json").read_text(encoding="utf-8"))
    tokenizer = causal_models.tokenizer(bos=template == "plain")
    tokenizer.pad_token = tokenizer.eos_token
    of = {"task": TaskSection.model_validate(told["task"]), "kind": "causal", "template": template}
    student = Student.of(
        causal_models.model(size=len(tokenizer)), tokenizer, StudentCard(**told | of)
    )
    student.save(where)
    monkeypatch.chdir(folder / "train")
    run = gather(folder)
    text = text_of(run)
    assert (
        "A decoder-only language model of" in text
        and ModelCard(text).data.pipeline_tag == "text-generation"
    )
    _, _, plain = re.findall(r"```(?:python|sh)\n(.*?)\n```", text, re.DOTALL)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(plain, {})
    (answer,) = student.predict(
        [{"premise": "<premise>", "hypothesis": "<hypothesis>"}], max_label_tokens=_budget(run)
    )
    assert printed.getvalue().strip() == answer.raw


def _budget(run: Run) -> int:
    return int(run.recipe["eval"]["max_label_tokens"])


def test_the_code_of_a_card_does_what_the_student_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = folder / "train" / "step-by-step-gold-s0"
    told = json.loads((where / "student.json").read_text(encoding="utf-8"))
    section = StudentSection(init="scratch", vocab_size=100)
    tokenizer = learn_vocabulary(
        [
            f"predict: explain: <premise> <hypothesis> number {n} runs over fields"
            for n in range(60)
        ],
        100,
    )
    card = StudentCard(**told | {"task": TaskSection.model_validate(told["task"])})
    student = Student.of(new_model(section, tokenizer, 0), tokenizer, card)
    student.save(where)
    monkeypatch.chdir(folder / "train")
    python, _, plain = re.findall(
        r"```(?:python|sh)\n(.*?)\n```", text_of(gather(folder)), re.DOTALL
    )
    item = {"premise": "<premise>", "hypothesis": "<hypothesis>"}
    (answer,) = student.predict([item], rationale=True)
    for code, expected in ((python, f"{answer.label}\n{answer.rationale}"), (plain, answer.raw)):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(code, {})
        assert printed.getvalue().strip() == expected.strip()


def test_a_card_tells_each_further_term_with_its_source_and_the_teachers_behind_it(
    folder: Path,
) -> None:
    method = "finetune+soft+labels"

    def learn(record: dict[str, Any]) -> None:
        record["student"]["method"] = method

    def add(results: dict[str, Any]) -> None:
        soft = {"kind": "response", "name": "soft", "weight": 0.5, "temperature": 2.0}
        more = {
            "terms": [{"kind": "labels"}, soft],
            "teachers": [{"model": "/secret/place/big"}, {"size": "small"}],
        }
        results["recipe"]["train"] |= more | {"methods": [method]}

    changed(folder, "train/finetune-gold-s0", learn, "train.json")
    card = text_of(changed(folder, "eval", add), "finetune-gold-s0")
    for said in (
        "It learned labels alone: standard fine-tuning",
        "token probabilities of a local teacher: Hinton et al., 2015, arXiv:1503.02531. It also learned a distribution",
        "| further term soft | response, weight 0.5, temperature 2 |",
        "Its label distributions were written by a-teacher (openai). Its further terms compared it with local teachers: "
        "the student big, one that began with random weights (small).",
        "The teacher's terms of use",
    ):
        assert said in card, said
    assert "/secret" not in card and "--rationale" not in card and "λ" not in card
    tags = ModelCard.load(folder / "train" / "finetune-gold-s0" / "README.md").data.tags
    assert {"finetune", "soft", "labels"} <= set(tags)
    assert "further term" not in text_of(gather(folder), "step-by-step-gold-s0"), "which names none"


@pytest.mark.parametrize(
    ("kind", "source", "governed"),
    [("openai", "s", True), ("human", "s", False), ("openai", None, False)],
)
def test_what_a_local_teacher_learned_of_a_model_is_under_that_models_terms_in_its_student(
    folder: Path, tmp_path: Path, kind: str, source: str | None, governed: bool
) -> None:
    train = tmp_path / "elsewhere" / "train"
    (train / "big").mkdir(parents=True)
    (train / "big" / "train.json").write_text(
        json.dumps({"student": {"source": source}}), encoding="utf-8"
    )
    (train / "manifest.json").write_text(
        json.dumps({"recipe": {"teacher": {"kind": kind}}}), encoding="utf-8"
    )

    def learn(record: dict[str, Any]) -> None:
        record["teachers"] = [
            {"name": "big", "path": str(train / "big"), "weight": 1.0, "fingerprint": "f"}
        ]

    card = text_of(
        changed(folder, "train/finetune-gold-s0", learn, "train.json"), "finetune-gold-s0"
    )
    assert ("The teacher's terms of use" in card) is governed
    assert "It learned no teacher's labels or rationales." in card
