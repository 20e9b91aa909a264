"""Trackers: the runs that mlflow, wandb and trackio get, by fakes of the calls that transformers
makes; TensorBoard is in test_board.py.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer
from loopback import LoopbackServer

from dsbs import UserError, annotate, load_recipe, train
from dsbs.config import Recipe
from dsbs.config.load import read_recorded

FAKES = {
    "wandb": """
        from types import SimpleNamespace
        calls, run, config = [], None, {}
        class Config(dict):
            def update(self, values, **_): super().update(values)
        class Run(SimpleNamespace):
            def _label(self, **_): pass
        def init(project, name=None, **_):
            global run, config
            import wandb
            wandb.run = Run(summary={}, id="1", name=name)
            wandb.config = Config()
            calls.append(("init", project, name, wandb.config))
        def log(values): calls.append(("log", values))
        def finish(*_):
            import wandb
            wandb.run = None
            calls.append(("finish",))
        def watch(*_, **__): pass
    """,
    "wandb/sdk/lib/config_util": "class ConfigError(Exception): pass",
    "wandb/sdk/lib": "",
    "wandb/sdk": "",
    "mlflow": """
        import os
        from types import SimpleNamespace
        __version__ = "3.0"
        calls = []
        utils = SimpleNamespace(validation=SimpleNamespace(
            MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100))
        active = None
        def active_run(): return active
        def is_tracking_uri_set(): return True
        def get_tracking_uri(): return "file:///nowhere"
        def set_experiment(name): calls.append(("experiment", name))
        def start_run(run_name=None, nested=False):
            global active
            active = SimpleNamespace(info=SimpleNamespace(run_id="1"))
            calls.append(("init", run_name))
        def end_run():
            global active
            active = None
            calls.append(("finish",))
        def log_params(values, **_): calls.append(("config", values))
        def log_metrics(metrics, step, **_): calls.append(("log", metrics, step))
    """,
    "trackio": """
        from types import SimpleNamespace
        __version__ = "0.30"
        calls, config = [], {}
        class Variable:
            value = None
            def get(self): return self.value
        context_vars = SimpleNamespace(
            current_run=Variable(), current_space_id=Variable(), current_project=Variable())
        class Config(dict):
            def update(self, values, **_): super().update(values)
        def init(project, name=None, **_):
            import trackio
            trackio.config = Config()
            context_vars.current_run.value = name
            calls.append(("init", project, name, trackio.config))
        def log(values): calls.append(("log", values))
        def finish():
            assert context_vars.current_run.value
            context_vars.current_run.value = None
            calls.append(("finish",))
    """,
}


@pytest.fixture
def annotated(toy: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Recipe]]:
    """A toy run whose teacher has answered; returns recipes on the same run folder."""
    with LoopbackServer(good_answer) as server:
        path = toy()
        base = [f"teacher.base_url={server.url}"]
        annotate(load_recipe(path, base), out=tmp_path / "run")
        yield lambda *overrides: load_recipe(path, [*base, *overrides])


@pytest.fixture
def trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages with the calls that transformers makes, which remember them."""
    packages = tmp_path / "packages"
    for name, code in FAKES.items():
        (packages / name).mkdir(parents=True, exist_ok=True)
        (packages / name / "__init__.py").write_text(textwrap.dedent(code), encoding="utf-8")
    monkeypatch.syspath_prepend(packages)
    yield
    for module in list(sys.modules):
        if module.partition(".")[0] in FAKES:
            del sys.modules[module]


def calls_of(name: str, kind: str) -> list[tuple[Any, ...]]:
    return [call[1:] for call in sys.modules[name].calls if call[0] == kind]


@pytest.mark.usefixtures("trackers")
def test_each_student_is_one_run_of_every_tracker_and_the_recipe_stays_here(
    annotated: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSBS_TEST_KEY", "sk-not-for-trackers")
    recipe = annotated(
        "train.methods=[step-by-step, finetune]",
        "report.trackers=[mlflow, wandb, trackio]",
        "teacher.api_key_env=DSBS_TEST_KEY",
    )
    train(recipe, out=tmp_path / "run")
    names = ["step-by-step-gold-s0", "finetune-gold-s0"]
    path = tmp_path / "run" / "train" / names[0] / "metrics.jsonl"
    metrics = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses = [row["label_loss"] for row in metrics if "label_loss" in row]
    for tracker in ("mlflow", "wandb", "trackio"):
        assert len(calls_of(tracker, "finish")) == len(names), tracker
        text = repr(sys.modules[tracker].calls)
        for secret in ("sk-not-for-trackers", "DSBS_TEST_KEY", str(recipe.teacher.base_url)):
            assert secret not in text
    assert calls_of("mlflow", "experiment") == [("toy",)] * 2
    assert calls_of("mlflow", "init") == [(name,) for name in names]
    for tracker in ("wandb", "trackio"):
        assert [call[:2] for call in calls_of(tracker, "init")] == [("toy", name) for name in names]
        assert calls_of(tracker, "init")[0][2]["learning_rate"] == 0.001
        logged = [values["train/label_loss"] for (values,) in calls_of(tracker, "log")
                  if "train/label_loss" in values]  # fmt: skip
        assert logged[: len(losses)] == pytest.approx(losses)
        assert any("eval/accuracy" in values for (values,) in calls_of(tracker, "log"))
    assert "WANDB_PROJECT" not in os.environ
    assert not list((tmp_path / "run").rglob("tensorboard"))


@pytest.mark.usefixtures("trackers")
def test_a_failed_training_ends_its_runs_and_leaves_those_of_others(
    annotated: Callable[..., Recipe],
) -> None:
    import mlflow
    import trackio
    import wandb

    from dsbs.training.callbacks import tracked

    recipe = annotated("report.trackers=[mlflow, wandb, trackio]")
    mlflow.start_run("of the notebook")
    with pytest.raises(ZeroDivisionError), tracked(recipe):
        wandb.init("toy")
        trackio.init("toy", "student")
        raise ZeroDivisionError
    assert wandb.run is None and trackio.context_vars.current_run.get() is None
    assert mlflow.active_run() is not None


@pytest.mark.parametrize("tracker", ["mlflow", "wandb", "trackio"])
def test_a_tracker_without_its_package_is_named_before_anything_is_trained(
    annotated: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tracker: str,
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    recipe = annotated(f"report.trackers={tracker}")
    with pytest.raises(UserError, match=rf"pip install 'dsbs\[{tracker}\]'"):
        train(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run" / "train").exists()


def test_the_key_of_earlier_versions_says_what_replaced_it(
    annotated: Callable[..., Recipe],
) -> None:
    with pytest.raises(UserError, match=r"report\.tensorboard: replaced by report\.trackers"):
        annotated("report.tensorboard=true")
    recorded = annotated().model_dump(mode="json")
    del recorded["report"]["trackers"]
    recorded["report"] |= {"tensorboard": True, "tensorboard_graph": True}
    recipe = read_recorded({"recipe": recorded})
    assert recipe is not None and recipe.report.trackers == ("tensorboard",)
