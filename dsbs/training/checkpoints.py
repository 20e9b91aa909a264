"""Where a training stood when it was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint. One that a kill left half-written has no readable trainer state and is removed."""
    whole = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            whole.append((int(path.name.rpartition("-")[2]), path))
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
    return max(whole)[1] if whole else None
