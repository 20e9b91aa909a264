"""Screenshot of a report page: docs/images/report.png from a run's report.html.

    python tools/report_image.py runs/demo [docs/images/report.png]

Needs Chromium and the package playwright (pip install 'dsbs[dev]'; apt-get install chromium).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "report.png"
WIDTH = 1100  # CSS pixels; wide enough for the table of systems
MAX_HEIGHT = 2000
PIXEL_RATIO = 1.5  # keeps text sharp on dense screens
MARGIN = 24  # below the last section that fits
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium() -> str | None:
    """The path of an installed Chromium; None if there is none."""
    paths = (shutil.which(program) for program in PROGRAMS)
    return next((path for path in paths if path is not None), None)


@contextmanager
def opened_tab(image: Path, height: int) -> Iterator[Any]:
    """A tab of the browser, for a screenshot that is written to ``image``."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    image.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=flags)
        yield browser.new_page(
            viewport={"width": WIDTH, "height": height}, device_scale_factor=PIXEL_RATIO
        )
        browser.close()


def capture(page: Path, image: Path) -> None:
    """Write the top of a report page as a PNG, cut below the last section that fits."""
    with opened_tab(image, MAX_HEIGHT) as tab:
        tab.goto(page.resolve().as_uri())
        ends = tab.locator("main > section").evaluate_all(
            "(sections) => sections.map((section) => section.getBoundingClientRect().bottom)"
        )
        height = max((end for end in ends if end + MARGIN <= MAX_HEIGHT), default=MAX_HEIGHT)
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": min(MAX_HEIGHT, height + MARGIN)}
        tab.screenshot(path=image, clip=clip)


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    page = Path(arguments[0])
    if page.is_dir():
        page /= "report.html"
    if not page.is_file():
        print(f"{page} does not exist: run `dsbs report` first", file=sys.stderr)
        return 2
    if find_chromium() is None:
        print("Chromium is not installed: apt-get install chromium", file=sys.stderr)
        return 1
    image = Path(arguments[1]) if len(arguments) > 1 else IMAGE
    capture(page, image)
    print(image)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
