"""Figures show what the records say, in a page and as standalone files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from sample_run import PARAMETERS, change_results, make_run

from dsbs.config import registry
from dsbs.records.results import SystemResult
from dsbs.reporting.figures import Figure, draw_figures, write_figures
from dsbs.reporting.figures.canvas import MUTE
from dsbs.reporting.figures.curves import break_even, training_curves
from dsbs.reporting.figures.scatter import speed_figure
from dsbs.reporting.figures.style import (
    Style,
    main_systems,
    series_styles,
    spread_apart,
    thin_ticks,
)
from dsbs.reporting.runs import EvaluatedRun, load_run

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert(1)</script> $x_2$ {{ 7*7 }}\n\u202e\x07"
Point = tuple[float, float]


def figures_of(*runs: EvaluatedRun) -> dict[str, Figure]:
    figures = draw_figures(runs)
    by_name = {figure.name: figure for figure in figures}
    assert len(by_name) == len(figures)
    return by_name


def elements(figure: Figure, tag: str = "*") -> list[ElementTree.Element]:
    root = ElementTree.fromstring(figure.svg)
    return list(root.iter(tag if tag == "*" else SVG + tag))


def texts(figure: Figure) -> list[str]:
    return [element.text or "" for element in elements(figure, "text")]


def points(figure: Figure) -> dict[str, Point]:
    """Each marker's tooltip and position."""
    positions = {}
    for group in elements(figure, "g"):
        tooltip = group.find(f"{SVG}title")
        marker = next(group.iter(f"{SVG}use"), None)
        if tooltip is not None and marker is not None:
            positions[str(tooltip.text)] = (float(marker.attrib["x"]), float(marker.attrib["y"]))
    return positions


def is_linear(pairs: list[tuple[float, float]]) -> bool:
    """Whether positions are a linear function of values, to a tenth of a point."""
    (low, start), (high, end) = min(pairs), max(pairs)
    return all(
        abs(start + (value - low) / (high - low) * (end - start) - position) < 0.1
        for value, position in pairs
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedRun:
    return load_run(make_run(tmp_path_factory.mktemp("figures") / "run"))


@pytest.fixture(scope="module")
def figures(run: EvaluatedRun) -> dict[str, Figure]:
    return figures_of(run)


def test_a_run_has_a_figure_for_everything_it_has_data_for(figures: dict[str, Figure]) -> None:
    assert list(figures) == ["curve", "speed", "pay-off", "recall", "reliability", "training"]


# --- single figures


def test_each_method_has_a_learning_curve_and_the_teacher_a_level(
    figures: dict[str, Figure], run: EvaluatedRun
) -> None:
    shown = set(texts(figures["curve"]))
    assert {"finetune, gold labels", "distill, teacher labels", "teacher"} <= shown
    assert "step-by-step, gold labels" in shown
    assert {"200", "400", "800", "training rows", "accuracy on test (60 rows)"} <= shown
    positions = points(figures["curve"])
    students = [system for system in run.results.systems if system.kind == "student"]
    assert len(positions) == len(students) == 9
    x_pairs = []
    y_pairs = []
    for system in students:
        x, y = positions[f"{_tooltip(system)} with {system.training_rows:,} rows"]
        x_pairs.append((math.log(system.training_rows or 0), x))
        y_pairs.append((system.accuracy, y))
    assert is_linear(x_pairs)
    assert is_linear(y_pairs)
    assert min(y_pairs)[1] > max(y_pairs)[1], "a higher accuracy is further up"


def _tooltip(system: SystemResult) -> str:
    low, high = system.ci95
    return f"{system.name}: {100 * system.accuracy:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def test_floors_are_gray_lines_in_the_curve_and_levels_elsewhere(tmp_path: Path) -> None:
    def add_floors(results: dict[str, Any]) -> None:
        for share in (0.25, 1.0):
            suffix = "" if share == 1 else f"-n{share:g}"
            floor = floor_result("tfidf", suffix, 0.3 + share / 10, share, int(800 * share))
            results["systems"].append(floor.model_dump(mode="json"))
        untrained = floor_result("untrained", "", 0.2, None, None)
        results["systems"].append(untrained.model_dump(mode="json"))

    run = change_results(make_run(tmp_path / "floors"), add_floors)
    figures = figures_of(run)
    for name in ("curve", "speed"):
        assert {"tfidf", "untrained"} <= set(texts(figures[name])), name
    assert "tfidf-n0.25" not in texts(figures["curve"])
    styles = series_styles([run])
    dashes = [str(styles[name].line) for name in ("tfidf", "untrained")]
    assert len(set(dashes)) == 2 and styles["tfidf"].color == styles["untrained"].color == MUTE
    curve = figures["curve"].svg
    assert curve.count("--mute") > figures_of(load_run(make_run(tmp_path / "none")))[
        "curve"
    ].svg.count("--mute")


def floor_result(
    name: str, suffix: str, accuracy: float, share: float | None, rows: int | None
) -> SystemResult:
    return SystemResult(
        name=name + suffix,
        kind="floor",
        floor=name,
        subset=share,
        training_rows=rows,
        accuracy=accuracy,
        ci95=(accuracy - 0.05, accuracy + 0.05),
        interval="wilson",
        unreadable=0.0,
    )


def test_a_single_share_of_the_rows_has_no_curve(tmp_path: Path) -> None:
    assert "curve" not in figures_of(load_run(make_run(tmp_path / "run", subsets=(1.0,))))


def test_several_sizes_are_compared(figures: dict[str, Figure], tmp_path: Path) -> None:
    assert "size" not in figures
    runs = [
        load_run(make_run(tmp_path / size, name=f"of-{size}", size=size)) for size in PARAMETERS
    ]
    joint = figures_of(*runs)
    shown = set(texts(joint["size"]))
    assert {"1.9 M", "11 M", "40 M", "of-nano", "of-mini", "of-small"} <= shown
    assert {"parameters", "teacher"} <= shown
    positions = points(joint["size"])
    assert len(positions) == 9, "only students of all rows"
    middle = [
        (math.log(count), x)
        for count in PARAMETERS.values()
        for tooltip, (x, _) in positions.items()
        if f"with {count:,} " in tooltip and tooltip.startswith("distill")
    ]
    assert is_linear(middle)
    nano = [position for tooltip, position in positions.items() if "with 1,900,000" in tooltip]
    assert len({x for x, _ in nano}) == 3, "students of one size are side by side"
    assert {"training-1", "training-2", "training-3", "recall-2", "reliability-3"} <= set(joint)
    assert "pay-off" in joint, "runs with one teacher's price share a figure"
    assert {"of-nano", "of-mini", "of-small"} <= set(texts(joint["curve"]))


def test_runs_of_equal_name_and_size_are_distinguished(tmp_path: Path) -> None:
    runs = [
        load_run(make_run(tmp_path / parent / "demo", name="demo")) for parent in ("old", "new")
    ]
    (figure,) = speed_figure(runs)
    assert {"old/demo", "new/demo"} <= set(texts(figure))


def test_the_time_of_a_prediction_has_its_own_axis(figures: dict[str, Figure]) -> None:
    assert "ms for a single row, on cpu" in texts(figures["speed"])
    times = [
        tip for tip in points(figures["speed"]) if tip.endswith("9 ms (95% within 18 ms) on cpu")
    ]
    assert len(times) == 3


def test_without_latencies_there_is_no_figure_of_time(tmp_path: Path) -> None:
    def remove_latencies(results: dict[str, Any]) -> None:
        for system in results["systems"]:
            system["latency"] = []

    assert speed_figure([change_results(make_run(tmp_path / "run"), remove_latencies)]) == []


def test_the_cost_lines_cross_at_break_even(figures: dict[str, Figure]) -> None:
    shown = set(texts(figures["pay-off"]))
    assert {"800 predictions", "calling the teacher, $0.40 per 1,000"} <= shown
    assert "step-by-step-gold, $0.32 once" in shown
    assert list(points(figures["pay-off"])) == [
        "step-by-step-gold: $0.32, recovered after 800 predictions"
    ]


def test_free_annotations_have_no_break_even(tmp_path: Path) -> None:
    def make_free(results: dict[str, Any]) -> None:
        results["break_even"][0] |= {"spent_usd": 0.0, "predictions": 0}

    assert break_even([change_results(make_run(tmp_path / "run"), make_free)]) == []


def test_calibration_bins_are_at_their_confidence_and_accuracy(
    figures: dict[str, Figure], run: EvaluatedRun
) -> None:
    figure = figures["reliability"]
    assert "step-by-step, gold labels, ECE 0.120" in texts(figure)
    system = run.results.system("step-by-step-gold")
    assert system is not None
    positions = [
        position
        for tip, position in points(figure).items()
        if tip.startswith("step-by-step-gold: ")
    ]
    assert len(positions) == len(system.calibration) == 7
    pairs = list(zip(system.calibration, positions, strict=True))
    assert is_linear([(b.confidence, x) for b, (x, _) in pairs])
    assert is_linear([(b.accuracy, y) for b, (_, y) in pairs])
    assert "step-by-step-gold-n0.5" not in "".join(points(figure)), "only students of all rows"


def test_recall_escapes_labels_and_shows_the_most_frequent(tmp_path: Path) -> None:
    def add_labels(results: dict[str, Any]) -> None:
        measure = {"value": 0.5, "ci95": [0.4, 0.6]}
        counts = {HOSTILE: 99, "_hidden": 98} | {f"label-{n}": n for n in range(40)}
        recall = {label: measure | {"n": count} for label, count in counts.items()}
        for system in results["systems"]:
            system["recall"] = recall

    figure = figures_of(change_results(make_run(tmp_path / "run"), add_labels))["recall"]
    shown = texts(figure)
    assert "<script>alert(1)</scrip… (99)" in shown
    assert "_hidden (98)" in shown
    assert "<script" not in figure.svg
    assert "label-12 (12)" in shown
    assert "label-11 (11)" not in shown
    assert "Only the 30 most frequent of 42 labels are shown." in figure.caption
    assert len({tooltip.partition(":")[0] for tooltip in points(figure)}) == 4


def test_training_has_a_panel_for_each_method_and_each_loss(figures: dict[str, Figure]) -> None:
    shown = texts(figures["training"])
    assert shown.count("loss in nats per token") == 2, "once for each row of panels"
    assert {"label loss, training", "rationale loss, training"} <= set(shown)
    assert {"label loss, validation", "validation accuracy", "step"} <= set(shown)
    assert {"finetune, gold labels", "step-by-step, gold labels"} <= set(shown)


def test_a_student_without_metrics_has_no_training_curve(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", subsets=(1.0,))
    for path in folder.glob("train/*/metrics.jsonl"):
        path.unlink()
    assert training_curves([load_run(folder)]) == []


def test_training_curves_skip_invalid_losses_and_missing_steps(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", subsets=(1.0,))
    path = folder / "train" / "step-by-step-gold-s0" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[0]["label_loss"] = float("nan")
    lines[1]["rationale_loss"] = None
    lines[2]["label_loss"] = 0.0
    path.write_text("\n".join(json.dumps(line) for line in lines[:5]), encoding="utf-8")
    (figure,) = training_curves([load_run(folder)])
    assert "nan" not in figure.svg.casefold()


def test_training_draws_the_loss_of_every_additional_term(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", subsets=(1.0,), rows=6)
    (plain,) = training_curves([load_run(folder)])
    assert "unit" not in plain.caption
    for seed in (0, 1):
        path = folder / "train" / f"step-by-step-gold-s{seed}" / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            if "loss" in line:
                line["response_loss"] = 3.0 / line["step"]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (figure,) = training_curves([load_run(folder)])
    assert "response loss, training" in texts(figure)
    assert "in its own unit" in figure.caption


# --- SVG


def test_several_figures_fit_into_one_page(figures: dict[str, Figure]) -> None:
    all_ids = []
    for name, figure in figures.items():
        assert figure.svg.startswith("<svg ")
        assert figure.svg.endswith("</svg>")
        ids = {element.attrib["id"] for element in elements(figure) if "id" in element.attrib}
        assert all(element_id == name or element_id.startswith(f"{name}-") for element_id in ids)
        assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', figure.svg)) <= ids
        tags = {element.tag.removeprefix(SVG) for element in elements(figure)}
        assert not tags & {"style", "script", "image", "metadata"}
        links = [
            value
            for element in elements(figure)
            for key, value in element.attrib.items()
            if key.endswith("href")
        ]
        assert all(link.startswith("#") for link in links), "nothing is loaded"
        all_ids += ids
    assert len(all_ids) == len(set(all_ids)) > 20


def test_a_figure_has_a_title_and_a_description_for_screen_readers(
    figures: dict[str, Figure],
) -> None:
    for figure in figures.values():
        root = elements(figure)[0]
        by_id = {element.get("id"): element.text for element in root}
        assert root.attrib["role"] == "img"
        assert by_id[root.attrib["aria-labelledby"]] == figure.title
        assert by_id[root.attrib["aria-describedby"]] == figure.caption


def test_equal_results_give_equal_figures(figures: dict[str, Figure], run: EvaluatedRun) -> None:
    assert figures_of(run) == figures


def test_ink_follows_the_page_and_text_stays_text(figures: dict[str, Figure]) -> None:
    for figure in figures.values():
        for element in elements(figure, "text"):
            assert re.search(r"fill: var\(--(ink|mute), #", element.attrib["style"])
            assert element.attrib["fill"].startswith("#"), "for renderers without CSS variables"
            assert "font-family" not in element.attrib["style"]


def test_figure_files_stand_alone_and_outdated_ones_are_removed(
    figures: dict[str, Figure], tmp_path: Path
) -> None:
    paths = write_figures(list(figures.values()), tmp_path)
    (tmp_path / "mine.svg").write_text("<svg/>", encoding="utf-8")
    for path in paths:
        root = ElementTree.parse(path).getroot()
        assert root.tag == f"{SVG}svg"
        assert root.attrib["viewBox"]
        assert root.attrib["id"] == path.stem
        style = root.find(f"{SVG}style")
        assert style is not None
        assert "prefers-color-scheme: dark" in str(style.text)
    write_figures([figures["curve"]], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.svg", "mine.svg"]


# --- styles


def rename_methods(names: list[str], folder: Path) -> dict[str, Style]:
    """The styles, by method, of a run with these methods."""

    def rename(results: dict[str, Any]) -> None:
        student = results["systems"][1]
        results["systems"] = [
            student | {"name": f"{name}-gold", "method": name, "labels": "gold"} for name in names
        ]

    folder = make_run(folder / "-".join(names), subsets=(1.0,), seeds=(0,), rows=6)
    styles = series_styles([change_results(folder, rename)])
    return {title.partition(",")[0]: style for title, style in styles.items()}


def test_a_series_has_one_style_in_all_reports_and_no_two_are_alike(
    run: EvaluatedRun, tmp_path: Path
) -> None:
    def add_systems(results: dict[str, Any]) -> None:
        student = results["systems"][1]
        for method in ("step-by-step", "rationale-then-label", "label-then-rationale"):
            for labels in ("gold", "teacher"):
                series = {"name": f"{method}-{labels}", "method": method, "labels": labels}
                results["systems"].append(student | series)
        external = {"kind": "external", "method": None, "labels": None, "subset": None, "seeds": []}
        results["systems"] += [student | external | {"name": name} for name in ("other", "another")]

    few = series_styles([run])
    many = series_styles([change_results(make_run(tmp_path / "run"), add_systems)])
    for title, style in few.items():
        assert many[title] == style
    assert len(many) == 11
    assert len({style.marker for style in many.values()}) == 11, "distinct without colors"
    assert len({(style.color, str(style.line)) for style in many.values()}) == 11


def test_a_method_with_terms_has_its_bases_color_and_its_own_marker(tmp_path: Path) -> None:
    names = [
        "finetune",
        "finetune+response",
        "finetune+soft",
        "finetune+response+feature",
        "step-by-step+response",
        "own",
    ]
    styles = rename_methods(names, tmp_path)
    order = list(styles)
    assert order.index("finetune") + 1 == order.index("finetune+response")
    assert {styles[name].color for name in names[:4]} == {styles["finetune"].color}
    assert len({styles[name].color for name in ("finetune", "step-by-step+response", "own")}) == 3
    markers = {(style.color, style.marker) for style in styles.values()}
    assert len(markers) == len(styles), "distinct without lines"
    others = rename_methods(["step-by-step+feature", "finetune+response"], tmp_path)
    assert others["finetune+response"] == styles["finetune+response"], "one style in all reports"


def test_a_new_method_brings_its_color(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS, "toy", "test_figures:TOY")
    assert rename_methods(["toy", "finetune"], tmp_path)["toy"].color == TOY.color


class TOY:
    """A method's record, as far as figures ask for it."""

    color = "#123456"


def test_a_crowded_figure_keeps_the_headline_its_baseline_and_the_teacher(
    run: EvaluatedRun,
) -> None:
    names = [system.name for system in main_systems(run.results, 3)]
    assert names == ["teacher", "finetune-gold", "step-by-step-gold"]


# --- axes


def test_equal_values_are_spread_and_others_stay() -> None:
    first, second, third = spread_apart([9.0, 30.0, 9.0], 1.1)
    assert second == 30.0
    assert third / first == pytest.approx(1.1)
    assert first * third == pytest.approx(81.0)
    assert spread_apart([1.0, 2.0, 4.0], 1.1) == [1.0, 2.0, 4.0]
    assert spread_apart([], 1.1) == []


def test_ticks_leave_space_for_their_labels() -> None:
    assert thin_ticks([100, 200, 210, 800], 4.0, 0.5) == [100, 200, 800]
    assert thin_ticks([50, 50], 4.0, 0.5) == [50]
