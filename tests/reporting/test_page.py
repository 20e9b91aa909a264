"""The page shows what is in the files, as text, and nothing from elsewhere; several runs stand side by side on it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from made_run import make_run

from dsbs import UserError, load_recipe, report, report_runs
from dsbs.cli import app
from dsbs.reporting.examples import PackedExamples, pack_examples
from dsbs.reporting.run import render, verdict
from dsbs.reporting.runs import load_run, load_runs

HOSTILE = "</script><script>alert(1)</script> {{ 7*7 }} {% raw %} \u202eevil \x00\x07 \ud800"


class Parts(HTMLParser):
    """Attributes of every element, the text of scripts and styles, and all other text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = (
            "examples" if dict(attrs).get("id") == "packed" else tag if tag in self.inline else ""
        )

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""
        self.text += " "

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data
        elif self._inside in self.inline:
            self.inline[self._inside].append(data)


def page_of(*runs: Path) -> Parts:
    """The page without figures, which take longest."""
    return Parts(render(load_runs(runs), []))


def change(file: Path, **values: Any) -> None:
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8"
    )


def unpacked(packed: PackedExamples) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed.data)))
    return whole


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "made")


def test_text_from_data_is_shown_as_text(made: Path) -> None:
    results = json.loads((made / "eval" / "results.json").read_text(encoding="utf-8"))
    for system in results["systems"]:
        system["recall"] = {HOSTILE: system["recall"]["neutral"]}
    change(
        made / "eval" / "results.json",
        systems=results["systems"],
        task=HOSTILE,
        cluster=HOSTILE,
        clusters=7,
    )
    change(
        made / "annotate" / "manifest.json",
        prompt={"instruction": HOSTILE, "template": "x", "exemplars": [], "anchor": [HOSTILE]},
    )
    change(
        made / "eval" / "manifest.json",
        recipe={"task": {"description": HOSTILE}},
        data={HOSTILE: HOSTILE},
    )
    page = page_of(made)
    assert len(page.inline["script"]) == 1
    shown = "</script><script>alert(1)</script> {{ 7*7 }} {% raw %} \u202eevil \\x00\\x07 \\ud800"
    assert page.text.count(shown) >= 5
    assert "49 {%" not in page.text and "\x00" not in page.text


def test_the_page_brings_all_that_it_needs_and_allows_nothing_else(made: Path) -> None:
    page = Parts(report_runs([made]).read_text(encoding="utf-8"))
    assert [
        tag for tag, attributes in page.elements if {"src", "href"} & set(attributes) and tag != "a"
    ] == []
    links = [str(attributes.get("href")) for tag, attributes in page.elements if tag == "a"]
    assert links and all(link.startswith("#") for link in links)
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert {link.removeprefix("#") for link in links} <= targets
    policy = next(
        str(attributes["content"])
        for tag, attributes in page.elements
        if "http-equiv" in attributes
    )
    assert policy.startswith("default-src 'none'; ") and "http" not in policy
    for text in page.inline["script"] + page.inline["style"]:
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "each id is there once"


def test_a_run_has_its_page_tables_and_figures_in_its_folder(made: Path) -> None:
    path = report_runs([made])
    assert path == made / "report.html"
    assert list((made / "report" / "figures").glob("*.svg")) and list(
        (made / "report").rglob("*.csv")
    )
    assert (made / "train" / "step-by-step-gold-s0" / "README.md").is_file(), "the student's card"
    first = path.read_text(encoding="utf-8")
    assert report_runs([made]).read_text(encoding="utf-8") == first, (
        "equal results give an equal page"
    )


def test_a_reliable_difference_is_told_with_its_uncertainty(made: Path) -> None:
    shown = verdict(load_run(made))
    assert shown.is_reliable
    assert shown.sentence == (
        "step-by-step-gold is 7.0 points more accurate than finetune-gold on these 60 test rows "
        "(95% CI [+1.0, +13.0])."
    )
    assert shown.details == (
        "step-by-step-gold labels 62.0% of the rows correctly, finetune-gold 55.0%. "
        "p = .036 (exact sign-flip permutation test, Holm-corrected for all comparisons in this run)."
    )
    text = page_of(made).text
    assert shown.sentence in text and shown.details in text


def test_no_reliable_difference_is_said_in_words_with_what_could_be_seen(made: Path) -> None:
    change(made / "eval" / "results.json", headline="distill-teacher")
    shown = verdict(load_run(made))
    assert not shown.is_reliable
    assert shown.sentence == (
        "distill-teacher and finetune-gold cannot be told apart on these 60 test rows "
        "(−3.0 points, 95% CI [−8.0, +2.0]). "
        "To detect a difference of 5 points you would need about 150 rows."
    )
    assert "a difference below 8.0 points would usually go unnoticed (80% power)" in shown.details


def test_a_system_beside_no_baseline_claims_nothing(made: Path) -> None:
    change(made / "eval" / "results.json", headline="finetune-gold")
    shown = verdict(load_run(made))
    assert not shown.is_reliable
    assert "It was not compared with a baseline." in shown.sentence
    assert "eval.baseline" in shown.details


def test_a_smoke_run_is_stamped(made: Path) -> None:
    assert "smoke: not reportable" not in page_of(made).text
    change(made / "eval" / "results.json", reportable=False)
    assert "smoke: not reportable" in page_of(made).text


def test_what_is_known_of_the_systems_stands_in_tables(made: Path) -> None:
    text = re.sub(r"\s+", " ", page_of(made).text)
    for part in (
        "[54.0, 70.0]", "1.9 M", "7.4", "9 / 18", "60 / 120", "entailment", "learning_rate 0.003",
        "truncated 2", "7,200", "[74.0, 92.0]", "$0.32", "310 rows", "800 predictions", "b" * 64,
        "2026-01-01 00:10 UTC",
    ):  # fmt: skip
        assert part in text, part
    assert "Rationales" not in text, "of measures that were not taken nothing is shown"


def test_a_page_of_little_says_no_more(made: Path) -> None:
    results = json.loads((made / "eval" / "results.json").read_text(encoding="utf-8"))
    bare = {
        key: results["systems"][0][key]
        for key in ("name", "kind", "accuracy", "ci95", "interval", "unreadable")
    }
    change(
        made / "eval" / "results.json",
        systems=[bare],
        needed=[],
        pay_off=[],
        headline=None,
        baseline=None,
    )
    for stage in ("annotate", "train"):
        (made / stage / "manifest.json").unlink()
    text = page_of(made).text
    for heading in (
        "Comparisons",
        "Size, speed and cost",
        "Recall",
        "Rationales",
        "Tuning",
        "The teacher's annotations",
    ):
        assert heading not in text, heading


def test_rationales_are_never_called_faithful(made: Path) -> None:
    results = json.loads((made / "eval" / "results.json").read_text(encoding="utf-8"))
    results["systems"][1]["metrics"]["rouge_l"] = {"value": 0.41, "ci95": [0.4, 0.42], "n": 60}
    change(made / "eval" / "results.json", systems=results["systems"])
    text = page_of(made).text
    assert "41.0" in text and "It does not measure whether the rationale explains" in text


# --- several runs


def test_several_runs_are_joined_with_what_differs(made: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "runs" / "other", name="other", size="small", seeds=(0,))
    page = page_of(made, other)
    text = re.sub(r"\s+", " ", page.text)
    assert "student.size nano small" in text and "train.seeds [0, 1] [0]" in text
    assert "teacher.model" not in text.split("Provenance")[0], "equal values are not listed"
    assert "tested on the same rows" in text
    assert (
        "made: step-by-step with gold labels needs 310 rows" in text
        and "other: step-by-step with gold" in text
    )
    change(other / "eval" / "results.json", data={"test": "d" * 64})
    assert "tested on different rows" in page_of(made, other).text


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / place, name="made") for place in ("a/run", "b/run", "c")]
    assert [run.name for run in load_runs(folders)] == ["a/run", "b/run", "c"]
    with pytest.raises(UserError, match="given 2 times"):
        load_runs([folders[0], tmp_path / "b" / ".." / "a" / "run"])


def test_rows_of_several_runs_are_joined_where_their_input_is_one(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, name=name, seeds=(0,), subsets=(1.0,), rows=6)
        for name in ("a", "b")
    ]
    assert pack_examples(load_runs(runs), 10**6).total_rows == 6
    other = make_run(
        tmp_path / "c",
        name="c",
        seeds=(0,),
        subsets=(1.0,),
        rows=6,
        texts={0: "other text under an id"},
    )
    whole = unpacked(pack_examples(load_runs([runs[0], other]), 10**6))
    assert [row[0] for row in whole["rows"]].count("made-0") == 2
    assert [system["run"] for system in whole["systems"]] == ["a"] * 4 + ["c"] * 4
    assert [system["teacher"] for system in whole["systems"]] == [0] * 4 + [4] * 4


# --- the examples


def test_examples_hold_what_each_system_said(made: Path) -> None:
    run = load_run(made)
    whole = unpacked(pack_examples([run], 10**6))
    names = [system["name"] for system in whole["systems"]]
    assert whole["headline"] == names.index("step-by-step-gold")
    for number, system in enumerate(whole["systems"]):
        for name, member in zip(
            run.members(run.results.systems[number]), system["members"], strict=True
        ):
            for place, row in enumerate(run.predictions(name).values()):
                assert whole["rows"][place][:2] == [row.id, row.gold]
                assert whole["answers"][member["answers"][place]] == {"text": row.prediction}
                assert member["correct"][place] == str(int(bool(row.correct)))
                assert member["probability"][place] == round(100 * (row.probability or 0))
    step_by_step = whole["systems"][whole["headline"]]
    assert (
        names[step_by_step["against"]] == "finetune-gold"
        and names[step_by_step["teacher"]] == "teacher"
    )
    assert whole["rows"][7][3] == ["A dog number 7 runs over a field.", "An animal moves (7)."]
    assert whole["rows"][7][4][str(whole["headline"])] == "A dog is an animal, so 7 it is."


def test_an_output_that_cannot_be_read_is_shown_as_it_is(made: Path) -> None:
    file = made / "eval" / "predictions" / "teacher.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    write_jsonl(
        file,
        [
            rows[0]
            | {
                "prediction": None,
                "raw": "hm",
                "correct": False,
                "probability": None,
                "rationale": None,
            },
            *rows[1:],
        ],
    )
    whole = unpacked(pack_examples([load_run(made)], 10**6))
    teacher = whole["systems"][0]["members"][0]
    assert (
        whole["answers"][teacher["answers"][0]] == {"raw": "hm"}
        and teacher["probability"][0] is None
    )


def test_inputs_of_older_prediction_files_come_from_the_annotations(made: Path) -> None:
    for file in (made / "eval" / "predictions").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        write_jsonl(file, [row | {"input": None} for row in rows])
    whole = unpacked(pack_examples([load_run(made)], 10**6))
    assert whole["rows"][7][3] == ["A dog number 7 runs over a field.", "An animal moves (7)."]


def test_the_longest_texts_are_cut_first_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", texts={0: "".join(chr(0x4E00 + i) for i in range(20_000))})
    whole = pack_examples([load_run(run)], 10**9)
    assert whole.text_limit is None and whole.packed_rows == 60
    cut = pack_examples([load_run(run)], len(whole.data) // 2)
    assert (
        cut.text_limit is not None
        and cut.packed_rows == 60
        and len(cut.data) <= len(whole.data) // 2
    )
    rows = unpacked(cut)["rows"]
    assert rows[0][3][0].endswith("[…]") and rows[7][3][0] == "A dog number 7 runs over a field."
    size = len(render([load_run(run)], []).encode()) - len(whole.data) // 2
    monkeypatch.setattr(sys.modules["dsbs.reporting.run"], "PAGE_BYTES", size)
    page = render([load_run(run)], [])
    assert len(page.encode()) <= size
    assert f"texts are cut after {cut.text_limit:,} characters" in page


def test_where_cutting_is_not_enough_rows_of_agreement_are_left_out(made: Path) -> None:
    file = made / "eval" / "predictions"
    for one in file.glob("*.jsonl"):  # on the first half all are right
        rows = [json.loads(line) for line in one.read_text(encoding="utf-8").splitlines()]
        write_jsonl(
            one,
            [row | {"prediction": row["gold"], "correct": True} for row in rows[:30]] + rows[30:],
        )
    whole = pack_examples([load_run(made)], 10**9)
    some = pack_examples([load_run(made)], int(len(whole.data) * 0.7))
    assert some.total_rows == 60 and 0 < some.packed_rows < 60
    kept = {row[0] for row in unpacked(some)["rows"]}
    assert kept >= {f"made-{number}" for number in range(30, 30 + min(30, some.packed_rows) - 1)}


# --- the command


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`dsbs report …` in the test's folder; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        app(["report", *arguments], standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_the_command_reports_folders_and_recipes(
    toy: Callable[..., Path], tmp_path: Path, command: Callable[..., str]
) -> None:
    for place in (tmp_path / "runs" / "toy", tmp_path / "elsewhere"):
        make_run(place, name=place.name, subsets=(1.0,), seeds=(0,))
    recipe = str(toy())
    said = json.loads(command(recipe, "--json"))
    assert said["report"] == "runs/toy/report.html" and (tmp_path / said["report"]).is_file()
    assert said["files"] and all((tmp_path / file).is_file() for file in said["files"])
    written = command(recipe, "name=other", "--out", "elsewhere")
    assert written == "elsewhere/report.html\n", (
        "of one recipe --out is the run folder, as everywhere"
    )
    assert command("elsewhere", "--out", "copy") == "copy/report.html\n"
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    assert command(recipe, "elsewhere") == "runs/report-toy-elsewhere/report.html\n"
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before, (
        "runs that are joined are only read"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is neither a run folder nor a recipe"),
        (["empty"], "does not exist\n  try: run `dsbs eval`"),
        (["empty", "train.max_steps=3"], "overrides belong to a recipe"),
        (["train.max_steps=3"], "no run is named"),
    ],
)
def test_a_mistake_is_told_with_what_to_do(
    tmp_path: Path, command: Callable[..., str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(message)):
        command(*arguments)


def test_reporting_before_evaluating_says_what_to_do(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="dsbs eval"):
        report(load_recipe(toy()), out=tmp_path / "nothing")


def test_reporting_from_python_returns_the_page(toy: Callable[..., Path], made: Path) -> None:
    assert report(load_recipe(toy()), out=made) == made / "report.html"
