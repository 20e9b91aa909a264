"""How a student's inputs and targets become token ids: as they are for a T5, in a template for a decoder alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from dsbs.config import StudentSection
from dsbs.errors import UserError
from dsbs.files import digest
from dsbs.students.architecture import kind_of
from dsbs.students.card import Kind, Template
from dsbs.students.instructions import PromptFormat, Prompts

_MARK = "\ue000text\ue000"  # stands for a text while a template is rendered; from Unicode's private use area
# Templates that write the day's date would make another student of the same rows tomorrow.
DATE = "01 January 2025"
_SAME_DAY = "{% macro strftime_now(format) %}" + DATE + "{% endmacro %}"


class InputFormat(Protocol):
    """What a student reads and writes, as ids."""

    kind: Kind
    template: Template | None

    def read(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Inputs, prefixes included, as at most ``limit`` ids each (None: uncut); what goes over is cut from the text's end."""
        ...

    def write(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Targets as at most ``limit`` ids each, the end token among them: it stays where a text is cut."""
        ...

    def identity(self, *, target: bool) -> tuple[str, ...]:
        """What decides the ids of inputs, or of targets, besides texts and tokenizer."""
        ...


def new_input_format(
    section: StudentSection, tokenizer: Any, init: str | None = None
) -> InputFormat:
    """The wording that a student is trained with. Raises UserError for a template that its tokenizer does not have."""
    if kind_of(init or section.source) == "seq2seq":
        return PlainFormat(tokenizer)
    has_one = bool(tokenizer.chat_template)
    if section.template == "chat" and not has_one:
        raise UserError(
            f"student.template: chat, and the tokenizer of {init or section.model} has no chat template",
            hint="use student.template: plain, or a model that was tuned to chat",
        )
    return ChatFormat(tokenizer, "chat" if has_one and section.template != "plain" else "plain")


class PlainFormat:
    """A text is its tokens and the end token: T5's way."""

    kind: Kind = "seq2seq"
    template: Template | None = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def read(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        ids: list[list[int]] = self._tokenizer(list(texts), return_attention_mask=False, **cut)[
            "input_ids"
        ]
        return ids

    write = read

    def identity(self, *, target: bool) -> tuple[str, ...]:
        return ()


class ChatFormat:
    """A decoder's prompt: ``head``, a text, ``tail``; then its target and an end token.

    ``plain``: the token that texts of this tokenizer begin with, if any, the text and a line break; it ends with the
    tokenizer's end token. ``chat``: the user's turn of the tokenizer's chat template and the header of the answer's; it ends
    with what ends a turn there. Special tokens are the template's alone: in a text they are read as their characters.
    """

    kind: Kind = "causal"

    def __init__(self, tokenizer: Any, template: Template) -> None:
        self.template: Template | None = template
        self._tokenizer = tokenizer
        if template == "chat":
            self.head, self.tail, self.end = _chat(tokenizer)
        else:
            begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
            self.head, self.tail, self.end = (
                tokenizer.bos_token if begins else "",
                "\n",
                _end_token(tokenizer),
            )
        # `all_special_tokens` has those with a role alone, and not Llama 3's headers of turns
        added = {one.content for one in tokenizer.added_tokens_decoder.values() if one.special}
        special = {*tokenizer.all_special_tokens, *added, tokenizer.convert_ids_to_tokens(self.end)}
        self.around = PromptFormat(
            template=template, head=self.head, tail=self.tail, special=sorted(special),
            stops=sorted({self.end, _end_token(tokenizer)}),
        )  # fmt: skip
        self._prompts = Prompts(self.around, self._ids)

    @property
    def stops(self) -> list[int]:
        """The ids that end an answer."""
        return self.around.stops

    def read(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        return self._prompts.read(texts, limit)

    def write(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        room = None if limit is None else limit - 1
        return [[*ids[:room], self.end] for ids in self._ids(texts, True)]

    def identity(self, *, target: bool) -> tuple[str, ...]:
        return ("target", str(self.end)) if target else ("prompt", digest(self.head, self.tail))

    def _ids(self, texts: Sequence[str], are_text: bool) -> list[list[int]]:
        """``are_text``: no special token is seen in them."""
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=are_text,
            return_attention_mask=False,
        )["input_ids"]
        return ids


def _end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the student's tokenizer has no end token",
            hint="set eos_token in its tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def _chat(tokenizer: Any) -> tuple[str, str, int]:
    """What a chat template writes before and after a user's text, and the id that ends the answer's turn."""
    user, answer = {"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}
    # a student says its label at once: models that think first (Qwen3) leave that out where their template is told to
    keys: dict[str, Any] = {"tokenize": False, "enable_thinking": False, "date_string": DATE}
    try:
        keys["chat_template"] = _SAME_DAY + tokenizer.get_chat_template()
        head, _, tail = tokenizer.apply_chat_template(
            [user], add_generation_prompt=True, **keys
        ).partition(_MARK)
        _, found, after = tokenizer.apply_chat_template([user, answer], **keys).rpartition(_MARK)
    except Exception as error:  # jinja's, or what a template raises itself
        raise UserError(
            f"the student's chat template cannot be used ({' '.join(str(error).split())[:200]})",
            hint="use student.template: plain",
        ) from None
    if not tail or not found:
        raise UserError(
            "the student's chat template leaves the message out", hint="use student.template: plain"
        )
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return head, tail, int(ids[0]) if ids and ids[0] in added else _end_token(tokenizer)
