"""The recipe: what wins over what, and what a person is told about mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from pydantic import Field, ValidationError

from dsbs.config import Recipe, Section, StudentSection, TermSettings, registry
from dsbs.config.load import load_recipe, read_recorded
from dsbs.config.schema import recipe_schema
from dsbs.errors import UserError
from dsbs.prompting import learned_source, source_fingerprint
from dsbs.tasks import make_task

PLAIN = """\
task:
  name: svamp
  data: {train: train.csv}
teacher: {model: some-model}
"""

Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    def write(text: str, name: str = "plain.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def mistakes(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The lines of the message that name a mistake, the recipe's folder cut off."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    lines = caught.value.problem.replace(f"{path.parent}/", "").splitlines()
    return [line.strip() for line in lines if "in the recipe" not in line]


# --- precedence


def test_defaults_give_way_to_the_recipe_and_the_recipe_to_overrides(written: Written) -> None:
    path = written(PLAIN + "train: {batch_size: 8, max_steps: 30}\n")
    recipe = load_recipe(path, ["train.max_steps=40", "train.seeds=[3, 4]"])
    assert recipe.train.log_every == 10  # default
    assert recipe.train.batch_size == 8  # recipe
    assert recipe.train.max_steps == 40  # command line
    assert recipe.train.seeds == (3, 4)


def test_the_last_of_two_overrides_of_one_key_wins(written: Written) -> None:
    assert (
        load_recipe(written(PLAIN), ["train.batch_size=4", "train.batch_size=5"]).train.batch_size
        == 5
    )


def test_an_override_is_split_on_its_first_equals_sign(written: Written) -> None:
    recipe = load_recipe(
        written(PLAIN), ["task.data.train=hub://a/b=c/train", "teacher.extra_body.stop=a=b"]
    )
    assert recipe.task.data.train == "hub://a/b=c/train"
    assert recipe.teacher.extra_body == {"stop": "a=b"}


def test_an_overrides_value_is_read_as_yaml(written: Written) -> None:
    recipe = load_recipe(
        written(PLAIN),
        ["task.limit=null", "report.trackers=[tensorboard]", "annotate.splits=[valid]"],
    )
    assert recipe.task.limit is None
    assert recipe.report.trackers == ("tensorboard",)
    assert recipe.annotate.splits == ("valid",)


def test_a_wrong_override_is_shown_instead_of_the_files_value(written: Written) -> None:
    path = written(PLAIN + "train: {max_steps: 30}\n")
    (message,) = mistakes(path, ["train.max_steps=many"])
    assert message.startswith("command line: train.max_steps: ")
    assert message.endswith("(given: 'many')")


def test_a_lone_value_stands_for_a_list_of_one(written: Written) -> None:
    recipe = load_recipe(
        written(PLAIN), ["train.methods=distill", "train.seeds=7", "train.labels=teacher"]
    )
    assert (recipe.train.methods, recipe.train.seeds, recipe.train.labels) == (
        ("distill",),
        (7,),
        ("teacher",),
    )


def test_an_override_opens_a_section_that_the_recipe_left_out_or_empty(written: Written) -> None:
    recipe = load_recipe(written(PLAIN + "eval:\n"), ["eval.batch_size=3", "annotate.max_tokens=9"])
    assert (recipe.eval.batch_size, recipe.annotate.max_tokens) == (3, 9)


def test_a_section_left_empty_has_its_defaults(written: Written) -> None:
    assert load_recipe(written(PLAIN + "annotate:\n")).annotate.concurrency == 64


@pytest.mark.parametrize("spelling", ["5e-5", "5.0e-5", "0.00005"])
def test_a_learning_rate_in_any_spelling_is_a_number(written: Written, spelling: str) -> None:
    in_file = load_recipe(written(PLAIN + f"train: {{learning_rate: {spelling}}}\n"))
    on_command_line = load_recipe(written(PLAIN), [f"train.learning_rate={spelling}"])
    assert in_file.train.learning_rate == on_command_line.train.learning_rate == 5e-5


def test_a_scratch_student_learns_faster_and_for_less_long_by_default(written: Written) -> None:
    scratch = load_recipe(written(PLAIN)).students[None].resolved_train
    pretrained = (
        load_recipe(written(PLAIN), ["student.model=google/t5-v1_1-base"])
        .students[None]
        .resolved_train
    )
    assert (scratch.learning_rate, scratch.max_steps) == (1e-3, 1000)
    assert (pretrained.learning_rate, pretrained.max_steps) == (5e-5, 10_000)


def test_what_the_recipe_sets_is_kept_whatever_the_student_starts_from(written: Written) -> None:
    for student in ("student.init=scratch", "student.model=google/t5-v1_1-base"):
        recipe = load_recipe(written(PLAIN), [student, "train.max_steps=7"])
        assert recipe.students[None].resolved_train.max_steps == 7
        unset = load_recipe(written(PLAIN), [student, "train.max_steps=null"])
        assert (
            unset.students[None].training
            == load_recipe(written(PLAIN), [student]).students[None].training
        )


def test_a_default_that_is_set_changes_nothing(written: Written) -> None:
    plain = load_recipe(written(PLAIN))
    explicit = load_recipe(written(PLAIN), ["train.learning_rate=0.001", "train.max_steps=1000"])
    assert explicit.students[None].training == plain.students[None].training


@pytest.mark.parametrize(
    ("student", "settings"),
    [
        ([], "d3ba520bb8a36b90"),
        (["student.model=minilm-l6"], "95ef47254ada45fd"),
        (["student.model=smollm2-135m-instruct", "student.head=labels"], "726933ee2fcf326e"),
        (["train.tune={learning_rate: [1e-4, 2e-4]}"], "eec3f73bf116d9b0"),
    ],
)
def test_a_new_version_keeps_the_annotations_and_students_of_earlier_runs(
    written: Written, student: list[str], settings: str
) -> None:
    # The hashes are those of earlier versions. Where a new key changes one, leave its default out
    # of the hash (dsbs.prompting._LATER_KEYS, StudentRecipe.training). Otherwise every run that was
    # paid for counts as another recipe's.
    written("instruction: Name the team.\ntemplate: '{{ text }}'\n", "prompt.yaml")
    path = written("""\
task: {name: classification, labels: [card, loan], data: {train: train.csv}}
teacher: {model: some-model}
annotate: {prompt: prompt.yaml}
train:
  methods: [finetune, step-by-step+labels+feature]
  terms: [{kind: labels}, {kind: feature}]
  teachers: [{model: teacher}]
""")
    recipe = load_recipe(path, student)
    task = make_task(recipe.task)
    assert source_fingerprint(recipe, task)[:16] == "c3c4e49839b92c00"
    assert learned_source(recipe, task)[:16] == "afb740036309c509"
    trained = recipe.students[None].training_of("step-by-step+labels+feature")
    assert trained[:16] == settings


def test_a_new_setting_of_annotation_counts_where_it_is_used(written: Written) -> None:
    recipe = load_recipe(written(PLAIN))
    used = load_recipe(written(PLAIN), ["annotate.use_recorded=true"])
    task = make_task(recipe.task)
    assert source_fingerprint(used, task) != source_fingerprint(recipe, task)


def test_a_scratch_students_defaults_hold_for_a_recipe_made_in_code() -> None:
    given: dict[str, Any] = {
        "name": "x",
        "task": {"name": "svamp", "data": {"train": "train.csv"}},
        "teacher": {"model": "some-model"},
    }
    as_section = Recipe(**given, student=StudentSection(init="scratch"))
    as_mapping = Recipe(**given, student={"init": "scratch"})
    assert as_section.students[None].resolved_train == as_mapping.students[None].resolved_train


@pytest.mark.parametrize(
    ("file", "name"), [("my run.yaml", "my-run"), ("a.b.yaml", "a.b"), ("_draft.yaml", "draft")]
)
def test_a_recipe_without_a_name_is_called_after_its_file(
    written: Written, file: str, name: str
) -> None:
    assert load_recipe(written(PLAIN, file)).name.lstrip("_") == name


# --- mistakes


def test_all_mistakes_are_told_at_once_each_with_its_line(written: Written) -> None:
    path = written(
        PLAIN
        + "train:\n"  # line 5
        + "  max_stps: 3\n"
        + "  learning_rate: fast\n"
        + "  methods: [finetun]\n"
        + "  seeds: [1, 1]\n"
        + "reprot: {}\n"
    )
    found = mistakes(path, ["eval.batch_size=0", "nonsense"])
    assert len(found) == 7
    text = "\n".join(found)
    assert "plain.yaml:6: train.max_stps: unknown key; did you mean 'max_steps'?" in text
    assert "plain.yaml:7: train.learning_rate:" in text
    assert "'fast'" in text
    assert "plain.yaml:8: train.methods: unknown method 'finetun'; did you mean 'finetune'?" in text
    assert "plain.yaml:9: train.seeds:" in text
    assert "plain.yaml:10: reprot: unknown key; did you mean 'report'?" in text
    assert "command line: eval.batch_size:" in text
    assert "override 'nonsense': not of the form key=value" in text


def test_an_unknown_task_does_not_wait_until_other_mistakes_are_mended(written: Written) -> None:
    path = written(PLAIN.replace("svamp", "swamp") + "train: {max_stps: 3}\n")
    text = "\n".join(mistakes(path))
    assert "did you mean 'max_steps'" in text
    assert "did you mean 'svamp'" in text


def test_an_unknown_task_is_shown_on_its_own_line(written: Written) -> None:
    (found,) = mistakes(written(PLAIN.replace("svamp", "swamp")))
    assert "did you mean 'svamp'" in found
    assert found.startswith("plain.yaml:2:")


def test_a_missing_key_is_shown_where_it_belongs(written: Written) -> None:
    (found,) = mistakes(
        written("task:\n  name: svamp\n  data:\n    test: x\nteacher: {model: m}\n")
    )
    assert found == "plain.yaml:3: task.data.train is missing"


@pytest.mark.parametrize("override", ["trian.max_steps=3", "train.max_stps=3", "train=3"])
def test_a_mistake_on_the_command_line_is_said_to_be_there(written: Written, override: str) -> None:
    (found,) = mistakes(written(PLAIN), [override])
    assert found.startswith("command line")


def test_a_key_in_the_wrong_section_is_told_its_home(written: Written) -> None:
    found = mistakes(
        written(PLAIN + "train:\n  concurrency: 3\n  temperature: 0.7\nlabels: [a, b]\n")
    )
    assert "plain.yaml:6: train.concurrency: unknown key; it belongs to annotate" in found
    assert any(
        line.startswith("plain.yaml:7: train.temperature") and "annotate" in line for line in found
    )
    assert "plain.yaml:8: labels: unknown key; it belongs to task or train" in found


def test_every_key_in_a_wrong_section_is_told_its_home_whatever_resembles_it(
    written: Written,
) -> None:
    sections = {
        name: field.annotation
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    wrong = []
    for section, kind in sections.items():
        strangers = {key for other in sections.values() for key in other.model_fields} - set(
            kind.model_fields
        )
        found = mistakes(written(PLAIN), [f"{section}.{key}=null" for key in sorted(strangers)])
        for key in strangers:
            homes = [name for name, other in sections.items() if key in other.model_fields]
            line = next(line for line in found if f" {section}.{key}: unknown key" in line)
            if not all(f" {home}" in line.partition("unknown key")[2] for home in homes):
                wrong.append(f"{line} (home: {homes})")
    assert not wrong, "\n".join(wrong)


def test_a_data_file_named_beside_data_is_told_to_go_into_it(written: Written) -> None:
    path = written("task:\n  name: svamp\n  train: train.csv\nteacher: {model: m}\n")
    found = next(line for line in mistakes(path) if line.startswith("plain.yaml:3: task.train"))
    assert "data" in found
    assert "belongs" in found or "did you mean" in found


@pytest.mark.parametrize(
    "spelled",
    [
        *("007 010", "yes no", "on off True", "1.0 1.00 1e3 +1", "2024-01-01 2024-01-02"),
        *("1_000 0x1F 1:30", "< =", ".inf .nan", "'a b' \"c\""),
    ],
)
def test_labels_are_read_as_they_are_spelled(written: Written, spelled: str) -> None:
    listing = ", ".join(re.findall("'.*'|\\S+", spelled))
    labels = tuple(label.strip("'\"") for label in re.findall("'.*'|\\S+", spelled))
    path = written(
        f"task: {{name: classification, labels: [{listing}], data: {{train: t.csv}}}}\n"
        "teacher: {model: m}\n"
    )
    assert load_recipe(path).task.labels == labels
    assert load_recipe(path, [f"task.labels=[z, {listing}]"]).task.labels == ("z", *labels)


def test_an_emoji_that_json_writes_as_two_escapes_is_one_character(written: Written) -> None:
    task = {"name": "classification", "labels": ["👍", "👎"], "data": {"train": "t.csv"}}
    path = written(json.dumps({"task": task, "teacher": {"model": "m"}}))
    assert load_recipe(path).task.labels == ("👍", "👎")


@pytest.mark.parametrize(
    "labels",
    [
        *("[a]", "[]", "[a, A]", "[a, ' a']", "[a, '']", "[a, null]", "[a, ~]", "[a, b, b]"),
        *("[Rückgabe, Ru\u0308ckgabe]", "[CO2, CO₂]", "[(a), （a）]", "[a-b, a‑b]"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(written: Written, labels: str) -> None:
    path = written(
        f"task: {{name: classification, labels: {labels}, data: {{train: t.csv}}}}\n"
        "teacher: {model: m}\n",
    )
    (found,) = mistakes(path)
    assert "task.labels" in found


def test_a_key_given_twice_is_a_mistake_that_names_both_lines(written: Written) -> None:
    found = mistakes(written(PLAIN + "train:\n  max_steps: 3\n  max_steps: 4\n"))
    assert found == ["plain.yaml:7: train.max_steps is given twice (first on line 6)"]


def test_a_section_given_twice_is_a_mistake(written: Written) -> None:
    found = mistakes(written(PLAIN + "eval: {split: valid}\neval: {batch_size: 4}\n"))
    assert found == ["plain.yaml:6: eval is given twice (first on line 5)"]


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_file_is_said_to_be_empty(written: Written, text: str) -> None:
    assert mistakes(written(text)) == ["plain.yaml is empty"]


@pytest.mark.parametrize("text", ["- task\n", "just words\n", "3\n"])
def test_a_file_that_is_no_mapping_is_refused(written: Written, text: str) -> None:
    assert mistakes(written(text)) == ["plain.yaml is not a mapping of sections"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("task:\n  name: a: b\n", 2),
        ("task:\n\tname: svamp\n", 2),
        ("task: [1\n", 2),
        ("? [1, 2]\n: 3\n", 1),
    ],
)
def test_text_that_is_not_yaml_is_shown_by_its_line(written: Written, text: str, line: int) -> None:
    (found,) = mistakes(written(text))
    assert found.startswith(f"plain.yaml:{line}: not valid YAML")


def test_a_yaml_alias_that_holds_itself_is_a_mistake_not_a_crash(written: Written) -> None:
    assert mistakes(written(PLAIN + "train: &loop\n  seeds: *loop\n"))


def test_keys_that_are_not_text_are_a_mistake_not_a_crash(written: Written) -> None:
    assert mistakes(written(PLAIN + "train: {1: 2}\n"))
    assert mistakes(written(PLAIN + "null: 2\n"))


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    (found,) = mistakes(path)
    assert "not UTF-8" in found


def test_a_recipe_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml does not exist"):
        load_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", ["../up", ".hidden", "a/b", "''", "a b"])
def test_a_name_that_is_no_folder_name_is_refused(written: Written, name: str) -> None:
    (found,) = mistakes(written(f"name: {name}\n" + PLAIN))
    assert found.startswith("plain.yaml:1: name:")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.batch_size=10", "train.micro_batch_size=4"], "multiple of train.micro_batch_size"),
        (["annotate.samples=3"], "temperature"),
        (["student.model=google/t5-v1_1-base", "student.init=scratch"], "exclude each other"),
        (["teacher.model=null"], "teacher.model is needed for kind openai"),
        (["task.labels=[a, b]"], "belongs to classification"),
        (["task.name=classification"], "task.labels is needed"),
        (
            ["task.input='{{ text }}'"],
            "task.input belongs to classification, multilabel, score, extraction and generation",
        ),
        (["task.numeric=true"], "task.numeric belongs to generation"),
        (["train.rationale_weight=-1"], "train.rationale_weight"),
        (["train.methods=[distill, distill]"], "given twice"),
        (["train.seeds=[]"], "train.seeds"),
        (["train.labels=silver"], "train.labels"),
        (["task.limit=0"], "task.limit"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    written: Written, overrides: list[str], told: str
) -> None:
    assert told in "\n".join(mistakes(written(PLAIN), overrides))


def test_a_recipe_is_frozen(written: Written) -> None:
    recipe = load_recipe(written(PLAIN))
    for section, field in (
        (recipe, "name"),
        (recipe.train, "max_steps"),
        (recipe.task.data, "train"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, "other")


# --- secrets


@pytest.mark.parametrize("user", ["me:hunter2", ":hunter2", "hunter2"])
def test_a_url_that_carries_a_password_is_refused_and_the_password_not_repeated(
    written: Written, user: str
) -> None:
    path = written(PLAIN.replace("some-model", f"m, base_url: 'https://{user}@host/v1'"))
    (found,) = mistakes(path)
    assert found.startswith("plain.yaml:4: teacher.base_url:")
    assert "api_key_env" in found
    assert "hunter2" not in found


@pytest.mark.parametrize(
    "url", ["me:hunter2@host/v1", "ftp://me:hunter2@host/v1", "//me:hunter2@host/v1"]
)
def test_a_password_in_a_url_that_is_none_is_not_repeated(written: Written, url: str) -> None:
    (found,) = mistakes(written(PLAIN), [f"teacher.base_url={url}"])
    assert "teacher.base_url" in found
    assert "hunter2" not in found


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "127.0.0.1:8000", "http://", "file:///etc/passwd", "''"]
)
def test_a_base_url_that_is_no_http_url_is_refused(written: Written, url: str) -> None:
    (found,) = mistakes(written(PLAIN), [f"teacher.base_url={url}"])
    assert "is not an http(s) URL" in found


# --- earlier versions


def test_a_removed_key_says_what_to_use_instead(written: Written) -> None:
    (error,) = mistakes(written(PLAIN + "eval:\n  simulator: true\n"))
    assert error.startswith("plain.yaml:6: eval.simulator: the simulator was removed")
    assert "eval.rationales" in error


@pytest.mark.parametrize("kind", ["mutual-information", "consistency"])
def test_a_removed_term_says_what_to_use_instead(written: Written, kind: str) -> None:
    (error,) = mistakes(written(PLAIN), [f"train.terms=[{{kind: {kind}}}]"])
    assert f"the experimental term {kind} was removed" in error and "response" in error


def test_a_recorded_recipe_with_keys_of_earlier_versions_is_read(written: Written) -> None:
    overrides = [
        "train.methods=finetune+response",
        "train.terms=[{kind: response}]",
        "train.teachers=[{size: mini}]",
    ]
    recipe = load_recipe(written(PLAIN), overrides)
    values = recipe.model_dump(mode="json")
    values["eval"]["simulator"] = False
    values["train"]["terms"][0]["angle"] = 2.0  # every kind had every key
    read = read_recorded({"recipe": values})
    assert read is not None and read.model_dump() == recipe.model_dump()
    assert read_recorded({"recipe": {}}) is None and read_recorded({}) is None


# --- what ships


@pytest.mark.parametrize(
    "kinds",
    [
        registry.TASKS,
        registry.TEACHERS,
        registry.METHODS,
        registry.TERMS,
        registry.METRICS,
        registry.COMPRESSION_STEPS,
        registry.EXPORT_FORMATS,
        registry.BACKENDS,
    ],
)
def test_every_registered_name_resolves(kinds: dict[Any, str]) -> None:
    for name in kinds:
        assert registry.entry(kinds, name) is not None


class ToyTerm(TermSettings):
    """Settings of a kind that a test registers."""

    slope: float = Field(2.0, gt=0)  # of nothing


def test_a_kind_that_is_registered_is_valid_in_a_recipe(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.METHODS, "toy", "dsbs.training.methods:FINETUNE")
    monkeypatch.setitem(registry.TEACHERS, "toy", "dsbs.annotation.backends.recorded:HumanTeacher")
    monkeypatch.setitem(registry.TERMS, "toy", f"{__name__}:ToyTerm")
    monkeypatch.setitem(registry.TASKS, "toy", "dsbs.tasks.svamp:Svamp")
    recipe = load_recipe(
        written(PLAIN),
        [
            "train.methods=[toy, toy+toy]",
            "train.terms=[{kind: toy, slope: 3}]",
            "teacher.kind=toy",
            "task={name: toy, data: {train: rows.jsonl}}",
        ],
    )
    (term,) = recipe.train.terms_of("toy+toy")
    assert isinstance(term, ToyTerm) and term.slope == 3
    assert recipe.model_dump(mode="json")["train"]["terms"][0]["slope"] == 3
    assert "toy" in str(recipe_schema())


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_recipe_loads(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # found by its name alone, from anywhere
    recipe = load_recipe(f"recipes/{path.name}")
    assert recipe.name == path.stem
    assert load_recipe(path) == recipe
    assert recipe.teacher.model


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    recipe = load_recipe("recipes/demo.yaml", ["train.max_steps=3"])
    resolved = recipe.model_dump(mode="json")
    assert Recipe.model_validate(resolved).model_dump(mode="json") == resolved


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "teachers").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_teacher_takes_the_place_of_a_recipes_own(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(
        "recipes/demo.yaml", [f"teacher=recipes/teachers/{path.name}", "teacher.timeout_s=7"]
    )
    assert recipe.teacher.model and recipe.teacher.timeout_s == 7
    assert recipe.teacher.kind != "openai" or recipe.teacher.base_url.startswith("http")


def test_a_recipe_may_name_its_teachers_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "teacher: {model: m, base_url: 'http://127.0.0.1:1/v1'}", encoding="utf-8"
    )
    (tmp_path / "r.yaml").write_text(
        "task: {name: svamp, data: {train: a.jsonl}}\nteacher: mine.yaml", encoding="utf-8"
    )
    assert load_recipe(tmp_path / "r.yaml").teacher.model == "m"
    (tmp_path / "mine.yaml").write_text("model: m", encoding="utf-8")
    with pytest.raises(UserError, match="no teacher: section"):
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "mine.yaml").unlink()
    with pytest.raises(UserError, match=r"teacher file mine\.yaml does not exist"):
        load_recipe(tmp_path / "r.yaml")


def test_a_students_gguf_file_is_looked_for_beside_the_recipe_and_stays_named_as_it_was(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy()
    (path.parent / "mine.gguf").write_bytes(b"GGUF")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    section = load_recipe(path, ["student={model: mine.gguf}"]).student
    assert (
        section.source == str(path.parent / "mine.gguf")
        and section.settings["model"] == "mine.gguf"
    )
    assert load_recipe(path, ["student={model: other.gguf}"]).student.source == "other.gguf"
    (elsewhere / "mine.gguf").write_bytes(b"GGUF")
    assert load_recipe(path, ["student={model: mine.gguf}"]).student.source == "mine.gguf"
