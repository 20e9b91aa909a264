"""Input formats: how texts become token ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from dsbs.config import StudentSection
from dsbs.errors import UserError
from dsbs.files import digest
from dsbs.students.card import Architecture, Start, Template, architecture_of

PROMPT_FORMAT_FILE = "wording.json"  # in the folder of an exported decoder
# Templates that write today's date would make another student of the same rows tomorrow.
TEMPLATE_DATE = "01 January 2025"
_FIXED_DATE = "{% macro strftime_now(format) %}" + TEMPLATE_DATE + "{% endmacro %}"
_PLACEHOLDER = "\ue000text\ue000"  # for a text in a template; from Unicode's private use area
# Between premise and hypothesis in the published code: T5's end token. Encoders read a pair there.
PAIR_SEPARATOR = "</s>"
Tokenize = Callable[[Sequence[str], bool], list[list[int]]]
"""Texts to token ids. True: read special tokens in a text as ordinary characters."""


def start_token(config: Any, start: Start) -> int:
    """The id of the decoder's first token, from a model's configuration.

    T5Gemma begins with its decoder's bos token, T5 with its padding token.
    """
    if start == "eos":
        return end_tokens(config)[0]
    first = getattr(config, "decoder_start_token_id", None)
    return int(config.decoder.bos_token_id if first is None else first)


def end_tokens(config: Any) -> list[int]:
    """The ids that end an encoder-decoder's text."""
    ends = config.eos_token_id
    return list(map(int, ends)) if isinstance(ends, list | tuple) else [int(ends)]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The ids that begin, end and pad texts, whatever a tokenizer calls them.

    BERT begins with cls and ends with sep; others have bos and eos, or one end token alone.
    """

    start: int
    end: int
    pad: int

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialTokens:
        """Raises UserError where a tokenizer has no token that ends a text."""
        end = tokenizer.sep_token_id
        if end is None:
            end = _end_token(tokenizer)
        starts = (tokenizer.cls_token_id, tokenizer.bos_token_id, end)
        start = next(token_id for token_id in starts if token_id is not None)
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return cls(int(start), int(end), int(pad))


# --- inputs


class InputFormat(Protocol):
    """Turns texts into the ids that a student reads and writes."""

    kind: Architecture
    template: Template | None

    def read(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Inputs, prefixes included, as at most ``limit`` ids each; None: no limit.

        An input that is too long is cut at the end of its text.
        """
        ...

    def write(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Targets as at most ``limit`` ids each. The end token is kept where a text is cut."""
        ...

    def identity(self, *, target: bool) -> tuple[str, ...]:
        """What determines the ids of inputs, or of targets, besides text and tokenizer."""
        ...


def new_input_format(
    section: StudentSection, tokenizer: Any, init: str | None = None
) -> InputFormat:
    """The format that a student is trained with.

    Raises UserError for a chat template that its tokenizer does not have.
    """
    architecture = architecture_of(init or section.source)
    if architecture != "causal":
        return input_format_of(tokenizer, architecture)
    has_chat_template = bool(tokenizer.chat_template)
    if section.template == "chat" and not has_chat_template:
        raise UserError(
            f"student.template: chat, but the tokenizer of {init or section.model} has no chat "
            "template",
            hint="use student.template: plain, or a model that was tuned to chat",
        )
    if has_chat_template and section.template != "plain":
        return input_format_of(tokenizer, architecture, "chat")
    return input_format_of(tokenizer, architecture, "plain")


def input_format_of(
    tokenizer: Any, architecture: Architecture, template: Template | None = None
) -> InputFormat:
    """The format of an architecture; decoder-only models have a template."""
    if architecture == "encoder":
        return EncoderFormat(tokenizer)
    if architecture == "seq2seq":
        return PlainFormat(tokenizer)
    return ChatFormat(tokenizer, template or "plain")


class PlainFormat:
    """A text is what an encoder-decoder's tokenizer makes of it; a target has an end token.

    T5's tokenizer ends every text so. T5Gemma's begins inputs with bos and ends none.
    """

    kind: Architecture = "seq2seq"
    template: Template | None = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def read(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        truncation = {} if limit is None else {"truncation": True, "max_length": limit}
        encoded = self._tokenizer(list(texts), return_attention_mask=False, **truncation)
        token_ids: list[list[int]] = encoded["input_ids"]
        return token_ids

    def write(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        rows = self.read(texts, limit)
        end = self._tokenizer.eos_token_id
        if all(row[-1:] == [end] for row in rows):
            return rows
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False
        )
        text_limit = None if limit is None else limit - 1
        return [[*token_ids[:text_limit], end] for token_ids in encoded["input_ids"]]

    def identity(self, *, target: bool) -> tuple[str, ...]:
        return ()


class EncoderFormat:
    """A text, or a pair of texts, between the tokenizer's special tokens.

    A target of the rationale decoder ends with the separator, and its first token is the
    tokenizer's first special token.
    """

    kind: Architecture = "encoder"
    template: Template | None = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.end = SpecialTokens.of(tokenizer).end

    def read(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """See ``InputFormat``. A text with PAIR_SEPARATOR is a pair, whose longer part is cut."""
        truncation: dict[str, Any] = {}
        if limit is not None:
            truncation = {"truncation": "longest_first", "max_length": limit}
        if self._tokenizer.sep_token_id is None:  # it would join a pair without a mark
            texts = [text.replace(PAIR_SEPARATOR, self._tokenizer.eos_token) for text in texts]
        parts = [text.partition(PAIR_SEPARATOR) for text in texts]
        rows: list[list[int]] = [[] for _ in texts]
        for is_pair in (False, True):
            indices = [i for i, part in enumerate(parts) if bool(part[1]) == is_pair]
            if not indices:
                continue
            second = [parts[i][2] for i in indices] if is_pair else None
            encoded = self._tokenizer(
                [parts[i][0] for i in indices],
                second,
                return_attention_mask=False,
                return_token_type_ids=False,
                **truncation,
            )
            for i, token_ids in zip(indices, encoded["input_ids"], strict=True):
                rows[i] = token_ids
        return rows

    def write(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        text_limit = None if limit is None else limit - 1
        return [[*token_ids[:text_limit], self.end] for token_ids in encoded["input_ids"]]

    def identity(self, *, target: bool) -> tuple[str, ...]:
        return ("target", str(self.end)) if target else ("pairs", PAIR_SEPARATOR)


class PromptFormat(BaseModel):
    """What surrounds the text of a decoder's prompt and ends its answer (``wording.json``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    template: str
    """Name of the template: plain or chat."""
    head: str
    tail: str
    special: list[str]
    """Tokens that are read as ordinary characters in a text."""
    stops: list[int]
    """Ids that end an answer."""
    end: int | None = None
    """The one that training ends an answer with. None: an export of an earlier version."""


class Prompts:
    """Turns texts into the token ids of their prompts."""

    def __init__(self, prompt_format: PromptFormat, tokenize: Tokenize) -> None:
        self._format = prompt_format
        self._tokenize = tokenize
        self._head, self._tail = tokenize([prompt_format.head, prompt_format.tail], False)
        self._special = re.compile("|".join(map(re.escape, prompt_format.special)))

    def read(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """See ``InputFormat``. Raises UserError where the template alone reaches ``limit``."""
        template_tokens = len(self._head) + len(self._tail)
        text_limit = None if limit is None else limit - template_tokens
        if text_limit is not None and text_limit <= 0:
            raise UserError(
                f"student.max_input_tokens: {limit} leaves no tokens for the text, as the "
                f"{self._format.template} template alone takes {template_tokens}",
                hint="raise student.max_input_tokens, or use student.template: plain",
            )
        # A prompt is tokenized whole, as other tools do. Head, text and tail are tokenized apart
        # only where the text is cut, or has special tokens that must stay text.
        prompts = [self._format.head + text + self._format.tail for text in texts]
        rows = self._tokenize(prompts, False)
        in_parts = [
            index
            for index, (text, token_ids) in enumerate(zip(texts, rows, strict=True))
            if (limit is not None and len(token_ids) > limit) or self._special.search(text)
        ]
        text_rows = self._tokenize([texts[index] for index in in_parts], True)
        for index, text_ids in zip(in_parts, text_rows, strict=True):
            rows[index] = [*self._head, *text_ids[:text_limit], *self._tail]
        return rows


class ChatFormat:
    """A decoder's prompt is ``head``, the text and ``tail``; its target follows, with an end token.

    ``plain``: the token that the tokenizer puts before a text, if any; the text; a line break. The
    target ends with the tokenizer's end token. ``chat``: the user's turn of the chat template and
    the header of the answer's turn; the target ends with the token that ends a turn. Special tokens
    belong to the template alone: within a text they are read as ordinary characters.
    """

    kind: Architecture = "causal"

    def __init__(self, tokenizer: Any, template: Template) -> None:
        self.template: Template | None = template
        self._tokenizer = tokenizer
        if template == "chat":
            self.head, self.tail, self.end = _chat_parts(tokenizer)
        else:
            has_start = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
            self.head = tokenizer.bos_token if has_start else ""
            self.tail = "\n"
            self.end = _end_token(tokenizer)
        # `all_special_tokens` lacks special tokens without a role, such as Llama 3's turn headers.
        added_tokens = tokenizer.added_tokens_decoder.values()
        special = {
            *tokenizer.all_special_tokens,
            *(token.content for token in added_tokens if token.special),
            tokenizer.convert_ids_to_tokens(self.end),
        }
        self.prompt_format = PromptFormat(
            template=template,
            head=self.head,
            tail=self.tail,
            special=sorted(special),
            stops=sorted({self.end, _end_token(tokenizer)}),
            end=self.end,
        )
        self._prompts = Prompts(self.prompt_format, self._tokenize)

    @property
    def stops(self) -> list[int]:
        """Ids that end an answer."""
        return self.prompt_format.stops

    def read(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        return self._prompts.read(texts, limit)

    def write(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        text_limit = None if limit is None else limit - 1
        return [[*token_ids[:text_limit], self.end] for token_ids in self._tokenize(texts, True)]

    def identity(self, *, target: bool) -> tuple[str, ...]:
        if target:
            return ("target", str(self.end))
        return ("prompt", digest(self.head, self.tail))

    def _tokenize(self, texts: Sequence[str], special_as_text: bool) -> list[list[int]]:
        if not texts:
            return []
        token_ids: list[list[int]] = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=special_as_text,
            return_attention_mask=False,
        )["input_ids"]
        return token_ids


class ExportedPrompts(Prompts):
    """Prompts of an export, from ``wording.json`` and ``tokenizer.json``; needs no transformers.

    Files that cannot be read raise pydantic's or tokenizers' own errors.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        text = (folder / PROMPT_FORMAT_FILE).read_text(encoding="utf-8")
        prompt_format = PromptFormat.model_validate_json(text)
        self.stops = prompt_format.stops
        file = str(folder / "tokenizer.json")
        tokenizer = Tokenizer.from_file(file)
        text_tokenizer = Tokenizer.from_file(file)
        text_tokenizer.encode_special_tokens = True

        def tokenize(texts: Sequence[str], special_as_text: bool) -> list[list[int]]:
            chosen = text_tokenizer if special_as_text else tokenizer
            encodings = chosen.encode_batch(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]

        super().__init__(prompt_format, tokenize)
        self.tokenizer: Any = tokenizer

    def write(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of answers, each with its end token. See ``InputFormat``."""
        if self._format.end is None and len(self.stops) > 1:
            raise UserError("this export is from an earlier version", hint="export it again")
        end = self.stops[0] if self._format.end is None else self._format.end
        return [[*token_ids, end] for token_ids in self._tokenize(texts, True)]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of answers' ids, with or without their end tokens."""
        answer_rows = [[index for index in row if index not in self.stops] for row in rows]
        texts = self.tokenizer.decode_batch(answer_rows, skip_special_tokens=True)
        return [text.strip() for text in texts]


def _end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the student's tokenizer has no end token",
            hint="set eos_token in its tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def _chat_parts(tokenizer: Any) -> tuple[str, str, int]:
    """Head and tail of a chat template's prompt, and the id that ends the answer's turn."""
    user = {"role": "user", "content": _PLACEHOLDER}
    answer = {"role": "assistant", "content": _PLACEHOLDER}
    # A student answers at once: templates of reasoning models (Qwen3) can leave thinking out.
    options: dict[str, Any] = {"tokenize": False, "enable_thinking": False}
    options["date_string"] = TEMPLATE_DATE
    try:
        options["chat_template"] = _FIXED_DATE + tokenizer.get_chat_template()
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, **options)
        dialogue = tokenizer.apply_chat_template([user, answer], **options)
    except Exception as error:  # jinja's errors, or those that a template raises itself
        problem = " ".join(str(error).split())[:200]
        raise UserError(
            f"the student's chat template cannot be used ({problem})",
            hint="use student.template: plain",
        ) from None
    head, _, tail = prompt.partition(_PLACEHOLDER)
    _, placeholder, after_answer = dialogue.rpartition(_PLACEHOLDER)
    if not tail or not placeholder:
        raise UserError(
            "the student's chat template omits the message", hint="use student.template: plain"
        )
    end_ids = tokenizer(after_answer.lstrip(), add_special_tokens=False)["input_ids"]
    if end_ids and end_ids[0] in tokenizer.added_tokens_decoder:
        return head, tail, int(end_ids[0])
    return head, tail, _end_token(tokenizer)
