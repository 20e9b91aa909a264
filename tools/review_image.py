"""Screenshot of the review page: docs/images/review.png from a run with annotations and a student.

    python tools/review_image.py runs/demo [docs/images/review.png]

Needs Chromium and the package playwright (pip install 'dsbs[dev]'; apt-get install chromium).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report_image import find_chromium, opened_tab

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "review.png"
HEIGHT = 600  # CSS pixels


def capture(url: str, image: Path) -> None:
    """Write the page with its first row as a PNG."""
    with opened_tab(image, HEIGHT) as tab:
        tab.goto(url)
        tab.locator("#row .input").wait_for()
        tab.screenshot(path=image)


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    if find_chromium() is None:
        print("Chromium is not installed: apt-get install chromium", file=sys.stderr)
        return 1
    image = Path(arguments[1]) if len(arguments) > 1 else IMAGE
    command = [sys.executable, "-m", "dsbs", "review", arguments[0], "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        if not line:
            return server.wait()  # its message says why
        capture(json.loads(line)["url"], image)
    finally:
        server.terminate()
        server.wait()
    print(image)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
