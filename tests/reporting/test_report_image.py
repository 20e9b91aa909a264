"""The screenshot of a report page for the documentation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from sample_run import make_run

from dsbs.reporting.run import report_runs


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = ROOT / "tools" / "report_image.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_top_of_a_page_becomes_a_png(tool: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if tool.find_chromium() is None:
        pytest.skip("Chromium is not installed")
    run = make_run(tmp_path / "run", rows=6, subsets=(1.0,), seeds=(0,))
    report_runs([run])
    image = tmp_path / "images" / "report.png"
    assert tool.main([str(run), str(image)]) == 0
    header = image.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width = int.from_bytes(header[16:20], "big")
    height = int.from_bytes(header[20:24], "big")
    assert width == tool.WIDTH * tool.PIXEL_RATIO
    assert 0 < height <= tool.MAX_HEIGHT * tool.PIXEL_RATIO


def test_a_run_without_a_report_is_refused(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(tmp_path)]) == 2
    assert "run `dsbs report` first" in capsys.readouterr().err
