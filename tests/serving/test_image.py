"""The image `serve` of the Dockerfile: its packages serve an export, without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from encoder_models import save_label_head
from exporting.tiny_t5 import make_student, texts

from dsbs.exporting.run import export

# Serves one request with what the packages in argv[2:] need, and nothing else.
SERVE = """
import json, sys
from importlib import metadata
from packaging.requirements import Requirement

def names(package, seen):
    key = package.lower().replace("_", "-")
    if key in seen:
        return
    seen.add(key)
    try:
        requirements = map(Requirement, metadata.requires(package) or ())
    except metadata.PackageNotFoundError:
        return
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            names(requirement.name, seen)

allowed = {"dsbs"}
for package in sys.argv[2:]:
    names(package, allowed)
owners = metadata.packages_distributions()

class OnlyThose:
    def find_spec(self, name, path=None, target=None):
        owner = {o.lower().replace("_", "-") for o in owners.get(name.partition(".")[0], ())}
        if owner and not owner & allowed:
            raise ModuleNotFoundError(f"{name} is not in the image", name=name)

for name in [n for n in sys.modules if n.partition(".")[0] == "packaging"]:
    del sys.modules[name]
sys.meta_path.insert(0, OnlyThose())

import dsbs.cli
from dsbs.serving.app import make_app
from dsbs.serving.model import Model
from dsbs.serving.settings import Settings
from dsbs.students.student import Student

student = Student.load(sys.argv[1])
Model(student, Settings()).warm_up()
print(student.predict(["My parcel"])[0].raw)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.mark.parametrize("head", ["text", "labels"])
@pytest.mark.parametrize("form", ["ct2", "onnx"])
def test_an_export_is_served_with_the_packages_of_the_image(
    tmp_path: Path, form: str, head: str
) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    target = dockerfile.partition("AS serve\n")[2].partition("\nFROM")[0]
    packages = re.findall(r"^ +'([a-z0-9-]+)[^']*' \\$", target, re.MULTILINE)
    assert {"fastapi", "uvicorn", "ctranslate2", "onnxruntime"} < set(packages)
    if head == "labels":
        student = save_label_head(tmp_path, num_hidden_layers=1)
    else:
        student = make_student(tmp_path)
    exported = export(student, form, examples=texts(3))
    ended = subprocess.run(
        [sys.executable, "-c", SERVE, str(exported.path), *packages],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()
