"""The page in a browser: layout, contrast, escaped text, filters, keyboard and printing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from sample_run import make_run

from dsbs import evaluate
from dsbs.config import Recipe
from dsbs.reporting.run import PAGE_BYTES, report_runs

pytest.importorskip(
    "playwright.sync_api", reason="Playwright's package is not installed (pip install dsbs[dev])"
)
from playwright.sync_api import Browser, Page, expect

HOSTILE = {
    0: "<script>alert(1)</script>",
    1: "</script><img src=x onerror=alert(2)>",
    2: "{{ 7*7 }}",
    3: "\u202eevil \u2067turned",
    4: "word " * 4000,
    5: "nul \x00 bell \x07 del \x7f",
}
# Texts with a contrast below 4.5 to their background (WCAG 2.2, 1.4.3).
LOW_CONTRAST = """() => {
  const channel = (c) => {
    c /= 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  };
  const luminance = ([r, g, b]) =>
    0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const background = (node) => {
    for (; node; node = node.parentElement) {
      const color = rgb(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
  };
  const low = [];
  for (const node of document.querySelectorAll("body *:not(script)")) {
    const hasText = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!hasText || node.closest("svg, :disabled, .skip") || !node.checkVisibility()) continue;
    const levels = [rgb(getComputedStyle(node).color), background(node)].map(luminance);
    const contrast = (Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05);
    if (contrast < 4.5) low.push([node.textContent.trim().slice(0, 40), contrast]);
  }
  return low;
}"""
OPEN_ALL = "document.querySelectorAll('details').forEach((node) => { node.open = true; })"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return report_runs([make_run(folder / "sample", texts=HOSTILE)])


@contextmanager
def open_page(
    browser: Browser, path: Path, width: int = 1280, scheme: str = "light"
) -> Iterator[Page]:
    """A loaded page. It may not request anything else, log to the console or open a dialog."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,  # type: ignore[arg-type]
    )
    page = context.new_page()
    requests: list[str] = []
    messages: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("dialog", lambda dialog: (messages.append("dialog"), dialog.dismiss()))
    page.goto(path.as_uri())
    expect(page.locator("#browser")).to_be_visible()
    yield page
    assert requests == [path.as_uri()]
    assert messages == []
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window_and_can_be_read(
    browser: Browser, report: Path, width: int, scheme: str
) -> None:
    with open_page(browser, report, width, scheme) as page:
        page.evaluate(OPEN_ALL)
        expect(page.locator("#rows .row")).to_have_count(50)
        assert page.evaluate("document.documentElement.scrollWidth") == width, (
            "the page does not scroll sideways"
        )
        assert page.evaluate(LOW_CONTRAST) == []
        red, green, blue = page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )
        assert (red + green + blue > 700) == (scheme == "light")


def test_text_from_data_is_shown_as_text(browser: Browser, report: Path) -> None:
    with open_page(browser, report) as page:
        for number, text in HOSTILE.items():
            row = page.locator("#rows > li").nth(number)
            row.locator("summary").click()
            shown = text.replace("\x00", "\\x00").replace("\x07", "\\x07").replace("\x7f", "\\x7f")
            for column in (".fields", ".reasons"):
                cell = row.locator(f"{column} .text").first
                assert cell.evaluate("(node) => node.textContent") == shown
                assert cell.evaluate("(node) => getComputedStyle(node).unicodeBidi") == "isolate"
        assert page.locator("#browser img, #browser script").count() == 0
        first, second = page.locator("#row-3 .excerpt bdi").all()
        first_box = first.bounding_box()
        second_box = second.bounding_box()
        assert first_box and second_box
        assert first_box["x"] < second_box["x"], "a text does not turn its neighbors"


def test_answers_show_the_fields_in_which_they_differ(browser: Browser, tmp_path: Path) -> None:
    rows = [
        {"id": "1", "text": "From Ann, 3", "label": {"sender": "Ann", "total": 3}},
        {"id": "2", "text": "From Bob", "label": {"sender": "Bob", "total": None}},
    ]
    answers = ["sender: ann\ntotal: 4", "sender: bob\ntotal: null"]
    lines = [{"id": str(i), "prediction": text} for i, text in enumerate(answers, 1)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    recipe = Recipe.model_validate(
        {
            "name": "fields",
            "task": {
                "name": "extraction",
                "fields": {"sender": {"type": "text"}, "total": {"type": "number"}},
                "data": {"train": path, "test": path},
            },
            "teacher": {"kind": "human"},
            "eval": {
                "floors": [],
                "predictions": {"rules": str(write_jsonl(tmp_path / "rules.jsonl", lines))},
            },
        }
    )
    evaluate(recipe, out=tmp_path / "run")
    with open_page(browser, report_runs([tmp_path / "run"])) as page:
        expected = ["total: 4 (gold: 3)", "as gold"]
        for number, text in enumerate(expected):
            row = page.locator("#rows > li").nth(number)
            row.locator("summary").click()
            expect(row.locator("tbody td").first).to_have_text(text)


def test_filters_and_search_choose_rows(browser: Browser, report: Path) -> None:
    with open_page(browser, report) as page:
        row_count = page.locator("#row-count")
        expect(row_count).to_have_text("60 of 60 rows")
        counts = {
            name: int(page.inner_text(f"#many-{name}"))
            for name in ("wins", "losses", "both-wrong", "both-right")
        }
        assert sum(counts.values()) == 60, "every row is of exactly one kind"
        page.get_by_label("wins").check()
        expect(row_count).to_have_text(f"{counts['wins']} of 60 rows")
        first = page.locator("#first").input_value()
        second = page.locator("#second").input_value()
        page.select_option("#first", second)
        page.select_option("#second", first)
        expect(row_count).to_have_text(f"{counts['losses']} of 60 rows")
        page.locator("input[value=all]").check()
        page.fill("#query", "DOG 17")
        expect(row_count).to_have_text("1 of 60 rows")
        expect(page.locator("#rows summary")).to_contain_text("A dog number 17")
        page.fill("#query", "no row has this")
        expect(row_count).to_have_text("0 of 60 rows")
        expect(page.locator("#rows > li")).to_have_count(0)


def test_a_filter_shows_matching_rows(browser: Browser, report: Path) -> None:
    with open_page(browser, report) as page:
        page.get_by_label("teacher wrong").check()
        assert int(page.inner_text("#many-teacher-wrong")) > 0
        page.locator("#rows summary").first.click()
        lines = page.locator("#rows .row").first.locator("tbody tr")
        answers = dict(
            zip(
                lines.locator("th").all_inner_texts(),
                lines.locator("td:nth-child(3)").all_inner_texts(),
                strict=True,
            )
        )
        assert "✗" in answers["teacher"] and "✓" in answers["step-by-step-gold"]
        assert lines.first.locator("td").last.inner_text().endswith("%"), "a probability"


def test_the_examples_are_usable_by_keyboard(browser: Browser, report: Path) -> None:
    with open_page(browser, report) as page:

        def focused(expression: str) -> Any:
            return page.evaluate(f"document.activeElement.{expression}")

        page.keyboard.press("Tab")
        assert focused("className") == "skip"
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.add(focused("id") or focused("closest('li')?.id") or focused("textContent"))
        assert {"first", "second", "query", "row-0"} <= reached
        page.keyboard.press("/")
        assert focused("id") == "query"
        page.keyboard.type("jk/")
        assert page.input_value("#query") == "jk/", "shortcuts do not apply in a field"
        page.fill("#query", "")
        page.keyboard.press("Escape")
        assert focused("closest('li').id") == "row-0"
        page.keyboard.press("j")
        page.keyboard.press("ArrowDown")
        assert focused("closest('li').id") == "row-2"
        page.keyboard.press("k")
        page.keyboard.press("Enter")
        expect(page.locator("#row-1 .row")).to_be_visible()
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid", "the focus is visible"
        page.locator("#row-49 summary").focus()
        page.keyboard.press("j")
        assert focused("closest('li').id") == "row-50"
        expect(page.locator("#page-number")).to_have_text("page 2 of 2")
        page.keyboard.press("k")
        assert focused("closest('li').id") == "row-49"


@pytest.mark.slow
def test_ten_thousand_examples_fit_and_can_be_reached(browser: Browser, tmp_path: Path) -> None:
    draw = random.Random(0)
    vocabulary = [
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9)))
        for _ in range(2000)
    ]
    weights = [1 / (rank + 1) for rank in range(len(vocabulary))]

    def prose() -> str:
        return " ".join(draw.choices(vocabulary, weights, k=14))

    run = make_run(
        tmp_path / "run", rows=10_000, seeds=(0,), texts={9_999: "the very last row"}, prose=prose
    )
    path = report_runs([run])
    assert path.stat().st_size < PAGE_BYTES
    with open_page(browser, path) as page:
        expect(page.locator("#row-count")).to_have_text("10,000 of 10,000 rows")
        expect(page.locator("#page-number")).to_have_text("page 1 of 200")
        expect(page.locator("#rows > li")).to_have_count(50)
        page.fill("#query", "very last row")
        expect(page.locator("#row-count")).to_have_text("1 of 10,000 rows")
        page.locator("#rows summary").click()
        assert page.locator("#rows .fields .text").first.inner_text() == "the very last row"


def test_printing_opens_everything_and_hides_the_examples(browser: Browser, report: Path) -> None:
    with open_page(browser, report, scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate("document.querySelectorAll('details.printed:not([open])').length") == 0
        expect(page.locator("#browser")).to_be_hidden()
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"


def test_without_scripts_the_page_says_where_the_predictions_are(
    browser: Browser, report: Path
) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    expect(page.get_by_text("needs JavaScript")).to_be_visible()
    expect(page.get_by_role("heading", name="Systems")).to_be_visible()
    expect(page.locator("#browser")).to_be_hidden()
    context.close()
