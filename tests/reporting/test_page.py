"""The report page: all data as text, nothing loaded from elsewhere, several runs side by side."""

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
from sample_run import change_record, change_results, make_run

from dsbs import UserError, load_recipe, report, report_runs
from dsbs.cli import app
from dsbs.reporting.examples import PackedExamples, pack_examples
from dsbs.reporting.run import render, verdict
from dsbs.reporting.runs import EvaluatedRun, load_run, load_runs

HOSTILE = "</script><script>alert(1)</script> {{ 7*7 }} {% raw %} \u202eevil \x00\x07 \ud800"
HOSTILE_SHOWN = HOSTILE.replace("\x00\x07 \ud800", "\\x00\\x07 \\ud800")


class ParsedPage(HTMLParser):
    """A page's elements, its scripts and styles, and all other text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._inside = ""
        if attributes.get("id") == "packed":
            self._inside = "examples"
        elif tag in self.inline:
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""
        self.text += " "

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data
        elif self._inside in self.inline:
            self.inline[self._inside].append(data)

    @property
    def plain_text(self) -> str:
        return re.sub(r"\s+", " ", self.text)


def parsed_page(*folders: Path) -> ParsedPage:
    """The page without figures, which take the most time."""
    return ParsedPage(render(load_runs(folders), []))


def unpack(examples: PackedExamples) -> dict[str, Any]:
    unpacked: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(examples.data)))
    return unpacked


def change_predictions(
    folder: Path, change: Callable[[int, dict[str, Any]], dict[str, Any]], pattern: str = "*"
) -> None:
    for path in (folder / "eval" / "predictions").glob(f"{pattern}.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        write_jsonl(path, [row | change(number, row) for number, row in enumerate(rows)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "sample")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedRun:
    """A run that no test changes."""
    return load_run(make_run(tmp_path_factory.mktemp("page") / "sample"))


# --- the whole page


def test_text_from_data_is_shown_as_text(folder: Path) -> None:
    def add_hostile_text(results: dict[str, Any]) -> None:
        for system in results["systems"]:
            system["recall"] = {HOSTILE: system["recall"]["neutral"]}
            pair = {"gold": HOSTILE, "predicted": HOSTILE, "rows": 1.0, "share": 0.5}
            system["confusions"] = [pair]
        results.update(task=HOSTILE, cluster=HOSTILE, clusters=7)

    prompt = {"instruction": HOSTILE, "template": "x", "exemplars": [], "anchor": [HOSTILE]}
    change_record(folder, "annotate/manifest.json", lambda record: record.update(prompt=prompt))
    data = {HOSTILE: HOSTILE}
    change_record(folder, "eval/manifest.json", lambda record: record.update(data=data))
    page = ParsedPage(render([change_results(folder, add_hostile_text)], []))
    assert len(page.inline["script"]) == 1
    assert page.text.count(HOSTILE_SHOWN) >= 5
    assert "49 {%" not in page.text
    assert "\x00" not in page.text


def test_of_many_labels_the_worst_are_rows_and_confused_pairs_are_named(folder: Path) -> None:
    def add_labels(results: dict[str, Any]) -> None:
        for system in results["systems"]:
            measure = system["recall"]["neutral"]
            system["recall"] = {f"label-{i}": measure | {"value": i / 77} for i in range(77)}
            pair = {"gold": "label-1", "predicted": "label-2", "rows": 12.5, "share": 0.25}
            system["confusions"] = [pair]

    text = ParsedPage(render([change_results(folder, add_labels)], [])).text
    assert "label-19" in text and "label-20" not in text
    assert "The 20 of 77 labels with the lowest recall of step-by-step-gold" in text
    assert "Most confused labels" in text and "12.5" in text


def test_a_report_is_self_contained_and_in_the_run_folder(folder: Path) -> None:
    path = report_runs([folder])
    assert path == folder / "report.html"
    assert list((folder / "report" / "figures").glob("*.svg"))
    assert list((folder / "report").glob("*.csv"))
    assert (folder / "train" / "step-by-step-gold-s0" / "README.md").is_file()
    text = path.read_text(encoding="utf-8")
    page = ParsedPage(text)
    links = [
        (tag, str(attributes[name]))
        for tag, attributes in page.elements
        for name in ("src", "href")
        if name in attributes
    ]
    assert {tag for tag, _ in links} == {"a"}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link for _, link in links} <= {f"#{element_id}" for element_id in ids}
    (policy,) = (
        str(attributes["content"]) for _, attributes in page.elements if "http-equiv" in attributes
    )
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    for inline in page.inline["script"] + page.inline["style"]:
        assert base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode() in policy
    assert report_runs([folder]).read_text(encoding="utf-8") == text


def test_the_tables_have_the_facts_about_the_systems(run: EvaluatedRun) -> None:
    text = ParsedPage(render([run], [])).plain_text
    for fact in (
        "[54.0, 70.0]",
        "1.9 M",
        "7.4",
        "9 / 18",
        "60 / 120",
        "entailment",
        "learning_rate 0.003",
        "truncated 2",
        "7,200",
        "[74.0, 92.0]",
        "$0.32",
        "310 rows",
        "800 predictions",
        "b" * 64,
        "2026-01-01 00:10 UTC",
        "by seed, points",
        "+7.0, +7.0",
    ):
        assert fact in text, fact
    assert "Rationales" not in text, "no rationale was measured"


def test_sections_without_data_are_left_out(folder: Path) -> None:
    def keep_teacher_only(results: dict[str, Any]) -> None:
        fields = ("name", "kind", "accuracy", "ci95", "interval", "unreadable")
        teacher = {field: results["systems"][0][field] for field in fields}
        results.update(systems=[teacher], label_efficiency=[], break_even=[])
        results.update(headline=None, baseline=None)

    for stage in ("annotate", "train"):
        (folder / stage / "manifest.json").unlink()
    text = ParsedPage(render([change_results(folder, keep_teacher_only)], [])).text
    headings = ("Comparisons", "Size, speed and cost", "Recall", "Rationales", "Tuning")
    for heading in (*headings, "The teacher's annotations"):
        assert heading not in text, heading


def test_rationales_are_never_called_faithful(folder: Path) -> None:
    def add_rouge(results: dict[str, Any]) -> None:
        measure = {"value": 0.41, "ci95": [0.4, 0.42], "n": 60}
        results["systems"][1]["metrics"]["rouge_l"] = measure

    text = ParsedPage(render([change_results(folder, add_rouge)], [])).text
    assert "41.0" in text
    assert "It does not measure whether the rationale explains the student's label." in text


def test_a_smoke_run_is_stamped(folder: Path) -> None:
    assert "smoke: not reportable" not in parsed_page(folder).text
    change_results(folder, lambda results: results.update(reportable=False))
    assert "smoke: not reportable" in parsed_page(folder).text


# --- the verdict


def test_a_reliable_difference_is_stated_with_its_interval(run: EvaluatedRun) -> None:
    shown = verdict(run)
    assert shown.is_reliable
    assert shown.sentence == (
        "step-by-step-gold is 7.0 points more accurate than finetune-gold on these 60 test rows "
        "(95% CI [+1.0, +13.0])."
    )
    assert shown.details.startswith(
        "step-by-step-gold labels 62.0% of the rows correctly, finetune-gold 55.0%. "
        "The exact sign-flip permutation test gives p = .036,"
    )
    text = ParsedPage(render([run], [])).text
    assert shown.sentence in text
    assert shown.details in text


def test_without_a_reliable_difference_the_page_says_how_many_rows_would_show_one(
    folder: Path,
) -> None:
    run = change_results(folder, lambda results: results.update(headline="distill-teacher"))
    shown = verdict(run)
    assert not shown.is_reliable
    assert shown.sentence == (
        "distill-teacher and finetune-gold cannot be told apart on these 60 test rows "
        "(−3.0 points, 95% CI [−8.0, +2.0]). "
        "To detect a difference of 5 points you would need about 150 rows."
    )
    assert "a difference below 8.0 points would usually go unnoticed (80% power)" in shown.details


def test_a_system_without_a_baseline_claims_nothing(folder: Path) -> None:
    run = change_results(folder, lambda results: results.update(headline="finetune-gold"))
    shown = verdict(run)
    assert not shown.is_reliable
    assert "not compared with a baseline" in shown.sentence
    assert "eval.baseline" in shown.details


# --- several runs


def test_several_runs_show_how_their_recipes_differ(folder: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "runs" / "other", name="other", size="small", seeds=(0,))
    text = parsed_page(folder, other).plain_text
    assert "student.size nano small" in text
    assert "train.seeds [0, 1] [0]" in text
    assert "teacher.model" not in text.split("Provenance")[0], "equal values are not listed"
    assert "tested on the same rows" in text
    assert "sample: step-by-step with gold labels needs 310 rows" in text
    assert "other: step-by-step with gold" in text
    change_results(other, lambda results: results.update(data={"test": "d" * 64}))
    assert "tested on different rows" in parsed_page(folder, other).text


def test_runs_of_equal_name_are_distinguished_by_folder(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / name, name="sample", rows=6, subsets=(1.0,))
        for name in ("a/run", "b/run", "c")
    ]
    assert [run.name for run in load_runs(folders)] == ["a/run", "b/run", "c"]
    with pytest.raises(UserError, match="given 2 times"):
        load_runs([folders[0], tmp_path / "b" / ".." / "a" / "run"])


def test_rows_of_several_runs_are_joined_by_id_and_input(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seeds": (0,), "subsets": (1.0,), "rows": 6}
    first, second = (
        load_run(make_run(tmp_path / name, name=name, **settings)) for name in ("a", "b")
    )
    assert pack_examples([first, second], 10**6).total_rows == 6
    texts = {0: "other text under an id"}
    third = load_run(make_run(tmp_path / "c", name="c", texts=texts, **settings))
    unpacked = unpack(pack_examples([first, third], 10**6))
    assert [row[0] for row in unpacked["rows"]].count("sample-0") == 2
    assert [system["run"] for system in unpacked["systems"]] == ["a"] * 4 + ["c"] * 4
    assert [system["teacher"] for system in unpacked["systems"]] == [0] * 4 + [4] * 4


# --- the examples


def test_examples_hold_each_systems_answers(run: EvaluatedRun) -> None:
    unpacked = unpack(pack_examples([run], 10**6))
    names = [system["name"] for system in unpacked["systems"]]
    assert unpacked["headline"] == names.index("step-by-step-gold")
    for result, system in zip(run.results.systems, unpacked["systems"], strict=True):
        for name, member in zip(run.members(result), system["members"], strict=True):
            for number, prediction in enumerate(run.predictions(name).values()):
                assert unpacked["rows"][number][:2] == [prediction.id, prediction.gold]
                answer = unpacked["answers"][member["answers"][number]]
                assert answer == {"text": prediction.prediction}
                assert member["correct"][number] == "01"[bool(prediction.correct)]
                assert member["probability"][number] == round(100 * (prediction.probability or 0))
    headline = unpacked["systems"][unpacked["headline"]]
    assert names[headline["against"]] == "finetune-gold"
    assert names[headline["teacher"]] == "teacher"
    row = unpacked["rows"][7]
    assert row[3] == ["A dog number 7 runs over a field.", "An animal moves (7)."]
    assert row[4][str(unpacked["headline"])] == "A dog is an animal, so 7 it is."


def test_an_unreadable_output_is_shown_raw(folder: Path) -> None:
    unreadable = {
        "prediction": None,
        "raw": "hm",
        "correct": False,
        "probability": None,
        "rationale": None,
    }
    change_predictions(folder, lambda number, _: {} if number else unreadable, "teacher")
    unpacked = unpack(pack_examples([load_run(folder)], 10**6))
    teacher = unpacked["systems"][0]["members"][0]
    assert unpacked["answers"][teacher["answers"][0]] == {"raw": "hm"}
    assert teacher["probability"][0] is None


def test_missing_inputs_of_predictions_come_from_the_annotations(folder: Path) -> None:
    change_predictions(folder, lambda *_: {"input": None})
    unpacked = unpack(pack_examples([load_run(folder)], 10**6))
    assert unpacked["rows"][7][3] == ["A dog number 7 runs over a field.", "An animal moves (7)."]


def test_the_longest_texts_are_cut_first_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_text = "".join(chr(0x4E00 + i) for i in range(20_000))
    run = load_run(make_run(tmp_path / "run", texts={0: long_text}))
    full = pack_examples([run], 10**9)
    assert full.text_limit is None
    assert full.packed_rows == 60
    cut = pack_examples([run], len(full.data) // 2)
    assert cut.text_limit is not None
    assert cut.packed_rows == 60
    assert len(cut.data) <= len(full.data) // 2
    rows = unpack(cut)["rows"]
    assert rows[0][3][0].endswith("[…]")
    assert rows[7][3][0] == "A dog number 7 runs over a field."
    size = len(render([run], []).encode()) - len(full.data) // 2
    monkeypatch.setattr(sys.modules["dsbs.reporting.run"], "PAGE_BYTES", size)
    page = render([run], [])
    assert len(page.encode()) <= size
    assert f"texts are cut after {cut.text_limit:,} characters" in page


def test_rows_of_agreement_are_left_out_if_cutting_is_not_enough(folder: Path) -> None:
    def agree(number: int, row: dict[str, Any]) -> dict[str, Any]:
        return {"prediction": row["gold"], "correct": True} if number < 30 else {}

    change_predictions(folder, agree)
    run = load_run(folder)
    full = pack_examples([run], 10**9)
    examples = pack_examples([run], int(len(full.data) * 0.7))
    assert examples.total_rows == 60
    assert 0 < examples.packed_rows < 60
    disputed = min(30, examples.packed_rows) - 1
    packed = {row[0] for row in unpack(examples)["rows"]}
    assert packed >= {f"sample-{number}" for number in range(30, 30 + disputed)}


# --- the command


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run `dsbs report …` in the test's folder; return its output."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        app(["report", *arguments], standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_the_command_reports_folders_and_recipes(
    toy: Callable[..., Path], tmp_path: Path, command: Callable[..., str]
) -> None:
    for folder in (tmp_path / "runs" / "toy", tmp_path / "elsewhere"):
        make_run(folder, name=folder.name, rows=6, subsets=(1.0,), seeds=(0,))
    recipe = str(toy())
    printed = json.loads(command(recipe, "--json"))
    assert printed["report"] == "runs/toy/report.html"
    assert printed["files"]
    assert all((tmp_path / file).is_file() for file in [printed["report"], *printed["files"]])
    output = command(recipe, "name=other", "--out", "elsewhere")
    assert output == "elsewhere/report.html\n", "with one recipe --out is the run folder"
    assert command("elsewhere", "--out", "copy") == "copy/report.html\n"
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    assert command(recipe, "elsewhere") == "runs/report-toy-elsewhere/report.html\n"
    after = sorted((tmp_path / "elsewhere").rglob("*"))
    assert after == before, "a report of several runs does not change them"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is neither a run folder nor a recipe"),
        (["empty"], "does not exist\n  try: run `dsbs eval`"),
        (["empty", "train.max_steps=3"], "only a recipe can be overridden"),
        (["train.max_steps=3"], "no run given"),
    ],
)
def test_a_mistake_is_explained(
    tmp_path: Path, command: Callable[..., str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(message)):
        command(*arguments)


def test_reporting_before_evaluating_is_explained(toy: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dsbs eval"):
        report(load_recipe(toy()), out=tmp_path / "nothing")


def test_reporting_from_python_returns_the_page(toy: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=6, subsets=(1.0,), seeds=(0,))
    assert report(load_recipe(toy()), out=folder) == folder / "report.html"


def test_a_rationale_is_the_first_seeds_or_none(folder: Path) -> None:
    run = load_run(folder)
    name = next(system.name for system in run.results.systems if len(run.members(system)) > 1)
    change_predictions(folder, lambda *_: {"rationale": "by the first seed"}, f"{name}-s0")
    change_predictions(folder, lambda *_: {"rationale": "by the second seed"}, f"{name}-s1")
    assert "by the first seed" in str(unpack(pack_examples([load_run(folder)], 10**6))["rows"])
    change_predictions(folder, lambda *_: {"rationale": None}, f"{name}-s0")
    assert "by the second seed" not in str(unpack(pack_examples([load_run(folder)], 10**6))["rows"])
