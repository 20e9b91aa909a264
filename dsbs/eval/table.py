"""The comparison as a table for people, from what ``results.json`` holds."""

from __future__ import annotations

from typing import Any

HEADINGS = (
    "system",
    "seeds",
    "accuracy",
    "95 % interval",
    "to baseline",
    "95 % interval",
    "p (Holm)",
    "parameters",
    "ms/example",
)


def cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text. Where baselines differ, by the share of the data, each row names its own."""
    several = len({name for system in result["systems"] for name in system["versus"]}) > 1
    rows = []
    for system in result["systems"]:
        baseline, versus = against(system)
        other = f" to {baseline}" if several else ""
        rows.append(
            [
                system["name"],
                str(len(system["seeds"])) if system["seeds"] else "–",
                f"{100 * system['accuracy']:.1f} %",
                f"{100 * system['ci95'][0]:.1f} – {100 * system['ci95'][1]:.1f}",
                f"{100 * versus['delta']:+.1f}{other}" if versus else "–",
                f"{100 * versus['ci95'][0]:+.1f} – {100 * versus['ci95'][1]:+.1f}" if versus else "–",
                p_value(versus["p_holm"]).removeprefix("= ") if versus else "–",
                millions(system["parameters"]),
                f"{system['ms_per_example']:.2f}" if system["ms_per_example"] is not None else "–",
            ]
        )
    return [f"to {result['baseline']}" if h == "to baseline" and not several else h for h in HEADINGS], rows


def against(system: dict[str, Any]) -> tuple[str | None, dict[str, Any] | None]:
    """The baseline that a system is compared with, and what came of it."""
    return next(iter(system["versus"].items()), (None, None))


def markdown(result: dict[str, Any]) -> str:
    """A Markdown page: heading, table, and what it shows in words."""
    headings, rows = cells(result)
    lines = [f"# {result['split']}, {result['n']} rows", ""]
    if not result["reportable"]:
        lines += ["**smoke: not reportable** (task.limit is set)", ""]
    lines += ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *verdict(result)])


def verdict(result: dict[str, Any]) -> list[str]:
    """One sentence for each comparison; "no reliable difference" in words where there is none."""
    sentences = []
    for system in result["systems"]:
        baseline, versus = against(system)
        if versus is None:
            continue
        points = f"{abs(100 * versus['delta']):.1f} points"
        low, high = (100 * x for x in versus["ci95"])
        if versus["p_holm"] < 0.05:
            way = "above" if versus["delta"] > 0 else "below"
            said = f"{points} {way} {baseline} (95 % interval {low:+.1f} to {high:+.1f}, p {p_value(versus['p_holm'])})"
        else:
            said = (
                f"no reliable difference to {baseline} ({100 * versus['delta']:+.1f} points, "
                f"95 % interval {low:+.1f} to {high:+.1f}, p {p_value(versus['p_holm'])})"
            )
        sentences.append(f"{system['name']}: {said}.")
    if result["baseline"] is None:
        sentences.append("The run has no baseline students, so nothing is compared: add finetune to train.methods.")
    return sentences


def p_value(p: float) -> str:
    return "< .001" if p < 0.001 else f"= {p:.3f}"


def millions(parameters: int | None) -> str:
    return "–" if parameters is None else f"{parameters / 1e6:.1f} M"
