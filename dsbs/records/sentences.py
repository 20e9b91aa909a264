"""Sentences about comparisons, floors, several students, label efficiency and break-even."""

from __future__ import annotations

from dsbs.formatting import (
    count,
    dollars,
    p_value,
    percent,
    points,
    sentence_list,
    signed_confidence_interval,
)
from dsbs.records.results import (
    BreakEven,
    Comparison,
    FloorComparison,
    GradedComparison,
    LabelEfficiency,
    Results,
    SystemResult,
)
from dsbs.records.subsets import subset_rank

ALPHA = 0.05  # a difference is reliable where its Holm-corrected p value is below this


def is_reliable(comparison: Comparison | GradedComparison) -> bool:
    """Whether the difference is significant after Holm's correction."""
    return comparison.p_holm < ALPHA


def comparison_sentence(baseline: str, comparison: Comparison) -> str:
    """The difference from another system, or that there is none to rely on, with its caveats."""
    uncertainty = f"{signed_confidence_interval(comparison.ci95)}, {p_value(comparison.p_holm)}"
    if is_reliable(comparison):
        return f"{distance(comparison)} accurate than {baseline} ({uncertainty})"
    details = "; ".join([f"{points(comparison.delta)}, {uncertainty}", *caveats_of(comparison)])
    return f"no reliable difference from {baseline} ({details})"


def distance(comparison: Comparison) -> str:
    """How far apart two systems are: 3.1 points more."""
    direction = "more" if comparison.delta > 0 else "less"
    distance = points(abs(comparison.delta)).removeprefix("+")
    return f"{distance} {direction}"


def caveats_of(comparison: Comparison) -> list[str]:
    """Caveats of a comparison that is not significant."""
    caveats = []
    excludes_zero = not comparison.ci95[0] <= 0 <= comparison.ci95[1]
    if excludes_zero and comparison.p < ALPHA:
        caveats.append(
            "the p value is corrected for the number of comparisons, the interval is not"
        )
    elif excludes_zero:
        caveats.append("the interval and the p value rest on different approximations")
    if comparison.minimum_detectable_effect is not None:
        smallest = points(comparison.minimum_detectable_effect).removeprefix("+")
        caveats.append(
            f"with this test set, a difference below {smallest} would usually go unnoticed "
            "(80% power)"
        )
    return caveats


# --- floors


def floor_warnings(system: SystemResult | None) -> list[str]:
    """A sentence that names the floors that a system does not beat, if any."""
    if system is None:
        return []
    missed = [
        f"{floor} ({_floor_difference(comparison)})"
        for floor, comparison in system.versus_floors.items()
        if not comparison.is_beaten
    ]
    if not missed:
        return []
    noun = "the floor" if len(missed) == 1 else "the floors"
    return [f"{system.name} does not beat {noun} {sentence_list(missed)}."]


def floor_details(system: SystemResult | None) -> list[str]:
    """A sentence about the floors that a system beats, and how to read all of them."""
    if system is None or not system.versus_floors:
        return []
    beaten = [
        f"{floor} ({_floor_difference(comparison)})"
        for floor, comparison in system.versus_floors.items()
        if comparison.is_beaten
    ]
    details = []
    if beaten:
        noun = "floor" if len(beaten) == 1 else "floors"
        details.append(f"It beats the {noun} {sentence_list(beaten)}.")
    return [*details, "Comparisons with floors are outside Holm's correction."]


def floor_sentences(system: SystemResult) -> list[str]:
    """A sentence for each floor that a system is compared with."""
    sentences = []
    for floor, comparison in system.versus_floors.items():
        verb = "beats" if comparison.is_beaten else "does not beat"
        difference = _floor_difference(comparison)
        sentences.append(f"{system.name} {verb} the floor {floor} ({difference}).")
    return sentences


def _floor_difference(comparison: FloorComparison) -> str:
    return f"{points(comparison.delta)}, {signed_confidence_interval(comparison.ci95)}"


# --- several students


def student_sentences(results: Results) -> list[str]:
    """Of several students: which is best, what their methods add, and whether they were tuned
    alike. Empty for a single student.
    """
    systems = [system for system in results.systems if system.kind == "student"]
    largest = max((system.subset for system in systems), key=subset_rank, default=None)
    systems = [system for system in systems if system.subset == largest]
    names = dict.fromkeys(system.student for system in systems if system.student is not None)
    if len(names) < 2:
        return []
    head = results.system(results.headline)
    subject = (None, None) if head is None else (head.method, head.labels)
    own_baselines = []
    for system in systems:
        if (system.method, system.labels) == subject and system.versus:
            baseline, comparison = next(iter(system.versus.items()))
            sentence = comparison_sentence(baseline, comparison)
            own_baselines.append(f"{system.name} ({percent(system.accuracy)}): {sentence}.")
    return [*_best_student_sentences(systems), *own_baselines, *_tuning_sentences(systems)]


def _best_student_sentences(systems: list[SystemResult]) -> list[str]:
    best = max(systems, key=lambda system: system.accuracy)
    sentences = [
        f"The most accurate student is {best.student} ({best.name}, {percent(best.accuracy)})."
    ]
    for other in systems:
        is_counterpart = (other.method, other.labels) == (best.method, best.labels)
        if other.student == best.student or not is_counterpart:
            continue
        comparison = best.versus_students.get(other.name)
        if comparison is None and best.name in other.versus_students:
            comparison = _reversed(other.versus_students[best.name])
        if comparison is None:
            continue
        sentence = comparison_sentence(other.name, comparison)
        sentences.append(f"By the same method, {best.name}: {sentence}.")
    return sentences


def _reversed(comparison: Comparison) -> Comparison:
    """The comparison of the other system with this one. Graded ones are left out."""
    low, high = comparison.ci95
    return comparison.model_copy(
        update={
            "delta": -comparison.delta,
            "ci95": (-high, -low),
            "wins": comparison.losses,
            "losses": comparison.wins,
            "graded": {},
        }
    )


def _tuning_sentences(systems: list[SystemResult]) -> list[str]:
    """Whether all students tried equally many settings by each method."""
    tried: dict[tuple[str | None, str | None], dict[str | None, int]] = {}
    for system in systems:
        if system.settings_tried is not None:
            key = (system.method, system.labels)
            tried.setdefault(key, {})[system.student] = system.settings_tried
    for (method, _), counts in tried.items():
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {number}" for name, number in counts.items())
            return [
                f"The students were not tuned alike ({method} tried settings: {listed}), so a "
                "difference between them may come from tuning."
            ]
    numbers = sorted({number for counts in tried.values() for number in counts.values()})
    if not numbers:
        return []
    if numbers == [0]:
        return ["No student was tuned; each was trained with its own learning rate and steps."]
    listed = sentence_list([f"{number}" for number in numbers])
    return [f"All students were tuned alike, on {listed} settings for each method."]


# --- labels and prices


def label_efficiency_sentence(efficiency: LabelEfficiency) -> str:
    """How many labels a method needs to be as accurate as another system."""
    method = f"{efficiency.method} with {efficiency.labels} labels"
    if efficiency.student is not None:
        method = f"{efficiency.student}: {method}"
    target = f"{efficiency.system} ({percent(efficiency.accuracy)})"
    low, high = efficiency.ci95
    if efficiency.rows is None:
        sentence = f"{method} does not match {target} within {efficiency.largest:,} rows"
        if low is None:
            return f"{sentence}."
        return f"{sentence}; the 95% CI begins at {low:,} rows."
    return (
        f"{method} needs {_row_limit(efficiency.rows, efficiency)} rows to match {target} "
        f"(95% CI {_row_limit(low, efficiency)} to {_row_limit(high, efficiency)} rows)."
    )


def _row_limit(rows: int | None, efficiency: LabelEfficiency) -> str:
    """A number of rows. Outside the curve only a bound is known."""
    if rows is None:
        return f"more than {efficiency.largest:,}"
    if rows <= efficiency.smallest:
        return f"at most {rows:,}"
    return f"{rows:,}"


def break_even_sentence(break_even: BreakEven) -> str:
    """After how many predictions the teacher's bill for the training rows is recovered."""
    price = dollars(1000 * break_even.teacher_usd_per_prediction)
    return (
        f"{break_even.system}: annotating its training rows cost {dollars(break_even.spent_usd)}. "
        f"It recovers that after {count(break_even.predictions, 'prediction')}, "
        f"since the teacher costs {price} per 1,000 predictions."
    )
