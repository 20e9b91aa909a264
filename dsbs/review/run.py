"""Review: serve the page of a run on this machine until a signal stops it."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbs.config import Recipe
from dsbs.config.load import read_recorded
from dsbs.errors import UserError, needs_extra
from dsbs.progress import Progress
from dsbs.review.queue import Order, load_rows
from dsbs.run_folder import RunFolder
from dsbs.serving.run import bind

HOST = "127.0.0.1"
_SESSION = "session.json"  # of the server that runs, or was killed: its port and token
_OPENER = "open.html"


@dataclass(frozen=True, slots=True)
class PageInfo:
    """A page that is served. ``url`` has the token: whoever knows it may decide."""

    url: str
    rows: int
    reviewed: int
    pid: int


def recorded_recipe(run: RunFolder) -> Recipe:
    """The recipe of a run's annotation. Raises UserError where there is none."""
    recipe = read_recorded(run.manifest("annotate")) if run.path.is_dir() else None
    if recipe is None:
        raise UserError(
            f"{run.path} is neither a recipe nor a run folder with annotations",
            hint="give a run folder such as runs/demo after `dsbs annotate`, or the recipe",
        )
    return recipe


def review(
    recipe: Recipe,
    run: RunFolder,
    on_ready: Callable[[PageInfo], None],
    *,
    reviewer: str,
    split: str = "train",
    port: int = 0,
    order: Order = "mistakes",
    progress: Progress | None = None,
    opens_browser: bool = False,
) -> dict[str, Any]:
    """Serve the page on 127.0.0.1 until SIGTERM or SIGINT. Returns its progress.

    ``on_ready`` is called once the page can be opened. ``port`` 0 takes that of the run's earlier
    page if it is free, so that a browser finds what it keeps. A server that takes the place of one
    that was killed also takes its token: open pages go on. Raises UserError, and DsbsError where
    the run is being reviewed already.
    """
    from dsbs.review.desk import Desk
    from dsbs.tasks import make_task

    with needs_extra("review", "dsbs review"):
        from dsbs.review.app import PageKey, make_app
        from dsbs.serving.app import HttpServer

    folder = run.stage("review")
    with run.lock("review"):
        session = _read_session(folder / _SESSION)
        listener = _listen(port, session.get("port"))
        try:
            rows = load_rows(recipe, run, split, progress=progress)
            bound: int = listener.getsockname()[1]
            token = session.get("token") or secrets.token_urlsafe(32)
            desk = Desk(run, recipe, make_task(recipe.task), split, rows, reviewer, order)
            key = PageKey(token, bound)
            url = f"http://{HOST}:{bound}/?token={token}"
            _write_private(folder / _SESSION, json.dumps({"port": bound, "token": token}))

            def announce() -> None:
                reviewed = desk.progress()["reviewed"]
                on_ready(PageInfo(url, len(rows), reviewed, os.getpid()))
                if opens_browser:
                    _open_browser(folder / _OPENER, url)

            # Malformed requests are not worth a warning each, and no log has an address.
            logging.getLogger("uvicorn").setLevel(logging.ERROR)
            HttpServer(make_app(desk, key), desk, announce).run(sockets=[listener])
        finally:
            listener.close()
            (folder / _OPENER).unlink(missing_ok=True)
        _write_private(folder / _SESSION, json.dumps({"port": bound}))
        return desk.progress()


def _listen(port: int, earlier: int | None) -> socket.socket:
    if port == 0 and earlier is not None:
        with suppress(UserError):
            return bind(HOST, earlier)
    return bind(HOST, port)


def _read_session(path: Path) -> dict[str, Any]:
    """The port and the token of an earlier server; {} unless the file is this user's alone."""
    try:
        status = path.stat()
        session = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    is_private = os.name == "nt" or (status.st_uid == os.geteuid() and status.st_mode & 0o077 == 0)
    if not is_private or not isinstance(session, dict):
        return {}
    port, token = session.get("port"), session.get("token")
    valid: dict[str, Any] = {}
    if isinstance(port, int) and 0 < port < 65536:
        valid["port"] = port
    if isinstance(token, str) and len(token) >= 32 and token.isascii():
        valid["token"] = token
    return valid


def _write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read, atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)


def _open_browser(path: Path, url: str) -> None:
    """Open the page by a private file that leads to it: other users see a browser's arguments."""
    content = (
        f'<!doctype html><meta http-equiv="refresh" content="0; url={url}"><title>dsbs</title>'
    )
    _write_private(path, content)
    webbrowser.open(path.resolve().as_uri())
