"""JSON answers: the request's schema, its fallbacks, and the reading of replies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback import LoopbackServer, Scripted, completion, question, read_rows

from dsbs import UserError, annotate, load_recipe
from dsbs.annotation.json_answer import response_format
from dsbs.annotation.parse import label_logprob, parse_reply
from dsbs.config import TaskSection
from dsbs.prompting import Prompt, PromptRenderer, read_prompt
from dsbs.tasks import make_task

TASK = make_task(
    TaskSection(name="classification", labels=("billing", "shipping", "7"), data={"train": "-"})
)
PROMPT = Prompt(template="Text: {{ text }}", stop=("\nText:",), format="json")
WHOLE = '{"rationale": "A parcel is a matter of delivery.", "label": "shipping"}'


def read(text: str, finish_reason: str | None = "stop", prompt: Prompt = PROMPT) -> Any:
    return parse_reply(text, prompt, TASK, {}, finish_reason)


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        f"```json\n{WHOLE}\n```",
        f"Here is the object:\n{WHOLE}\nI hope that it helps {{sic}}.",
        f"<think>{{\"label\": \"billing\"}}</think>{WHOLE}",
        f"{WHOLE}\n{WHOLE}",
        f'{{"answer": {WHOLE}}}',
        f'{WHOLE}\nText: another\n{{"rationale": "x", "label": "billing"}}',
        WHOLE.replace("A parcel", "A parcel\n"),  # a raw line break, which JSON does not allow
        WHOLE.replace('"shipping"', '["shipping"]'),
        "A parcel is a matter of delivery.\nAnswer: shipping",  # as the prompt file asks
    ],
)  # fmt: skip
def test_the_object_is_read_whatever_surrounds_it(text: str) -> None:
    sample = read(text)
    assert (sample.label, sample.reason) == ("shipping", None)
    assert " ".join(sample.rationale.split()) == "A parcel is a matter of delivery."


@pytest.mark.parametrize(
    ("text", "finish_reason", "reason"),
    [
        ('{"rationale": "A parcel", "label": "shipp', "length", "truncated"),
        ('{"rationale": "Maybe Answer: billing', "length", "truncated"),
        ('{"rationale": "A parcel", "label": "shipping"', "length", "truncated"),
        ('{"rationale": "A parcel", "label": "shipping"', None, "truncated"),
        ('{"rationale": "A parcel", "label": "shipping"', "stop", "unparsed"),
        ('{"rationale": "A parcel"}', "stop", "unparsed"),
        ('{"rationale": "A parcel", "label": null}', "stop", "empty"),
        ('{"rationale": "A parcel", "label": ""}', "stop", "empty"),
        ('{"rationale": "A parcel", "label": {"name": "shipping"}}', "stop", "unparsed"),
        ('{"rationale": "A parcel", "label": ["shipping", "billing"]}', "stop", "several-answers"),
        ('{"label": "billing", "rationale": "A", "label": "shipping"}', "stop", "several-answers"),
        (f'{{"label": "billing"}} or {WHOLE}', "stop", "several-answers"),
        ('{"rationale": "A parcel", "label": "returns"}', "stop", "label-outside-set"),
        ("I'm sorry, I can't help with that.", "stop", "refused"),
        ("", "stop", "empty"),
    ],
)
def test_what_is_not_one_whole_answer_gives_no_label(
    text: str, finish_reason: str | None, reason: str
) -> None:
    sample = read(text, finish_reason)
    assert (sample.label, sample.reason) == (None, reason)


def test_a_number_keeps_its_spelling_and_a_missing_rationale_is_none() -> None:
    assert read('{"label": 7}').label == "7"
    assert read('{"label": 7}').rationale is None


@given(st.text(min_size=1, max_size=60), st.text(max_size=20), st.integers(0, 200))
def test_no_part_of_an_answer_is_read_as_a_whole(rationale: str, around: str, cut: int) -> None:
    text = json.dumps({"rationale": rationale, "label": "shipping"})
    if "{" not in around and "\nText:" not in around:
        assert read(around.replace("<", "") + text).label == "shipping"
    assert read(text[: min(cut, len(text) - 1)], "length").label is None


def test_the_labels_tokens_are_found_in_an_object() -> None:
    pieces = [('{"rationale": "label: \\"x\\"", "label": ', -1.0), ('"ship', -0.25), ("ping", -0.5)]
    tokens = [*pieces, ('"}', -2.0)]
    content = [{"token": token, "logprob": logprob} for token, logprob in tokens]
    raw = json.dumps({"choices": [{"logprobs": {"content": content}}]})
    assert label_logprob(raw, "".join(token for token, _ in tokens), PROMPT, TASK) == pytest.approx(
        -0.75
    )


def test_the_schema_has_the_prompts_order_and_the_labels_as_an_enum() -> None:
    schema = response_format(TASK, "rationale-first")["json_schema"]["schema"]
    assert list(schema["properties"]) == schema["required"] == ["rationale", "label"]
    assert schema["properties"]["label"] == {"type": "string", "enum": list(TASK.labels or ())}
    free = make_task(TaskSection(name="generation", data={"train": "-"}))
    schema = response_format(free, "label-first")["json_schema"]["schema"]
    assert list(schema["properties"]) == schema["required"] == ["label", "rationale"]
    assert schema["properties"]["label"] == {"type": "string"}


def test_exemplars_are_objects_that_are_read_as_their_labels() -> None:
    prompt = Prompt.model_validate(
        {
            "template": "Text: {{ text }}",
            "exemplars": [{"input": {"text": "t"}, "rationale": 'It is "late".', "label": "7"}],
            "format": "json",
        }
    )
    renderer = PromptRenderer(prompt, TASK)
    _, answer = renderer.exemplar(prompt.exemplars[0], 1)
    sample = read(answer, prompt=prompt)
    assert (sample.label, sample.rationale) == ("7", 'It is "late".')


def test_a_prompt_file_does_not_choose_the_format(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("template: '{{ text }}'\nformat: json\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.yaml:2"):
        read_prompt(str(tmp_path / "p.yaml"), None)


@pytest.mark.parametrize("accepted", ["json_schema", "json_object", None])
def test_a_refused_schema_falls_back_once(
    toy: Callable[..., Path], tmp_path: Path, accepted: str | None
) -> None:
    def endpoint(body: dict[str, Any], _number: int) -> str | Scripted:
        kind = body.get("response_format", {}).get("type")
        if kind != accepted:
            # https://github.com/llm-exe/llm-exe/issues/662
            message = "This response_format type is unavailable now"
            return 400, {}, json.dumps({"error": {"message": message}}).encode()
        label = "billing" if "invoice" in question(body) else "shipping"
        text = json.dumps({"rationale": f"The message is about {label}.", "label": label})
        return 200, {}, json.dumps(completion(text)).encode()

    path = toy(train=6, test=2, annotate={"format": "json", "concurrency": 1})
    with LoopbackServer(endpoint) as server:
        recipe = load_recipe(path, [f"teacher.base_url={server.url}"])
        result = annotate(recipe, out=tmp_path / "run")
        refused = {"json_schema": 0, "json_object": 1, None: 2}[accepted]
        assert server.requests == 8 + refused
        assert result.splits["train"].accepted == 6
        assert "JSON object" in server.bodies[-1]["messages"][0]["content"]
        annotate(recipe, out=tmp_path / "run")
        assert server.requests == 8 + refused
    assert read_rows(tmp_path / "run")[0]["rationale"].startswith("The message is about")
