"""The Python API: lazy re-exports of the stages' functions."""

from __future__ import annotations

import subprocess
import sys


def test_stage_functions_stay_callable_after_their_packages_are_imported() -> None:
    code = (
        "import dsbs\n"
        "from dsbs.annotation.parse import parse_reply\n"
        "from dsbs.config.registry import METHODS\n"
        "import dsbs.reporting.run\n"
        "assert all(map(callable, (dsbs.annotate, dsbs.train, dsbs.report, dsbs.evaluate)))\n"
        "from dsbs import annotate\n"
        "assert annotate is dsbs.annotate\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_importing_dsbs_imports_nothing_heavy() -> None:
    code = (
        "import sys, dsbs\n"
        "heavy = {'torch', 'transformers', 'openai', 'datasets', 'pydantic', 'rich'}\n"
        "assert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
