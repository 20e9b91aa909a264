"""The wheel carries prompts, recipes and data, and works outside the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import get_args

import pytest
from conftest import ROOT

from dsbs.project.init import Kind


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(folder),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,) = folder.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    needed = [
        "prompts/svamp.yaml",
        "recipes/demo.yaml",
        "recipes/paper/svamp.yaml",
        "data/support/train.csv",
    ]
    needed += [f"data/templates/{kind}/recipe.yaml" for kind in get_args(Kind)]
    assert not {f"dsbs/_shipped/{path}" for path in needed} - names
    assert {"dsbs/py.typed", "dsbs/reporting/templates/page.html"} <= names
    assert not [name for name in names if name.startswith(("tests/", "runs/"))]
    venv.create(folder / "venv", with_pip=False)
    site = next((folder / "venv" / "lib").glob("python3*")) / "site-packages"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(site),
            str(wheel),
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    here = [p for p in sys.path if p.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(here) + "\n", encoding="utf-8")
    return folder / "venv" / "bin" / "python"


def test_dsbs_works_from_the_wheel_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = subprocess.run(
        [installed, "-E", "-c", "import dsbs; print(dsbs.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert str(ROOT) not in where.stdout, "the wheel's own package is what runs"
    done = subprocess.run(
        [installed, "-E", "-m", "dsbs", "validate", "recipes/demo.yaml", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"]["train"]["rows"] >= 240


def test_a_new_project_is_made_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    for command in (
        ["init", "mine", "--template", "nli"],
        ["validate", "mine/recipe.yaml"],
        ["show", "mine/recipe.yaml"],
    ):
        done = subprocess.run(
            [installed, "-E", "-m", "dsbs", *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    assert {"train.csv", "recipe.schema.json"} <= {
        path.name for path in (tmp_path / "mine").iterdir()
    }
