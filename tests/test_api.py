"""The Python surface: functions stay functions although packages bear their names."""

from __future__ import annotations

import subprocess
import sys


def test_stage_functions_stay_callable_after_their_packages_are_imported() -> None:
    code = (
        "import dsbs\n"
        "from dsbs.annotation.parse import parse_reply\n"
        "from dsbs.config.registry import METHODS\n"
        "import dsbs.reporting.run\n"
        "assert callable(dsbs.annotate) and callable(dsbs.train) and callable(dsbs.report) and callable(dsbs.evaluate)\n"
        "from dsbs import annotate\n"
        "assert annotate is dsbs.annotate\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_importing_dsbs_imports_nothing_heavy() -> None:
    code = "import sys, dsbs\nassert not {'torch', 'transformers', 'openai', 'datasets', 'pydantic', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
