"""Serving: load a student, bind an address and answer requests until a signal stops it."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

from dsbs.errors import UserError, needs_extra
from dsbs.serving.cascade import Cascade
from dsbs.serving.model import Model
from dsbs.serving.settings import Settings
from dsbs.students.student import Student


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server that accepts requests."""

    url: str
    student: str
    pid: int
    is_exposed: bool  # reachable from other machines, without a token


def serve(
    path: str,
    settings: Settings,
    on_ready: Callable[[ServerInfo], None],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_env: str | None = None,
    threads: int | None = None,
    cascade: Cascade | None = None,
) -> None:
    """Serve the student in ``path`` until SIGTERM or SIGINT.

    ``on_ready`` is called once the server accepts requests. ``port`` 0 takes a free one.
    ``token_env`` names the environment variable that holds the token. ``threads`` is the number of
    threads of the model; None: OMP_NUM_THREADS, or one per core. ``cascade`` has the teacher of
    the rows that the student is not sure of. Raises UserError, and KeyboardInterrupt after a
    SIGINT.
    """
    with needs_extra("serve", "dsbs serve"):
        from dsbs.serving.app import HttpServer, Service, make_app
    token = None if token_env is None else _read_token(token_env)
    listener = bind(host, port)
    try:
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # every runtime reads it when loaded
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(threads)
        threshold = None if cascade is None else cascade.threshold
        finds_novel = cascade is not None and cascade.settings.asks_novel
        model = Model(Student.load(path), settings, threshold, finds_novel=finds_novel)
        model.warm_up()
        address, bound_port = listener.getsockname()[:2]
        url_host = f"[{address}]" if ":" in address else address
        is_loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        info = ServerInfo(
            url=f"http://{url_host}:{bound_port}",
            student=model.name,
            pid=os.getpid(),
            is_exposed=token is None and not is_loopback,
        )
        service = Service(model, settings, cascade)
        # Malformed requests are the clients' errors; uvicorn would log each as a warning.
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        app = make_app(service, token, local=token is None and is_loopback)
        server = HttpServer(app, service, lambda: on_ready(info))
        server.run(sockets=[listener])
    finally:
        listener.close()
    if server.interrupted:
        raise KeyboardInterrupt


def _read_token(variable: str) -> str:
    """Raises UserError, which never shows ``variable``: a user may have passed the token itself."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise UserError(
            "--token-env: not a valid environment variable name",
            hint="export the token and name the variable here, e.g. --token-env DSBS_TOKEN",
        )
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(
            f"--token-env: {variable} is not set",
            hint=f"export {variable}=<a long random text>",
        )
    if not token.isascii() or any(character.isspace() for character in token):
        raise UserError(
            f"the token in {variable} contains a space or a character that is not allowed in a "
            "header",
            hint="use letters and digits",
        )
    return token


def bind(host: str, port: int) -> socket.socket:
    """Bind without listening: clients connect once the student is loaded. Raises UserError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        problem = getattr(error, "strerror", None) or "not a valid host name"
        raise UserError(
            f"--host {host}: {problem}", hint="give an address of this machine"
        ) from None
    # Windows would let a second server take the address of one that listens.
    option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
    listener.setsockopt(socket.SOL_SOCKET, option, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror})",
            hint="give another --port; 0 takes a free one",
        ) from None
    return listener
