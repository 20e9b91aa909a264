"""What the page says in words, beside the numbers of ``results_table``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dsbs.formatting import percent
from dsbs.records.summary import first_comparison, headline, is_reliable
from dsbs.reporting.gather import Run

# What has no glyph would vanish or, as half of a surrogate pair, stop the page from being written.
_SHOWN = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"
}
_SHOWN |= {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}
_TURNS = re.compile(
    "[\u2066-\u2069]"
)  # the beginnings of isolates, which an element's own end does not close, and their end


def visible(text: str) -> str:
    """The text with its control characters as escapes, and what turns its direction closed: it turns nothing beside it."""
    unopened = unclosed = 0
    for character in _TURNS.findall(text):
        if character != "\u2069":
            unclosed += 1
        elif unclosed:
            unclosed -= 1
        else:
            unopened += 1
    return "\u2068" * unopened + text.translate(_SHOWN) + "\u2069" * unclosed


def share(value: float | None) -> str | None:
    """A share in percent, for a column that says so."""
    return None if value is None else f"{100 * value:.1f}"


def count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def ms(value: float | None) -> str | None:
    """Milliseconds, for a column that says so."""
    return (
        None
        if value is None
        else f"{value:,.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 1
        else f"{value:.2f}"
    )


def moment(said: str | None) -> str:
    """A manifest's time, which is in UTC, to the minute."""
    return f"{said[:16].replace('T', ' ')} UTC" if said else "–"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run says about its headline system: a sentence with its uncertainty, and the levels behind it."""

    run: str
    sentence: str
    detail: str
    reliable: bool


def verdict(run: Run) -> Verdict:
    """The headline system against the first baseline that it was compared with."""
    results = run.results
    system = results.system(results.headline)
    name, gap = first_comparison(system) if system else (None, None)
    other = results.system(name)
    if system is None or gap is None or other is None:
        detail = "No baseline (eval.baseline) was evaluated beside it, so this does not tell what the method brings."
        return Verdict(run.name, _kept(headline(results)), detail, reliable=False)
    detail = f"{system.name} is right on {percent(system.accuracy)} of the rows, {other.name} on {percent(other.accuracy)}."
    if not is_reliable(gap):
        detail += " That no difference is found does not show that there is none."
    return Verdict(run.name, _kept(headline(results)), _kept(detail), reliable=is_reliable(gap))


def _kept(text: str) -> str:
    """No line ends between a number and its per cent sign."""
    return text.replace(" %", "\u00a0%")
