"""``wording.json``: what stands around a decoder-only student's texts, for engines and scripts without transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dsbs.errors import UserError

WORDING = "wording.json"
Ids = Callable[
    [Sequence[str], bool], list[list[int]]
]  # of texts; True: no special token is seen in them


class PromptFormat(BaseModel):
    """What a prompt is made of besides its text, and what ends an answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    template: str  # its name
    head: str
    tail: str
    special: list[str]  # tokens that are read as their characters where they stand in a text
    stops: list[int]  # ids


class Prompts:
    """Texts as the ids of their prompts, by ``ids_of`` of any tokenizer."""

    def __init__(self, around: PromptFormat, ids_of: Ids) -> None:
        self._around, self._ids_of = around, ids_of
        self._head, self._tail = ids_of([around.head, around.tail], False)
        self._special = re.compile("|".join(map(re.escape, around.special)))

    def read(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """See ``InputFormat``."""
        room = None if limit is None else limit - len(self._head) - len(self._tail)
        if room is not None and room <= 0:
            raise UserError(
                f"student.max_input_tokens: {limit} leaves no room for a text, since the {self._around.template} template "
                f"alone takes {len(self._head) + len(self._tail)} tokens",
                hint="raise student.max_input_tokens, or use student.template: plain",
            )
        # as one text, which is how others tokenise such a prompt too; in pieces only where that says something else
        found = self._ids_of(
            [self._around.head + text + self._around.tail for text in texts], False
        )
        apart = [
            i
            for i, (text, ids) in enumerate(zip(texts, found, strict=True))
            if (limit is not None and len(ids) > limit) or self._special.search(text)
        ]
        for i, ids in zip(apart, self._ids_of([texts[i] for i in apart], True), strict=True):
            found[i] = [*self._head, *ids[:room], *self._tail]
        return found


class StoredPrompts(Prompts):
    """Of an export's ``wording.json`` and ``tokenizer.json``; what cannot be read raises what pydantic or tokenizers raise."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        around = PromptFormat.model_validate_json((folder / WORDING).read_text(encoding="utf-8"))
        self.stops = around.stops
        whole, apart = (Tokenizer.from_file(str(folder / "tokenizer.json")) for _ in range(2))
        apart.encode_special_tokens = True

        def ids_of(texts: Sequence[str], are_text: bool) -> list[list[int]]:
            chosen = apart if are_text else whole
            return [one.ids for one in chosen.encode_batch(list(texts), add_special_tokens=False)]

        super().__init__(around, ids_of)
        self.tokenizer: Any = whole

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Answers as ids, with what ends them or without -> their texts."""
        own = [[index for index in ids if index not in self.stops] for ids in rows]
        return [text.strip() for text in self.tokenizer.decode_batch(own, skip_special_tokens=True)]
