"""Label set: reads text as one label of a closed set.

A text is compared with the labels in steps, from the least to the most tidying. The first step that
finds a label decides:

1. the text itself;
2. the same in Unicode's canonical and compatibility forms, without case, white space and kinds of
   hyphen (``label_key``);
3. the same without the wrapping that models add: quotes, emphasis, brackets, a final full stop;
4. without marks at the label's own ends, spaces and hyphens between words ("non toxic" for
   "non-toxic"), or in another spelling of a number ("7" for "007");
5. a sentence that states exactly one label and does not negate it.

A key of two labels finds neither.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple, TypeVar

from dsbs.config.sections import label_key, plain_text
from dsbs.records import Unreadable
from dsbs.tasks.marks import BRACKETS, EMPHASIS, first_line, tidy, unwrapped

_Key = TypeVar("_Key")

_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])[\s_-]+(?=[^\W\d_])|(?<!\d)\s+|\s+(?!\d)")
_NUMBER = re.compile(r"[+-]?(\d+)(\.\d+)?(e[+-]?\d{1,2})?", re.IGNORECASE)


# --- a closed set


class LabelSet:
    """The labels of a closed set, with the indexes to read them. Cost per text does not grow with
    the number of labels.
    """

    def __init__(self, labels: Iterable[str]) -> None:
        self.labels = tuple(dict.fromkeys(labels))
        self._spelled = {unicodedata.normalize("NFC", label): label for label in self.labels}
        self._spelled |= {label: label for label in self.labels}
        self._by_key = _unambiguous((label_key(label), label) for label in self.labels)
        self._by_number = _unambiguous(
            (number, label) for label in self.labels if (number := _number_key(label)) is not None
        )
        self._by_value = _unambiguous(
            (float(label), label) for label in self.labels if _NUMBER.fullmatch(label)
        )
        self._by_loose_key = _unambiguous(
            (key, label) for label in self.labels for key in _loose_keys(label)
        )
        self._sorted_keys = sorted(self._by_key)
        self._mentions = _Mentions(self.labels)
        # No longer line is a label, with all wrapping and in any Unicode form.
        self._max_length = 4 * max(map(len, self.labels), default=0) + 100
        self.line_counts = sorted(
            {len(label.splitlines()) for label in self.labels} - {0, 1}, reverse=True
        )

    def spelled(self, text: str) -> str | None:
        """The label that a text is, whatever its Unicode form, case and white space (steps 1 and
        2).
        """
        label = self._spelled.get(text)
        if label is None and not text.isascii():
            label = self._spelled.get(unicodedata.normalize("NFC", text))
        return label or self._by_key.get(label_key(text))

    def of_value(self, value: Any) -> str | None:
        """The label that a data file's cell holds. Numbers may have lost their spelling: 7, 7.0 and
        "7" are the label "007", where no other label is that number.
        """
        if isinstance(value, float):
            return self._by_value.get(value)
        label = self.spelled(str(value))
        if label is None and isinstance(value, int) and not isinstance(value, bool):
            return self._by_value.get(value)
        return label or self._by_number.get(_number_key(str(value).strip()) or "")

    def lookup(self, text: str) -> str | None:
        """The label that a text is, in steps 1 to 4; None where it says more or something else."""
        candidates = [text, *self._first_lines(text)]
        line = first_line(text)
        if len(line) <= self._max_length:
            candidates += unwrapped(line)
        for candidate in candidates:
            label = self.spelled(candidate)
            if label is not None:
                return label
        for candidate in candidates[1:]:
            key = label_key(candidate)
            label = self._by_loose_key.get(key) or self._by_loose_key.get(_without_spaces(key))
            label = label or self._by_number.get(_number_key(key) or "")
            if label is not None:
                return label
        return None

    def read(self, text: str) -> str | Unreadable:
        """The label that a text is or, in its first line, states (steps 1 to 5).

        A line that begins a label at the end of the text was truncated.
        """
        label = self.lookup(text)
        if label is not None:
            return label
        line = first_line(text)
        answer = tidy(line)
        if not answer:
            return Unreadable("empty")
        stated = self._mentions.stated(plain_text(line))
        if len(stated) == 1:
            return stated.pop()
        if stated:
            return Unreadable("several-answers", answer)
        is_last_line = text.rstrip(" *_`\"'").endswith(line.rstrip(" *_`\"'"))
        if is_last_line and self._begins_label(label_key(answer)):
            return Unreadable("truncated", answer)
        return Unreadable("label-outside-set", answer)

    def concluded(self, claim: str) -> str | None:
        """The label that a sentence's last words are. "a" and "i" are words there, not letters."""
        label = self.lookup(claim)
        if label is not None and len(label) == 1 and not {label, label.upper()} & {*claim}:
            return None
        return label

    def not_negated(self, sentence: str) -> set[str]:
        """The labels that a sentence mentions without a negation before them."""
        return self._mentions.stated(plain_text(sentence), text_follows=True)

    def _first_lines(self, text: str) -> Iterator[str]:
        """For labels with line breaks: as many first lines of a text as a label has."""
        lines = text.strip().splitlines()
        for count in self.line_counts:
            if count <= len(lines):
                yield from unwrapped("\n".join(lines[:count]))

    def _begins_label(self, key: str) -> bool:
        at = bisect_left(self._sorted_keys, key)
        return at < len(self._sorted_keys) and self._sorted_keys[at].startswith(key)


def _unambiguous(pairs: Iterable[tuple[_Key, str]]) -> dict[_Key, str]:
    """A mapping without the keys that two labels have."""
    mapping: dict[_Key, str] = {}
    ambiguous = set()
    for key, label in pairs:
        if mapping.setdefault(key, label) != label:
            ambiguous.add(key)
    return {key: label for key, label in mapping.items() if key not in ambiguous}


def _loose_keys(label: str) -> set[str]:
    """A label's keys without the marks at its ends, and without spaces between its words."""
    shorter = [label_key(candidate) for candidate in unwrapped(label)]
    keys = {*shorter, *(_without_spaces(key) for key in shorter)}
    return {key for key in keys if any(character.isalnum() for character in key)}


def _without_spaces(key: str) -> str:
    """A key without the spaces, hyphens and underscores between its words."""
    return _BETWEEN_WORDS.sub("", key)


def _number_key(text: str) -> str | None:
    """A number in its shortest spelling. None for other texts and for those that are rather codes
    or versions (1.10, 007.0).
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    integer, fraction, exponent = match.groups()
    if fraction and fraction.endswith("0") and fraction.strip(".0"):
        return None
    if len(integer) > 1 and integer[0] == "0" and (fraction or exponent):
        return None
    return f"{Decimal(text).normalize():f}"


# --- labels in a sentence


class Token(NamedTuple):
    """A word or a mark of a sentence."""

    word: str
    """Case-folded."""
    text: str
    start: int
    end: int


_TOKEN = re.compile(r"[^\W_]+(?:(?:[_'-]+[^\W_]+)|(?<=\d)[.,:]\d+)*|\S")


def tokenize(text: str) -> list[Token]:
    """A ``plain_text`` as words and marks. Words keep their inner hyphens, apostrophes and
    underscores, numbers their points.
    """
    return [
        Token(match.group().casefold().removesuffix("-related"), match.group(), *match.span())
        for match in _TOKEN.finditer(text)
    ]


class _Mention(NamedTuple):
    start: int  # of tokens
    end: int
    label: str


class _Mentions:
    """Finds labels in sentences, by their words."""

    def __init__(self, labels: Sequence[str]) -> None:
        spellings = [(tuple(_words(label)), label) for label in labels]
        self._by_words = _unambiguous(spellings)
        aliases = [(alias, label) for words, label in spellings for alias in _aliases(words)]
        for alias, label in _unambiguous(aliases).items():
            self._by_words.setdefault(alias, label)
        lengths: dict[str, set[int]] = {}
        for words in self._by_words:
            if words:
                lengths.setdefault(words[0], set()).add(len(words))
        # Longest first, so that "card" is not read in "card fraud".
        self._lengths = {word: sorted(counts, reverse=True) for word, counts in lengths.items()}
        self._weak = {label for words, label in spellings if _is_weak(words)}

    def stated(self, text: str, *, text_follows: bool = False) -> set[str]:
        """The labels that a ``plain_text`` states and does not negate.

        A label that is also a common word, a letter or a number (``_is_weak``) counts only where it
        stands as an answer does, and no other label is mentioned. ``text_follows``: a label's own
        text follows it, whose words negate nothing.
        """
        tokens = tokenize(text)
        mentions = list(self._find(tokens, text))
        strong = [mention for mention in mentions if mention.label not in self._weak]
        inside = {at for mention in strong for at in range(mention.start, mention.end)}
        starts = {mention.start for mention in mentions}
        words = [token.word for token in tokens]
        positive: list[_Mention] = []
        stated: set[str] = set()
        for mention in mentions:
            if mention.label in stated or _is_negated(words, mention.start, inside):
                continue
            if not text_follows and _is_negated_after(words, mention.end, starts):
                continue
            positive.append(mention)
            if mention.label not in self._weak or _stands_as_answer(tokens, mention):
                stated.add(mention.label)
        if not stated or (len(stated) == 1 and stated <= self._weak):
            several = stated.union(
                mention.label for mention in positive if not _is_function_word(tokens, mention)
            )
            return several if len(several) > 1 else stated
        return stated

    def _find(self, tokens: Sequence[Token], text: str) -> Iterator[_Mention]:
        at = 0
        while at < len(tokens):
            end = at + 1
            for length in self._lengths.get(tokens[at].word, ()):
                words = tuple(token.word for token in tokens[at : at + length])
                label = self._by_words.get(words)
                if (
                    label
                    and len(words) == length
                    and _stands_alone(text, tokens[at], tokens[at + length - 1])
                ):
                    yield _Mention(at, at + length, label)
                    end = at + length
                    break
            at = end


def _words_in(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _words(label: str) -> Iterator[str]:
    return (token.word for token in tokenize(plain_text(label)))


def _aliases(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Other ways to write a label's words: "non-toxic" as "non toxic", "card_fraud" as "card
    fraud".
    """
    parts = tuple(piece for word in words for piece in re.split("[_-]+", word))
    if len(parts) < 2 or not all(piece.isalnum() for piece in parts):
        return
    yield parts
    yield ("-".join(parts),)
    yield ("_".join(parts),)
    if "-" in "".join(words):
        yield ("".join(parts),)


def _stands_alone(text: str, first: Token, last: Token) -> bool:
    """Whether no letter, sign or unit is attached: "C" does not stand alone in "C++", 5 in "5%"."""
    before = text[first.start - 1 : first.start]
    after = text[last.end : last.end + 1]
    for neighbor in (before, after):
        if neighbor and (neighbor.isalnum() or unicodedata.category(neighbor)[0] == "M"):
            return False
    if after and after in "+#%°":
        return False
    return not before or before not in "!~¬#@&$€£+"


# --- labels that are also common words

_COMMON_WORDS = _words_in(
    "a an the i it he she we us me you they in on at by to of or and as is be do go so if no not "
    "yes none any all other others some same never true false who what this that"
)
_OPTION_WORDS = _words_in(
    "option choice label class category grade answer rating score type level group code tier "
    "priority rank mark number intent"
)
_LINKS = _words_in("is be as are was : =")
_ARTICLES = frozenset(("a", "an", "the"))
_ENDS = frozenset(".,;:!)]-\"'*`")
_FOLLOWING = frozenset(("is", "because", "since"))


def _is_weak(words: Sequence[str]) -> bool:
    """Whether a label's words mean little within a sentence: a letter, a number, a common word or
    marks alone.
    """
    if len(words) == 1:
        word = words[0]
        return len(word) == 1 or word in _COMMON_WORDS or _NUMBER.fullmatch(word) is not None
    return not any(word[0].isalnum() for word in words)


def _stands_as_answer(tokens: Sequence[Token], mention: _Mention) -> bool:
    """Whether a weak label stands where an answer does: "(B)", "B.", "option B", "it is a B"."""
    token = tokens[mention.start]
    if len(token.word) == 1 and token.text not in (mention.label, mention.label.upper()):
        return False
    before = [earlier.word for earlier in tokens[: mention.start]]
    while before and before[0] in EMPHASIS:
        del before[0]
    after = tokens[mention.end].word if mention.end < len(tokens) else ""
    is_end = not after or after in _ENDS
    if not before:
        return is_end or after in _FOLLOWING
    if after and after in BRACKETS.get(before[-1], before[-1] if before[-1] in EMPHASIS else ""):
        return True
    if not is_end and after not in _FOLLOWING:
        return False
    if before[-1] in _LINKS or before[-1] in _OPTION_WORDS or before[-1].endswith("'s"):
        return True
    return before[-1] in _ARTICLES and (len(token.word) == 1 or token.word[0].isdigit())


def _is_function_word(tokens: Sequence[Token], mention: _Mention) -> bool:
    """Whether a mention of a letter is rather the article "a" or the pronoun "I"."""
    token = tokens[mention.start]
    if len(token.word) != 1:
        return False
    if token.text not in (mention.label, mention.label.upper()):
        return True
    follows_word = mention.end < len(tokens) and tokens[mention.end].word[0].isalpha()
    return token.word in _COMMON_WORDS and follows_word


# --- negation

_CUES = _words_in(
    "not no non nor neither never none nothing cannot cant dont doesnt isnt wasnt hardly barely "
    "scarcely rarely seldom without lacks lacking lack absence absent less least except "
    "excluding excludes excluded avoids unlikely un anti zero nowhere nobody fails devoid opposite "
    "doubt denies disagree unlike almost nearly pseudo quasi too ≠ ¬ "
    "nicht kein keine keinen keinem keiner keines weder ohne kaum nie niemals "
    "pas aucun aucune jamais sans ni ne sin nunca ningún ninguno ninguna tampoco "
    "niet geen nooit zonder não sem nem nenhum nenhuma non senza né "
    "inte ej ingen inga ikke ikkje не нет ни без bez değil"
)
_CUE_PAIRS = frozenset(
    (
        ("free", "of"), ("free", "from"), ("far", "from"), ("rather", "than"), ("instead", "of"),
        ("other", "than"), ("apart", "from"), ("anything", "but"), ("all", "but"),
        ("rule", "out"), ("rules", "out"), ("ruled", "out"), ("ruling", "out"), ("as", "opposed"),
        ("short", "of"), ("contrary", "to"),
        ("void", "of"), ("clear", "of"), ("exempt", "from"), ("different", "from"),
        ("distinct", "from"), ("contrast", "to"), ("contrast", "with"),
    )
)  # fmt: skip
_CUES_AFTER = _words_in(
    "not cannot never hardly nowhere absent missing wrong incorrect unlikely excluded ruled "
    "inapplicable false nicht pas niet inte ikke не"
)
_SENTENCE_ENDS = frozenset(".!?;")
_CONTRASTS = _words_in("but instead rather however sondern mais sino maar utan aber но")
_CLAUSE_ENDS = _words_in(
    ". ! ? ; : = , ( ) - because since as for which where when so but and while although though if"
)
_NEW_CLAUSE = re.compile(r"it's\b|(it|this) is\b")
_BEFORE_NO = _words_in(": = , ( -")


def _is_cue(word: str) -> bool:
    return word in _CUES or word.endswith("n't")


def _is_negated(words: Sequence[str], start: int, inside: set[int]) -> bool:
    """Whether words before a label negate it. The words of labels (``inside``) do not: "not spam"
    may be one.
    """
    for at in range(start - 1, -1, -1):
        pair = tuple(words[at : at + 2])
        if at not in inside and (_is_cue(words[at]) or pair in _CUE_PAIRS):
            return True
        if words[at] in _SENTENCE_ENDS:
            break
        if words[at] in _CONTRASTS and (words[at - 1 : at] or [""])[0] not in ("anything", "all"):
            break
        if words[at] == "," and _NEW_CLAUSE.match(" ".join(words[at + 1 : at + 3])):
            break
    return False


def _is_no(words: Sequence[str]) -> bool:
    """Whether a clause is a mere "no", as in "toxic: no"."""
    is_alone = len(words) == 1 or (len(words) > 1 and not words[1][0].isalnum())
    return is_alone and (words[0] in ("0", "false") or _is_cue(words[0]))


def _is_negated_after(words: Sequence[str], end: int, starts: set[int]) -> bool:
    """Whether the words after a label negate or question it: "toxic is wrong", "toxic?", "toxic:
    no". ``starts`` are the first words of the sentence's labels.
    """
    if words[end : end + 1] in (["?"], ["free"]):
        return True
    for at in range(end, len(words)):
        if words[at] in _BEFORE_NO and _is_no(words[at + 1 :]):
            return True
        if words[at] in _CLAUSE_ENDS or at in starts:
            return False
        if words[at] in _CUES_AFTER or words[at].endswith("n't"):
            later = min((start for start in starts if start > at), default=None)
            # "toxic is not right, neutral is", but "toxic and not neutral"
            return later is None or not _CLAUSE_ENDS.isdisjoint(words[at + 1 : later])
    return False
