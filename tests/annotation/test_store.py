"""The reply store: keys, token budgets and readers."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from dsbs import UserError
from dsbs.annotation.backends import Reply
from dsbs.annotation.store import ReplyStore, RequestKeys, Stored, request_key, token_budget

KEYS = RequestKeys(["k"], [])
BODY: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "q"}],
    "temperature": 0.0,
    "max_tokens": 10,
}


def key(sample: int = 0, identity: str = "http://a#chat", **changes: Any) -> str:
    return request_key(BODY | changes, identity, sample)


def test_a_key_covers_everything_sent_except_the_token_budget() -> None:
    different = {
        key(), key(sample=1), key(identity="http://b#chat"), key(model="n"),
        key(temperature=0.5), key(seed=1), key(messages=[{"role": "user", "content": "q "}]),
    }  # fmt: skip
    assert len(different) == 7
    assert key(max_tokens=99) == key() and token_budget(BODY) == 10
    assert token_budget({"max_completion_tokens": 7}) == 7


def test_a_stored_reply_is_visible_after_reopening_and_to_a_second_reader(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "replies.sqlite")
    store.put("k", 10, "e", "m", 0, Reply("text", "stop", 3, 4, "why", raw='{"id": "x"}'))
    reader = sqlite3.connect(tmp_path / "replies.sqlite")
    assert reader.execute("SELECT text, raw FROM replies").fetchall() == [("text", '{"id": "x"}')]
    store.close()
    assert ReplyStore(tmp_path / "replies.sqlite").look_up(KEYS, 10) == Stored(
        "k", Reply("text", "stop", 3, 4, "why")
    )


def test_a_cut_reply_does_not_answer_a_larger_budget(
    tmp_path: Path,
) -> None:
    store = ReplyStore(tmp_path / "replies.sqlite")
    store.put("k", 10, "e", "m", 0, Reply("cut", "length"))
    assert store.look_up(KEYS, 20).reply is None
    reply = store.look_up(KEYS, 10).reply
    assert reply is not None and reply.text == "cut"
    store.put("k", 20, "e", "m", 0, Reply("whole", "stop"))
    for tokens in (10, 20, 50):
        stored = store.look_up(KEYS, tokens)
        assert stored.reply is not None and stored.reply.text == "whole"
        assert [reply.text for reply in stored.wasted] == ["cut"], "it is on the bill too"
    rows = (
        sqlite3.connect(tmp_path / "replies.sqlite")
        .execute("SELECT count(*) FROM replies")
        .fetchone()
    )
    assert rows == (2,), "nothing that was paid for is thrown away"


def test_a_file_that_is_not_a_store_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "replies.sqlite").write_text(
        "not a database, but somebody's" * 99, encoding="utf-8"
    )
    with pytest.raises(UserError, match="cannot be opened"):
        ReplyStore(tmp_path / "replies.sqlite")
    assert (tmp_path / "replies.sqlite").read_text(encoding="utf-8").startswith("not a database")
