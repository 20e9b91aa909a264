"""The figures show what the records say, and stand in a page and alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from made_run import make_run

from dsbs.reporting.figures import Figure, draw_figures, write_figures
from dsbs.reporting.figures.style import main_systems, series_styles, spread_apart, thin_ticks
from dsbs.reporting.runs import EvaluatedRun, load_run

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
HOSTILE = "<script>alert(1)</script> $x_2$ {{ 7*7 }}\n\u202e\x07"


def drawn(*runs: EvaluatedRun) -> dict[str, Figure]:
    found = draw_figures(runs)
    assert len({figure.name for figure in found}) == len(found)
    return {figure.name: figure for figure in found}


def root(figure: Figure) -> ElementTree.Element:
    return ElementTree.fromstring(figure.svg)


def texts(figure: Figure) -> list[str]:
    return [element.text or "" for element in root(figure).iter(f"{SVG}text")]


def points(figure: Figure) -> dict[str, tuple[float, float]]:
    """What each marker says, and where it is."""
    found = {}
    for group in root(figure).iter(f"{SVG}g"):
        said, marker = group.find(f"{SVG}title"), next(group.iter(f"{SVG}use"), None)
        if said is not None and marker is not None:
            found[str(said.text)] = (float(marker.attrib["x"]), float(marker.attrib["y"]))
    return found


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> EvaluatedRun:
    """A run whose results were changed."""
    path = folder / "eval" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    change(results)
    path.write_text(json.dumps(results), encoding="utf-8")
    return load_run(folder)


def proportional(pairs: list[tuple[float, float]]) -> bool:
    """Whether places are a straight line of values, to a tenth of a point."""
    (a, x), (b, y) = min(pairs), max(pairs)
    return all(abs(x + (value - a) / (b - a) * (y - x) - place) < 0.1 for value, place in pairs)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedRun:
    return load_run(make_run(tmp_path_factory.mktemp("figures") / "run"))


@pytest.fixture(scope="module")
def one(run: EvaluatedRun) -> dict[str, Figure]:
    return drawn(run)


def test_a_run_has_a_figure_for_each_thing_that_it_has_data_of(one: dict[str, Figure]) -> None:
    assert list(one) == ["curve", "speed", "pay-off", "recall", "reliability", "training"]


def test_each_method_has_a_line_over_the_rows_and_the_teacher_a_level(
    one: dict[str, Figure], run: EvaluatedRun
) -> None:
    shown = texts(one["curve"])
    assert {
        "finetune, gold labels",
        "distill, teacher labels",
        "step-by-step, gold labels",
        "teacher",
    } <= set(shown)
    assert {"200", "400", "800", "training rows", "accuracy on test (60 rows)"} <= set(shown)
    places = points(one["curve"])
    students = [system for system in run.results.systems if system.kind == "student"]
    assert len(places) == len(students) == 9
    across, up = [], []
    for system in students:
        low, high = system.ci95
        interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
        x, y = places[
            f"{system.name}: {100 * system.accuracy:.1f}% {interval} with {system.training_rows:,} rows"
        ]
        across.append((math.log(system.training_rows or 0), x))
        up.append((system.accuracy, y))
    assert proportional(across) and proportional(up)
    assert min(up)[1] > max(up)[1], "more is higher"


def test_one_share_alone_makes_no_curve(tmp_path: Path) -> None:
    assert "curve" not in drawn(load_run(make_run(tmp_path / "run", subsets=(1.0,))))


def test_sizes_of_several_runs_are_compared_and_one_size_is_not(
    one: dict[str, Figure], tmp_path: Path
) -> None:
    assert "size" not in one
    runs = [
        load_run(make_run(tmp_path / size, name=f"of-{size}", size=size))
        for size in ("nano", "mini", "small")
    ]
    found = drawn(*runs)
    assert {
        "1.9 M",
        "11 M",
        "40 M",
        "of-nano",
        "of-mini",
        "of-small",
        "parameters",
        "teacher",
    } <= set(texts(found["size"]))
    places = points(found["size"])
    assert len(places) == 9, "students of the whole data alone"
    middle = [(math.log(n), x) for n in (1_900_000, 11_000_000, 40_000_000) for tip, (x, _) in places.items()
              if f"with {n:,} " in tip and tip.startswith("distill")]  # fmt: skip
    assert proportional(middle)
    assert len([tip for tip in places if "with 1,900,000 " in tip]) == len(
        {places[t][0] for t in places if "1,900,000" in t}
    )
    assert {"training-1", "training-2", "training-3", "recall-2", "reliability-3"} <= set(found)
    assert "pay-off" in found, "runs of one teacher's price share a figure"
    assert set(texts(found["curve"])) >= {"of-nano", "of-mini", "of-small"}


def test_runs_of_one_name_and_size_are_told_apart(tmp_path: Path) -> None:
    runs = [load_run(make_run(tmp_path / place / "demo", name="demo")) for place in ("old", "new")]
    assert {"old/demo", "new/demo"} <= set(texts(drawn(*runs)["speed"]))


def test_the_time_of_a_prediction_has_its_own_axis(one: dict[str, Figure]) -> None:
    assert "ms for a single row, on cpu" in texts(one["speed"])
    said = [tip for tip in points(one["speed"]) if tip.endswith("9 ms (95% within 18 ms) on cpu")]
    assert len(said) == 3


def test_without_latencies_there_is_no_figure_of_time(tmp_path: Path) -> None:
    def untimed(results: dict[str, Any]) -> None:
        for system in results["systems"]:
            system["latency"] = []

    assert "speed" not in drawn(changed(make_run(tmp_path / "run"), untimed))


def test_the_lines_of_cost_cross_where_distilling_has_paid(one: dict[str, Figure]) -> None:
    assert {
        "800 predictions",
        "calling the teacher, $0.40 per 1,000",
        "step-by-step-gold, $0.32 once",
    } <= set(texts(one["pay-off"]))
    assert list(points(one["pay-off"])) == [
        "step-by-step-gold: $0.32, recovered after 800 predictions"
    ]


def test_what_was_free_has_no_pay_off(tmp_path: Path) -> None:
    def free(results: dict[str, Any]) -> None:
        results["break_even"][0] |= {"spent_usd": 0.0, "predictions": 0}

    assert "pay-off" not in drawn(changed(make_run(tmp_path / "run"), free))


def test_bins_stand_where_confidence_and_accuracy_are(
    one: dict[str, Figure], run: EvaluatedRun
) -> None:
    assert "step-by-step, gold labels, ECE 0.120" in texts(one["reliability"])
    system = run.results.system("step-by-step-gold")
    assert system is not None
    places = {
        tip: place
        for tip, place in points(one["reliability"]).items()
        if tip.startswith("step-by-step-gold: ")
    }
    assert len(places) == len(system.calibration) == 7
    ordered = list(places.values())
    assert proportional(
        [(bin_.confidence, x) for bin_, (x, _) in zip(system.calibration, ordered, strict=True)]
    )
    assert proportional(
        [(bin_.accuracy, y) for bin_, (_, y) in zip(system.calibration, ordered, strict=True)]
    )
    assert "step-by-step-gold-n0.5" not in "".join(points(one["reliability"])), (
        "the whole data's students are enough"
    )


def test_recall_shows_hostile_labels_as_text_and_cuts_the_many(tmp_path: Path) -> None:
    def labelled(results: dict[str, Any]) -> None:
        for system in results["systems"]:
            some = {"value": 0.5, "ci95": [0.4, 0.6]}
            system["recall"] = {HOSTILE: some | {"n": 99}, "_hidden": some | {"n": 98}}
            system["recall"] |= {f"label-{number}": some | {"n": number} for number in range(40)}

    figure = drawn(changed(make_run(tmp_path / "run"), labelled))["recall"]
    shown = texts(figure)
    assert (
        "<script>alert(1)</scrip… (99)" in shown
        and "_hidden (98)" in shown
        and "<script" not in figure.svg
    )
    assert "label-12 (12)" in shown and "label-11 (11)" not in shown
    assert "Only the 30 most frequent of 42 labels are shown." in figure.caption
    assert len({tip.partition(":")[0] for tip in points(figure)}) == 4


def test_training_has_a_panel_for_each_method_with_each_tasks_loss(one: dict[str, Figure]) -> None:
    shown = texts(one["training"])
    assert shown.count("loss in nats per token") == 2, "once for each row of panels"
    assert {
        "label loss, training",
        "rationale loss, training",
        "label loss, validation",
        "validation accuracy",
        "step",
    } <= set(shown)
    assert {"finetune, gold labels", "step-by-step, gold labels"} <= set(shown)


def test_a_student_without_metrics_has_no_training_curve(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", subsets=(1.0,))
    for path in folder.glob("train/*/metrics.jsonl"):
        path.unlink()
    assert "training" not in drawn(load_run(folder))


def test_losses_that_are_no_numbers_and_seeds_that_ended_early_do_not_break_a_curve(
    tmp_path: Path,
) -> None:
    folder = make_run(tmp_path / "run", subsets=(1.0,))
    path = folder / "train" / "step-by-step-gold-s0" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[0]["label_loss"] = float("nan")
    lines[1]["rationale_loss"] = None
    lines[2]["label_loss"] = 0.0
    path.write_text("\n".join(json.dumps(line) for line in lines[:5]), encoding="utf-8")
    svg = drawn(load_run(folder))["training"].svg
    assert "nan" not in svg.casefold().replace("finance", "")


def test_several_figures_fit_into_one_page(one: dict[str, Figure]) -> None:
    ids = [
        element.attrib["id"]
        for figure in one.values()
        for element in root(figure).iter()
        if "id" in element.attrib
    ]
    assert len(ids) == len(set(ids)) > 20
    for name, figure in one.items():
        assert figure.svg.startswith("<svg ") and figure.svg.endswith("</svg>")
        own = {element.attrib["id"] for element in root(figure).iter() if "id" in element.attrib}
        assert all(one_id == name or one_id.startswith(f"{name}-") for one_id in own)
        referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', figure.svg))
        assert referred <= own
        assert not {element.tag.removeprefix(SVG) for element in root(figure).iter()} & {
            "style",
            "script",
            "image",
            "metadata",
        }
        loaded = [
            value
            for element in root(figure).iter()
            for key, value in element.attrib.items()
            if key.endswith("href")
        ]
        assert all(value.startswith("#") for value in loaded), "it loads nothing"


def test_a_figure_tells_what_it_is_to_those_who_cannot_see_it(one: dict[str, Figure]) -> None:
    for name, figure in one.items():
        top = root(figure)
        named = {element.get("id"): element.text for element in top}
        assert (
            top.attrib["role"] == "img" and named[top.attrib["aria-labelledby"]] == figure.title
        ), name
        assert named[top.attrib["aria-describedby"]] == figure.caption and figure.caption


def test_equal_results_give_equal_bytes(one: dict[str, Figure], run: EvaluatedRun) -> None:
    assert {name: figure.svg for name, figure in drawn(run).items()} == {
        name: figure.svg for name, figure in one.items()
    }


def test_ink_follows_the_page_and_text_stays_text(one: dict[str, Figure]) -> None:
    for figure in one.values():
        for element in root(figure).iter(f"{SVG}text"):
            assert re.search(r"fill: var\(--(ink|mute), #", element.attrib["style"]), element.attrib
            assert element.attrib["fill"].startswith("#"), "for renderers without CSS variables"
            assert "font-family" not in element.attrib["style"]


def test_a_written_figure_stands_alone_and_an_old_one_goes(
    one: dict[str, Figure], tmp_path: Path
) -> None:
    paths = write_figures(list(one.values()), tmp_path)
    (tmp_path / "mine.svg").write_text("<svg/>", encoding="utf-8")
    for path in paths:
        top = ElementTree.parse(path).getroot()
        assert top.tag == f"{SVG}svg" and top.attrib["viewBox"] and top.attrib["id"] == path.stem
        style = top.find(f"{SVG}style")
        assert style is not None and "prefers-color-scheme: dark" in str(style.text)
    write_figures([one["curve"]], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.svg", "mine.svg"]


def test_a_method_looks_the_same_in_every_report_and_no_two_are_alike(
    run: EvaluatedRun, tmp_path: Path
) -> None:
    def more(results: dict[str, Any]) -> None:
        for method in ("step-by-step", "rationale-then-label", "label-then-rationale"):
            for labels in ("gold", "teacher"):
                other = {"name": f"{method}-{labels}", "method": method, "labels": labels}
                results["systems"].append(results["systems"][1] | other)
        outside = {"kind": "external", "method": None, "labels": None, "subset": None, "seeds": []}
        results["systems"] += [
            results["systems"][1] | outside | {"name": name} for name in ("other", "another")
        ]

    crowded = changed(make_run(tmp_path / "run"), more)
    few, many = series_styles([run]), series_styles([crowded])
    for title in (
        "finetune, gold labels",
        "distill, teacher labels",
        "step-by-step, gold labels",
        "teacher",
    ):
        assert few[title] == many[title]
    assert len(many) == 11
    assert len({look.marker for look in many.values()}) == len(many), "told apart without colours"
    assert len({(look.color, look.marker, str(look.line)) for look in many.values()}) == len(many)


def test_a_crowded_figure_keeps_the_headline_its_baseline_and_the_teacher(
    run: EvaluatedRun,
) -> None:
    assert [system.name for system in main_systems(run.results, 3)] == [
        "teacher",
        "finetune-gold",
        "step-by-step-gold",
    ]


def test_equal_values_stand_side_by_side_and_others_stay() -> None:
    a, b, c = spread_apart([9.0, 30.0, 9.0], 1.1)
    assert b == 30.0 and c / a == pytest.approx(1.1) and a * c == pytest.approx(81.0)
    assert spread_apart([1.0, 2.0, 4.0], 1.1) == [1.0, 2.0, 4.0]
    assert spread_apart([], 1.1) == []


def test_numbers_of_an_axis_leave_room_for_each_other() -> None:
    assert thin_ticks([100, 200, 210, 800], 4.0, 0.5) == [100, 200, 800]
    assert thin_ticks([50, 50], 4.0, 0.5) == [50]


def test_a_method_with_terms_has_its_bases_colour_and_a_mark_of_its_own(tmp_path: Path) -> None:
    titles = [
        "finetune",
        "finetune+response",
        "finetune+soft",
        "finetune+response+feature",
        "step-by-step+response",
        "own",
    ]

    def run_of(names: list[str]) -> EvaluatedRun:
        def rename(results: dict[str, Any]) -> None:
            student = next(one for one in results["systems"] if one["kind"] == "student")
            results["systems"] = [
                student | {"name": f"{name}-gold", "method": name, "labels": "gold"}
                for name in names
            ]

        folder = make_run(tmp_path / "-".join(names), subsets=(1.0,), seeds=(0,), rows=6)
        return changed(folder, rename)

    found = series_styles([run_of(titles)])
    by_method = {title.partition(",")[0]: look for title, look in found.items()}
    order = list(by_method)
    assert order.index("finetune") + 1 == order.index("finetune+response")
    assert {by_method[name].color for name in titles[:4]} == {by_method["finetune"].color}
    assert by_method["step-by-step+response"].color not in (
        by_method["finetune"].color,
        by_method["own"].color,
    )
    marks = [(look.color, look.marker) for look in found.values()]
    assert len(set(marks)) == len(marks), "told apart without lines, too"
    alone = series_styles([run_of(["step-by-step+feature", "finetune+response"])])
    assert alone["finetune+response, gold labels"] == by_method["finetune+response"], (
        "the same in every report"
    )


def test_training_draws_the_loss_of_every_further_term(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", subsets=(1.0,), seeds=(0, 1), rows=6)
    for seed in (0, 1):
        path = run / "train" / f"step-by-step-gold-s{seed}" / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [
            row | ({"response_loss": 3.0 / row["step"]} if "loss" in row else {}) for row in rows
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    figure = drawn(load_run(run))["training"]
    assert "response loss, training" in texts(figure) and "in its own unit" in figure.caption
    plain = make_run(tmp_path / "plain", subsets=(1.0,), seeds=(0,), rows=6)
    assert "unit" not in drawn(load_run(plain))["training"].caption
