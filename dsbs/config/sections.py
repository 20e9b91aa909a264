"""Recipe sections: their base class and the helpers that all of them use."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

LabelSource = Literal["gold", "teacher"]


class Section(BaseModel):
    """A closed and frozen section. The docstring below each field documents its key."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,
        validate_default=True,
    )


def folder_in(context: Any) -> Path | None:
    """The folder of the recipe's file, which ``load_recipe`` passes as the validation context."""
    if not isinstance(context, dict):
        return None
    folder: Path | None = context.get("folder")
    return folder


def as_tuple(value: Any) -> Any:
    """A single value where a list is allowed, as a tuple of one."""
    return (value,) if isinstance(value, str | int | float) else value


# Zero-width characters, direction marks and variation selectors.
_INVISIBLE = re.compile("[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff]")
_PUNCTUATION = str.maketrans(
    dict.fromkeys("‐‑‒–—―−", "-") | dict.fromkeys("‘’ʼ", "'") | dict.fromkeys("“”", '"')
)


def plain_text(text: str) -> str:
    """Text in Unicode's form NFKC with ASCII hyphens and quotes, without invisible characters."""
    if text.isascii():
        return text
    text = _INVISIBLE.sub("", text.translate(_PUNCTUATION))
    return unicodedata.normalize("NFKC", text).translate(_PUNCTUATION)


def label_key(text: str) -> str:
    """Text for comparing labels: ``plain_text`` without differences in case or white space."""
    return " ".join(plain_text(text).casefold().split())


def unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """A sentence about an unknown name: the nearest known one, and all known ones."""
    names = list(names)
    guess = ""
    for near in difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        guess = f"; did you mean {near!r}?"
    return f"unknown {kind} {name!r}{guess} (known: {', '.join(names)})"
