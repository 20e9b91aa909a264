"""The page in a browser: what a reader sees, hears of, and can do with the keyboard."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from made_run import make_run

from dsbs.reporting.run import PAGE_BYTES, report_runs

pytest.importorskip(
    "playwright.sync_api", reason="Playwright's package is not installed (pip install dsbs[dev])"
)
from playwright.sync_api import Browser, Page, expect, sync_playwright

HOSTILE = {
    0: "<script>alert(1)</script>",
    1: "</script><img src=x onerror=alert(2)>",
    2: "{{ 7*7 }}",
    3: "\u202eevil \u2067turned",
    4: "word " * 4000,
    5: "nul \x00 bell \x07 del \x7f",
}
# Text of which a reader sees too little: under 4.5 to its background (WCAG 2.2, 1.4.3).
CONTRAST = """() => {
  const channel = (c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (one) => { for (; one; one = one.parentElement) {
    const found = rgb(getComputedStyle(one).backgroundColor); if (found.length < 4 || found[3] > 0) return found; } };
  const low = [];
  for (const one of document.querySelectorAll("body *:not(script)")) {
    const own = [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || one.closest("svg, :disabled, .skip") || !one.checkVisibility()) continue;
    const [a, b] = [light(rgb(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push([one.textContent.trim().slice(0, 40), (a + 0.05) / (b + 0.05)]);
  }
  return low;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser on this machine ({', '.join(names)})")
    expect.set_options(timeout=60_000)  # whatever else runs on the machine
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return report_runs([make_run(folder / "made", texts=HOSTILE)]).page


@contextmanager
def opened(
    browser: Browser, path: Path, width: int = 1280, scheme: str = "light"
) -> Iterator[Page]:
    """The page, its examples unpacked; nothing may be asked of elsewhere, nothing complain, nothing pop up."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
    page.goto(path.as_uri())
    expect(page.locator("#browser")).to_be_visible()
    yield page
    assert requests == [path.as_uri()]
    assert complaints == []
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window_and_can_be_read(
    browser: Browser, report: Path, width: int, scheme: str
) -> None:
    with opened(browser, report, width, scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        expect(page.locator("#rows .row")).to_have_count(50)
        assert page.evaluate("document.documentElement.scrollWidth") == width, (
            "the page's body does not scroll sideways"
        )
        assert page.evaluate(CONTRAST) == []
        red, green, blue = page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )
        assert (red + green + blue > 700) == (scheme == "light")


def test_text_from_data_is_shown_as_text(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        for number, text in HOSTILE.items():
            row = page.locator("#rows > li").nth(number)
            row.locator("summary").click()
            shown = text.replace("\x00", "\\x00").replace("\x07", "\\x07").replace("\x7f", "\\x7f")
            for place in (row.locator(".fields .text").first, row.locator(".reasons .text").first):
                assert place.evaluate("(one) => one.textContent") == shown
                assert place.evaluate("(one) => getComputedStyle(one).unicodeBidi") == "isolate"
        assert page.locator("#browser img, #browser script").count() == 0
        first, second = page.locator("#row-3 .excerpt bdi").all()
        places = first.bounding_box(), second.bounding_box()
        assert places[0] and places[1] and places[0]["x"] < places[1]["x"], (
            "a text that turns its direction turns no other"
        )


def test_filters_and_search_choose_rows(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        counted = page.locator("#row-count")
        expect(counted).to_have_text("60 of 60 rows")
        many = {
            name: int(page.inner_text(f"#many-{name}"))
            for name in ("wins", "losses", "both-wrong", "both-right")
        }
        assert sum(many.values()) == 60, "every row is of one of the four kinds"
        page.get_by_label("wins").check()
        expect(counted).to_have_text(f"{many['wins']} of 60 rows")
        swapped = page.locator("#first").input_value(), page.locator("#second").input_value()
        page.select_option("#first", swapped[1])
        page.select_option("#second", swapped[0])
        expect(counted).to_have_text(f"{many['losses']} of 60 rows")
        page.locator("input[value=all]").check()
        page.fill("#query", "DOG 17")
        expect(counted).to_have_text("1 of 60 rows")
        expect(page.locator("#rows summary")).to_contain_text("A dog number 17")
        page.fill("#query", "nothing has this")
        expect(counted).to_have_text("0 of 60 rows")
        expect(page.locator("#rows > li")).to_have_count(0)


def test_filters_show_what_they_say(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
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
        assert lines.first.locator("td").last.inner_text().endswith("%"), "the probability is told"


def test_the_examples_are_worked_by_keyboard(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:

        def focused(what: str) -> Any:
            return page.evaluate(f"document.activeElement.{what}")

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
        assert page.input_value("#query") == "jk/", "in a field letters are letters"
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
        assert style == "solid", f"{style}: where the focus is can be seen"
        page.locator("#row-49 summary").focus()
        page.keyboard.press("j")
        assert focused("closest('li').id") == "row-50"
        expect(page.locator("#page-number")).to_have_text("page 2 of 2")
        page.keyboard.press("k")
        assert focused("closest('li').id") == "row-49"


@pytest.mark.slow
def test_ten_thousand_examples_fit_and_are_all_reached(browser: Browser, tmp_path: Path) -> None:
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
    path = report_runs([run]).page
    assert path.stat().st_size < PAGE_BYTES
    with opened(browser, path) as page:
        expect(page.locator("#row-count")).to_have_text("10,000 of 10,000 rows")
        expect(page.locator("#page-number")).to_have_text("page 1 of 200")
        expect(page.locator("#rows > li")).to_have_count(50)
        page.fill("#query", "very last row")
        expect(page.locator("#row-count")).to_have_text("1 of 10,000 rows")
        page.locator("#rows summary").click()
        assert page.locator("#rows .fields .text").first.inner_text() == "the very last row"


def test_on_paper_all_is_open_but_the_examples(browser: Browser, report: Path) -> None:
    with opened(browser, report, scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate("document.querySelectorAll('details.printed:not([open])').length") == 0
        expect(page.locator("#browser")).to_be_hidden()
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"


def test_without_scripts_the_page_says_where_the_examples_are(
    browser: Browser, report: Path
) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    expect(page.get_by_text("needs JavaScript")).to_be_visible()
    expect(page.get_by_role("heading", name="Systems")).to_be_visible()
    expect(page.locator("#browser")).to_be_hidden()
    context.close()
