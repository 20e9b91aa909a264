"""Numbers for people, and Markdown checked with a parser of CommonMark and GitHub's tables."""

from __future__ import annotations

import html
import re

import pytest
from markdown_it import MarkdownIt

from dsbs.formatting import (
    confidence_interval,
    count,
    dollars,
    duration,
    escape_markdown,
    listing,
    markdown_paragraph,
    markdown_table,
    megabytes,
    milliseconds,
    one_line,
    p_value,
    percent,
    points,
    rate,
    sentence_list,
    signed,
    signed_confidence_interval,
)
from dsbs.records.measures import wilson

# Links of bare addresses need another package, and have a test of their own.
PARSER = MarkdownIt("gfm-like", {"linkify": False})
HOSTILE = [
    "<script>alert(1)</script>",
    "{{ 7*7 }} *x* _y_ **z** `code` ~~gone~~",
    "[a](javascript:alert(1)) ![i](x) <http://x.y>",
    "a | b || c \\| d",
    "&lt; &amp; &#60; AT&T",
    "---",
    "# heading",
    "- item",
    "12. item",
    "1) item",
    "= = =",
    "> quoted",
    "p < .001, a<b and <!-- c --> d",
    "$x$ \\(y\\) @someone",
    "+7.0",
]


def rendered_text(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", PARSER.render(page))).strip()


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_literally(text: str) -> None:
    assert PARSER.render(markdown_paragraph(text)).startswith("<p>")
    assert rendered_text(markdown_paragraph(text)) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_stays_one_cell(text: str) -> None:
    page = "\n".join(markdown_table(["a", "b"], [[escape_markdown(text), "end"]]))
    cells = re.findall(r"<td>(.*?)</td>", PARSER.render(page), flags=re.DOTALL)
    assert [html.unescape(cell) for cell in cells] == [text, "end"]


def test_bare_addresses_make_no_links() -> None:
    assert escape_markdown("see https://a.b and www.c.d") == "see https\\://a.b and www\\.c.d"


def test_line_ends_and_bidirectional_characters_are_replaced() -> None:
    assert one_line("a\r\nb\u2028c\x00d\ud800e\tf") == "a b c d e f"
    assert one_line("\u202eevil") == "\ufffdevil"
    assert one_line("x" * 50, max_length=10) == "x" * 9 + "…"


# --- numbers


def test_shares_and_differences() -> None:
    assert percent(0.7315) == "73.2%"
    assert confidence_interval((0.452, 0.585)) == "95% CI [45.2, 58.5]"
    assert points(0.042) == "+4.2 points"
    assert points(-0.042) == "−4.2 points"
    assert signed_confidence_interval((-0.038, 0.123)) == "95% CI [−3.8, +12.3]"
    assert signed(-0.0421, 3) == "−0.042"


def test_a_difference_that_rounds_to_zero_has_no_minus() -> None:
    assert points(-0.0001) == "+0.0 points"


def test_a_rate_has_its_interval() -> None:
    assert rate(wilson(632, 1000)) == "63.2% (95% CI [60.2, 66.1])"
    assert rate(None) == "–"


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0004, "p < .001"), (0.004, "p = .004"), (0.0496, "p = .050"), (0.706, "p = .71")],
)
def test_p_values(p: float, text: str) -> None:
    assert p_value(p) == text


def test_counts_have_singular_and_plural() -> None:
    assert count(1, "row") == "1 row"
    assert count(1234, "row") == "1,234 rows"
    assert count(2, "reply", "replies") == "2 replies"
    assert listing({"truncated": 2, "no-label": 1200}) == "no-label 1,200, truncated 2"
    assert sentence_list(["a", "b", "c"]) == "a, b and c"
    assert sentence_list(["a"]) == "a"


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        (None, "price unknown"),
        (0, "$0.00"),
        (12345.6, "$12,345.60"),
        (0.4, "$0.40"),
        (0.0301, "$0.03"),
        (0.00012, "$0.00012"),
        (1e-9, "$0.000000001"),
    ],
)
def test_dollars_keep_significant_digits(usd: float | None, text: str) -> None:
    assert dollars(usd) == text


def test_times_and_sizes_keep_significant_digits() -> None:
    times = [milliseconds(time) for time in (0.01234, 26.61, 610.4, 1034.2)]
    assert times == ["0.0123 ms", "26.6 ms", "610 ms", "1,034 ms"]
    assert [duration(seconds) for seconds in (2.46, 48, 720, 11_000)] == [
        "2.5 s",
        "48 s",
        "12 min",
        "3.1 h",
    ]
    assert megabytes(1204.46) == "1,204.5 MB"
