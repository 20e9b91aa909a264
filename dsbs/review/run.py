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
_SESSION = "session.json"  # port and token of the server that runs or was killed
_OPENER = "open.html"


@dataclass(frozen=True, slots=True)
class PageInfo:
    """A page that is served. ``url`` contains the token, which gives access to the page."""

    url: str
    rows: int
    reviewed: int
    pid: int


def recorded_recipe(run: RunFolder) -> Recipe:
    """The recipe with which a run was annotated. Raises UserError if there is none."""
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

    ``on_ready`` is called once the page can be opened. ``port`` 0 uses the port of the run's
    previous page if it is free, so that the browser finds its unsaved decisions. A server that
    replaces a killed one also uses its token, so that open pages reconnect. Raises UserError, and
    DsbsError if the run already has a review server.
    """
    from dsbs.review.session import ReviewSession
    from dsbs.tasks import make_task

    with needs_extra("review", "dsbs review"):
        from dsbs.review.app import PageKey, make_app
        from dsbs.serving.app import HttpServer

    folder = run.stage("review")
    with run.lock("review"):
        earlier = _read_session(folder / _SESSION)
        listener = _listen(port, earlier.get("port"))
        try:
            rows = load_rows(recipe, run, split, progress=progress)
            bound: int = listener.getsockname()[1]
            token = earlier.get("token") or secrets.token_urlsafe(32)
            session = ReviewSession(
                run, recipe, make_task(recipe.task), split, rows, reviewer, order
            )
            key = PageKey(token, bound)
            url = f"http://{HOST}:{bound}/?token={token}"
            _write_private(folder / _SESSION, json.dumps({"port": bound, "token": token}))

            def announce() -> None:
                reviewed = session.progress()["reviewed"]
                on_ready(PageInfo(url, len(rows), reviewed, os.getpid()))
                if opens_browser:
                    _open_browser(folder / _OPENER, url)

            # Malformed requests are not worth a warning each, and no log has an address.
            logging.getLogger("uvicorn").setLevel(logging.ERROR)
            HttpServer(make_app(session, key), session, announce).run(sockets=[listener])
        finally:
            listener.close()
            (folder / _OPENER).unlink(missing_ok=True)
        _write_private(folder / _SESSION, json.dumps({"port": bound}))
        return session.progress()


def _listen(port: int, earlier: int | None) -> socket.socket:
    if port == 0 and earlier is not None:
        with suppress(UserError):
            return bind(HOST, earlier)
    return bind(HOST, port)


def _read_session(path: Path) -> dict[str, Any]:
    """Port and token of an earlier server; {} unless only this user can read the file."""
    try:
        status = path.stat()
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    is_private = os.name == "nt" or (status.st_uid == os.geteuid() and status.st_mode & 0o077 == 0)
    if not is_private or not isinstance(earlier, dict):
        return {}
    port, token = earlier.get("port"), earlier.get("token")
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
    """Open the page through a private redirect file: other users can see a browser's arguments."""
    content = (
        f'<!doctype html><meta http-equiv="refresh" content="0; url={url}"><title>dsbs</title>'
    )
    _write_private(path, content)
    webbrowser.open(path.resolve().as_uri())
