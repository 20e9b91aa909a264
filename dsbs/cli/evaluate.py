"""``dsbs eval``: predict, score, and compare all systems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dsbs.cli.common import (
    Json,
    Out,
    Overrides,
    RecipePath,
    SetKeys,
    load,
    print_json,
    print_results,
    progress,
)
from dsbs.errors import GateError

if TYPE_CHECKING:
    pass

MinAccuracy = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="X",
        help="Exit with code 4 if the headline system's accuracy is below X, e.g. 0.8.",
        show_default=False,
    ),
]
MinDelta = Annotated[
    float | None,
    typer.Option(
        min=-1,
        max=1,
        metavar="Y",
        help="Exit with code 4 if its accuracy minus its first baseline's is below Y, e.g. -0.01.",
        show_default=False,
    ),
]
MinCoverage = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="Z",
        help="Exit with code 4 if the headline student can answer less than Z of the requests "
        "(eval.cascade).",
        show_default=False,
    ),
]
ScoreOnly = Annotated[
    bool,
    typer.Option("--score-only", help="Load no model: rescore the existing prediction files."),
]


def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    set_keys: SetKeys = None,
    out: Out = None,
    as_json: Json = False,
    score_only: ScoreOnly = False,
    min_accuracy: MinAccuracy = None,
    min_delta: MinDelta = None,
    min_coverage: MinCoverage = None,
) -> None:
    """Predict with every student, score all systems in the same way, compare them with baselines.

    eval.predictions.NAME=FILE adds external predictions: rows with id and prediction.
    """
    from dsbs.evaluation.run import evaluate as run
    from dsbs.records.gates import gate_failures

    results = run(
        load(recipe, overrides, set_keys), out=out, progress=progress(), score_only=score_only
    )
    if as_json:
        print_json(results.as_json())
    else:
        print_results(results)
    failures = gate_failures(results, min_accuracy, min_delta, min_coverage)
    if failures:
        raise GateError(
            "\n  ".join(failures),
            hint="compare the systems' predictions; all results were written",
        )
