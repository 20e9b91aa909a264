"""Several labels, scores and fields: what is written is read back, and nothing else."""

from __future__ import annotations

import json
import string
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from dsbs import UserError
from dsbs.config import TaskSection
from dsbs.records import Unreadable
from dsbs.tasks import Task, make_task

Words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12
)
# Texts of little else than what separates, wraps and ends values.
Marks = st.text("ab1 \"'*`“”‘’.,;:|->#[]", min_size=1, max_size=8)


def task(**keys: Any) -> Task:
    return make_task(TaskSection(data={"train": "rows.csv"}, **keys))


def valid_task(**keys: Any) -> Task:
    """The task, where the recipe's checks allow it."""
    try:
        return task(**keys)
    except ValidationError:
        assume(False)
        raise AssertionError from None


# --- several labels

TAGS = task(name="multilabel", labels=["billing", "shipping", "food and drink", "a, b"])


@given(st.lists(Words, min_size=2, max_size=6), st.data())
def test_a_set_of_labels_is_read_back_in_every_form(labels: list[str], data: st.DataObject) -> None:
    tags = valid_task(name="multilabel", labels=labels)
    chosen = data.draw(st.lists(st.sampled_from(labels), unique=True))
    written = tags.gold(chosen, {}, "row 1")
    assert tags.value(written) == sorted(chosen)
    assert tags.read_label(written, {}) == written
    assert tags.read_label(tags.json_text(chosen) or "", {}) == written
    assert tags.gold(tags.gold_cell(json.dumps(chosen), "label", "row 1"), {}, "row 1") == written
    bullets = "\n".join(f"- {label}" for label in chosen)
    if chosen and all(label == label.strip(" -–—•*#>:=") for label in chosen):
        assert tags.read_label(bullets, {}) in (written, *_failures(tags, bullets))


def _failures(tags: Task, text: str) -> list[Unreadable]:
    """A list in another form may be unreadable, but never another set."""
    read = tags.read_label(text, {})
    return [read] if isinstance(read, Unreadable) else []


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("billing", ["billing"]),
        ("Billing, Shipping", ["billing", "shipping"]),
        ("shipping; billing; shipping", ["billing", "shipping"]),
        (" **billing** and **shipping**.", ["billing", "shipping"]),
        ("- billing\n- food and drink\n\nThese two fit.", ["billing", "food and drink"]),
        ("1. billing\n2. shipping", ["billing", "shipping"]),
        ("food and drink, shipping", ["food and drink", "shipping"]),
        ("a, b, billing", ["a, b", "billing"]),
        ('["a, b", "billing"]', ["a, b", "billing"]),
        ("None.", []),
        ("[]", []),
        ('["none"]', []),
        ("billing\nShipping\n\nThe text mentions food and drink, too.", ["billing", "shipping"]),
        ('```json\n["billing",\n"shipping"]\n```', ["billing", "shipping"]),
        ("billing\nThe text mentions shipping, too.", ["billing"]),
    ],
)
def test_lists_of_labels_in_replies(text: str, labels: list[str]) -> None:
    read = TAGS.read_label(text, {})
    assert isinstance(read, str) and TAGS.value(read) == sorted(labels)


@pytest.mark.parametrize(
    ("text", "reason", "detail"),
    [
        ("billing, refunds", "label-outside-set", "refunds"),
        ('["billing", "refunds"]', "label-outside-set", "refunds"),
        ("", "empty", ""),
        ("** **", "empty", ""),
    ],
)
def test_an_unknown_label_rejects_the_list_with_its_name(
    text: str, reason: str, detail: str
) -> None:
    read = TAGS.read_label(text, {})
    assert isinstance(read, Unreadable) and read.reason == reason and detail in read.detail


def test_a_mark_that_is_a_label_is_no_separator() -> None:
    marks = task(name="multilabel", labels=["0", "|"])
    assert marks.read_label("- 0\n- |", {}) == "0; |"


def test_a_list_with_two_readings_is_none_of_them() -> None:
    tags = task(name="multilabel", labels=["salt", "pepper", "salt and pepper"])
    assert tags.read_label("salt; pepper", {}) == "pepper; salt"
    assert tags.read_label("salt and pepper", {}) == "salt and pepper", "spelled so"
    read = tags.read_label("pepper, salt and pepper", {})
    assert isinstance(read, Unreadable) and read.reason == "several-answers"


def test_a_label_that_reads_like_none_is_a_label() -> None:
    tags = task(name="multilabel", labels=["no labels", "other"])
    assert tags.gold(tags.gold_cell("no labels", "label", "x"), {}, "x") == "no labels"
    assert tags.read_label("No labels.", {}) == "no labels"
    assert tags.read_label("none of them", {}) == "none"


def test_a_label_that_begins_with_a_bracket_is_no_json() -> None:
    tags = task(name="multilabel", labels=["[x]", "y"], columns={"separator": "|"})
    assert tags.gold(tags.gold_cell("[x]|y", "label", "x"), {}, "x") == "[x]; y"


def test_cells_of_labels() -> None:
    tags = task(name="multilabel", labels=["a", "b", "c"], columns={"separator": "|"})
    cells = ["a|c", "a | c", ["c", "a"], '["a", "c"]']
    assert {tags.gold(tags.gold_cell(cell, "label", "x"), {}, "x") for cell in cells} == {"a; c"}
    assert tags.gold(tags.gold_cell("none", "label", "x"), {}, "x") == "none"
    assert tags.gold([], {}, "x") == "none"
    assert tags.gold_cell("", "label", "x") is None
    with pytest.raises(UserError, match="'None' is not one of the task's labels"):
        tags.gold([None], {}, "x")
    with pytest.raises(UserError, match=r"rows.csv:3: 'd' is not one of the task's labels"):
        tags.gold(["a", "d"], {}, "rows.csv:3")


# --- scores


@given(
    st.integers(-20, 20),
    st.integers(1, 10),
    st.sampled_from([1, 2, 0.5, 0.25, 0.1, 0.05]),
    st.data(),
)
def test_every_point_of_a_scale_is_read_back_in_every_script(
    low: int, width: int, step: float, data: st.DataObject
) -> None:
    scale = valid_task(name="score", range=[low, low + width], step=step)
    label = data.draw(st.sampled_from(scale.labels))
    assert scale.read_label(label, {}) == label
    assert scale.gold(float(label), {}, "x") == scale.gold(label, {}, "x") == label
    assert scale.value(label) == scale.number(label) == float(label)
    zero = data.draw(st.sampled_from(["0", "٠", "०", "０"]))
    script = label.translate(
        str.maketrans(string.digits, "".join(chr(ord(zero) + i) for i in range(10)))
    )
    minus = data.draw(st.sampled_from(["-", "−"]))
    forms = [script.replace("-", minus), f"**{label}**", f"Score: {label}.", f"{label} points"]
    if scale.labels and float(scale.labels[-1]) > 0:
        forms.append(f"{label}/{scale.labels[-1]}")
    assert {scale.read_label(form, {}) for form in forms} == {label}


@given(st.decimals(-100, 100, places=2))
def test_a_number_beside_the_scale_is_no_point(number: Any) -> None:
    scale = task(name="score", range=[1, 5])
    read = scale.read_label(str(number), {})
    if number in (1, 2, 3, 4, 5):
        assert read == str(int(number))
    else:
        assert isinstance(read, Unreadable) and read.reason == "label-outside-set"


@pytest.mark.parametrize("value", [0.1 + 0.2, "0.30000000000000004", 0.30000001192092896])
def test_a_computed_gold_score_is_the_point_that_it_stands_for(value: Any) -> None:
    scale = task(name="score", range=[0, 1], step=0.1)
    assert scale.gold(value, {}, "x") == "0.3"
    assert scale.gold(0.3 - 0.1 - 0.1 - 0.1, {}, "x") == "0"


@pytest.mark.parametrize("value", [0.3001, "0.3\n0.5", "nan", "inf", "0_1", 10**400, True])
def test_a_gold_score_beside_a_point_is_none(value: Any) -> None:
    with pytest.raises(UserError, match="is not a number from 0 to 1"):
        task(name="score", range=[0, 1], step=0.1).gold(value, {}, "x")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("4 out of 5", "4"),
        ("4 of 5 stars", "4"),
        ("4,0", "4"),
        ("4 (good)", "4"),
        ("3 or 4", "several-answers"),
        ("3-4", "several-answers"),
        ("4/10", "label-outside-set"),
        ("80%", "label-outside-set"),
        ("3.5", "label-outside-set"),
        ("good", "label-outside-set"),
        ("", "empty"),
    ],
)
def test_scores_in_replies(text: str, label: str) -> None:
    read = task(name="score", range=[1, 5]).read_label(text, {})
    assert (read.reason if isinstance(read, Unreadable) else read) == label


# --- fields

FIELDS = {
    "sender": {"type": "text"},
    "kind": {"type": "label", "labels": ["invoice", "credit note"]},
    "total amount": {"type": "number"},
    "due": {"type": "date"},
    "items": {"type": "list"},
}
INVOICE = task(name="extraction", fields=FIELDS)
Values = st.fixed_dictionaries(
    {},
    optional={
        "sender": Words | Marks,
        "kind": st.sampled_from(["invoice", "credit note"]),
        "total amount": st.one_of(
            st.integers(-(10**12), 10**12), st.floats(-1e9, 1e9, allow_subnormal=False)
        ),
        "due": st.dates(),
        "items": st.lists(Words | Marks, max_size=4),
    },
)


@given(Values)
def test_fields_are_read_back_in_every_form(values: dict[str, Any]) -> None:
    try:
        written = INVOICE.gold(values, {}, "x")
    except UserError:  # a text that means "null", or has a field's name with a colon
        assume(False)
        raise
    assert INVOICE.read_label(written, {}) == written
    assert INVOICE.read_label(" ".join(written.split("\n")), {}) == written, (
        "a T5 has no line breaks"
    )
    assert INVOICE.gold(INVOICE.value(written), {}, "x") == written
    reply = json.loads(json.dumps(INVOICE.value(written)), parse_float=str, parse_int=str)
    as_json = INVOICE.json_text(reply)
    assert INVOICE.read_label(as_json or "", {}) == written
    assert INVOICE.correct(written, written)


@given(Values, Values)
def test_different_values_are_never_equal_rows(one: dict[str, Any], two: dict[str, Any]) -> None:
    try:
        first, second = INVOICE.gold(one, {}, "x"), INVOICE.gold(two, {}, "x")
    except UserError:
        assume(False)
        raise
    parts = INVOICE.correct_parts(first, second)
    assert all(parts.values()) == INVOICE.correct(first, second)
    if first == second:
        assert all(parts.values())


REPLY = (
    "sender: Ann Lee\nkind: Invoice\ntotal amount: $1,250.00\ndue: 3 March 2025\nitems: pen | ink"
)
CANONICAL = "sender: Ann Lee\nkind: invoice\ntotal amount: 1250\ndue: 2025-03-03\nitems: pen | ink"


@pytest.mark.parametrize(
    "text",
    [
        REPLY,
        "- **Sender:** Ann Lee\n- **Kind:** invoice\n- **Total amount:** 1250\n"
        "- **Due:** 2025-03-03\n- **Items:** pen | ink\n\nThat is all.",
        "kind: invoice; sender: Ann Lee; total_amount: 1250; due: 2025/03/03; items: pen | ink",
        '{"sender": "Ann Lee", "kind": "invoice", "total_amount": 1250, "due": "2025-03-03", '
        '"items": ["pen", "ink"]}',
        "\n".join(f"**{line}**" for line in REPLY.split("\n")),
        REPLY.replace("pen | ink", '["pen", "ink"]'),
    ],
)
def test_replies_with_fields(text: str) -> None:
    assert INVOICE.read_label(text, {}) == CANONICAL
    assert INVOICE.value(CANONICAL) == {
        "sender": "Ann Lee",
        "kind": "invoice",
        "total amount": 1250,
        "due": "2025-03-03",
        "items": ["pen", "ink"],
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("sender: Ann\nsender: Bob", "several-answers"),
        ("kind: receipt", "label-outside-set"),
        ("total amount: 3 or 4", "several-answers"),
        ("total amount: some", "unparsed"),
        ("total amount: 1.5 million", "unparsed"),
        ("total amount: $1.2 M", "unparsed"),
        ("total amount: 5 K", "unparsed"),
        ("total amount: 3 Mrd", "unparsed"),
        ("total amount: 2,5 Tsd.", "unparsed"),
        ("due: March 2025", "unparsed"),
        ("due: 2-3 March 2025", "unparsed"),
        ("due: soon", "unparsed"),
        ("due: 31 February 2025", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_a_bad_value_is_no_other_value(line: str, reason: str) -> None:
    name = line.partition(":")[0]
    lines = [other for other in CANONICAL.split("\n") if not other.startswith(name or "items")]
    read = INVOICE.read_label("\n".join([*lines, line]), {})
    assert isinstance(read, Unreadable) and read.reason == reason


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1.234.567,8", 1234567.8),
        ("1,234,567.8", 1234567.8),
        ("1'234.5", 1234.5),
        ("1,234", 1234),
        ("1.234", 1.234),
        ("0,234", 0.234),
        ("1.234.567", 1234567),
        ("-$5", -5),
        ("$-5", -5),
    ],
)
def test_marks_in_numbers(text: str, number: float) -> None:
    written = INVOICE.gold({"total amount": text}, {}, "x")
    assert INVOICE.value(written)["total amount"] == number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"Acme Inc."', "Acme Inc."),
        ('"Acme Inc.".', "Acme Inc."),
        ("**“Ann”**", "Ann"),
        ('"A" and "B"', '"A" and "B"'),
        ("'90s and '00s'", "'90s and '00s'"),
        ("__init__", "__init__"),
    ],
)
def test_only_quotes_around_all_of_a_text_are_removed(text: str, value: str) -> None:
    assert INVOICE.value(INVOICE.gold({"sender": text}, {}, "x"))["sender"] == value


def test_marks_between_fields_are_no_part_of_a_value() -> None:
    written = INVOICE.gold({"sender": "Ann, ,;", "items": ["pen", "ink , ,"]}, {}, "x")
    assert INVOICE.value(written)["sender"] == "Ann"
    assert INVOICE.read_label(written, {}) == written
    assert INVOICE.gold(INVOICE.value(written), {}, "x") == written


def test_a_json_reply_with_two_values_of_a_field_has_none() -> None:
    read = INVOICE.read_label('{"total amount": 5, "Total_Amount": 6}', {})
    assert isinstance(read, Unreadable) and read.reason == "several-answers"


def test_values_that_must_occur_in_the_input() -> None:
    fields = {
        "name": {"type": "text", "verbatim": True},
        "tags": {"type": "list", "verbatim": True},
    }
    names = task(name="extraction", fields=fields)
    label = names.gold({"name": "ann  LEE", "tags": ["red", "blue"]}, {}, "x")
    assert names.not_in_input(label, {"text": "Ann Lee likes red."}) == ["tags"]
    assert names.not_in_input(label, {"text": "Ann\nLee likes red and blue."}) == []


def test_columns_are_fields_and_the_rest_is_the_text() -> None:
    names = task(name="extraction", fields=FIELDS, columns={"sender": "from"})
    row = {
        "from": "Ann",
        "kind": "",
        "total amount": 3.0,
        "due": None,
        "items": "a|b",
        "mail": "Hi",
    }
    assert names.fields(row, "x") == {"text": "Hi"}
    label = names.gold(names.gold_columns(row, "x"), {}, "x")
    assert names.value(label) == {
        "sender": "Ann", "kind": None, "total amount": 3, "due": None, "items": ["a", "b"]
    }  # fmt: skip
    assert names.gold_columns({"mail": "Hi", "from": ""}, "x") is None


def test_what_the_student_reads_is_no_gold_value() -> None:
    mails = task(name="extraction", fields=FIELDS, input="{{ sender }}: {{ body }}")
    row = {"sender": "Ann <ann@example.org>", "body": "Hi", "total amount": 3}
    assert mails.gold_columns(row, "x") == {"total amount": 3}
    assert mails.gold_columns(row | {"total amount": None}, "x") is None


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"sender": "null"}, "means that there is no value"),
        ({"sender": "see Due: Monday"}, "has a field's name and a colon in it"),
        ({"total amount": "many"}, "not a number"),
        ({"due": "03/2025"}, "lacks the year"),
        ({"sender": "Ann", "Sender": "Bob"}, "has the field 'sender' twice"),
        ({"colour": "red"}, "a field 'colour' that task.fields does not have"),
    ],
)
def test_gold_values_that_are_no_values(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        INVOICE.gold(values, {}, "rows.jsonl:4")


# --- parts


@given(st.lists(st.sampled_from(TAGS.head_labels), unique=True), Values)
def test_a_label_consists_of_its_parts(labels: list[str], values: dict[str, Any]) -> None:
    tags = TAGS.gold(labels, {}, "x")
    assert TAGS.label_of_parts(TAGS.parts(tags)) == tags
    assert [name for name, value in TAGS.parts(tags).items() if value] == [
        name for name in TAGS.part_names if name in labels
    ]
    assert TAGS.classes(tags) == (tuple(sorted(labels)) or ("none",))
    try:
        fields = INVOICE.gold(values, {}, "x")
    except UserError:
        assume(False)
        raise
    assert INVOICE.label_of_parts(INVOICE.parts(fields)) == fields
    assert tuple(INVOICE.parts(fields)) == INVOICE.part_names == tuple(FIELDS)


def test_only_a_scale_has_an_order() -> None:
    assert task(name="score", range=[1, 5]).has_order
    assert not TAGS.has_order and not INVOICE.has_order
    assert not task(name="classification", labels=["1", "2"]).has_order


@pytest.mark.parametrize("text", ["?", "No fields."])
def test_text_without_a_field_is_unparsed(text: str) -> None:
    read = INVOICE.read_label(text, {})
    assert isinstance(read, Unreadable) and read.reason == "unparsed"


def test_a_list_of_numbers_is_read_as_labels_that_are_numbers() -> None:
    section = {"name": "multilabel", "labels": ["1", "2", "3"], "data": {"train": "-"}}
    task = make_task(TaskSection.model_validate(section))
    assert task.read_label("[1, 3]", {}) == task.read_label('["1", "3"]', {}) == "1; 3"
    assert isinstance(task.read_label("[1, 4]", {}), Unreadable)
    assert isinstance(task.read_label("[true]", {}), Unreadable)
