"""``dsbs validate``: check a recipe against its data without a model or a request."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from dsbs.cli.common import Json, Overrides, RecipePath, SetKeys, load, print_json, shown_prompt
from dsbs.formatting import count, percent


def validate(
    recipe: RecipePath,
    overrides: Overrides = None,
    set_keys: SetKeys = None,
    as_json: Json = False,
) -> None:
    """Check the recipe and its data; show the first prompt, truncation and unknown tokens.

    Loads no model and sends no request.
    """
    from dsbs.project.validate import validate as run

    result = run(load(recipe, overrides, set_keys))
    if as_json:
        print_json(result.as_json())
        return
    for name, split in result.splits.items():
        rows = f"{name}: {count(split['rows'], 'row')}, {split['with_gold']} with gold"
        print(rows + _listing(split.get("labels", {})))
        if "labels_per_row" in split:
            print(f"  {split['labels_per_row']:.1f} labels a row")
        for field, values in split.get("fields", {}).items():
            filled = f"  {field}: {percent(values['filled'])} filled"
            print(filled + _listing(values.get("labels", {})))
        lengths = split.get("students", {"": split})
        for student, texts in itertools.product(lengths, ("inputs", "targets")):
            figures = lengths[student][texts]
            if figures:
                title = f"{student}, {texts}".removeprefix(", ")
                print(
                    f"  {title}: median {figures['median']} tokens, longest {figures['longest']}; "
                    f"{percent(figures['truncated'])} truncated, "
                    f"{100 * figures['unknown']:.2f}% unknown tokens"
                )
    if result.first_prompt is not None:
        print("\nThe first prompt:")
        print(shown_prompt(result.first_prompt))
    print()
    for warning in result.warnings:
        print(f"warning: {warning}")
    closing = "The recipe is valid."
    if result.warnings:
        closing = "The recipe is valid; see the warnings."
    print(closing)


def _listing(numbers: Mapping[str, int]) -> str:
    listing = ", ".join(f"{label} {number}" for label, number in numbers.items())
    return f" ({listing})" if listing else ""
