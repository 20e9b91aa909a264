"""Mistakes that would pass unnoticed, or end in a traceback: one message, exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import good_answer, run_dsbs, toy_rows, write_csv, write_jsonl
from loopback import LoopbackServer, completion

from dsbs import UserError, annotate, evaluate, load_recipe, train
from dsbs.annotation.run import merge
from dsbs.config.load import load_located
from dsbs.files import atomic_write, expand_user
from dsbs.progress import NoProgress
from dsbs.prompting import read_prompt
from dsbs.run_folder import RunFolder
from dsbs.tasks import make_task
from dsbs.tasks.label_set import LabelSet
from dsbs.tasks.shards import Shard


def test_annotations_of_other_texts_with_the_same_ids_are_refused(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=40, test=6)
    run = tmp_path / "run"
    with LoopbackServer(good_answer) as server:
        changes = [f"teacher.base_url={server.url}", "train.max_steps=2"]
        recipe = load_recipe(path, changes)
        annotate(recipe, out=run)
    train(recipe, out=run)
    evaluate(recipe, out=run)
    for split, start in (("test", 1000), ("train", 0)):
        rows = toy_rows(40 if split == "train" else 6, start=start)
        write_csv(tmp_path / f"{split}.csv", [row | {"text": f"{row['text']}!"} for row in rows])
    with pytest.raises(UserError, match=r"6 test rows \(first: r1000\) have another input"):
        evaluate(recipe, out=run)
    with pytest.raises(UserError, match=r"40 train rows \(first: r0\) have another input"):
        train(load_recipe(path, [*changes, "train.methods=[distill]"]), out=run)
    review = run_dsbs("review", str(run), "--export-csv", "x.csv", cwd=tmp_path)
    assert review.returncode == 2 and "have another input" in review.stderr


def test_a_copy_of_a_students_folder_is_no_second_seed(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = load_recipe(toy(), ["train.methods=[finetune]", "train.max_steps=2"])
    (student,) = train(recipe, out=tmp_path / "run").students
    shutil.copytree(student.path, f"{student.path}.bak")
    assert [each.name for each in RunFolder(tmp_path / "run").students()] == [student.name]


@pytest.mark.parametrize("template", ["Message: {text}", "What is it?"])
def test_a_prompt_without_the_row_is_refused(tmp_path: Path, template: str) -> None:
    prompt = tmp_path / "prompt.yaml"
    prompt.write_text(yaml.safe_dump({"instruction": "Decide.", "template": template}))
    with pytest.raises(UserError, match="every request would be the same"):
        read_prompt(str(prompt), None)


@pytest.mark.parametrize("use", ["label", "rationale"])
def test_an_input_with_the_answer_is_refused(toy: Callable[..., Path], use: str) -> None:
    columns = f"task.columns={{{use}: team}}"
    recipe = load_recipe(toy(), [columns, 'task.input="{{ team }}: {{ text }}"'])
    with pytest.raises(UserError, match=f"reads the column 'team', which holds each row's {use}"):
        make_task(recipe.task)


def test_a_lost_store_of_replies_is_not_bought_again(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=6, test=2)
    run = tmp_path / "run"
    with LoopbackServer(good_answer) as server:
        recipe = load_recipe(path, [f"teacher.base_url={server.url}"])
        annotate(recipe, out=run)
        before = (run / "annotate" / "train.jsonl").read_bytes()
        for file in (run / "annotate").glob("replies.sqlite*"):
            file.unlink()
        with pytest.raises(UserError, match=r"has no replies, and .* has 6 rows with one"):
            annotate(recipe, out=run)
        assert server.requests == 8
        assert (run / "annotate" / "train.jsonl").read_bytes() == before
        (run / "annotate").rename(run / "away")
        annotate(recipe, out=run)
        assert server.requests == 16


def test_a_lost_store_is_made_again_from_its_shards(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with LoopbackServer(good_answer) as server:
        recipe = load_recipe(toy(train=6, test=2), [f"teacher.base_url={server.url}"])
        for shard in Shard.all(2):
            annotate(recipe, out=run, shard=shard)
        merge(recipe, out=run)
        for file in (run / "annotate").glob("replies.sqlite*"):
            file.unlink()
        assert merge(recipe, out=run).splits["train"].accepted == 6
        assert server.requests == 8


@pytest.mark.parametrize("count", ["1" + "0" * 30, "Infinity", "-1", "1e400"])
def test_a_reply_with_an_odd_count_of_tokens_is_kept(
    toy: Callable[..., Path], tmp_path: Path, count: str
) -> None:
    def odd(body: dict[str, object], number: int) -> object:
        reply = json.dumps(completion(good_answer(body, number)) | {"usage": {"prompt_tokens": 0}})
        return 200, {}, reply.replace('"prompt_tokens": 0', f'"prompt_tokens": {count}').encode()

    with LoopbackServer(odd) as server:
        recipe = load_recipe(toy(train=2, test=2), [f"teacher.base_url={server.url}"])
        result = annotate(recipe, out=tmp_path / "run")
    assert result.splits["train"].accepted == 2
    assert result.splits["train"].usage.prompt_tokens is None


@pytest.mark.parametrize("text", ["2024-02-30", "0x_", "!!int abc", "[" * 3000 + "]" * 3000])
def test_a_value_that_yaml_cannot_make_is_not_valid_yaml(
    toy: Callable[..., Path], text: str
) -> None:
    with pytest.raises(yaml.YAMLError):
        load_located(text)
    with pytest.raises(UserError, match="the value is not valid YAML"):
        load_recipe(toy(), [f"train.seeds={text}"])


def test_a_name_that_begins_with_a_tilde_is_a_file_that_does_not_exist(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    assert expand_user("~nobody-of-this-name/r.yaml") == Path("~nobody-of-this-name/r.yaml")
    for arguments in (
        ["show", "~nobody-of-this-name/r.yaml"],
        ["validate", str(toy()), "task.data.train=~train.csv"],
    ):
        ended = run_dsbs(*arguments, cwd=tmp_path)
        assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr


@pytest.mark.parametrize(
    "change", ["teacher.extra_body={a: 2024-01-01}", "teacher.extra_body={a: .nan}"]
)
def test_what_an_endpoint_cannot_be_sent_is_refused(toy: Callable[..., Path], change: str) -> None:
    with pytest.raises(UserError, match="a value is not JSON"):
        load_recipe(toy(), [change])
    with pytest.raises(UserError, match=r"annotate\.temperature"):
        load_recipe(toy(), ["annotate.temperature=.inf"])


def test_an_integer_of_a_thousand_digits_is_no_label() -> None:
    labels = LabelSet(["007", "8"])
    assert labels.of_value(10**1000) is None
    assert labels.of_value(7) == "007"


def test_a_folder_is_no_output_file_and_a_file_no_run(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is a folder"), atomic_write(tmp_path):
        pass
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError, match="taken is a file, and a run is a folder"):
        annotate(load_recipe(toy()), out=tmp_path / "taken")


def test_predictions_need_every_id_or_none(toy: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(toy(), ["train.methods=[finetune]", "train.max_steps=1"])
    (student,) = train(recipe, out=tmp_path / "run").students
    (tmp_path / "mixed.csv").write_text("id,text\n3,a\n,b\n", encoding="utf-8")
    ended = run_dsbs("predict", student.path, "mixed.csv", cwd=tmp_path)
    assert ended.returncode == 2 and "the column 'id' is empty" in ended.stderr
    ended = run_dsbs(
        "predict", student.path, "mixed.csv", "--set", "eval.batch_size=2", cwd=tmp_path
    )
    assert ended.returncode == 2 and "--set needs a recipe" in ended.stderr


def test_a_damaged_student_is_named(toy: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(toy(), ["train.methods=[finetune]", "train.max_steps=1"])
    (student,) = train(recipe, out=tmp_path / "run").students
    (Path(student.path) / "model.safetensors").write_bytes(b"")
    write_jsonl(tmp_path / "rows.jsonl", [{"id": "1", "text": "a"}])
    ended = run_dsbs("predict", student.path, "rows.jsonl", cwd=tmp_path)
    assert ended.returncode == 1 and "a file is damaged or missing" in ended.stderr


def test_a_damaged_database_is_one_message(toy: Callable[..., Path], tmp_path: Path) -> None:
    path = toy(train=30, test=2)
    with LoopbackServer(good_answer) as server:
        url = f"teacher.base_url={server.url}"
        annotate(load_recipe(path, [url]), out=tmp_path / "run")
        store = tmp_path / "run" / "annotate" / "replies.sqlite"
        content = bytearray(store.read_bytes())
        content[4096:] = bytes(len(content) - 4096)
        store.write_bytes(content)
        ended = run_dsbs("annotate", str(path), url, "--out", "run", cwd=tmp_path)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert "damaged" in ended.stderr or "cannot be opened" in ended.stderr


def test_eval_says_which_test_rows_are_train_rows_too(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(test=10)
    rows = [*toy_rows(3), *toy_rows(7, start=1000)]
    rows[0] = rows[0] | {"id": "other", "text": rows[0]["text"].upper()}
    write_csv(tmp_path / "test.csv", rows)
    lines = [{"id": row["id"], "prediction": row["team"]} for row in rows]
    predictions = write_jsonl(tmp_path / "x.jsonl", lines)
    said: list[str] = []

    class Said(NoProgress):
        def say(self, text: str) -> None:
            said.append(text)

    recipe = load_recipe(
        path, [f"eval.predictions={{x: {predictions}}}", "annotate.splits=[train]"]
    )
    evaluate(recipe, out=tmp_path / "run", progress=Said())
    assert [text for text in said if "3 of 10 test rows are also train rows" in text] == said
