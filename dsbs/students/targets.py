"""What a student is to write: a label, a rationale or both in one text, and the token that its decoder begins with."""

from __future__ import annotations

from typing import Any, Literal

Target = Literal[
    "label", "rationale", "rationale-then-label", "label-then-rationale"
]  # what a task's outputs are
# The token that a decoder begins with: T5's padding, or its end token, which is in every vocabulary and no other input has.
Start = Literal["pad", "eos"]
THEN_LABEL, THEN_RATIONALE = " Answer: ", " Because: "  # between the parts of one sequence


def compose(target: Target, label: str | None, rationale: str | None) -> str | None:
    """The text that a student is to write; in one sequence a label stands alone where there is no rationale."""
    if target == "label":
        return label
    if target == "rationale":
        return rationale
    if label is None:
        return None
    if target == "rationale-then-label":
        return f"{rationale or ''}{THEN_LABEL}{label}".strip()
    return f"{label}{THEN_RATIONALE}{rationale}" if rationale else label


def take_apart(target: Target, text: str) -> tuple[str, str | None]:
    """Label's part and rationale's part of what a student wrote. A sequence that never came to its label has an empty one."""
    if target == "rationale-then-label":
        rationale, found, label = text.rpartition(THEN_LABEL.strip())
        return (label.strip(), rationale.strip() or None) if found else ("", text.strip() or None)
    if target == "label-then-rationale":
        label, _, rationale = text.partition(THEN_RATIONALE.strip())
        return label.strip(), rationale.strip() or None
    return text, None


def start_token(config: Any, start: Start) -> int:
    """The id, by a model's configuration."""
    return int(config.decoder_start_token_id if start == "pad" else config.eos_token_id)
