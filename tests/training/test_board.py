"""TensorBoard events, read back by TensorBoard; writing them changes nothing else."""

from __future__ import annotations

import hashlib
import html
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer, run_dsbs, start_dsbs
from loopback import LoopbackServer

from dsbs import UserError, annotate, load_recipe, train
from dsbs.config import Recipe

pytest.importorskip(
    "tensorboard", reason="TensorBoard is not installed (pip install dsbs[tensorboard])"
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)
from tensorboard.plugin_util import markdown_to_safe_html

HOSTILE = "<script>alert(1)</script> *not* [a](http://b.c) | ~x~ $y$ `z` &amp; _u_"
ONLY = ("train.methods=step-by-step", "report.trackers=[tensorboard]")


@pytest.fixture
def annotated(toy: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Recipe]]:
    """A toy run whose teacher has answered; returns recipes on the same run folder."""
    with LoopbackServer(good_answer) as server:
        path = toy()
        base = [f"teacher.base_url={server.url}"]
        annotate(load_recipe(path, base), out=tmp_path / "run")
        yield lambda *overrides: load_recipe(path, [*base, *overrides])


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0, "graph": 0}
    )
    found.Reload()
    return found


def curve(found: EventAccumulator, tag: str) -> dict[int, float]:
    """A tag's points by step; a step that is there twice is a mistake."""
    points = [(one.step, one.value) for one in found.Scalars(tag)]
    assert len(dict(points)) == len(points), f"{tag} has a step twice"
    return dict(points)


def texts(folder: Path, tag: str) -> dict[int, str]:
    """A tag's texts by step, as TensorBoard's pages read them."""
    found = PluginEventAccumulator(str(folder / "tensorboard"), tensor_size_guidance={"text": 0})
    found.Reload()
    events = [
        (one.step, one.tensor_proto.string_val[0].decode())
        for one in found.Tensors(f"{tag}/text_summary")
    ]
    assert len(dict(events)) == len(events), f"{tag} has a step twice"
    return dict(events)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_every_figure_of_metrics_jsonl_is_drawn_at_its_step(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    train(annotated(*ONLY), out=tmp_path / "run")
    folder = tmp_path / "run" / "train" / "step-by-step-gold-s0"
    found = events(folder)
    rows = lines(folder / "metrics.jsonl")
    losses = {row["step"]: row for row in rows if "loss" in row}
    validations = {row["step"]: row for row in rows if "eval_accuracy" in row}
    drawn = {
        "train": ("loss", "label_loss", "rationale_loss", "learning_rate", "grad_norm"),
        "speed": ("step_ms", "examples_per_s", "tokens_per_s"),
        "cost": ("peak_memory_mb", "elapsed_s", "tokens", "examples"),
    }
    for group, names in drawn.items():
        for name in names:
            assert curve(found, f"{group}/{name}") == pytest.approx(
                {step: row[name] for step, row in losses.items()}
            ), name
    for name in ("accuracy", "label_loss"):
        assert curve(found, f"valid/{name}") == pytest.approx(
            {step: row[f"eval_{name}"] for step, row in validations.items()}
        )
    assert all(
        row["step_ms"] > 0 and row["tokens_per_s"] > row["examples_per_s"]
        for row in losses.values()
    )
    tags = [tag.partition("/") for tag in found.Tags()["scalars"]]
    assert {name for group, _, name in tags if group == "cost"} == set(drawn["cost"])
    assert not found.Tags()["graph"], "nobody asked for it"


def test_each_validation_shows_the_same_rows_with_the_students_predictions(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    train(
        annotated(*ONLY, "report.tensorboard_samples=2", "task.data.valid_fraction=0.2"),
        out=tmp_path / "run",
    )
    found = texts(tmp_path / "run" / "train" / "step-by-step-gold-s0", "samples/valid")
    assert list(found) == [3, 6]
    shown = [[line.split("|") for line in text.splitlines()[2:]] for text in found.values()]
    assert [[cells[1:3] for cells in rows] for rows in shown] == [
        [cells[1:3] for cells in shown[0]]
    ] * 2
    assert len(shown[0]) == 2 and all(
        cells[2].strip() in ("billing", "shipping") for cells in shown[0]
    )
    assert all("My " in cells[1] and cells[4].strip() for rows in shown for cells in rows)


def test_text_of_data_is_shown_by_tensorboard_as_it_is() -> None:
    from dsbs.formatting import markdown_table
    from dsbs.training.callbacks import _code_block, _escape

    page = markdown_to_safe_html("\n".join(markdown_table(["input"], [[_escape(HOSTILE)]])))
    assert (
        page.count("<td>") == 1
        and "<script" not in page
        and "<a" not in page
        and "<em>" not in page
    )
    assert html.unescape(page.partition("<td>")[2].partition("</td>")[0]) == HOSTILE
    block = markdown_to_safe_html(_code_block(f"name: x\ntext: {HOSTILE}"))
    assert (
        html.unescape(block.partition("<code>")[2].partition("</code>")[0]).strip()
        == f"name: x\ntext: {HOSTILE}"
    )


def test_the_recipe_is_shown_and_the_graph_on_request(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    train(annotated(*ONLY, "report.tensorboard_graph=true"), out=tmp_path / "run")
    folder = tmp_path / "run" / "train" / "step-by-step-gold-s0"
    assert "    rationale_weight: 1.0" in texts(folder, "recipe")[0]
    nodes = [node.name for node in events(folder).Graph().node]
    for part in ("encoder", "decoder", "lm_head"):
        assert any(part in name for name in nodes), part


def test_a_graph_without_tensorboard_is_a_mistake_in_the_recipe(
    annotated: Callable[..., Recipe],
) -> None:
    with pytest.raises(UserError, match=r"report\.tensorboard_graph is for TensorBoard"):
        annotated("report.tensorboard_graph=true")


@pytest.mark.slow
def test_a_killed_training_goes_on_in_the_same_curves_to_the_weights_of_one_without_tensorboard(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    small = [
        "train.methods=step-by-step",
        "train.max_steps=40",
        "train.eval_every=5",
        "train.batch_size=4",
    ]
    recipe = annotated(*small)
    train(recipe, out=tmp_path / "run")
    plain = tmp_path / "run" / "train" / "step-by-step-gold-s0"
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "run" / "annotate").rename(other / "annotate")
    arguments = [
        "train",
        str(tmp_path / "toy.yaml"),
        f"teacher.base_url={recipe.teacher.base_url}",
        *small,
        "report.trackers=[tensorboard]",
        "report.tensorboard_graph=true",
        "--out",
        str(other),
    ]
    folder = other / "train" / "step-by-step-gold-s0"
    process = start_dsbs(*arguments)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (folder / "train.json").exists(), "killed before its end"
    for path in (folder / "tensorboard").iterdir():  # and in the middle of a record
        with path.open("ab") as file:
            file.write(path.read_bytes()[:9])
    again = run_dsbs(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert weights(folder) == weights(plain)
    found = events(folder)
    undisturbed = {row["step"]: row for row in lines(plain / "metrics.jsonl") if "loss" in row}
    assert curve(found, "train/loss") == pytest.approx(
        {step: row["loss"] for step, row in undisturbed.items()}
    )
    assert sorted(curve(found, "valid/accuracy")) == list(range(5, 41, 5))
    assert list(texts(folder, "samples/valid")) == list(range(5, 41, 5)) and list(
        texts(folder, "recipe")
    ) == [0]
    assert any("decoder" in node.name for node in found.Graph().node)


def test_a_training_that_begins_anew_leaves_no_point_of_the_first(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "train" / "step-by-step-gold-s0"
    train(annotated(*ONLY), out=tmp_path / "run")
    (
        folder / "train.json"
    ).unlink()  # killed before its first checkpoint, for all that is left of it
    train(annotated(*ONLY), out=tmp_path / "run")
    assert sorted(curve(events(folder), "train/loss")) == [1, 2, 3, 4, 5, 6]
    assert list(texts(folder, "samples/valid")) == [3, 6] and list(texts(folder, "recipe")) == [0]


def test_without_its_package_the_line_to_install_it_is_named(
    annotated: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        UserError, match=r"(?s)needs the package .*tensorboard.*pip install 'dsbs\[tensorboard\]'"
    ):
        train(annotated(*ONLY), out=tmp_path / "run")
