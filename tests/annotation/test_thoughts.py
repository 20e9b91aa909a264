"""Reasoning is split off, whatever its form, and a draft's label is never read.

Forms: DeepSeek-R1 and Qwen3-Thinking templates write the opening tag
(https://github.com/vllm-project/vllm/blob/main/docs/features/reasoning_outputs.md), gpt-oss
channels (https://github.com/openai/harmony/blob/main/docs/format.md), their stripped form
(https://github.com/Augustas11/macprovider/issues/743), Magistral's [THINK].
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsbs.annotation.backends import completion
from dsbs.annotation.parse import parse_reply
from dsbs.annotation.thoughts import split_thoughts
from dsbs.config import TaskSection
from dsbs.prompting import Prompt
from dsbs.tasks import make_task

TASK = make_task(
    TaskSection(name="classification", labels=("billing", "shipping"), data={"train": "-"})
)
PROMPT = Prompt(template="Text: {{ text }}", stop=("\nText:",))
VISIBLE = "A parcel that is missing is a matter of delivery.\nAnswer: shipping"
DRAFT = "Okay. Let me think.\nAnswer: billing\nWait, no."
HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}"

FORMS = {
    "closing tag alone": "{}\n</think>\n\n{}",
    "think": "<think>\n{}\n</think>\n\n{}",
    "thinking": "<thinking>{}</thinking>{}",
    "reasoning": "<reasoning>{}</reasoning>\n{}",
    "thought": "<thought>{}</thought>\n{}",
    "namespaced": "<seed:think>{}</seed:think>{}",
    "upper case": "<THINK>{}</THINK>{}",
    "opened twice": "<think>\n<think>\n{}\n</think>\n{}",
    "nested": "<think>a <think>{}</think> c</think>\n{}",
    "closed twice": "{}</think>\n</think>\n{}",
    "two blocks": "<think>first</think><think>{}</think>\n{}",
    "Magistral": "[THINK]{}[/THINK]{}",
    "Kimi": "◁think▷{}◁/think▷{}",
    "OpenThinker": "<|begin_of_thought|>{}<|end_of_thought|>{}",
    "Command A": "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
    "Gemma 4": "<|channel>thought\n{}<channel|>{}",
    "harmony": HARMONY,
    "harmony, returned": HARMONY + "<|return|>",
    "harmony, with its start": "<|start|>assistant" + HARMONY,
    "harmony, begun": "{}<|end|><|start|>assistant<|channel|>final<|message|>{}",
    "harmony without channel tokens": "analysis<|message|>{}<|end|>assistantfinal<|message|>{}",
    "harmony, two analyses": "<|channel|>analysis<|message|>x<|end|><|start|>assistant" + HARMONY,
    "harmony, stripped": "analysis{}assistantfinal{}",
    "harmony, stripped, spaced": "analysis\n{}\nassistant final\n{}",
    "end token": "<think>{}</think>{}<|im_end|>",
    "another turn": "<think>{}</think>{}<|eot_id|><|start_header_id|>user\nAnswer: billing",
    "DeepSeek's end": "{}</think>{}<｜end▁of▁sentence｜>",
}


@pytest.mark.parametrize("form", FORMS)
def test_only_the_visible_part_is_read(form: str) -> None:
    text = FORMS[form].format(DRAFT, VISIBLE)
    sample = parse_reply(text, PROMPT, TASK, {}, "stop")
    assert (sample.label, sample.rationale) == ("shipping", VISIBLE.split("\n", maxsplit=1)[0])
    thought = parse_reply(text, PROMPT, TASK, {}, "stop", rationale_from="reasoning").rationale
    assert thought is not None
    assert "Let me think." in thought
    assert "|" not in thought


@pytest.mark.parametrize("form", FORMS)
def test_a_draft_is_not_read_where_the_reply_ends_in_the_thoughts(form: str) -> None:
    before = FORMS[form].format(DRAFT, "\0").split("\0", maxsplit=1)[0]
    cut = before[: before.index(DRAFT) + len(DRAFT)]
    sample = parse_reply(cut, PROMPT, TASK, {}, "length")
    assert (sample.label, sample.reason in ("truncated", "spent-on-reasoning")) == (None, True)


@pytest.mark.parametrize(
    "rest", [" fits, let me check that again", "\n\nWait, is it? The", "\nHmm"]
)
def test_a_cut_reply_that_goes_on_after_its_answer_is_a_thought(rest: str) -> None:
    text = f"The user asks for something. Maybe Answer: billing{rest}"
    assert parse_reply(text, PROMPT, TASK, {}, "length").reason == "truncated"


def test_a_cut_reply_that_ends_with_its_answer_is_read() -> None:
    for text in (VISIBLE, VISIBLE + ".", VISIBLE + "\n\nMessage: my invoice"):
        assert parse_reply(text, PROMPT, TASK, {}, "length").label == "shipping"


def test_a_tag_that_the_rationale_mentions_is_no_tag() -> None:
    text = "The page lacks a closing `</think>` after '<think>'.\nAnswer: shipping"
    assert split_thoughts(text) == (text, None)


plain = st.text(alphabet="abc .,\n:é¿", max_size=30)
MARKS = ["<think>", "</think>", "[THINK]", "[/THINK]", "<reasoning>", "</reasoning>"]


@given(st.lists(st.tuples(plain, plain), min_size=1, max_size=4), plain, st.booleans())
def test_blocks_of_thoughts_are_cut_out_wherever_they_stand(
    blocks: list[tuple[str, str]], rest: str, is_open: bool
) -> None:
    text = "".join(f"{visible}<think>{thought}</think>" for visible, thought in blocks) + rest
    visible = "".join(visible for visible, _ in blocks) + rest
    if is_open:
        text += "<thinking>Answer: billing"
    assert split_thoughts(text)[0] == visible


@given(st.lists(st.one_of(plain, st.sampled_from(MARKS)), max_size=12), plain)
def test_no_arrangement_of_tags_shows_what_is_before_the_last_unpaired_closing_one(
    pieces: list[str], rest: str
) -> None:
    text = "draft" + "".join(pieces) + "</think></think>" + rest
    visible, thoughts = split_thoughts(text)
    assert visible == rest
    assert thoughts is not None
    assert "draft" in thoughts


@given(st.text(max_size=60))
def test_text_without_marks_is_all_visible(text: str) -> None:
    if not any(mark in text for mark in "<[◁") and not text.lstrip().startswith("a"):
        assert split_thoughts(text) == (text, None)


MESSAGES: dict[str, dict[str, Any]] = {
    # https://api-docs.deepseek.com/guides/reasoning_model
    "reasoning_content": {"reasoning_content": "Hm.", "content": VISIBLE},
    # https://console.groq.com/docs/reasoning
    "reasoning": {"reasoning": "Hm.", "content": VISIBLE},
    # https://openrouter.ai/docs/use-cases/reasoning-tokens
    "reasoning_details": {
        "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}],
        "content": VISIBLE,
    },
    "a summary": {
        "reasoning": None,
        "reasoning_details": [
            {"type": "reasoning.summary", "summary": "Hm."},
            {"type": "reasoning.encrypted", "data": "eyJ"},
        ],
        "content": VISIBLE,
    },
    # https://docs.litellm.ai/docs/reasoning_content
    "thinking_blocks": {
        "thinking_blocks": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}],
        "content": VISIBLE,
    },
    # https://platform.claude.com/docs/en/build-with-claude/extended-thinking
    "Anthropic's parts": {
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "x"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": VISIBLE},
        ]
    },
    # https://docs.mistral.ai/capabilities/reasoning/
    "Mistral's parts": {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
            {"type": "text", "text": VISIBLE},
        ]
    },
}


@pytest.mark.parametrize("form", MESSAGES)
def test_separate_reasoning_is_kept_apart(form: str) -> None:
    body = {"choices": [{"message": MESSAGES[form], "finish_reason": "stop"}]}
    reply = completion(body, "{}", None, "online")
    assert (reply.text, reply.reasoning) == (VISIBLE, "Hm.")


@pytest.mark.parametrize("label", ["analysis", "commentary"])
def test_a_label_that_is_a_channels_name_is_read(label: str) -> None:
    labels = ("news", "analysis", "commentary")
    task = make_task(TaskSection(name="classification", labels=labels, data={"train": "-"}))
    prompt = Prompt(template="{{ text }}", order="label-first", anchor=())
    reply = f"{label}\nThe author gives an opinion on the vote."
    assert parse_reply(reply, prompt, task, {"text": "-"}, "stop").label == label
