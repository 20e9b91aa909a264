"""The eval stage: predict what is missing, score all systems alike, compare them with baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dsbs.config import Recipe, base_of
from dsbs.config.registry import METHODS, entry
from dsbs.errors import UserError
from dsbs.evaluation.bootstrap import Clusters
from dsbs.evaluation.cascade import (
    Answers,
    calibration_examples,
    cascades,
    check_cascade,
    teacher_labels,
)
from dsbs.evaluation.costs import break_evens, teacher_bill, teacher_costs, teacher_price
from dsbs.evaluation.floors import check_floors, floor_systems
from dsbs.evaluation.latency import measure_latency, read_latency
from dsbs.evaluation.metrics import score
from dsbs.evaluation.predictions import (
    loader,
    predict_student,
    read_predictions,
    rows_file,
    student_predictions,
    update_marks,
)
from dsbs.evaluation.recorded import TEACHER, add_external, predict_teacher
from dsbs.evaluation.reviewed import reviewed_splits
from dsbs.evaluation.systems import (
    System,
    clusters_of,
    compare,
    compare_with_floors,
    first_baselines,
    headline_system,
    label_efficiencies,
    pairs,
    score_system,
    student_pairs,
)
from dsbs.files import atomic_write, write_json
from dsbs.formatting import count
from dsbs.progress import NoProgress, Progress
from dsbs.prompting import learned_source, source_fingerprint
from dsbs.records import Example, TrainedStudent
from dsbs.records.results import Comparison, Latency, Results
from dsbs.records.reviews import reviews_mark
from dsbs.records.subsets import Subset, subset_rank
from dsbs.records.summary import results_markdown
from dsbs.run_folder import RunFolder, training_record
from dsbs.students.calibration import ConfidenceKind, read_calibration
from dsbs.students.card import read_card
from dsbs.students.weights import weights_megabytes
from dsbs.tasks import Task, make_task
from dsbs.tasks.data import annotated_split, comparable, load, stream, survey


def evaluate(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    score_only: bool = False,
) -> Results:
    """Predict the split with every student of the recipe, and compare all systems.

    The teacher and ``eval.predictions`` take part. With ``score_only`` no model is loaded: existing
    prediction files are scored again. Writes ``eval/predictions/*.jsonl``, ``eval/results.json``
    and ``eval/results.md``. Raises UserError if there is nothing to compare, a file is missing, or
    no row has a gold label.
    """
    progress = progress or NoProgress()
    run = RunFolder.of(recipe, out)
    task = make_task(recipe.task)
    students = _students_of_recipe(recipe, task, run)
    missing = missing_students(recipe, students)
    if missing:
        progress.say(f"not trained, or not finished: {', '.join(missing)}")
    reviews = reviews_mark(run.read_reviews("train"), run.read_reviews("valid"))
    earlier = [student.name for student in students if student.reviews != reviews]
    if earlier:
        progress.say(
            f"people's reviews have changed since the training of {', '.join(earlier)}: `dsbs "
            "train` keeps those that they do not touch"
        )
    split = recipe.eval.split
    rows = [row for row in load(recipe, task, split) if row.label is not None]
    if not rows:
        raise UserError(
            f"no row of the {split} split has a gold label, so nothing can be compared",
            hint="label some test rows; they are never trained on",
        )
    if not score_only:
        _warn_of_train_rows(recipe, task, rows, progress)
    check_floors(recipe, task)
    check_cascade(recipe, run)
    clusters = clusters_of(rows, recipe.eval.cluster)
    data: dict[str, str] = {split: survey(rows).hash}
    with run.lock("eval"), run.record("eval", recipe, data):
        systems = _teacher_system(recipe, task, rows, run, students)
        systems += _student_systems(recipe, task, rows, run, students, progress, score_only)
        systems += _external_systems(recipe, task, rows, run)
        systems += floor_systems(
            recipe, task, rows, run, _training_rows(students), progress, score_only=score_only
        )
        results = _compare(recipe, task, run, systems, clusters, data)
        calibration = _calibration_answers(recipe, task, run, students, progress, score_only)
        costs = teacher_costs(run, results)
        changes = {
            "cascades": cascades(recipe, task, systems, costs, clusters, calibration),
            "reviews": reviewed_splits(recipe, task, run, systems, clusters),
        }
        results = results.model_copy(update=changes)
        write_json(run.results, results.as_json())
        with atomic_write(run.stage("eval") / "results.md") as file:
            file.write(results_markdown(results) + "\n")
    return results


def _warn_of_train_rows(
    recipe: Recipe, task: Task, rows: Sequence[Example], progress: Progress
) -> None:
    """Say how many evaluated rows students may have learned by heart."""
    if recipe.eval.split != "test":
        return
    inputs = [comparable(row.input) for row in rows]
    distinct = set(inputs)
    try:
        learned = {
            key
            for row in stream(recipe, task, "train")
            if (key := comparable(row.input)) in distinct
        }
    except UserError:
        return  # the run is evaluated where its train rows are not
    number = sum(key in learned for key in inputs)
    if number:
        progress.say(
            f"warning: {number:,} of {count(len(rows), 'test row')} are also train rows, so that "
            "students may know their labels by heart: accuracies are too high (`dsbs validate` "
            "shows them)"
        )


def _compare(
    recipe: Recipe,
    task: Task,
    run: RunFolder,
    systems: Sequence[System],
    clusters: Clusters,
    data: dict[str, str],
) -> Results:
    for system in systems:
        for name, scored in zip(system.member_names, system.files, strict=True):
            update_marks(run, name, scored, task)
    teachers = [system for system in systems if system.kind == "teacher"]
    teacher = next(iter(teachers), None)
    references: dict[str, str | None] = {}
    if teacher is not None:
        references = {p.id: p.rationale for p in teacher.files[0].predictions}
    scored_systems = [
        score_system(system, task, clusters, None if system is teacher else references)
        for system in systems
    ]
    chosen = pairs(systems, recipe.eval)
    across = student_pairs(systems)
    comparisons = compare([*chosen, *across], clusters)
    with_floors = compare_with_floors(systems, clusters)
    baseline = chosen[0][1] if chosen else None
    spent_usd, usd_per_row = teacher_bill(run.manifest("annotate"), "train")
    usd_per_prediction = teacher.usd_per_prediction if teacher else None
    students = [student for system in systems for student in system.students]
    return Results(
        run=str(run.path),
        name=recipe.name,
        recipe=recipe.model_dump(mode="json"),
        data=data,
        task=recipe.task.name,
        split=recipe.eval.split,
        n=len(systems[0].files[0].rows),
        cluster=recipe.eval.cluster,
        clusters=None if clusters is None else int(clusters.max()) + 1,
        baseline=None if baseline is None else baseline.name,
        headline=headline_system(recipe, systems),
        reportable=recipe.task.limit is None and all(student.reportable for student in students),
        systems=[
            system.model_copy(
                update={
                    "versus": _among(chosen, comparisons, system.name),
                    "versus_students": _among(across, comparisons, system.name),
                    "versus_floors": with_floors.get(system.name, {}),
                }
            )
            for system in scored_systems
        ],
        label_efficiency=label_efficiencies(
            systems, [*first_baselines(chosen), *teachers], clusters
        ),
        break_even=list(break_evens(systems, spent_usd, usd_per_prediction, usd_per_row)),
    )


def _calibration_answers(
    recipe: Recipe,
    task: Task,
    run: RunFolder,
    students: Sequence[TrainedStudent],
    progress: Progress,
    score_only: bool,
) -> dict[str, Answers] | None:
    """The answers to validation rows by prediction file; None: they do not choose a threshold."""
    section = recipe.eval.cascade
    if section is None or section.calibration != "valid":
        return None
    split = annotated_split(recipe, "valid")
    annotations = run.load_annotations(split, source_fingerprint(recipe, task))
    rows = calibration_examples(recipe, task, run.read_reviews(split), annotations)
    labels = teacher_labels(rows, annotations, split)
    answers = {}
    for student in students:
        path = rows_file(run, student, "calibration")
        if not score_only:
            predict_student(recipe, student, rows, run, progress, kind="calibration")
        if path.is_file():
            file = score(task, rows, student_predictions(recipe, path, student), student.name)
            answers[student.name] = Answers(file, labels)
    return answers


def _among(
    chosen: Sequence[tuple[System, System]],
    comparisons: Mapping[str, Mapping[str, Comparison]],
    name: str,
) -> dict[str, Comparison]:
    """A system's comparisons of these pairs."""
    names = [other.name for system, other in chosen if system.name == name]
    return {other: comparisons[name][other] for other in names}


# --- systems


def _teacher_system(
    recipe: Recipe,
    task: Task,
    rows: Sequence[Example],
    run: RunFolder,
    students: Sequence[TrainedStudent],
) -> list[System]:
    learned_from_teacher = any(student.source is not None for student in students)
    if not predict_teacher(recipe, task, rows, run, required=learned_from_teacher):
        return []
    price = teacher_price(run.manifest("annotate"), recipe.eval.split)
    scored = score(task, rows, read_predictions(run.predictions(TEACHER)), TEACHER)
    return [System(TEACHER, "teacher", [scored], usd_per_prediction=price)]


def _student_systems(
    recipe: Recipe,
    task: Task,
    rows: Sequence[Example],
    run: RunFolder,
    students: Sequence[TrainedStudent],
    progress: Progress,
    score_only: bool,
) -> list[System]:
    """The students of each method, labels and subset: in the order of the recipe's students,
    baselines and larger subsets first.
    """
    groups: dict[str, list[TrainedStudent]] = {}
    for student in sorted(students, key=lambda student: student.seed):
        groups.setdefault(student.system, []).append(student)
    baselines = list(recipe.eval.baseline)
    largest = max((student.subset for student in students), key=subset_rank, default=1.0)

    order = list(recipe.students)

    def place(name: str) -> tuple[int, int]:
        first = groups[name][0]
        position = len(baselines)
        if first.method in baselines:
            position = baselines.index(first.method)
        return order.index(first.student), position

    names = sorted(groups)
    names.sort(key=lambda name: subset_rank(groups[name][0].subset), reverse=True)
    systems = []
    for name in sorted(names, key=place):
        members = groups[name]
        first = members[0]
        latency = read_latency(run, first, recipe)
        if not score_only:
            is_timed = first.subset == largest  # a smaller subset gives the same speed
            latency = _predict(recipe, members, rows, run, progress, is_timed) or latency
        files = [
            score(
                task,
                rows,
                student_predictions(recipe, run.predictions(student.name), student),
                student.name,
            )
            for student in members
        ]
        systems.append(
            System(
                name,
                "student",
                files,
                students=members,
                training_rows=_training_rows(members)[first.subset],
                settings_tried=_settings_tried(first),
                megabytes=_megabytes(first),
                latency=latency,
                confidence_kinds=[_confidence_kind(student) for student in members],
            )
        )
    return systems


def _confidence_kind(student: TrainedStudent) -> ConfidenceKind:
    """The kind chosen on valid; the probability where the student was not calibrated."""
    calibration = read_calibration(student.path)
    return "probability" if calibration is None else calibration.confidence


def _predict(
    recipe: Recipe,
    members: Sequence[TrainedStudent],
    rows: Sequence[Example],
    run: RunFolder,
    progress: Progress,
    is_timed: bool,
) -> list[Latency]:
    """Predict with every seed's student, and time the first if asked."""
    load_first = loader(members[0])
    for student in members:
        load = load_first if student is members[0] else loader(student)
        predict_student(recipe, student, rows, run, progress, load)
    if not is_timed:
        return []
    return measure_latency(recipe, members[0], rows, run, progress, load_first)


def _external_systems(
    recipe: Recipe, task: Task, rows: Sequence[Example], run: RunFolder
) -> list[System]:
    systems = []
    for name in add_external(recipe, task, rows, run):
        scored = score(task, rows, read_predictions(run.predictions(name)), name)
        systems.append(System(name, "external", [scored]))
    return systems


def _megabytes(student: TrainedStudent) -> float | None:
    """Of the weights; None if they were moved elsewhere, as scoring does not need them."""
    try:
        return weights_megabytes(student.path)
    except UserError:
        return None


def _settings_tried(student: TrainedStudent) -> int | None:
    """The trials of one of several students; None for the only one."""
    if student.student is None:
        return None
    return len(training_record(Path(student.path)).get("trials", ()))


def _training_rows(students: Sequence[TrainedStudent]) -> dict[Subset, int | None]:
    """The number of train rows in each subset, by the first of its students that recorded it."""
    counts: dict[Subset, int | None] = {}
    for student in students:
        if counts.get(student.subset) is None:
            rows = training_record(Path(student.path)).get("rows")
            counts[student.subset] = rows if isinstance(rows, int) else None
    return counts


# --- students of the recipe


def _students_of_recipe(recipe: Recipe, task: Task, run: RunFolder) -> list[TrainedStudent]:
    """The trained students that the recipe asks for.

    Raises UserError if there are none (and no external predictions), or if some were trained with
    other settings, labels or annotations than the recipe's.
    """
    train = recipe.train
    recipes = recipe.students
    students = [
        student
        for student in run.students()
        if student.student in recipes
        and student.method in train.methods
        and student.seed in train.seeds
        and student.subset in train.subset
        and _has_wanted_labels(recipe, student)
    ]
    if not students and not recipe.eval.predictions:
        raise UserError(
            f"{run.stage('train')} has no finished student of this recipe",
            hint="run `dsbs train` with this recipe first, or name external prediction files in "
            "eval.predictions",
        )
    source = learned_source(recipe, task)
    outdated = [
        student.name
        for student in students
        if student.settings != recipes[student.student].training_of(student.method)
        or student.source not in (None, source)
        or read_card(student.path).classes not in ((), task.head_labels)
    ]
    if outdated:
        raise UserError(
            f"this recipe's settings, labels or annotations have changed since the training of "
            f"{', '.join(outdated)}",
            hint="repeat the overrides of that `dsbs train`, or run it with this recipe: students "
            "that fit are kept, others set aside",
        )
    return students


def _has_wanted_labels(recipe: Recipe, student: TrainedStudent) -> bool:
    """Whether ``train.labels`` asks for a student; some methods have labels of their own."""
    method = entry(METHODS, base_of(student.method))
    return method.labels is not None or student.labels in recipe.train.labels


def missing_students(recipe: Recipe, students: Sequence[TrainedStudent]) -> list[str]:
    """Students of seeds that the recipe asks for, of methods that other seeds exist of; and named
    students of which none is trained.
    """
    names = {student.name for student in students}
    systems = sorted({student.system for student in students})
    expected = [f"{system}-s{seed}" for system in systems for seed in recipe.train.seeds]
    untrained = set(recipe.students) - {student.student for student in students}
    unfinished = [
        f"any of {name}" for name in recipe.students if name is not None and name in untrained
    ]
    return [name for name in expected if name not in names] + unfinished
