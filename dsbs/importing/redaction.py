"""Keys and personal data in texts: counted always, replaced on request.

Personal data are found by presidio-analyzer's pattern recognizers, which check what can be checked
(card numbers, IBANs, the domain of an e-mail address) and need no model and no network. It has no
recognizer for keys; theirs are the prefixes that providers publish.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any

from dsbs.errors import needs_extra

KEY = re.compile(
    r"\b(?:sk|rk|pk)-(?:(?:ant|proj|svcacct|or)-)?[\w-]{16,}"  # OpenAI, Anthropic, OpenRouter
    r"|\b(?:sk|rk)_(?:live|test)_\w{16,}"  # Stripe
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bAIza[\w-]{35}"  # Google
    r"|\bgh[oprsu]_\w{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{20,}"
    r"|\bhf_\w{30,}|\bgsk_\w{30,}|\bxox[abprs]-[\w-]{10,}"
    r"|(?<![\w-])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"  # JSON web tokens
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b[Bb]earer\s+[\w.~+/-]{20,}=*",
    re.DOTALL,
)
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[^\W\d_]{2,24}\b")
_MIN_SCORE = 0.4  # of a presidio recognizer's result; passing a check gives 1.0


def count_private(text: str, counts: Counter[str]) -> None:
    """Add the keys and e-mail addresses in a text to ``counts``."""
    if "@" in text:
        counts["e-mail addresses"] += sum(1 for _ in EMAIL.finditer(text))
    counts["keys"] += sum(1 for _ in KEY.finditer(text))


def hide_keys(text: str) -> str:
    """A text for the terminal."""
    return KEY.sub("<KEY>", text)


@cache
def _recognizers() -> tuple[tuple[re.Pattern[str], Any], ...]:
    """Recognizers, each with what a text must have for it to find anything: they are slow."""
    with needs_extra("redact", "--redact"):
        import tldextract.tldextract as suffixes
        from presidio_analyzer import predefined_recognizers as presidio
    # By default it downloads the list of domain suffixes; a snapshot comes with it.
    suffixes.TLD_EXTRACTOR = suffixes.TLDExtract(suffix_list_urls=(), cache_dir=None)
    return (
        (re.compile("@"), presidio.EmailRecognizer()),
        (re.compile(r"\d(?:[ -]?\d){11}"), presidio.CreditCardRecognizer()),
        (re.compile(r"[A-Z]{2}\d\d"), presidio.IbanRecognizer()),
        (re.compile(r"\d\.\d|:\w*:"), presidio.IpRecognizer()),
        (re.compile(r"\d(?:[ ()./-]{0,3}\d){6}"), presidio.PhoneRecognizer()),
        (re.compile(r"\w{25}"), presidio.CryptoRecognizer()),
        (re.compile(r"\d{3}[ .-]?\d\d[ .-]?\d{4}"), presidio.UsSsnRecognizer()),
    )


class Redactor:
    """Replaces keys and personal data by the name of their kind: ``<EMAIL_ADDRESS>``.

    Raises UserError where presidio-analyzer is not installed.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._recognizers = _recognizers()

    def __call__(self, text: str) -> str:
        text = KEY.sub(lambda _: self._name("KEY"), text)
        results = [
            result
            for needed, recognizer in self._recognizers
            if needed.search(text)
            for result in recognizer.analyze(text, recognizer.supported_entities, None) or ()
            if result.score >= _MIN_SCORE
        ]
        position = 0
        parts = []
        # the surest of overlapping results, then the longest
        for result in _without_overlaps(results):
            parts += [text[position : result.start], self._name(result.entity_type)]
            position = result.end
        return "".join([*parts, text[position:]])

    def value(self, value: Any) -> Any:
        """The same for a value of a row, with all that it contains."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, dict):
            return {key: self.value(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.value(inner) for inner in value]
        return value

    def _name(self, kind: str) -> str:
        self.counts[kind] += 1
        return f"<{kind}>"


def _without_overlaps(results: list[Any]) -> list[Any]:
    chosen: list[Any] = []
    for result in sorted(results, key=lambda r: (-r.score, r.start - r.end)):
        if all(result.end <= other.start or result.start >= other.end for other in chosen):
            chosen.append(result)
    return sorted(chosen, key=lambda result: result.start)
