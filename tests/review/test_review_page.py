"""The review page in Chromium: by keyboard alone, on a phone, over a killed server, by two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from review_page import (
    HOSTILE,
    LABELS,
    Page,
    annotation,
    classification,
    decisions,
    reviewing,
    write_run,
)

from dsbs.records.reviews import Review
from dsbs.run_folder import RunFolder

pytest.importorskip(
    "playwright.sync_api", reason="Playwright's package is not installed (pip install dsbs[dev])"
)
from playwright.sync_api import Browser, expect
from playwright.sync_api import Page as Tab

ROWS = 120


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return classification(tmp_path_factory.mktemp("page") / "run", ROWS)


@pytest.fixture(scope="module")
def page(run: RunFolder) -> Iterator[Page]:
    with reviewing(run) as page:
        yield page


@contextmanager
def opened(browser: Browser, page: Page, width: int = 1280, reviewer: str = "ann") -> Iterator[Tab]:
    """The page in a browser of its own, as a reviewer. It may ask nobody but its server, and not
    write to the console or open a dialog; that its server is down is no error of its own.
    """
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme="dark", has_touch=width < 500
    )
    tab = context.new_page()
    requests: list[str] = []
    messages: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("dialog", lambda dialog: (messages.append("dialog"), dialog.dismiss()))
    tab.goto(page.url)
    shown(tab, 0)
    if reviewer != "ann":
        tab.keyboard.press("f")
        tab.get_by_label("you are").fill(reviewer)
        with tab.expect_response(lambda response: f"reviewer={reviewer}" in response.url):
            tab.keyboard.press("Enter")
        shown(tab, 0)
    yield tab
    assert {urlsplit(url).netloc for url in requests if not url.startswith("data:")} == {page.host}
    assert [text for text in messages if "ERR_CONNECTION_REFUSED" not in text] == []
    context.close()


def shown(tab: Tab, position: int) -> None:
    """Wait until the row at a position of the queue is shown."""
    expect(tab.locator("#position")).to_contain_text(f"{position + 1} / ")
    expect(tab.locator("#row")).to_be_visible()


def saved(tab: Tab) -> None:
    expect(tab.locator("#saved")).to_have_text("✓ saved")


@pytest.mark.parametrize(("width", "reviewer"), [(1280, "ann"), (390, "phone")])
def test_a_hundred_rows_by_keyboard_alone(
    browser: Browser, page: Page, run: RunFolder, width: int, reviewer: str
) -> None:
    with opened(browser, page, width, reviewer) as tab:
        keys = tab.keyboard
        for number in range(100):
            if number % 10 == 0:  # the next rows are there before they are needed
                shown(tab, number)
                assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
            match number % 10:
                case 3:  # a label that differs from gold where number % 4 == 3
                    keys.press("l")
                    keys.type(LABELS[2][:3].upper())
                    keys.press("Enter")
                case 4:
                    keys.press("e")
                    keys.press("Control+a")
                    keys.insert_text(f"My reason {number}.")
                    keys.press("Control+Enter")
                case 5:
                    keys.press("w")
                case 6:
                    keys.press("r")
                case 7:
                    keys.press("g")
                    if number % 4 != 3:  # the teacher's label is the gold one: it asks for another
                        keys.insert_text(LABELS[(number + 1) % 3])
                        keys.press("Enter")
                case 8:
                    keys.press("s")
                case 9:
                    for key in "rua":
                        keys.press(key)
                case _:
                    keys.press("a")
        shown(tab, 100)
        saved(tab)
        expect(tab.locator("#progress")).to_contain_text(f"of {ROWS} rows reviewed")
    found = decisions(run, reviewer)
    assert len(found) == 100
    assert [_words(found[f"r{n}"]) for n in range(10)] == [
        "accepted",
        "accepted",
        "accepted",
        "corrected account",
        "corrected: My reason 4.",
        "corrected: ",
        "rejected",
        "accepted, gold is wrong",
        "skipped",
        "accepted",
    ]
    assert _words(found["r17"]) == "corrected billing, gold is wrong"
    assert not any(review.sampled for review in found.values() if review.decision == "undone")


def _words(review: Review) -> str:
    label = f" {review.label}" if review.label else ""
    rationale = "" if review.rationale is None else f": {review.rationale}"
    return f"{review.decision}{label}{rationale}{', gold is wrong' * review.gold_is_wrong}"


def test_a_killed_server_loses_no_decision_and_the_page_goes_on(
    browser: Browser, tmp_path: Path
) -> None:
    run = classification(tmp_path / "run")
    with reviewing(run) as page, opened(browser, page) as tab:
        tab.keyboard.press("a")
        saved(tab)
        shown(tab, 1)
        tab.keyboard.press("e")
        tab.locator("#rationale-text").fill("half a sent")
        killed(page)
        assert list(decisions(run)) == ["r0"], "what was acknowledged is on disk"
        tab.keyboard.press("Escape")
        tab.keyboard.press("r")
        expect(tab.locator("#down")).to_contain_text("The server does not answer")
        expect(tab.locator("#saved")).to_contain_text("1 decision not saved yet")
        shown(tab, 2)
        tab.keyboard.press("s")
        expect(tab.locator("#saved")).to_contain_text("2 decisions not saved yet")
        with reviewing(run) as again:  # the same command; the same port and token
            assert again.url == page.url
            saved(tab)
            expect(tab.locator("#down")).to_be_hidden()
            words = [review.decision for _, review in sorted(decisions(run).items())]
            assert words == ["accepted", "rejected", "skipped"]
            shown(tab, 3)
            killed(again)
        tab.keyboard.press("r")
        expect(tab.locator("#saved")).to_contain_text("1 decision not saved yet")
        context = tab.context
        tab.close()
        with reviewing(run):
            late = context.new_page()
            late.goto(page.url)
            expect(late.locator("#progress")).to_contain_text("4 of 12 rows")
            assert decisions(run)["r3"].decision == "rejected", "a closed page's decision is kept"
            late.keyboard.press("f")
            late.get_by_label("rows", exact=True).select_option("all")
            expect(late.locator("#position")).to_have_text("1 / 12")
            late.keyboard.press("Escape")
            late.keyboard.press("j")
            shown(late, 1)
            late.keyboard.press("e")
            expect(late.locator("#rationale-text")).to_have_value("half a sent")


def killed(page: Page) -> None:
    page.process.kill()
    page.process.wait()


def test_two_reviewers_at_once(browser: Browser, tmp_path: Path) -> None:
    run = classification(tmp_path / "run", rows=5)
    with (
        reviewing(run) as page,
        opened(browser, page) as first,
        opened(browser, page, reviewer="bob") as second,
    ):
        for number in range(5):
            for tab, key in ((first, "a"), (second, "r" if number == 3 else "a")):
                if number < 8:
                    shown(tab, number)
                expect(tab.locator("#why")).not_to_contain_text("accepted")  # nobody is influenced
                tab.keyboard.press(key)
        for tab in (first, second):
            expect(tab.locator("#nothing")).to_be_visible()
            saved(tab)
        first.get_by_text("Results so far").click()
        expect(first.locator("#results-text")).to_contain_text("kappa")
        first.locator("#results-text li button").click()
        expect(first.locator("#why")).to_contain_text("bob: rejected")
    assert len(decisions(run, "ann")) == len(decisions(run, "bob")) == 5


def test_hostile_rows_are_text(browser: Browser, page: Page) -> None:
    with opened(browser, page, reviewer="eve") as tab:
        for number, text in HOSTILE.items():
            tab.keyboard.press("j")
            shown(tab, number)
            passage = tab.locator(".input .text")
            plain = passage.evaluate(
                "(p) => [...p.childNodes].map((n) => n.nodeType === 3 ? n.data : '').join('')"
            )
            expected = "".join(c for c in text if c.isprintable() or c in " \n")
            assert plain == expected
            assert passage.evaluate("(node) => getComputedStyle(node).unicodeBidi") == "isolate"
            if number == 2:
                marks = passage.locator(".control").all_inner_texts()
                assert marks == ["RLO", "PDF", "RLI", "PDI", "ZWSP", "U+0007"]
        assert tab.locator("#row img, #row script").count() == 0
        assert tab.title().startswith("sample")
        more = tab.get_by_role("button", name="Show all 20,000 characters")
        box = tab.locator(".input .text").bounding_box()
        assert box and box["height"] < 500, "the label beside a long text is in sight"
        tab.keyboard.press("t")
        expect(more).to_have_count(0)
        tab.keyboard.press("v")
        expect(tab.locator("#rows li")).to_have_count(50)
        assert tab.locator("#rows img, #rows script").count() == 0


def test_rows_are_chosen_and_opened_from_the_list(browser: Browser, page: Page) -> None:
    with opened(browser, page, reviewer="fay") as tab:
        tab.keyboard.press("f")
        tab.get_by_label("differs from gold").check()
        expect(tab.locator("#chosen")).to_contain_text("30 rows")
        tab.keyboard.press("Escape")
        tab.keyboard.press("v")
        expect(tab.locator("#rows button").first).to_be_focused()
        tab.keyboard.press("j")
        tab.keyboard.press("Enter")
        shown(tab, 1)
        expect(tab.locator(".compared .differs").first).to_contain_text("differs")
        tab.keyboard.press("/")
        tab.keyboard.type("message 11 ")
        expect(tab.locator("#chosen")).to_contain_text("4 rows")  # 11, and 111, 115, 119
        tab.keyboard.press("Escape")
        tab.keyboard.press("?")
        expect(tab.get_by_role("dialog", name="Keys")).to_be_visible()
        tab.keyboard.press("Escape")
        controls = tab.locator("button:visible, select:visible, input:visible")
        without_name = (
            "(all) => all.filter((n) => !n.textContent.trim() && !n.labels?.length).length"
        )
        assert controls.evaluate_all(without_name) == 0


LONG = [f"topic {number:03}" for number in range(1000)]
FIELDS = {
    "sender": {"type": "text", "required": True},
    "amount": {"type": "number"},
    "kind": {"type": "label", "labels": ["bill", "offer"]},
    "items": {"type": "list"},
}


def test_labels_of_every_kind(browser: Browser, tmp_path: Path) -> None:
    tasks = {
        "many": ({"name": "classification", "labels": LONG}, "topic 001", "topic 002"),
        "several": ({"name": "multilabel", "labels": LABELS}, "billing; shipping", "billing"),
        "score": ({"name": "score", "range": [1, 5]}, "2", "4"),
        "fields": (
            {"name": "extraction", "fields": FIELDS},
            "sender: Ann\namount: null\nkind: bill\nitems: lamp",
            "sender: Ann\namount: 12\nkind: offer\nitems: lamp | desk",
        ),
    }
    for name, (task, label, right) in tasks.items():
        run = write_run(tmp_path / name, task, [annotation(0, "A text.", label, label)])
        with reviewing(run) as page, opened(browser, page, 390) as tab:
            keys = tab.keyboard
            keys.press("l")
            match name:
                case "many":
                    keys.type("002")
                    keys.press("Enter")
                case "several":
                    keys.type("ship")
                    keys.press("Enter")
                    keys.press("Control+Enter")
                case "score":
                    keys.press("4")
                case "fields":
                    tab.get_by_label("amount").fill("twelve or so")
                    keys.press("Enter")
                    expect(tab.locator("#label-problem")).to_contain_text(
                        "amount is 'twelve or so'"
                    )
                    tab.get_by_label("amount").fill("12")
                    tab.get_by_label("kind").select_option("offer")
                    tab.get_by_label("items").fill("lamp\ndesk")
                    keys.press("Control+Enter")
            saved(tab)
        assert decisions(run)["r0"].label == right
