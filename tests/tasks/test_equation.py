"""Arithmetic by whitelist: exact values, SVAMP's own spelling, and nothing else."""

from __future__ import annotations

import gzip
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbs.tasks.svamp import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    MAX_OPERATORS,
    Equation,
    parse_equation,
    same_value,
)


@pytest.mark.parametrize(
    ("text", "value", "canonical"),
    [
        ("7", 7, "7.0"),
        ("007", 7, "7.0"),
        (".5", Fraction(1, 2), "0.5"),
        ("2.50", Fraction(5, 2), "2.5"),
        ("2 + 3 * 4", 14, "( 2.0 + ( 3.0 * 4.0 ) )"),
        ("(2 + 3) * 4", 20, "( ( 2.0 + 3.0 ) * 4.0 )"),
        ("2 * 3 + 4 * 5", 26, "( ( 2.0 * 3.0 ) + ( 4.0 * 5.0 ) )"),
        ("10 - 4 - 3", 3, "( ( 10.0 - 4.0 ) - 3.0 )"),
        ("100 / 5 / 2", 10, "( ( 100.0 / 5.0 ) / 2.0 )"),
        ("100 / (5 / 2)", 40, "( 100.0 / ( 5.0 / 2.0 ) )"),
        ("1 / 3", Fraction(1, 3), "( 1.0 / 3.0 )"),
        ("((((7 * 12))))", 84, "( 7.0 * 12.0 )"),
        ("-5", -5, "-5.0"),
        ("10 - -3", 13, "( 10.0 - -3.0 )"),
        ("-(2 + 3) * 4", -20, "( -( 2.0 + 3.0 ) * 4.0 )"),
        ("7 × 12", 84, "( 7.0 * 12.0 )"),
        ("7 · 12", 84, "( 7.0 * 12.0 )"),
        ("7 x 12", 84, "( 7.0 * 12.0 )"),
        ("84 ÷ 2", 42, "( 84.0 / 2.0 )"),
        ("10 − 4", 6, "( 10.0 - 4.0 )"),
        ("[2 + 3] * 4", 20, "( ( 2.0 + 3.0 ) * 4.0 )"),
        ("1,250 + 3", 1253, "( 1250.0 + 3.0 )"),
        ("1,234,567.5", Fraction("1234567.5"), "1234567.5"),
        ("  84/2  ", 42, "( 84.0 / 2.0 )"),
    ],
)
def test_an_expression_has_an_exact_value_and_one_spelling(
    text: str, value: Fraction, canonical: str
) -> None:
    assert parse_equation(text) == Equation(Fraction(value), canonical)


@pytest.mark.parametrize(
    "text", ["1 / 0", "(3 + 4) / (2 - 2)", "5 - 1 / 0", "-(1 / 0)", "1 / (1 / 0)"]
)
def test_division_by_zero_is_readable_and_has_no_value(text: str) -> None:
    equation = parse_equation(text)
    assert equation is not None
    assert equation.value is None
    assert not same_value(text, text)
    assert not same_value(text, "0")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "some - 18",
        "2 * x",
        "x",
        "7x",
        "seven",
        "1e3",
        "0x10",
        "1_000",
        "1,25",
        "12,3456",
        "1..2",
        "1.2.3",
        "5.",
        "3 +",
        "* 3",
        "+3",
        "()",
        "(3",
        "3)",
        "3 4",
        "2(3)",
        "(2)(3)",
        "3 ** 2",
        "3 // 2",
        "3 % 2",
        "3 = 3",
        "$3",
        "3;4",
        "__import__('os').system('true')",
        "().__class__",
        "exit()",
        "1 if 1 else 2",
        "lambda: 1",
        "'a' * 9",
        "٣ + 4",
        "²",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    assert parse_equation(text) is None


def test_a_python_payload_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "made"
    assert parse_equation(f"__import__('pathlib').Path({str(target)!r}).touch()") is None
    assert not target.exists()


@pytest.mark.parametrize(
    "text",
    [
        "1" + " " * MAX_CHARACTERS + "+ 1",
        "9" * 30,
        "9*" * (MAX_OPERATORS + 1) + "9",
        "(" * (MAX_DEPTH + 2) + "1" + ")" * (MAX_DEPTH + 2),
        "-" * (MAX_DEPTH + 2) + "1",
        "(" * 250,
        "-" * 250,
        "9" * 100_000,
    ],
    ids=["long", "digits", "tokens", "parentheses", "minuses", "open", "only minuses", "huge"],
)
def test_size_and_depth_are_limited(text: str) -> None:
    assert parse_equation(text) is None


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("84 / 2", "( 84.0 / 2.0 )", True),
        ("84 / 2", "42", True),
        ("3 + 4", "4 + 3", True),
        ("1 / 3", "0.33333", True),
        ("1 / 3", "0.33", False),
        ("84 / 2", "84 * 2", False),
        ("5", "-5", False),
        ("some", "some", False),
    ],
)
def test_expressions_are_the_same_by_value(a: str, b: str, same: bool) -> None:
    assert same_value(a, b) is same
    assert same_value(b, a) is same


# --- against Python's own arithmetic over fractions

numbers = st.one_of(
    st.integers(0, 9999).map(str),
    st.tuples(st.integers(0, 999), st.integers(0, 99)).map(lambda n: f"{n[0]}.{n[1]:02d}"),
)
expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" + ", "-", " * ", "/", "+", " - "]), inner).map("".join),
        inner.map("({})".format),
        inner.map("-({})".format),
    ),
    max_leaves=8,
)


def by_python(text: str) -> Fraction | None:
    try:
        return eval(re.sub(r"\d+(?:\.\d+)?", lambda n: f"F('{n.group()}')", text), {"F": Fraction})
    except ZeroDivisionError:
        return None


@settings(max_examples=300, deadline=None)
@given(expressions)
def test_values_are_those_of_python(text: str) -> None:
    equation = parse_equation(text)
    assert equation is not None, text
    assert equation.value == by_python(text)
    assert by_python(equation.text) == equation.value  # the canonical spelling says the same
    again = parse_equation(equation.text)
    assert again == equation  # and is its own canonical spelling


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789.,+-*/()[]×÷x =$", max_size=40) | st.text(max_size=40))
def test_no_text_makes_it_fail(text: str) -> None:
    equation = parse_equation(text)
    assert equation is None or equation.text


@pytest.mark.parametrize(
    "text",
    [" + ".join(["1"] * 25), "2*" * 35 + "2", "123456789012345678 + 1", "-" * 20 + "1"],
    ids=["long sum", "long product", "many digits", "many minuses"],
)
def test_what_is_readable_has_a_spelling_that_is_readable_too(text: str) -> None:
    """Labels are kept in canonical spelling, which must be readable again."""
    equation = parse_equation(text)
    if equation is not None:
        again = parse_equation(equation.text)
        assert again is not None
        assert again.value == equation.value
        assert same_value(equation.text, text)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_spelling_is_svamps_own_on_every_row(shared_data: Path, split: str) -> None:
    with gzip.open(
        shared_data / "svamp" / f"{split}.jsonl.gz", "rt", encoding="utf-8", newline="\n"
    ) as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == {"train": 800, "test": 200}[split]
    for row in rows:
        gold = row["label"].replace(
            " 10 ", " 10.0 "
        )  # svamp-test-00144 alone has a number without decimals
        assert gold == row["label"] or row["id"] == "svamp-test-00144"
        as_people_write = (
            gold.replace(".0 ", " ").replace("( ", "(").replace(" )", ")").replace("*", "×")
        )
        for text in (row["label"], as_people_write):
            equation = parse_equation(text)
            assert equation is not None, row["id"]
            assert equation.text == gold, row["id"]
        if row["meta"]["source_id"] != "chal-680":  # its equation and its answer disagree
            assert float(parse_equation(gold).value) == pytest.approx(
                row["meta"]["answer"], abs=1e-2
            ), row["id"]
