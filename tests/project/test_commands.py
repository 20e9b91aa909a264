"""What all commands share: help that reads well, and no torch where none is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer
from conftest import run_dsbs

from dsbs.cli import app

COMMANDS = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_help_of_every_command_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom dsbs.cli import app\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        app([name, '--help'])\n"
        "    except SystemExit as end:\n        assert not end.code, name\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'matplotlib'}\n"
        "    assert not heavy & set(sys.modules), name\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMANDS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(COMMANDS) and {
        "init",
        "ls",
        "show",
        "doctor",
        "schema",
    } <= set(COMMANDS)


def test_looking_around_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['dsbs', *sys.argv[1:]]\nfrom dsbs.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    for arguments in (["init", "a"], ["schema"], ["show", "recipes/demo.yaml"], ["doctor"], ["ls"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)


def test_help_names_the_exit_code_of_the_gates(tmp_path: Path) -> None:
    done = run_dsbs("eval", "--help", cwd=tmp_path)
    assert (
        "--min-accuracy" in done.stdout
        and "--min-delta" in done.stdout
        and "code 4" in " ".join(done.stdout.split())
    )
