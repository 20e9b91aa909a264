"""Natural language inference as in the paper (section 4): ANLI (Nie et al., 2020) and e-SNLI
(Camburu et al., 2018).
"""

from __future__ import annotations

from typing import Any

from dsbs.errors import UserError
from dsbs.records import Unreadable
from dsbs.tasks import Fields, Task
from dsbs.tasks.label_set import LabelSet

# In the order of the data sets' class numbers 0, 1, 2.
LABELS = ("entailment", "neutral", "contradiction")
_LABEL_SET = LabelSet(LABELS)


class Nli(Task):
    inputs = {"premise": ("sentence1", "context"), "hypothesis": ("sentence2",)}
    goal = (
        "Decide what the premise says about the hypothesis: entailment (it must be true), "
        "contradiction (it cannot be true) or neutral (the premise leaves it open)."
    )
    id_columns = ("id", "uid", "pairID")
    label_columns = ("label", "gold_label")
    no_label = ("", "-", "-1")  # SNLI's rows without a majority

    @property
    def label_set(self) -> LabelSet:
        return _LABEL_SET

    def gold(self, value: Any, fields: Fields, where: str) -> str:
        text = str(value).strip().removesuffix(".0")  # as data frames with empty cells write 1
        if text in ("0", "1", "2"):
            return LABELS[int(text)]
        label = _LABEL_SET.spelled(text)
        if label is not None:
            return label
        raise UserError(
            f"{where}: label {text[:60]!r} is not one of {', '.join(LABELS)} (or 0, 1, 2)",
            hint="fix the row",
        )

    def text(self, fields: Fields) -> str:
        """Premise, T5's end-of-sequence token, hypothesis: the published code's input."""
        return f"{fields['premise']}</s>{fields['hypothesis']}"

    def read_label(self, text: str, fields: Fields) -> str | Unreadable:
        return _LABEL_SET.read(text)


class Anli(Nli):
    rationale_columns = ("rationale", "reason")


class Esnli(Nli):
    rationale_columns = ("rationale", "explanation_1")
