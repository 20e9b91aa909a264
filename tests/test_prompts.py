"""Prompts: the shipped ones hold together, and rendering is stable, safe and hashed."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from dsbs.annotation.parse import parse_reply
from dsbs.config import Recipe, TaskSection
from dsbs.config.load import load_recipe
from dsbs.errors import UserError
from dsbs.prompting import Exemplar, Prompt, PromptRenderer, load_prompt, read_prompt
from dsbs.records import Example
from dsbs.tasks import Task, make_task

FILES = sorted(path.stem for path in (ROOT / "prompts").glob("*.yaml"))
TEAMS = load_recipe("recipes/demo.yaml").task.labels
NLI = make_task(TaskSection(name="esnli", data={"train": "-"}))
TEXT = make_task(TaskSection(name="generation", data={"train": "-"}))


def task_of(name: str) -> Task:
    if name == "support":
        return make_task(TaskSection(name="classification", labels=TEAMS, data={"train": "-"}))
    return make_task(TaskSection(name=name, data={"train": "-"}))


def shipped(name: str) -> Prompt:
    return read_prompt(f"prompts/{name}.yaml", None)


def exemplars() -> list[Any]:
    found = []
    for name in FILES:
        count = len(
            yaml.safe_load((ROOT / "prompts" / f"{name}.yaml").read_text(encoding="utf-8"))[
                "exemplars"
            ]
        )
        found += [
            pytest.param(name, number, id=f"{name}-{number}") for number in range(1, count + 1)
        ]
    return found


def nli_example(premise: str, hypothesis: str = "h") -> Example:
    return Example("1", {"premise": premise, "hypothesis": hypothesis})


# --- the prompts that ship


def test_every_task_with_a_recipe_of_its_own_has_a_prompt() -> None:
    assert FILES == ["anli", "cqa", "esnli", "support", "svamp"]


@pytest.mark.parametrize(("name", "number"), exemplars())
@pytest.mark.parametrize("finish_reason", ["stop", None])
def test_an_exemplar_reads_back_as_its_own_label_and_rationale(
    name: str, number: int, finish_reason: str | None
) -> None:
    prompt, task = shipped(name), task_of(name)
    exemplar = prompt.exemplars[number - 1]
    question, answer = PromptRenderer(prompt, task).exemplar(exemplar, number)
    fields = task.fields(exemplar.input, "test")
    sample = parse_reply(answer, prompt, task, fields, finish_reason)
    assert sample.label == task.gold(exemplar.label, fields, "test")
    assert sample.rationale == exemplar.rationale
    ran_on = parse_reply(
        f"{answer}\n\n{question} {answer[::-1]}", prompt, task, fields, finish_reason
    )
    assert (ran_on.label, ran_on.rationale) == (sample.label, sample.rationale)


@pytest.mark.parametrize("name", FILES)
def test_a_prompt_has_four_to_ten_distinct_exemplars(name: str) -> None:
    given = [json.dumps(exemplar.input, sort_keys=True) for exemplar in shipped(name).exemplars]
    assert 4 <= len(given) <= 10
    assert len(set(given)) == len(given)


@pytest.mark.parametrize("name", ["anli", "esnli", "support"])
def test_exemplars_are_balanced_over_the_labels(name: str) -> None:
    labels = task_of(name).labels
    assert labels is not None
    counts = Counter(exemplar.label for exemplar in shipped(name).exemplars)
    assert set(counts) == set(labels)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_exemplars_of_cqa_favor_no_letter() -> None:
    places = [
        exemplar.input["choices"].index(exemplar.label) for exemplar in shipped("cqa").exemplars
    ]
    assert len(set(places)) == len(places)


def test_exemplars_of_svamp_show_every_operation_and_a_value_that_is_right() -> None:
    labels = [exemplar.label for exemplar in shipped("svamp").exemplars]
    assert set("+-*/") <= set("".join(labels))
    for exemplar in shipped("svamp").exemplars:
        stated = re.findall(r"= (\d+)\.", exemplar.rationale)[-1]
        assert task_of("svamp").correct(exemplar.label, stated), exemplar.label


@pytest.mark.parametrize("name", ["svamp", "esnli"])
def test_no_exemplar_is_a_row_of_the_data(shared_data: Path, name: str) -> None:
    def words(value: str) -> str:
        return " ".join(re.findall(r"\w+", value.casefold()))

    ours = {
        words(value)
        for exemplar in shipped(name).exemplars
        for key, value in exemplar.input.items()
        if key != "question"
    }
    checked = 0
    for path in sorted((shared_data / name).glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            for line in file:
                row = json.loads(line)["input"]
                checked += 1
                assert not ours & {
                    words(value) for key, value in row.items() if key != "question"
                }, row
    assert checked >= 1000


# --- rendering


@pytest.mark.parametrize("name", FILES)
def test_all_before_the_question_is_the_same_in_every_request(name: str) -> None:
    prompt, task = shipped(name), task_of(name)
    inputs = [task.fields(exemplar.input, "test") for exemplar in prompt.exemplars[:2]]
    one, two = (
        PromptRenderer(prompt, task).render(Example(str(i), fields))
        for i, fields in enumerate(inputs)
    )
    assert one.messages[:-1] == two.messages[:-1]
    assert one.messages[-1] != two.messages[-1]
    question = one.messages[-1]["content"]
    prefix = one.text.removesuffix(question)
    assert prefix != one.text
    assert two.text == prefix + two.messages[-1]["content"]
    assert len(prefix) > 500


@pytest.mark.parametrize("name", FILES)
def test_a_completion_prompt_shows_every_exemplar_whole_and_ends_where_the_answer_begins(
    name: str,
) -> None:
    prompt, task = shipped(name), task_of(name)
    renderer = PromptRenderer(prompt, task)
    text = renderer.render(Example("1", task.fields(prompt.exemplars[0].input, "test"))).text
    for number, exemplar in enumerate(prompt.exemplars, 1):
        question, answer = renderer.exemplar(exemplar, number)
        assert f"{question} {answer}\n\n" in text
    assert text == text.rstrip()
    assert text.endswith(":")


def test_chat_messages_alternate_and_end_with_the_question() -> None:
    rendered = PromptRenderer(shipped("esnli"), NLI).render(
        nli_example("A man sleeps.", "He is awake.")
    )
    roles = [message["role"] for message in rendered.messages]
    assert roles == ["system"] + ["user", "assistant"] * 6 + ["user"]
    assert (
        rendered.messages[-1]["content"]
        == "Premise: A man sleeps.\nHypothesis: He is awake.\nReasonings:"
    )
    assert rendered.messages[2]["content"].endswith("\nAnswer: entailment")
    assert all(
        set(message) == {"role", "content"} and message["content"].strip()
        for message in rendered.messages
    )
    assert rendered.body("chat") == {"messages": list(rendered.messages)}
    assert rendered.body("completions") == {"prompt": rendered.text}


def test_without_an_instruction_there_is_no_system_message() -> None:
    rendered = PromptRenderer(Prompt(template="{{ premise }}"), NLI).render(nli_example("p"))
    assert rendered.messages == ({"role": "user", "content": "p"},)
    assert rendered.text == "p"


@pytest.mark.parametrize(
    "text",
    ["{{ 7*7 }}", "{% for i in range(9) %}x{% endfor %}", "{{ config }}", "{# gone #}", "{{"],
)
def test_a_data_value_is_never_read_as_a_template(text: str) -> None:
    rendered = PromptRenderer(shipped("esnli"), NLI).render(nli_example(text))
    assert f"Premise: {text}\n" in rendered.text
    own = make_task(
        TaskSection(name="generation", input="{{ a }} and {{ b }}", data={"train": "-"})
    )
    rendered = PromptRenderer(Prompt(template="Text: {{ text }}"), own).render(
        Example("1", {"a": text, "b": "c"})
    )
    assert rendered.text == f"Text: {text} and c"


def test_markup_in_data_is_not_escaped() -> None:
    text = 'a < b & "c"'
    assert (
        PromptRenderer(Prompt(template="{{ premise }}"), NLI).render(nli_example(text)).text == text
    )


def test_an_unknown_field_tells_the_fields_there_are() -> None:
    renderer = PromptRenderer(Prompt(template="{{ premis }}"), NLI)
    with pytest.raises(UserError) as caught:
        renderer.render(nli_example("p"))
    assert "'premis' is undefined" in caught.value.problem
    assert "hypothesis, premise" in caught.value.hint


@pytest.mark.parametrize(
    "template",
    [
        "{{ premise",
        "{% if %}",
        "{{ premise.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{{ premise + 1 }}",
    ],
)
def test_a_template_that_fails_is_a_mistake_not_a_crash(template: str) -> None:
    with pytest.raises(UserError, match="prompt: template"):
        PromptRenderer(Prompt(template=template), NLI).render(nli_example("p"))


@pytest.mark.parametrize(
    ("exemplar", "told"),
    [
        ({"input": {"premise": "p"}, "rationale": "r", "label": "neutral"}, "hypothesis"),
        (
            {"input": {"premise": "p", "hypothesis": "h"}, "rationale": "r", "label": "perhaps"},
            "perhaps",
        ),
    ],
)
def test_an_exemplar_that_does_not_fit_the_task_is_named(
    exemplar: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match="exemplar 1") as caught:
        PromptRenderer(Prompt(template="{{ premise }}", exemplars=(Exemplar(**exemplar),)), NLI)
    assert told in caught.value.problem


# --- prompt files


def own_recipe(**settings: Any) -> Recipe:
    return Recipe(name="x", task={"data": {"train": "-"}, **settings}, teacher={"model": "m"})


def test_without_a_prompt_file_classes_get_a_zero_shot_prompt_that_names_them_all() -> None:
    labels = ["billing", "shipping", "card fraud"]
    made = own_recipe(name="classification", labels=labels, description="Route the message.")
    task = make_task(made.task)
    prompt = load_prompt(made, task)
    rendered = PromptRenderer(prompt, task).render(Example("1", {"text": "My card is lost."}))
    assert [message["role"] for message in rendered.messages] == ["system", "user"]
    system = rendered.messages[0]["content"]
    assert system.startswith("Route the message.")
    assert system.endswith("\nAnswer: <label>")
    assert all(label in system for label in labels)
    assert rendered.messages[1]["content"] == "Text: My card is lost."
    reply = "A card was lost.\nAnswer: card fraud\n\nText: Where is it?\nAnswer: shipping"
    sample = parse_reply(reply, prompt, task, {"text": "-"}, "stop")
    assert (sample.label, sample.rationale) == ("card fraud", "A card was lost.")


def test_a_zero_shot_prompt_for_numbers_asks_for_a_number() -> None:
    made = own_recipe(name="generation", numeric=True)
    prompt = load_prompt(made, make_task(made.task))
    assert "as a number" in prompt.instruction
    assert prompt.instruction.endswith("\nAnswer: <answer>")


@pytest.mark.parametrize("name", ["anli", "cqa", "esnli", "svamp"])
def test_a_known_task_gets_its_shipped_prompt(name: str) -> None:
    made = own_recipe(name=name)
    assert load_prompt(made, make_task(made.task)) == shipped(name)


@pytest.mark.parametrize(
    "change",
    [
        {"instruction": "Other."},
        {"template": "P: {{ premise }}"},
        {"answer": "{{ rationale }} Answer: {{ label }}"},
        {"anchor": ["Label:"]},
        {"stop": []},
        {"exemplars": []},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_hash_changes_with_any_part_of_a_prompt(change: dict[str, Any]) -> None:
    prompt = shipped("esnli")
    assert Prompt.model_validate(prompt.model_dump()).hash == prompt.hash
    assert Prompt.model_validate(prompt.model_dump() | change).hash != prompt.hash


def test_the_hash_changes_with_any_part_of_an_exemplar_and_with_their_order() -> None:
    whole = shipped("esnli").model_dump()
    first, *others = whole["exemplars"]
    changed = [
        [first | {"label": "neutral"}, *others],
        [first | {"rationale": "Other."}, *others],
        [first | {"input": first["input"] | {"premise": "Other."}}, *others],
        [*others, first],
    ]
    hashes = {
        Prompt.model_validate(whole | {"exemplars": given}).hash
        for given in (whole["exemplars"], *changed)
    }
    assert len(hashes) == 5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("template: '{{ text }}'\nexemplar: []\n", r"own\.yaml:2: exemplar"),
        ("instruction: x\n", "template"),
        (
            "template: x\nexemplars:\n  - {input: {text: t}, label: a}\n",
            r"own\.yaml:3: exemplars\[0\]\.rationale",
        ),
        ("template: '{{ text }}'\nanchor: ''\n", "an empty string in anchor"),
        ("template: '{{ text }}'\nstop: ['Q:', ' ']\n", "an empty string in anchor or stop"),
        ("template: '{{ text }}'\nanchor: []\n", "anchor is empty, so that the label"),
        ("template: [x\n", "not valid YAML"),
        ("", "own.yaml"),
        ("- x\n", "own.yaml"),
    ],
)
def test_a_prompt_file_that_is_wrong_is_told_by_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        read_prompt("own.yaml", tmp_path)


def test_a_prompt_file_lies_beside_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("template: 'Q: {{ text }}'\nanchor: 'So:'\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "task: {name: generation, data: {train: t.csv}}\n"
        "teacher: {model: m}\nannotate: {prompt: own.yaml}\n"
    )
    prompt = load_prompt(load_recipe(path), TEXT)
    assert (prompt.template, prompt.anchor) == ("Q: {{ text }}", ("So:",))
