"""``dsbs train``: train the recipe's students."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from dsbs.cli.common import (
    DryRun,
    Json,
    Out,
    Overrides,
    RecipePath,
    SetKeys,
    load,
    print_json,
    print_train_plan,
    print_train_result,
    progress,
)

if TYPE_CHECKING:
    pass


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    set_keys: SetKeys = None,
    out: Out = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Train every student of the recipe; finished ones are kept, an interrupted one continues."""
    from dsbs.training import run as stage
    from dsbs.training.distributed import destroy_process_group, is_main_process

    loaded = load(recipe, overrides, set_keys)
    if dry_run:
        lines = stage.planned(loaded, out)
        if as_json:
            print_json({"students": lines})
        else:
            print_train_plan(lines)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers send it, like Ctrl-C
    result = stage.train(loaded, out=out, progress=progress())
    destroy_process_group()
    if not is_main_process():
        return
    if as_json:
        print_json(result.as_json())
    else:
        print_train_result(result)
