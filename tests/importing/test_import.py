"""`dsbs import`: from a log to rows and a recipe that trains, whatever the log has."""

from __future__ import annotations

import json
import random
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run_dsbs

import dsbs
from dsbs.errors import UserError
from dsbs.importing.redaction import _recognizers
from dsbs.importing.run import ImportOptions, ImportResult, import_log

KEY = "sk-proj-abcdefghijklmnopqrstuvwxyz012345"
WORDS = {"billing": "invoice", "shipping": "parcel", "login": "password"}
SYSTEM = "Route the customer's message to a team. The teams are: billing, shipping, login, press."
TEMPLATE = "Message: {}\nTeam:"


def texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Messages with the team that is told by one word."""
    chance = random.Random(seed)
    starts = ("Hello,", "Again", "Why is", "So", "Please,", "My friend says")
    pairs = []
    for number in range(count):
        team = chance.choice(list(WORDS))
        start = chance.choice(starts)
        pairs.append((f"{start} the {WORDS[team]} number {number} is wrong", team))
    return pairs


def chat(question: str, reply: str, system: str = SYSTEM, **extra: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": messages, **extra}


def write(path: Path, entries: Iterable[Any]) -> Path:
    lines = (entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def imported(folder: Path, entries: Iterable[Any], **options: Any) -> ImportResult:
    log = write(folder / "log", entries)
    return import_log([log], folder / "rows.jsonl", ImportOptions(**options))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = [
        line
        for name in ("rows.jsonl", "rows-test.jsonl")
        for line in (folder / name).read_text(encoding="utf-8").splitlines()
    ]
    return [json.loads(line) for line in lines]


def test_from_a_log_to_a_student(tmp_path: Path) -> None:
    entries = [
        chat(TEMPLATE.format(text), f"It names the {WORDS[team]} plainly.\nAnswer: {team}")
        for text, team in texts(80)
    ]
    write(tmp_path / "log", entries)
    command = run_dsbs("import", "log", "--out", "rows.jsonl", cwd=tmp_path)
    assert command.returncode == 0, command.stderr
    assert "replies read: 100.0% of 80 rows" in command.stdout
    assert "dsbs validate rows.yaml" in command.stdout
    prompt = yaml.safe_load((tmp_path / "rows-prompt.yaml").read_text(encoding="utf-8"))
    assert (prompt["instruction"], prompt["template"]) == (SYSTEM, "Message: {{ text }}\nTeam:")
    small = ["student={init: scratch, size: nano}", "train.max_epochs=null", "train.max_steps=4"]
    recipe = dsbs.load_recipe(tmp_path / "rows.yaml", [*small, "train.methods=[step-by-step]"])
    assert recipe.task.labels == ("billing", "login", "press", "shipping")
    checked = dsbs.validate(recipe)
    assert checked.first_prompt is not None
    assert checked.first_prompt.startswith(f"{SYSTEM}\n\nMessage: ")
    run = tmp_path / "run"
    annotated = dsbs.annotate(recipe, out=run)
    train = annotated.splits["train"]
    assert train.accepted == train.rows > 50
    (student,) = dsbs.train(recipe, out=run).students
    assert student.steps == 4
    results = dsbs.evaluate(recipe, out=run)
    assert results.n == 80 - train.rows
    # run again: nothing is overwritten unasked
    again = run_dsbs("import", "log", "--out", "rows.jsonl", cwd=tmp_path)
    assert again.returncode == 2
    assert "rows.jsonl exists already" in again.stderr


def test_with_an_endpoint_the_recipe_asks_it_for_missing_replies(tmp_path: Path) -> None:
    log = [chat(text, f"It is plain.\nAnswer: {team}") for text, team in texts(20)]
    write(tmp_path / "unnamed", log)
    write(tmp_path / "named", [{"model": "large"} | entry for entry in log])
    options = ImportOptions(base_url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="does not name its model"):
        import_log([tmp_path / "unnamed"], tmp_path / "rows.jsonl", options)
    with pytest.raises(UserError, match="--base-url: 'here' is not an"):
        import_log([tmp_path / "named"], tmp_path / "rows.jsonl", ImportOptions(base_url="here"))
    assert not (tmp_path / "rows.jsonl").exists()
    import_log([tmp_path / "named"], tmp_path / "rows.jsonl", options)
    recipe = dsbs.load_recipe(tmp_path / "rows.yaml")
    assert (recipe.teacher.kind, recipe.teacher.model) == ("openai", "large")
    assert recipe.teacher.base_url == options.base_url
    assert recipe.annotate.use_recorded and recipe.annotate.splits == ("train", "test")


def test_failed_calls_are_rows_for_the_endpoint_to_answer(tmp_path: Path) -> None:
    log = [{"model": "large-2026"} | chat(text, f"Answer: {team}") for text, team in texts(20)]
    ended = {"error": {"message": "Rate limit reached"}}
    failed = [
        {"request": chat(text, "", model="large"), "response": ended}
        for text in (
            "the parcel of ada@example.org is late",
            "the parcel of bob@example.org is late",
            texts(1)[0][0],  # answered when it was repeated
            "the parcel of bob@example.org is late",
        )
    ]
    write(tmp_path / "log", [failed[0], *log, *failed[1:]])
    plain = import_log([tmp_path / "log"], tmp_path / "plain.jsonl")
    assert (plain.unanswered, sum(plain.rows.values())) == (0, 20)
    options = ImportOptions(base_url="http://127.0.0.1:9/v1", redact=True)
    result = import_log([tmp_path / "log"], tmp_path / "rows.jsonl", options)
    assert (result.unanswered, result.read, sum(result.rows.values())) == (2, 20, 22)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]
    unanswered = [row for row in rows if "teacher" not in row]
    hidden = {"text": "the parcel of <EMAIL_ADDRESS> is late"}
    assert [row["input"] for row in unanswered] == [hidden, hidden]
    assert len({row["id"] for row in rows}) == len(rows)


def label_alone(text: str, team: str) -> str:
    return team


REPLIES: dict[str, tuple[Callable[[str, str], str], dict[str, Any]]] = {
    "label": (label_alone, {"name": "classification"}),
    "bold label": (lambda _, team: f"**{team.title()}**", {"name": "classification"}),
    "json": (
        lambda text, team: json.dumps({"rationale": f"see {text}", "label": team}),
        {"name": "classification"},
    ),
    "json of other names": (
        lambda text, team: f"```json\n{json.dumps({'team': team, 'why': f'it says {text}'})}\n```",
        {"name": "classification"},
    ),
    "json with escapes": (
        lambda text, team: json.dumps({"category": f"{team} é", "why": f'it "says" {text} …'}),
        {"name": "classification"},
    ),
    "tag": (
        lambda text, team: f"The text {text} says it.\n<team>{team}</team>",
        {"name": "classification"},
    ),
    "label first": (
        lambda text, team: f"Team: {team}\nReason: the text says {text}.",
        {"name": "classification"},
    ),
    "list": (
        lambda text, team: json.dumps({"tags": sorted({team, "urgent"})}),
        {"name": "multilabel"},
    ),
    "score": (lambda text, team: f"Rating: {len(team) % 4 + 1}", {"name": "score"}),
    "number": (
        lambda text, team: f"I add them up.\nThe answer is {sum(map(ord, text)) * 7919 % 10007}",
        {"name": "generation", "numeric": True},
    ),
    "fields": (
        lambda text, team: json.dumps({"team": team, "thing": WORDS[team], "count": len(text)}),
        {"name": "extraction"},
    ),
    "free text": (
        lambda text, team: f"Dear customer,\nwe read that {text}.\nBest wishes",
        {"name": "generation"},
    ),
}


@pytest.mark.parametrize("name", REPLIES)
def test_replies_of_each_form_are_recognized_and_read(name: str, tmp_path: Path) -> None:
    reply, task = REPLIES[name]
    system = "Say what the message is about."
    entries = [chat(text, reply(text, team), system) for text, team in texts(120)]
    if name == "score":
        entries = [
            chat(text, f"Rating: {number % 5 + 1}", system)
            for number, (text, _) in enumerate(texts(120))
        ]
    result = imported(tmp_path, entries)
    assert task.items() <= result.task.items(), result.task
    assert result.read == 120, (result.unread, result.reply_form)
    recipe = dsbs.load_recipe(tmp_path / "rows.yaml")
    dsbs.validate(recipe)
    has_reason = name.startswith("json") or name in ("tag", "label first", "number")
    assert ("step-by-step" in recipe.train.methods) == has_reason
    if name == "json with escapes":
        dsbs.annotate(recipe, out=tmp_path / "run")
        lines = (tmp_path / "run" / "annotate" / "train.jsonl").read_text(encoding="utf-8")
        row = json.loads(lines.partition("\n")[0])
        assert row["label"].endswith(" é") and row["rationale"].startswith('it "says" ')


def test_two_fields_and_few_shot_turns(tmp_path: Path) -> None:
    def question(premise: str, hypothesis: str) -> str:
        return f"Premise: {premise}\nHypothesis: {hypothesis}\nIs it true, false or open?"

    shots = [
        {"role": "user", "content": question("A cat sleeps.", "An animal rests.")},
        {"role": "assistant", "content": "true"},
    ]
    entries = []
    for number, (text, team) in enumerate(texts(60)):
        entry = chat(question(text, f"It is about {team}."), ("true", "false")[number % 2])
        entry["messages"][1:1] = shots
        entries.append(entry)
    result = imported(tmp_path, entries)
    assert result.fields == ("premise", "hypothesis")
    row = rows_of(tmp_path)[0]["input"]
    assert row["hypothesis"].startswith("It is about")
    prompt = yaml.safe_load((tmp_path / "rows-prompt.yaml").read_text(encoding="utf-8"))
    assert prompt["exemplars"][0]["input"] == {
        "premise": "A cat sleeps.",
        "hypothesis": "An animal rests.",
    }
    checked = dsbs.validate(dsbs.load_recipe(tmp_path / "rows.yaml"))
    assert checked.first_prompt is not None
    assert question("A cat sleeps.", "An animal rests.") in checked.first_prompt


def test_json_questions_become_fields(tmp_path: Path) -> None:
    entries = [
        chat(json.dumps({"Subject Line": text, "id": number}), team)
        for number, (text, team) in enumerate(texts(60))
    ]
    result = imported(tmp_path, entries)
    assert result.fields == ("subject_line", "id_text")
    dsbs.validate(dsbs.load_recipe(tmp_path / "rows.yaml"))


def test_several_models_and_prompts(tmp_path: Path) -> None:
    entries = [chat(text, team, model="big") for text, team in texts(60)]
    entries += [chat(text, team, model="small") for text, team in texts(20)]
    entries += [chat(text, "yes", "Is it polite?", model="big") for text, _ in texts(30)]
    result = imported(tmp_path, entries, dry_run=True)
    assert result.models == {"big": 90, "small": 20}
    assert [prompt["calls"] for prompt in result.prompts] == [60, 30]
    assert sum(result.rows.values()) == 60
    assert not (tmp_path / "rows.jsonl").exists()
    other = imported(tmp_path, entries, prompt=2, dry_run=True)
    assert other.instruction == "Is it polite?"
    small = imported(tmp_path, entries, model="small", limit=5, dry_run=True)
    assert sum(small.rows.values()) == 5
    with pytest.raises(UserError, match="no model 'tiny'"):
        imported(tmp_path, entries, model="tiny")


def test_dates_in_the_system_text_are_no_inputs(tmp_path: Path) -> None:
    entries = [
        chat(text, team, f"Today is 2025-{number % 12 + 1:02}-{number % 28 + 1:02}. Route it.")
        for number, (text, team) in enumerate(texts(60))
    ]
    result = imported(tmp_path, entries, dry_run=True)
    assert result.fields == ("text",)
    assert result.instruction == "Today is 2025-12-04. Route it."
    assert result.first_row["input"].keys() == {"text"}


def test_a_killed_import_is_run_again_and_an_edited_recipe_is_kept(tmp_path: Path) -> None:
    entries = [chat(text, team) for text, team in texts(60)]
    imported(tmp_path, entries)
    (tmp_path / "rows.jsonl").unlink()  # it is written last
    imported(tmp_path, entries)
    (tmp_path / "rows.jsonl").unlink()
    recipe = tmp_path / "rows.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8") + "# mine\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.yaml exists already"):
        imported(tmp_path, entries)
    assert not (tmp_path / "rows.jsonl").exists()
    imported(tmp_path, entries, overwrite=True)
    assert "# mine" not in recipe.read_text(encoding="utf-8")


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_import_never_writes_over_its_log(tmp_path: Path, overwrite: bool) -> None:
    for name in ("rows.jsonl", "rows-test.jsonl"):
        log = write(tmp_path / name, [chat(text, team) for text, team in texts(60)])
        before = log.read_bytes()
        with pytest.raises(UserError, match=r"write over it|exists already"):
            import_log([log], tmp_path / "rows.jsonl", ImportOptions(overwrite=overwrite))
        assert log.read_bytes() == before
        log.unlink()


def test_gold_labels_of_a_log_are_kept(tmp_path: Path) -> None:
    entries = [
        chat(text, team, label="billing", id=f"c{i}") for i, (text, team) in enumerate(texts(60))
    ]
    result = imported(tmp_path, entries)
    assert result.gold == 60
    assert {row["label"] for row in rows_of(tmp_path)} == {"billing"}
    recipe = yaml.safe_load((tmp_path / "rows.yaml").read_text(encoding="utf-8"))
    assert recipe["train"]["labels"] == "gold"


def test_reasoning_beside_the_reply_becomes_the_rationale(tmp_path: Path) -> None:
    entries = []
    for text, team in texts(40):
        entry = chat(text, team)
        entry["messages"][-1]["reasoning_content"] = f"They say {text}, which is about {team}."
        entries.append(entry)
    imported(tmp_path, entries)
    recipe = dsbs.load_recipe(tmp_path / "rows.yaml")
    assert recipe.annotate.rationale_from == "reasoning"
    assert rows_of(tmp_path)[0]["teacher"]["completion"].startswith("<think>\nThey say")


def test_hostile_lines_are_counted_and_their_secrets_shown_nowhere(tmp_path: Path) -> None:
    entries: list[Any] = [
        chat(text, team, id=f"c{number}", headers={"Authorization": f"Bearer {KEY}"})
        for number, (text, team) in enumerate(texts(60))
    ]
    entries += [
        entries[0],  # a retry that was logged twice
        chat("Another text of the same id is a row", "billing", id="c1"),
        f'{{"key": "{KEY}", "messages": [',  # half a line
        f"[2025-01-01] INFO {KEY}",
        "[" * 100_000,
        json.dumps({"messages": [{"role": "user", "content": "\0"}, entries[0]["messages"][-1]]}),
        '{"prompt": "It costs NaN", "completion": "billing", "cost": NaN}',
        '{"prompt": "half a pair \\ud83d of characters", "completion": "billing"}',
        "7",
        f'{{"api_key": "{KEY}"}}',
    ]
    log = write(tmp_path / "log", entries)
    log.write_bytes(b"\xef\xbb\xbf" + log.read_bytes() + b'\n\xff\xfe\n{"messages": [{"rol')
    command = run_dsbs("import", "log", "--out", "out/rows.jsonl", cwd=tmp_path)
    assert command.returncode == 0, command.stderr
    written = [path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()]
    assert KEY not in "".join([command.stdout, command.stderr, *written])
    result = import_log([log], tmp_path / "rows.jsonl", ImportOptions(dry_run=True))
    assert result.tally.skipped == {
        "not valid JSON": 4,
        "nested too deeply": 1,
        "a NUL character": 1,
        "not an object": 1,
        "unknown format": 1,
        "repeated entry": 1,
    }
    assert result.tally.first_skipped["not valid JSON"] == f"{log}:63"
    assert sum(result.rows.values()) == 61
    assert [prompt["calls"] for prompt in result.prompts] == [62, 2]


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    padding = {"headers": {"trace": "x" * 20_000}}
    line = json.dumps({**chat("{}", "billing"), **padding})
    with (tmp_path / "log").open("w") as file:
        for number in range(1500):  # 30 MB
            file.write(line.replace("{}", f"question {number} {number * 7919}") + "\n")
    tracemalloc.start()
    import_log([tmp_path / "log"], tmp_path / "rows.jsonl", ImportOptions(test_fraction=0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20


def test_keys_and_addresses_are_counted_and_redacted(tmp_path: Path) -> None:
    pytest.importorskip("presidio_analyzer")
    entries = [
        chat(
            f"{text}; I am user{number}@example.com, card 4111 1111 1111 1111, {KEY}{number}", team
        )
        for number, (text, team) in enumerate(texts(20))
    ]
    result = imported(tmp_path, entries, redact=True)
    assert result.private == {"keys": 20, "e-mail addresses": 20}
    assert result.redacted == {"KEY": 20, "EMAIL_ADDRESS": 20, "CREDIT_CARD": 20}
    written = "".join(json.dumps(row) for row in rows_of(tmp_path))
    assert not any(text in written for text in (KEY, "@example.com", "4111"))


def test_redaction_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    _recognizers.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'dsbs\[redact\]'"):
        imported(tmp_path, [chat("Hi", "billing")], redact=True)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "empty"),
        (["no json"], "no entry of a log was recognized: not valid JSON 1"),
        ([{"a": 1}], "unknown format 1"),
        ([{"messages": [{"role": "user", "content": "Hi"}]}], "no complete call"),
        (
            [{"id": "c", "object": "chat.completion", "choices": [{"message": {"content": "a"}}]}],
            "add the file with the requests",
        ),
    ],
)
def test_a_log_without_calls_is_refused_with_a_reason(
    entries: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        imported(tmp_path, entries)
    assert {path.name for path in tmp_path.iterdir()} == {"log"}
