"""Texts are tokenized once: within a run for every student, and across runs from a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_student import TEXTS

from dsbs.students.tokenizer import learn_vocabulary
from dsbs.training import tokens
from dsbs.training.encode import Encoder, collate, encoded_hash
from dsbs.training.methods import View
from dsbs.training.rows import Row
from dsbs.training.tokens import Tokens

VIEWS = (View("label", "predict: ", 1.0), View("rationale", "explain: ", 1.0))


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, pieces: int = 300) -> None:
        self._real = learn_vocabulary(TEXTS, pieces)
        self.backend_tokenizer = self._real.backend_tokenizer
        self.eos_token_id = self._real.eos_token_id
        self.texts: list[str] = []

    def __call__(self, texts: list[str], **how: Any) -> Any:
        self.texts += texts
        return self._real(texts, **how)


@pytest.fixture(autouse=True)
def every_text_is_worth_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_MIN_CACHED", 1)


def rows(count: int = 20) -> list[Row]:
    """Every third has no rationale, the others two."""
    return [
        Row(
            f"r{i}",
            f"{TEXTS[i]} ( {i} )",
            "ab"[i % 2],
            None,
            () if i % 3 == 0 else (f"a man with {i} dogs", "a man"),
        )
        for i in range(count)
    ]


def test_ids_are_the_tokenizers_own_and_each_text_is_tokenized_once_whatever_asks_for_it(
    tmp_path: Path,
) -> None:
    tokenizer = Counting()
    encoder = Encoder(Tokens(tokenizer), 24, 6)
    found = encoder.rows(rows(), VIEWS, "gold")
    assert len(found) == 20 and [set(row) for row in found][:2] == [
        {"label"},
        {"label", "rationale"},
    ]
    for row, encoded in zip(rows(), found, strict=True):
        expected = {"label": ("predict: ", [row.gold]), "rationale": ("explain: ", row.rationales)}
        for name, pairs in encoded.items():
            prefix, texts = expected[name]
            for (source, target), text in zip(pairs, texts, strict=True):
                ids = [
                    tokenizer._real([whole], truncation=True, max_length=limit)["input_ids"][0]
                    for whole, limit in ((prefix + row.text, 24), (text, 6))
                ]
                assert [list(source), list(target)] == ids
    assert len(tokenizer.texts) == len(set(tokenizer.texts)) == 20 + 13 + 2 + 14
    encoder.rows(rows(), VIEWS, "gold")
    encoder.rows(rows()[5:9], VIEWS[:1], "gold")
    assert len(tokenizer.texts) == 49, (
        "another student of the same rows, or of a part of them, costs nothing"
    )


def test_a_view_without_weight_and_rows_that_teach_nothing_are_left_out() -> None:
    nothing = (View("label", "", 1.0), View("rationale", "", 0.0, supervised=False))
    silent = [*rows(3), Row("none", "text", None, "a", ("why",))]
    found = Encoder(Tokens(Counting()), 24, 6).rows(silent, nothing, "gold")
    assert [list(row) for row in found] == [["label"]] * 3
    assert [list(row["label"][0][0]) for row in found[1:]] == [
        list(found[i]["label"][0][0]) for i in (1, 2)
    ]
    with pytest.raises(IndexError):
        found[3]


def test_a_second_run_reads_the_ids_of_the_first(tmp_path: Path) -> None:
    first, again = Counting(), Counting()
    before = Encoder(Tokens(first, tmp_path), 24, 6).rows(rows(), VIEWS, "gold")
    after = Encoder(Tokens(again, tmp_path), 24, 6).rows(rows(), VIEWS, "gold")
    assert first.texts and not again.texts
    assert encoded_hash(before) == encoded_hash(after)
    batch = collate(after[:4])["rationale"]
    assert batch.source.dtype == batch.target.dtype and batch.rows.tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize("harm", ["cut", "one bit", "empty", "another file"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, harm: str) -> None:
    before = Encoder(Tokens(Counting(), tmp_path), 24, 6).rows(rows(), VIEWS, "gold")
    for path in tmp_path.glob("*.npz"):
        whole = bytearray(path.read_bytes())
        middle = (
            whole.index(b"NUMPY", whole.index(b"ids.npy")) + 130
        )  # in the ids themselves, behind their header
        whole[middle] ^= harm == "one bit"
        path.write_bytes(
            {"cut": whole[:-40], "empty": b"", "another file": b"{}" * 99}.get(harm, bytes(whole))
        )
    tokenizer = Counting()
    after = Encoder(Tokens(tokenizer, tmp_path), 24, 6).rows(rows(), VIEWS, "gold")
    assert len(tokenizer.texts) == 49 and encoded_hash(before) == encoded_hash(after)
    third = Counting()
    Encoder(Tokens(third, tmp_path), 24, 6).rows(rows(), VIEWS, "gold")
    assert not third.texts, "and kept again"


def test_another_limit_another_vocabulary_or_another_text_is_tokenized_anew(tmp_path: Path) -> None:
    Tokens(Counting(), tmp_path).indices("", ["a man", "dogs"], 8)
    for tokenizer, texts, limit in (
        (Counting(), ["a man", "dogs"], 9),
        (Counting(200), ["a man", "dogs"], 8),
        (Counting(), ["a man", "dogs 1"], 8),
    ):
        Tokens(tokenizer, tmp_path).indices("", texts, limit)
        assert tokenizer.texts == texts


def test_files_of_texts_that_are_gone_are_swept_away(tmp_path: Path) -> None:
    Tokens(Counting(), tmp_path).indices("", ["a man", "dogs"], 8)
    now = Tokens(Counting(), tmp_path)
    now.indices("", ["a man"], 8)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".0123.npz.77.partial").write_bytes(b"what a kill left")
    now.sweep()
    assert len(list(tmp_path.iterdir())) == 1
    again = Counting()
    Tokens(again, tmp_path).indices("", ["a man"], 8)
    assert not again.texts


def test_where_nothing_can_be_written_training_goes_on_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = Tokens(Counting(), tmp_path / "file")
    assert np.diff(found.indices("", ["a man", "dogs", "a man"], 8)).tolist() == [1, -1]


def test_a_tokenizer_in_python_has_no_cache(tmp_path: Path) -> None:
    slow = Counting()
    del slow.backend_tokenizer
    assert len(Tokens(slow, tmp_path).indices("", ["a man", "dogs"], 8)) == 2
    assert not list(tmp_path.iterdir())
