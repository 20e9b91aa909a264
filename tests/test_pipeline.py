"""A CSV and three lines of recipe, through every command."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import good_answer, run_dsbs, toy_rows, write_csv
from loopback import LoopbackServer


def test_a_csv_and_three_lines_of_recipe_go_through_all_stages(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "mine.csv", [{"text": row["text"], "team": row["team"]} for row in toy_rows(160)]
    )
    with LoopbackServer(good_answer) as server:
        (tmp_path / "mine.yaml").write_text(
            "task: {name: classification, labels: [billing, shipping], columns: {label: team},"
            " data: {train: mine.csv}}\n"
            f"teacher: {{model: some-model, base_url: {server.url}}}\n"
            "train: {max_steps: 8, batch_size: 8, eval_every: 8}\n"
            "eval: {latency_calls: 1, max_label_tokens: 8}\n",
            encoding="utf-8",
        )
        done = {}
        for command in ("validate", "annotate", "train", "eval", "report"):
            result = run_dsbs(command, "mine.yaml", "--json", cwd=tmp_path)
            assert result.returncode == 0, result.stderr
            done[command] = json.loads(result.stdout)
        assert server.requests == 160
    splits = done["annotate"]["splits"]
    assert splits["train"]["rows"] + splits["test"]["rows"] == 160 and splits["test"]["rows"] >= 16
    assert splits["train"]["label_accuracy"] == 1.0
    assert [student["name"] for student in done["train"]["students"]] == [
        "step-by-step-gold-s0",
        "finetune-gold-s0",
        "distill-teacher-s0",
    ]
    names = {system["name"]: system for system in done["eval"]["systems"]}
    floors = {"majority", "tfidf"}
    students = {"finetune-gold", "distill-teacher", "step-by-step-gold"}
    assert set(names) == {"teacher"} | students | floors
    assert set(names["step-by-step-gold"]["versus_floors"]) == floors
    assert names["teacher"]["accuracy"] == 1.0
    versus = names["step-by-step-gold"]["versus"]["finetune-gold"]
    assert {"delta", "ci95", "p"} <= set(versus)
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    answered = run_dsbs(
        "predict", "mine.yaml", cwd=tmp_path, input="My parcel number 5 is wrong.\n"
    )
    assert answered.returncode == 0 and "prediction" in json.loads(answered.stdout)


def test_a_limited_run_is_stamped_everywhere(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "mine.csv", [{"text": row["text"], "team": row["team"]} for row in toy_rows(160)]
    )
    with LoopbackServer(good_answer) as server:
        (tmp_path / "mine.yaml").write_text(
            "task: {name: classification, labels: [billing, shipping], columns: {label: team},"
            " data: {train: mine.csv}, limit: 30}\n"
            f"teacher: {{model: some-model, base_url: {server.url}}}\n"
            "train: {max_steps: 4, batch_size: 8, methods: finetune}\n"
            "eval: {latency_calls: 1, max_label_tokens: 8}\n",
            encoding="utf-8",
        )
        for command in ("annotate", "train", "eval"):
            result = run_dsbs(command, "mine.yaml", cwd=tmp_path)
            assert result.returncode == 0, result.stderr
            assert "smoke: not reportable" in result.stdout
        run_dsbs("report", "mine.yaml", cwd=tmp_path)
    assert "smoke: not reportable" in (tmp_path / "runs" / "mine" / "report.html").read_text(
        encoding="utf-8"
    )
    assert "smoke: not reportable" in (
        tmp_path / "runs" / "mine" / "eval" / "results.md"
    ).read_text(encoding="utf-8")
