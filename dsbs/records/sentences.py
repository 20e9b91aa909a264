"""Sentences about comparisons, floors, several students, cascades, labels and break-even."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from dsbs.formatting import (
    ABSENT,
    confidence_interval,
    count,
    dollars,
    duration,
    p_value,
    percent,
    points,
    points_number,
    rate,
    sentence_list,
    signed_confidence_interval,
)
from dsbs.records.measures import Cascade
from dsbs.records.results import (
    BreakEven,
    Comparison,
    GradedComparison,
    LabelEfficiency,
    Results,
    SystemResult,
)
from dsbs.records.reviews import ReviewedSplit
from dsbs.records.subsets import subset_rank

ALPHA = 0.05  # a difference is reliable where its Holm-corrected p value is below this
TIME_RATIO = 1.3  # the report mentions it where a better student trained so many times as long


def is_reliable(comparison: Comparison | GradedComparison) -> bool:
    """Whether the difference is significant after Holm's correction."""
    return comparison.p_holm < ALPHA


def comparison_sentence(baseline: str, comparison: Comparison) -> str:
    """The difference from another system, or that there is none to rely on, with its caveats."""
    uncertainty = f"{signed_confidence_interval(comparison.ci95)}, {p_value(comparison.p_holm)}"
    if is_reliable(comparison):
        details = "; ".join([uncertainty, *seed_caveats(comparison)])
        return f"{distance(comparison)} accurate than {baseline} ({details})"
    details = "; ".join([f"{points(comparison.delta)}, {uncertainty}", *caveats_of(comparison)])
    return f"no reliable difference from {baseline} ({details})"


def seed_caveats(comparison: Comparison) -> list[str]:
    """Caveats of a significant comparison whose seeds do not agree, or are too few to say so.

    The p value is about rows: with other test rows, these same students would differ too. Whether
    students of other seeds would is a question of Student's t interval over the seeds.
    """
    differences = list(comparison.delta_per_seed.values())
    if len(differences) == 1:
        return ["trained with one seed: another seed may shrink or reverse the difference"]
    if not differences or _excludes_zero(differences):
        return []
    by_seed = sentence_list([points_number(difference) for difference in differences])
    return [f"by seed the difference is {by_seed} points: other seeds may not confirm it"]


def _excludes_zero(differences: Sequence[float]) -> bool:
    """Whether the 95% t interval of the mean difference excludes zero."""
    from scipy.stats import t

    standard_error = statistics.stdev(differences) / math.sqrt(len(differences))
    half_width = t.ppf(0.975, len(differences) - 1) * standard_error
    return bool(abs(statistics.mean(differences)) > half_width)


def time_sentences(system: SystemResult, baseline: SystemResult | None) -> list[str]:
    """A sentence where a more accurate system also trained clearly longer than its baseline."""
    if baseline is None or not system.train_s or not baseline.train_s:
        return []
    ratio = system.train_s / baseline.train_s
    if ratio < TIME_RATIO or system.versus[baseline.name].delta <= 0:
        return []
    return [
        f"{system.name} trained {ratio:.1f} times as long as {baseline.name} "
        f"({duration(system.train_s)} and {duration(baseline.train_s)}): train {baseline.name} "
        "as long, too, before you choose."
    ]


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


def floor_warnings(results: Results, system: SystemResult | None) -> list[str]:
    """A sentence that names the floors that a system does not beat, if any."""
    if system is None:
        return []
    missed = [
        f"{floor} ({_floor_difference(results, system, floor)})"
        for floor, comparison in system.versus_floors.items()
        if not comparison.is_beaten
    ]
    if not missed:
        return []
    noun = "the floor" if len(missed) == 1 else "the floors"
    return [f"{system.name} does not beat {noun} {sentence_list(missed)}."]


def floor_details(results: Results, system: SystemResult | None) -> list[str]:
    """A sentence about the floors that a system beats, and how to read all of them."""
    if system is None or not system.versus_floors:
        return []
    beaten = [
        f"{floor} ({_floor_difference(results, system, floor)})"
        for floor, comparison in system.versus_floors.items()
        if comparison.is_beaten
    ]
    details = []
    if beaten:
        noun = "floor" if len(beaten) == 1 else "floors"
        details.append(f"It beats the {noun} {sentence_list(beaten)}.")
    return [*details, "Comparisons with floors are outside Holm's correction."]


def floor_sentences(results: Results, system: SystemResult) -> list[str]:
    """A sentence for each floor that a system is compared with."""
    sentences = []
    for floor, comparison in system.versus_floors.items():
        verb = "beats" if comparison.is_beaten else "does not beat"
        difference = _floor_difference(results, system, floor)
        sentences.append(f"{system.name} {verb} the floor {floor} ({difference}).")
    return sentences


def _floor_difference(results: Results, system: SystemResult, floor: str) -> str:
    comparison = system.versus_floors[floor]
    difference = f"{points(comparison.delta)}, {signed_confidence_interval(comparison.ci95)}"
    learned = {result.labels for result in (results.system(floor), system) if result} - {None}
    if len(learned) < 2:
        return difference
    owner = "gold" if system.labels == "teacher" else "the teacher's"
    return f"which learned {owner} labels: {difference}"


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
            "delta_per_seed": {seed: -delta for seed, delta in comparison.delta_per_seed.items()},
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


# --- cascades


def review_sentences(results: Results) -> list[str]:
    """How many labels people changed in each split, and what that did to accuracies."""
    return [
        sentence
        for split, reviewed in results.reviews.items()
        for sentence in _split_sentences(split, reviewed)
    ]


def _split_sentences(split: str, reviewed: ReviewedSplit) -> list[str]:
    changes = sentence_list(
        [
            f"{count(reviewed.labels_changed, 'label')} changed",
            f"{count(reviewed.rationales_changed, 'rationale')} edited",
            f"{count(reviewed.rejected, 'annotation')} rejected",
            f"{count(reviewed.gold_changed, 'gold label')} corrected",
        ]
    )
    sentences = [
        f"{split}: {count(reviewed.reviewers, 'reviewer')} decided on {reviewed.reviewed:,} of "
        f"{count(reviewed.rows, 'annotated row')}: {changes}."
    ]
    if reviewed.teacher_before and reviewed.teacher_after and reviewed.gold_changed:
        sentences.append(
            f"{split}: the teacher's measured accuracy is {rate(reviewed.teacher_before)} by the "
            f"data's gold labels and {rate(reviewed.teacher_after)} by the corrected ones."
        )
    elif reviewed.teacher_before:
        sentences.append(
            f"{split}: the teacher's measured accuracy is {rate(reviewed.teacher_before)} before "
            "and after, as no gold label changed."
        )
    if reviewed.labels_before and reviewed.labels_after and split != "test":
        sentences.append(
            f"{split}: of the teacher's labels in training, {rate(reviewed.labels_before)} were "
            f"right before the review, and {rate(reviewed.labels_after)} are now."
        )
    if reviewed.true_accuracy:
        sentences.append(
            f"{split}: the teacher's true accuracy is {rate(reviewed.true_accuracy)}, by "
            f"{count(reviewed.true_accuracy.n, 'random row')} that people decided on."
        )
    if reviewed.corrected:
        sentences.append(
            f"{split}: all other figures are by the data's gold labels. By the corrected ones:"
        )
    for name, accuracy in reviewed.corrected.items():
        before = percent(accuracy.before)
        sentences.append(f"{split}: {name} is right on {rate(accuracy)}, instead of {before}.")
    return sentences


def headline_cascade(results: Results) -> Cascade | None:
    """The cascade of the headline system's student that was best on valid."""
    cascades = (cascade for cascade in results.cascades if cascade.system == results.headline)
    return next(cascades, None)


def cascade_answer(results: Results) -> list[str]:
    """What share of the requests could be switched over, at which loss, saving how much."""
    cascade = headline_cascade(results)
    if cascade is None:
        return []
    if cascade.threshold is None:
        return [f"None of the teacher's requests could be switched over to {cascade.student}."]
    share = percent(cascade.coverage.value)
    if cascade.coverage.ci95 is not None:
        share += f" ({confidence_interval(cascade.coverage.ci95)})"
    different = percent(1 - cascade.agreement.value)
    loss = f"answering {different} of all requests differently from the teacher"
    if cascade.of == "accuracy":
        loss = (
            f"with {percent(cascade.accuracy.value)} of all answers right instead of "
            f"{percent(cascade.teacher_accuracy.value)}"
        )
    saving = f"saving {percent(cascade.coverage.value)} of the teacher's requests"
    if cascade.usd_per_1000 is not None and cascade.teacher_usd_per_1000 is not None:
        saved = dollars(cascade.teacher_usd_per_1000 - cascade.usd_per_1000)
        saving = f"saving {saved} of {dollars(cascade.teacher_usd_per_1000)} per 1,000 requests"
    return [
        f"{cascade.student} could take over {share} of the teacher's requests, {loss} and {saving}."
    ]


def cascade_details(results: Results) -> list[str]:
    """The guarantee behind the answer, or what is missing for one."""
    cascade = headline_cascade(results)
    if cascade is None:
        return []
    level = f"{100 * cascade.level:g}% confidence"
    rows = f"{count(cascade.rows, 'calibration row')} of {cascade.source}"
    goal = f"{100 * (cascade.target or 0):g}% {cascade.of}"
    if cascade.margin is not None:
        goal = f"a loss of at most {100 * cascade.margin:g} points against the teacher"
    if cascade.bound is None:
        return [f"No threshold keeps {goal} with {level} on {rows}.", _missing_rows(cascade)]
    guaranteed = f"{cascade.of} of at least {percent(cascade.bound)}"
    if cascade.margin is not None:
        guaranteed = f"a loss of at most {points(cascade.bound).removeprefix('+')}"
    tested = f"tested on {cascade.n:,} other rows"
    if cascade.folds is not None:
        tested = f"tested by cross-fitting in {cascade.folds} folds"
    sentences = [
        f"Its threshold ({cascade.confidence} of at least {cascade.threshold:.3g}) guarantees "
        f"{guaranteed} with {level} for requests drawn like the {rows}; it was {tested}."
    ]
    if cascade.left_out:
        left_out = count(cascade.left_out, "test row")
        sentences.append(f"Left out: {left_out} without a readable label of the teacher.")
    return sentences


def _missing_rows(cascade: Cascade) -> str:
    alone = cascade.teacher_accuracy.value
    if cascade.of == "accuracy" and cascade.target is not None and alone < cascade.target:
        return f"More rows would not help: the teacher alone is right on {percent(alone)}."
    if cascade.rows_needed is None:
        return "More rows would not help: its surest answers are wrong too often."
    if cascade.rows_needed <= cascade.rows:
        return "More rows may help."
    return f"It would take about {cascade.rows_needed:,} rows, or more."


# --- tables of text


def selective_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of selective prediction: each system with a confidence."""
    headings = ["system", "confidence"]
    rows = []
    for system in results.systems:
        if system.selective is None:
            continue
        measures = system.selective.measures
        headings[2:] = list(measures)
        row = [system.name, ", ".join(system.selective.confidence)]
        for measure in measures.values():
            low, high = measure.ci95 or (measure.value, measure.value)
            row.append(f"{measure.value:.3f} [{low:.3f}, {high:.3f}]")
        rows.append(row)
    return headings, rows


def cascade_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the cascades: each prediction file with a confidence."""
    headings = ["student", "threshold", "guaranteed", "calibration rows", "coverage", "agreement"]
    headings += ["accuracy", "teacher alone", "student alone", "per 1,000 requests"]
    rows = [
        [
            cascade.student,
            ABSENT if cascade.threshold is None else f"{cascade.threshold:.4f}",
            ABSENT if cascade.bound is None else percent(cascade.bound),
            f"{cascade.rows:,}",
            percent(cascade.coverage.value),
            percent(cascade.agreement.value),
            percent(cascade.accuracy.value),
            percent(cascade.teacher_accuracy.value),
            percent(cascade.student_accuracy.value),
            dollars(cascade.usd_per_1000),
        ]
        for cascade in results.cascades
    ]
    return headings, rows
