"""``dsbs doctor``: whether this machine, and a recipe on it, have what a run needs. Nothing is written and nothing bought."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from dsbs.annotation.backends import RejectedError, TransientError
from dsbs.config import EndpointSection, Recipe
from dsbs.config.load import load_recipe
from dsbs.errors import DsbsError
from dsbs.files import find_file
from dsbs.project import machine
from dsbs.project.checks import Check, Status, run
from dsbs.prompting import load_prompt
from dsbs.run_folder import RunFolder
from dsbs.students.card import CARD
from dsbs.students.gguf import gguf_file, is_gguf
from dsbs.tasks import make_task
from dsbs.tasks.data import HUB

ANSWER_S = 5.0  # seconds that an endpoint has to list its models


def examine(
    path: str | None = None, overrides: Sequence[str] = (), out: str | None = None
) -> list[Check]:
    """Every check of the machine and, with ``path``, of that recipe. Raises nothing: what fails is a line."""
    found: list[Check] = []
    recipe = None
    if path is not None:
        try:
            recipe = load_recipe(path, overrides)
        except DsbsError as error:
            found.append(Check("recipe", "problem", error.problem, error.hint))
    folder = Path(out or "runs") if recipe is None else RunFolder.of(recipe, out).path
    found += run("packages", machine.packages)
    found += run("extras", machine.extras)
    found += run("cores", machine.processor)
    found += run(
        "GPU",
        partial(machine.accelerators, recipe is not None and recipe.train.precision == "bf16"),
    )
    found += run("disk", partial(machine.disk, folder))
    found += run("cache", machine.caches)
    if recipe is not None:
        found += run("data", partial(_data, recipe))
        found += run("prompt", partial(_prompt, recipe))
        found += run("extras", partial(_needed_extras, recipe))
        found += run("teacher", partial(_teacher, recipe))
        found += run("student", partial(_student, recipe))
        found += run("train.teachers", partial(_local_teachers, recipe))
    return found


def _data(recipe: Recipe) -> Iterator[Check]:
    """Whether the files that a recipe names are there; `dsbs validate` reads them."""
    data = recipe.task.data
    named = {f"task.data.{split}": getattr(data, split) for split in ("train", "valid", "test")}
    named["teacher.completions"] = (
        recipe.teacher.completions if recipe.teacher.kind == "recorded" else None
    )
    named |= {f"eval.predictions.{name}": file for name, file in recipe.eval.predictions.items()}
    for key, source in named.items():
        if source is None:
            continue
        if source.startswith(HUB):
            yield _from_hub(key, source)
        else:
            yield from run(key, partial(_file, recipe, key, source))


def _file(recipe: Recipe, key: str, source: str) -> Iterator[Check]:
    path = find_file(
        source,
        what="file",
        hint=f"check {key}; paths are read from here or beside the recipe",
        beside=recipe.folder,
    )
    yield Check(key, "ok", f"{path}, {path.stat().st_size / 1e6:.2f} MB")
    beside = (recipe.folder or Path()) / source
    if beside.is_file() and not path.samefile(beside):
        hint = "run the commands in the recipe's folder, or rename one of the two"
        yield Check(key, "warning", f"{path} is read, and not {beside} beside the recipe", hint)


def _prompt(recipe: Recipe) -> Iterator[Check]:
    if not recipe.teacher.is_prompted:
        return
    prompt = load_prompt(recipe, make_task(recipe.task))
    yield Check(
        "prompt",
        "ok",
        f"{recipe.annotate.prompt or 'the task has its own'}, {len(prompt.exemplars)} exemplars",
    )


def _needed_extras(recipe: Recipe) -> Iterator[Check]:
    needed = {
        "local": recipe.teacher.kind == "llamacpp",
        "lora": recipe.train.lora is not None,
        "gguf": recipe.student.model is not None
        and not recipe.train.init
        and is_gguf(recipe.student.model),
        "ray": recipe.annotate.engine == "ray",
        "tensorboard": recipe.report.tensorboard,
    }
    for extra, wanted in needed.items():
        if wanted and not machine.has_extra(extra):
            use = machine.EXTRAS[extra][1]
            yield Check(
                f"extra {extra}", "problem", f"the recipe has {use}", f"pip install 'dsbs[{extra}]'"
            )


def _teacher(recipe: Recipe) -> Iterator[Check]:
    teacher = recipe.teacher
    if teacher.kind == "openai":
        for endpoint in teacher.served_by:
            yield from run(endpoint.base_url, partial(_endpoint, recipe, endpoint))
    elif teacher.kind == "llamacpp":
        yield Check("teacher", "ok", str(gguf_file(str(teacher.model), recipe.folder)))
    elif teacher.kind == "transformers":
        yield _model("teacher.model", str(teacher.model))
    elif teacher.kind == "ensemble":
        from dsbs.annotation.backends.ensemble import read_members

        for member in read_members(recipe):
            status: Status = "ok" if member.status == "done" else "warning"
            hint = (
                None
                if status == "ok"
                else f"rows without a reply have no vote; run `dsbs annotate` for {member.run} again"
            )
            yield Check(
                "teacher",
                status,
                f"{member.run}: {member.model}, weight {member.weight:g}, {member.status}",
                hint,
            )


def _endpoint(recipe: Recipe, endpoint: EndpointSection) -> Iterator[Check]:
    """The key, the address, and the model among those that the endpoint lists."""
    from dsbs.annotation.backends.openai import OpenAIEndpoint, api_key

    name, model = endpoint.base_url, str(recipe.teacher.model)
    key = api_key(recipe.teacher, endpoint)
    yield Check("key", "ok", f"{endpoint.api_key_env} is set" if key else "none is sent")
    client = OpenAIEndpoint(recipe.teacher, endpoint, key, name)
    check_url = "check teacher.base_url and the network, or start the server"
    try:
        listed = asyncio.run(client.models(ANSWER_S))
    except TransientError as error:
        heals = error.kind in ("throttled", "server error")
        hint = "try again later" if heals else check_url
        yield Check(name, "warning" if heals else "problem", str(error), hint)
        return
    except RejectedError as error:
        yield Check(name, "warning", f"answers, but lists no models ({error})", check_url)
        return
    if listed is None:
        hint = "see that teacher.base_url ends where /chat/completions begins (often /v1)"
        yield Check(name, "warning", f"answers, but has no list at {name}/models", hint)
        return
    yield Check(name, "ok", f"answers, and lists {len(listed)} models")
    same = {one for one in listed if one in (model, f"{model}:latest") or one.endswith(f"/{model}")}
    if same:
        yield Check("teacher.model", "ok", f"{model} is among them")
        return
    near = difflib.get_close_matches(model, listed, n=3, cutoff=0.4) or listed[:3]
    hint = (
        f"the nearest are {', '.join(near)}; a name of your own for a deployment is seldom listed"
        if near
        else check_url
    )
    yield Check("teacher.model", "warning", f"{model} is not among those that {name} lists", hint)


def _student(recipe: Recipe) -> Iterator[Check]:
    start = recipe.train.init
    if start is not None:
        is_there = Path(start).expanduser().is_dir()
        yield Check(
            "train.init",
            "ok" if is_there else "problem",
            start,
            None if is_there else "there is no such folder",
        )
    elif recipe.student.source is not None:
        yield _model("student.model", recipe.student.source)
    else:
        yield Check("student", "ok", f"from scratch, {recipe.student.size}")


def _local_teachers(recipe: Recipe) -> Iterator[Check]:
    for place, one in enumerate(recipe.train.teachers):
        key = f"train.teachers.{place}"
        if one.model is not None:
            is_there = (Path(one.model).expanduser() / CARD).is_file()
            hint = None if is_there else f"give the folder of a trained student, which has a {CARD}"
            yield Check(f"{key}.model", "ok" if is_there else "problem", one.model, hint)
        elif one.start is not None:
            yield _model(f"{key}.start", one.start)
        else:
            yield Check(key, "ok", f"trained first, from scratch, {one.size}")


def _model(key: str, name: str) -> Check:
    """Whether a Hub model or a local one can be loaded without a network."""
    if is_gguf(name):
        return Check(key, "ok", str(gguf_file(name)))
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return Check(key, "ok", f"{name}, a folder")
        return Check(
            key,
            "problem",
            f"the folder {name} has no config.json",
            "give the folder of a saved model",
        )
    try:
        is_cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return Check(
            key, "problem", f"{name} is neither a folder nor a name on the Hub", "check the path"
        )
    if is_cached:
        return Check(key, "ok", f"{name}, in the Hub's cache")
    if constants.HF_HUB_OFFLINE:
        hint = "unset HF_HUB_OFFLINE, or download it elsewhere and give its folder"
        return Check(
            key, "problem", f"{name} is not in the Hub's cache, and HF_HUB_OFFLINE is set", hint
        )
    return Check(key, "ok", f"{name}, which will be downloaded from the Hub")


def _from_hub(key: str, source: str) -> Check:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        hint = "unset HF_HUB_OFFLINE, or download the rows and give their path"
        return Check(
            key,
            "warning",
            f"{source} is found only where it is cached: HF_HUB_OFFLINE is set",
            hint,
        )
    return Check(key, "ok", f"{source}, loaded when it is needed")
