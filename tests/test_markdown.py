"""Text of data in Markdown is shown as it is. Held against a parser of CommonMark and GitHub's tables."""

from __future__ import annotations

import html
import re

import pytest
from markdown_it import MarkdownIt

from dsbs.formatting import escape_markdown, markdown_paragraph, markdown_table, one_line

PARSER = MarkdownIt(
    "gfm-like", {"linkify": False}
)  # bare addresses are looked for below: linkify is a package of its own
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


def shown(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", PARSER.render(page))).strip()


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_as_it_is(text: str) -> None:
    assert PARSER.render(markdown_paragraph(text)).startswith("<p>")
    assert shown(markdown_paragraph(text)) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_stays_one_cell(text: str) -> None:
    page = "\n".join(markdown_table(["a", "b"], [[escape_markdown(text), "end"]]))
    cells = re.findall(r"<td>(.*?)</td>", PARSER.render(page), flags=re.DOTALL)
    assert [html.unescape(cell) for cell in cells] == [text, "end"]


def test_bare_addresses_make_no_links() -> None:
    assert escape_markdown("see https://a.b and www.c.d") == "see https\\://a.b and www\\.c.d"


def test_line_ends_and_turning_characters_do_not_come_through() -> None:
    assert one_line("a\r\nb\u2028c\x00d\ud800e\tf") == "a b c d e f"
    assert one_line("\u202eevil") == "\ufffdevil"
    assert one_line("x" * 50, max_length=10) == "x" * 9 + "…"
