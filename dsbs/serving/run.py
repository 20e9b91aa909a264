"""`dsbs serve`: a student's folder, an address, and a process that answers until it is told to stop."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

from dsbs.errors import UserError
from dsbs.serving.model import Model
from dsbs.serving.settings import Settings
from dsbs.students import Student


@dataclass(frozen=True, slots=True)
class Ready:
    """A server that answers."""

    url: str
    student: str
    pid: int
    exposed: bool  # beyond this machine, and without a token


def serve(
    path: str,
    settings: Settings,
    ready: Callable[[Ready], None],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_env: str | None = None,
    threads: int | None = None,
) -> None:
    """Serve the student in ``path`` until SIGTERM or SIGINT; ``ready`` is called once it answers.

    ``port`` 0 takes a free one. ``token_env`` names the environment variable of the token. ``threads`` compute; None: one for
    each core, or as OMP_NUM_THREADS says. Raises UserError, and KeyboardInterrupt after a SIGINT.
    """
    try:
        from dsbs.serving.app import Service, make_app
        from dsbs.serving.http import HttpServer
    except ModuleNotFoundError as error:
        raise UserError(
            f"dsbs serve needs {error.name}", hint="pip install 'dsbs[serve]'"
        ) from None
    token = None if token_env is None else _token(token_env)
    bound = _bind(host, port)
    try:
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(
                threads
            )  # what every runtime reads when it is loaded
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(threads)
        model = Model(Student.load(path), settings)
        model.warm()
        address, number = bound.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        exposed = token is None and not loopback
        service = Service(model, settings)
        logging.getLogger("uvicorn").setLevel(
            logging.ERROR
        )  # a client's bad request is the client's news
        server = HttpServer(
            make_app(service, token, local=token is None and loopback),
            service,
            lambda: ready(Ready(f"http://{shown}:{number}", model.name, os.getpid(), exposed)),
        )
        server.run(sockets=[bound])
    finally:
        bound.close()
    if server.interrupted:
        raise KeyboardInterrupt


def _token(variable: str) -> str:
    """Raises UserError, which never shows what was given: it may be the token itself."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise UserError(
            "--token-env: what is given is no name of an environment variable",
            hint="export the token and name the variable here, e.g. --token-env DSBS_TOKEN",
        )
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(
            f"--token-env: {variable} is not set", hint=f"export {variable}=<a long random text>"
        )
    if not token.isascii() or any(character.isspace() for character in token):
        raise UserError(
            f"the token in {variable} has a space or a character that no header holds",
            hint="give letters and digits",
        )
    return token


def _bind(host: str, port: int) -> socket.socket:
    """Bound and not yet listening: clients are let in once the student is there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:  # the latter of a name that no host can have
        said = getattr(error, "strerror", None) or "not the name of a host"
        raise UserError(f"--host {host}: {said}", hint="give an address of this machine") from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(
            f"{host}:{port} cannot be served on ({error.strerror})",
            hint="give another --port; 0 takes a free one",
        ) from None
    return bound
