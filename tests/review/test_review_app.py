"""The review page's server: who is refused, what is saved, and when a token is valid."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_dsbs
from review_page import Page, classification, decisions, reviewing

from dsbs.records.reviews import apply_reviews, read_reviews
from dsbs.review.run import recorded_recipe
from dsbs.run_folder import RunFolder, read_annotations
from dsbs.tasks import make_task

NOW = "2026-01-01T00:00:00.{:03}Z"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return classification(tmp_path_factory.mktemp("app") / "run")


@pytest.fixture(scope="module")
def page(run: RunFolder) -> Iterator[Page]:
    with reviewing(run) as page:
        yield page


def test_requests_without_the_key_are_refused_without_a_reason(page: Page, run: RunFolder) -> None:
    own = page.sent_by_the_page()
    form = {"id": "r0", "decision": "accepted", "reviewer": "eve", "time": NOW.format(1)}
    without = {name: {k: v for k, v in own.items() if k != name} for name in own}
    port = int(page.host.partition(":")[2])
    refused = [
        page.request("/"),
        page.request("/?token="),
        page.request(f"/?token={page.token[:-1]}"),
        page.request(f"/?token={page.token}", headers={"Host": "attacker.example"}),
        page.request(f"/?token={page.token}", headers={"Host": f"attacker.example:{port}"}),
        page.request(f"/?token={page.token}", headers={"Origin": "http://attacker.example"}),
        page.request(f"/queue?token={page.token}"),
        page.request("/queue", headers=without["Cookie"]),
        page.request("/queue", headers=without["X-Dsbs-Review"]),
        page.request("/queue", headers=own | {"Host": f"attacker.example:{port}"}),
        page.request("/rows?n=0", headers=own | {"Sec-Fetch-Site": "same-site"}),
        page.request("/nowhere"),
        page.request("/docs"),
        page.request("/reviews", form, headers=without["Origin"]),
        page.request("/reviews", form, headers=without["X-Dsbs-Review"]),
        page.request("/reviews", form, headers=without["Cookie"]),
        page.request("/reviews", form, headers=own | {"Origin": f"http://127.0.0.1:{port + 1}"}),
        page.request("/reviews", form, headers=own | {"Origin": "null"}),
        page.request("/reviews", form, headers=own | {"X-Dsbs-Review": page.token}),
    ]
    assert {status for status, *_ in refused} == {403}
    assert len({body for _, body, _ in refused}) == 1, "no refusal says why"
    assert not decisions(run, "eve")
    assert page.request("/queue", headers=own)[0] == 200
    assert page.request("/nowhere", headers=own)[0] == 404


def test_the_page_may_load_nothing_and_is_kept_nowhere(page: Page) -> None:
    status, html, headers = page.request(f"/?token={page.token}")
    assert status == 200
    cookie = headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert page.token not in html


def test_a_decision_is_on_disk_once_it_is_acknowledged(page: Page, run: RunFolder) -> None:
    own = page.sent_by_the_page()
    form = {"id": "r4", "decision": "accepted", "reviewer": "bob", "time": NOW.format(2)}
    for _ in range(2):  # as after a server that was killed before it could answer
        assert page.request("/reviews", form, headers=own)[0] == 200
        assert [review.decision for review in read_reviews(run.reviews("train"))["r4"]] == [
            "accepted"
        ]
    undo = form | {"decision": "undone", "time": NOW.format(3)}
    for _ in range(2):
        assert page.request("/reviews", undo, headers=own)[0] == 200
    assert not decisions(run, "bob")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"id": "r99"}, "no such row"),
        ({"decision": "corrected", "label": "cats"}, "'cats' is not one of"),
        ({"decision": "corrected", "label": {"a": [1]}}, "is not one of"),
        ({"decision": "corrected", "label": " "}, "the label is empty"),
        ({"gold_is_wrong": True}, "which you marked as wrong"),
        ({"decision": "deleted"}, "decision"),
        ({"reviewer": "\n"}, "reviewer"),
        ({"time": "yesterday"}, "time"),
        ({"path": "/etc/passwd"}, "path"),
    ],
)
def test_a_decision_that_cannot_be_right_is_not_saved(
    page: Page, run: RunFolder, changes: dict[str, object], problem: str
) -> None:
    form = {"id": "r0", "decision": "accepted", "reviewer": "cay", "time": NOW.format(4)}
    status, body, _ = page.request("/reviews", form | changes, headers=page.sent_by_the_page())
    assert status in (400, 422) and problem in body
    assert not decisions(run, "cay")


def test_a_correction_keeps_only_what_was_changed(page: Page, run: RunFolder) -> None:
    own = page.sent_by_the_page()
    form = {"reviewer": "dan", "decision": "corrected"}
    for number, (row, changes) in enumerate(
        [
            ("r4", {"label": " Shipping "}),  # the teacher's own, spelled in another way
            ("r5", {"rationale": "Reason 5: Message 5 is about account."}),
            ("r6", {"label": "account", "rationale": " Mine. ", "gold_is_wrong": True}),
            ("r8", {"rationale": ""}),
        ],
        5,
    ):
        sent = form | {"id": row, "time": NOW.format(number)} | changes
        assert page.request("/reviews", sent, headers=own)[0] == 200
    saved = decisions(run, "dan")
    assert [saved[row].decision for row in ("r4", "r5")] == ["accepted", "accepted"]
    assert (saved["r6"].label, saved["r6"].rationale) == ("account", "Mine.")
    assert saved["r6"].gold_is_wrong
    assert (saved["r8"].label, saved["r8"].rationale) == (None, "")
    recipe = recorded_recipe(run)
    annotations = {row.id: row for row in read_annotations(run.annotations("train"))}
    learned = apply_reviews(annotations, {"r8": [saved["r8"]]}, make_task(recipe.task))["r8"]
    assert (learned.label, learned.rationale) == ("account", None), (
        "a wrong rationale is not learned"
    )


def test_a_file_that_an_editor_broke_is_said_and_kept(page: Page, run: RunFolder) -> None:
    path = run.reviews("train")
    content = path.read_bytes() if path.exists() else b""
    form = {"id": "r9", "decision": "accepted", "reviewer": "ed", "time": NOW.format(20)}
    path.write_bytes(b"{}\n" + content)
    status, body, _ = page.request("/reviews", form, headers=page.sent_by_the_page())
    assert status == 503 and "train.jsonl:1: not a review" in body
    assert path.read_bytes() == b"{}\n" + content
    path.write_bytes(content)
    assert page.request("/reviews", form, headers=page.sent_by_the_page())[0] == 200
    assert "r9" in decisions(run, "ed")


def test_a_killed_server_hands_its_token_on_and_a_stopped_one_does_not(tmp_path: Path) -> None:
    run = classification(tmp_path / "run", rows=3)
    session = run.stage("review") / "session.json"
    with reviewing(run) as first:
        if os.name != "nt":
            assert stat.S_IMODE(session.stat().st_mode) == 0o600
        second = run_dsbs("review", str(run.path), "--no-browser", cwd=tmp_path)
        assert second.returncode == 1 and "is in use by process" in second.stderr
    with reviewing(run) as page:
        assert page.url == first.url
        page.process.send_signal(signal.SIGINT)
        _, said = page.process.communicate(timeout=60)
        assert page.process.returncode == 0 and "0 rows reviewed" in said
        assert page.token not in said and page.token not in session.read_text()
    with reviewing(run) as third:
        assert third.host == first.host and third.token != first.token
    session.chmod(0o644)  # as a copy of the run may be: anybody may have read it
    with reviewing(run) as page:
        assert os.name == "nt" or page.token != third.token


def test_what_cannot_be_reviewed_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, problem in [
        (["empty"], "neither a recipe nor a run folder with annotations"),
        (["missing.yaml"], "missing.yaml does not exist"),
        (["empty", "--reviewer", ""], "--reviewer"),
    ]:
        ended = run_dsbs("review", *arguments, cwd=tmp_path)
        assert ended.returncode == 2 and problem in ended.stderr, ended.stderr
