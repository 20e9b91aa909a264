"""Checks for ``dsbs doctor``: this machine, and a recipe's data, prompt, teacher and models.

Nothing is written, and no paid request is sent.
"""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any

from dsbs.annotation.backends import (
    RejectedError,
    TransientError,
    make_teacher,
    teacher_class,
)
from dsbs.config import EndpointSection, Recipe, StudentSection
from dsbs.config.load import load_recipe
from dsbs.errors import DsbsError
from dsbs.files import expand_user, find_file
from dsbs.project import machine
from dsbs.project.machine import Check, run_check
from dsbs.prompting import load_prompt
from dsbs.run_folder import RunFolder
from dsbs.students.card import CARD
from dsbs.students.weights import expand_local, gguf_file, is_gguf
from dsbs.tasks import make_task
from dsbs.tasks.tables import HUB

_FIRST_TIMESTAMP = 10**9  # smaller numbers are no dates in seconds
LIST_TIMEOUT_S = 5.0  # for an endpoint to list its models


def examine(
    path: str | None = None, overrides: Sequence[str] = (), out: str | None = None
) -> list[Check]:
    """All checks of the machine and, with ``path``, of that recipe. Failures are results too."""
    results: list[Check] = []
    recipe = None
    if path is not None:
        try:
            recipe = load_recipe(path, overrides)
        except DsbsError as error:
            results.append(Check("recipe", "problem", error.problem, error.hint))
    folder = Path(out or "runs")
    needs_bf16 = False
    if recipe is not None:
        folder = RunFolder.of(recipe, out).path
        needs_bf16 = any(student.train.precision == "bf16" for student in recipe.students.values())
    results += run_check("packages", machine.packages)
    results += run_check("extras", machine.extras)
    results += run_check("cores", machine.processor)
    results += run_check("GPU", partial(machine.accelerators, needs_bf16))
    results += run_check("disk", partial(machine.disk, folder))
    results += run_check("cache", machine.caches)
    if recipe is not None:
        results += run_check("data", partial(_data, recipe))
        results += run_check("prompt", partial(_prompt, recipe))
        results += run_check("extras", partial(_needed_extras, recipe))
        results += run_check("teacher", partial(_teacher, recipe))
        results += run_check("student", partial(_students, recipe))
        results += run_check("train.teachers", partial(_local_teachers, recipe))
    return results


def _data(recipe: Recipe) -> Iterator[Check]:
    """Whether the recipe's data files exist; `dsbs validate` reads them."""
    data = recipe.task.data
    sources = {f"task.data.{split}": getattr(data, split) for split in ("train", "valid", "test")}
    if recipe.teacher.kind == "recorded":
        sources["teacher.completions"] = recipe.teacher.completions
    for name, file in recipe.eval.predictions.items():
        sources[f"eval.predictions.{name}"] = file
    for key, source in sources.items():
        if source is None:
            continue
        if source.startswith(HUB):
            yield _from_hub(key, source)
        else:
            yield from run_check(key, partial(_file, recipe, key, source))


def _file(recipe: Recipe, key: str, source: str) -> Iterator[Check]:
    path = find_file(
        source,
        what="file",
        hint=f"check {key}; paths are relative to this folder or to the recipe's",
        folder=recipe.folder,
    )
    yield Check(key, "ok", f"{path}, {path.stat().st_size / 1e6:.2f} MB")
    hidden = (recipe.folder or Path()) / source
    if hidden.is_file() and not path.samefile(hidden):
        message = f"{path} is used instead of {hidden} beside the recipe"
        hint = "run the commands in the recipe's folder, or rename one of the files"
        yield Check(key, "warning", message, hint)


def _prompt(recipe: Recipe) -> Iterator[Check]:
    if not recipe.teacher.is_prompted:
        return
    prompt = load_prompt(recipe, make_task(recipe.task))
    name = recipe.annotate.prompt or "the task's own"
    yield Check("prompt", "ok", f"{name}, {len(prompt.exemplars)} exemplars")


def _needed_extras(recipe: Recipe) -> Iterator[Check]:
    students = recipe.students.values()
    sources = [student.student.model for student in students if not student.train.init]
    needs = {
        "lora": any(student.train.lora is not None for student in students),
        "gguf": any(model is not None and is_gguf(model) for model in sources),
        "ray": recipe.annotate.engine == "ray",
    }
    needs |= dict.fromkeys(recipe.report.trackers, True)
    teacher_extra = teacher_class(recipe.teacher.kind).extra
    if teacher_extra is not None:
        needs[teacher_extra] = True
    for extra, is_needed in needs.items():
        if is_needed and not machine.has_extra(extra):
            _, use = machine.EXTRAS[extra]
            message = f"the recipe uses {use}"
            yield Check(f"extra {extra}", "problem", message, f"pip install 'dsbs[{extra}]'")


def _teacher(recipe: Recipe) -> Iterator[Check]:
    teacher = recipe.teacher
    if teacher.kind == "openai":
        for endpoint in teacher.served_by:
            yield from run_check(endpoint.base_url, partial(_endpoint, recipe, endpoint))
    elif teacher.kind == "llamacpp":
        yield Check("teacher", "ok", str(gguf_file(str(teacher.model), recipe.folder)))
    elif teacher.kind == "transformers":
        yield _model("teacher.model", str(teacher.model))
    elif teacher.kind == "ensemble":
        yield from _members(recipe)


def _members(recipe: Recipe) -> Iterator[Check]:
    for member in make_teacher(recipe).manifest_entries()["members"]:
        run = member["run"]
        message = f"{run}: {member['model']}, weight {member['weight']:g}, {member['status']}"
        if member["status"] == "done":
            yield Check("teacher", "ok", message)
        else:
            hint = f"rows without a reply do not vote; run `dsbs annotate` for {run} again"
            yield Check("teacher", "warning", message, hint)


def _endpoint(recipe: Recipe, endpoint: EndpointSection) -> Iterator[Check]:
    """The key, the address, and whether the endpoint lists the model."""
    from dsbs.annotation.backends.openai import OpenAIEndpoint, api_key

    url = endpoint.base_url
    key = api_key(recipe.teacher, endpoint)
    yield Check("key", "ok", f"{endpoint.api_key_env} is set" if key else "no key is sent")
    client = OpenAIEndpoint(recipe.teacher, endpoint, key, url)
    check_url = "check teacher.base_url and the network, or start the server"
    try:
        models = asyncio.run(client.models(LIST_TIMEOUT_S))
    except TransientError as error:
        if error.kind in ("throttled", "server error"):
            yield Check(url, "warning", str(error), "try again later")
        else:
            yield Check(url, "problem", str(error), check_url)
        return
    except RejectedError as error:
        yield Check(url, "warning", f"answers, but lists no models ({error})", check_url)
        return
    if models is None:
        hint = "check that teacher.base_url ends before /chat/completions (often with /v1)"
        yield Check(url, "warning", f"answers, but has no list at {url}/models", hint)
        return
    yield Check(url, "ok", f"answers, and lists {len(models)} models")
    yield _listed(str(recipe.teacher.model), models, url, check_url)


def _listed(model: str, models: Sequence[dict[str, Any]], url: str, check_url: str) -> Check:
    """Whether an endpoint's list has the model, and until when: servers add a tag or a folder to
    names.
    """
    names = [str(entry["id"]) for entry in models]
    for name, entry in zip(names, models, strict=True):
        if name in (model, f"{model}:latest") or name.endswith(f"/{model}"):
            return _lifetime(model, entry)
    hint = check_url
    nearest = difflib.get_close_matches(model, names, n=3, cutoff=0.4) or names[:3]
    if nearest:
        hint = (
            f"the nearest names are {', '.join(nearest)}; "
            "a deployment with its own name is often not listed"
        )
    return Check("teacher.model", "warning", f"{url} does not list {model}", hint)


def _lifetime(model: str, entry: dict[str, Any]) -> Check:
    """A warning if a model's entry has a shutdown date."""
    end = shutdown_date(entry)
    if end is None:
        return Check("teacher.model", "ok", f"{model} is listed")
    verb = "ends" if end >= datetime.now(UTC).date() else "ended"
    successor = entry.get("deprecation_replacement_model")
    hint = "choose its successor before you annotate: a new teacher is asked for all rows again"
    if isinstance(successor, str) and successor:
        hint = f"its successor is {successor}; a new teacher is asked for all rows again"
    message = f"{model} {verb} on {end:%Y-%m-%d}, as its endpoint says"
    return Check("teacher.model", "warning", message, hint)


_END = re.compile(r"shut_?down|deprecat|retire|expir|sunset|end_of_life|eol", re.IGNORECASE)


def shutdown_date(entry: dict[str, Any]) -> date | None:
    """The shutdown date in a model's entry; None: there is none.

    OpenAI has ``shutdown_date`` (https://developers.openai.com/api/docs/deprecations), Mistral
    ``deprecation``, OpenRouter ``expiration_date``, Azure ``deprecation.inference``.
    """
    for name, value in entry.items():
        if not _END.search(name):
            continue
        end = value.get("inference") if isinstance(value, dict) else value
        try:
            if isinstance(end, str):
                return date.fromisoformat(end[:10])
            if isinstance(end, int) and end > _FIRST_TIMESTAMP:
                return datetime.fromtimestamp(end, UTC).date()
        except (ValueError, OverflowError, OSError):
            continue
    return None


def _students(recipe: Recipe) -> Iterator[Check]:
    for name, student in recipe.students.items():
        section = "student" if name is None else f"student.{name}"
        start = student.train.init
        if start is None:
            yield _start(section, student.student)
            continue
        key = "train.init"
        if name is not None:
            key = f"{section}.train.init"
        if expand_user(start).is_dir():
            yield Check(key, "ok", start)
        else:
            yield Check(key, "problem", start, "this folder does not exist")


def _start(key: str, section: StudentSection) -> Check:
    """Whether a student's model exists."""
    if section.source is None:
        return Check(key, "ok", f"from scratch, {section.size}")
    return _model(f"{key}.model", section.source)


def _local_teachers(recipe: Recipe) -> Iterator[Check]:
    for index, teacher in enumerate(recipe.train.teachers):
        key = f"train.teachers.{index}"
        if teacher.model is not None:
            if (expand_user(teacher.model) / CARD).is_file():
                yield Check(f"{key}.model", "ok", teacher.model)
            else:
                hint = f"give the folder of a trained student, which has a {CARD}"
                yield Check(f"{key}.model", "problem", teacher.model, hint)
        elif teacher.start is not None:
            yield _model(f"{key}.start", teacher.start)
        else:
            yield Check(key, "ok", f"trained first, from scratch, {teacher.size}")


def _model(key: str, name: str) -> Check:
    """Whether a Hub model or a local one can be loaded without a network."""
    if is_gguf(name):
        return Check(key, "ok", str(gguf_file(name)))
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = expand_user(expand_local(name))  # raises UserError for a missing package
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return Check(key, "ok", f"{name}, a folder")
        message = f"the folder {name} has no config.json"
        return Check(key, "problem", message, "give the folder of a saved model")
    try:
        is_cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        message = f"{name} is neither a folder nor the name of a Hub model"
        return Check(key, "problem", message, "check the path")
    if is_cached:
        return Check(key, "ok", f"{name}, in the Hub's cache")
    if constants.HF_HUB_OFFLINE:
        message = f"{name} is not in the Hub's cache, and HF_HUB_OFFLINE is set"
        hint = "unset HF_HUB_OFFLINE, or download it elsewhere and give its folder"
        return Check(key, "problem", message, hint)
    return Check(key, "ok", f"{name}, to be downloaded from the Hub")


def _from_hub(key: str, source: str) -> Check:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        message = f"{source} can be loaded only if it is cached: HF_HUB_OFFLINE is set"
        hint = "unset HF_HUB_OFFLINE, or download the rows and give their path"
        return Check(key, "warning", message, hint)
    return Check(key, "ok", f"{source}, loaded when needed")
