"""Commands in processes of their own that need not import torch and transformers again.

Importing them takes longer than most commands that the tests run. A server imports them once for
each pytest process; every command then runs in a fork of that server, with arguments, folder,
environment, input and output of its own. It can be killed or told to stop like any process.

A test of what happens as Python starts or ends, or of what is imported, needs a real
``python -m dsbs``: see ``run_python`` in conftest.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "transformers.trainer_seq2seq",
        "transformers.models.t5.modeling_t5",
        "transformers.models.t5.tokenization_t5",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "scipy.stats",
        "matplotlib.figure",
        "matplotlib.backends.backend_svg",
        "jinja2",
        "aiohttp",
        "rich.table",
        "uvicorn",
        "fastapi",
        "sklearn.linear_model",
        "cleanlab.filter",
        "cleanlab.rank",
        "dsbs.cli",
        "dsbs.annotation.run",
        "dsbs.training.run",
        "dsbs.evaluation.run",
        "dsbs.reporting.run",
        "dsbs.compression.run",
        "dsbs.exporting.run",
        "dsbs.review.run",
        "dsbs.students.student",
    ]
)
DSBS = "-m dsbs"


class Forked:
    """A running command; ``wait``, ``poll`` and the like are those of subprocess.Popen.

    ``command`` begins with DSBS or with the path of a script. Output goes to files, so that no
    one needs to read it for the command to go on.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        input: str = "",
    ) -> None:
        self.args = list(command)
        self._files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
        self._files[0].write(input.encode())
        self._files[0].seek(0)
        self._process = _SERVER.Process(
            target=_run,
            args=(
                self.args,
                str(cwd or Path.cwd()),
                dict(os.environ if env is None else env),
                [DupFd(file.fileno()) for file in self._files],
            ),
        )
        self._process.start()
        atexit.register(self.kill)  # pytest would wait for what a failed test left running

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        """What the command has written so far."""
        return self._read(1)

    @property
    def stderr(self) -> str:
        return self._read(2)

    def _read(self, number: int) -> str:
        # The command's file position is this one too: reading must not move it.
        descriptor = self._files[number].fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0, self.stdout, self.stderr)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Everything it wrote, once it has ended."""
        self.wait(timeout)
        return self.stdout, self.stderr

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def completed(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Wait for the end, as ``subprocess.run`` does."""
        try:
            self.wait(timeout)
        finally:
            self.kill()
        return subprocess.CompletedProcess(self.args, self.wait(), self.stdout, self.stderr)


def _run(command: list[str], cwd: str, env: dict[str, str], files: list[Any]) -> None:
    for number, file in enumerate(files):
        descriptor = file.detach()
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    os.chdir(cwd)
    gc.freeze()  # what was imported stays: collecting garbage need not look at it
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    if command[0] == DSBS:
        sys.path.insert(0, cwd)
        sys.argv = ["dsbs", *command[1:]]
        runpy.run_module("dsbs", run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(command[0]).parent))
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")
