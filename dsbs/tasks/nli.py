"""Natural language inference as in the paper (section 4): ANLI (Nie et al., 2020) and e-SNLI
(Camburu et al., 2018).
"""

from __future__ import annotations

from typing import Any

from dsbs.errors import UserError
from dsbs.records import Unread
from dsbs.tasks import Fields, Task, fold, read_closed

# In the order of the data sets' class numbers 0, 1, 2.
LABELS = ("entailment", "neutral", "contradiction")


class Nli(Task):
    inputs = {"premise": ("sentence1", "context"), "hypothesis": ("sentence2",)}
    id_columns = ("id", "uid", "pairID")
    label_columns = ("label", "gold_label")
    no_label = ("", "-", "-1")  # SNLI's rows without a majority

    @property
    def labels(self) -> tuple[str, ...]:
        return LABELS

    def gold(self, value: Any, fields: Fields, where: str) -> str:
        text = str(value).strip()
        if text in ("0", "1", "2"):
            return LABELS[int(text)]
        if fold(text) in LABELS:
            return fold(text)
        raise UserError(
            f"{where}: label {text[:60]!r} is not one of {', '.join(LABELS)} (or 0, 1, 2)",
            hint="fix the row",
        )

    def text(self, fields: Fields) -> str:
        """Premise, T5's end-of-sequence token, hypothesis: the published code's input."""
        return f"{fields['premise']}</s>{fields['hypothesis']}"

    def read_label(self, text: str, fields: Fields) -> str | Unread:
        return read_closed(text, LABELS)


class Anli(Nli):
    rationale_columns = ("rationale", "reason")


class Esnli(Nli):
    rationale_columns = ("rationale", "explanation_1")
