"""Templates: Jinja in a sandbox, with a row's fields and nothing else; an unknown field is an
error.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsbs.errors import UserError

_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True
)


@lru_cache(maxsize=256)
def _compiled(source: str, where: str) -> Template:
    try:
        return _ENVIRONMENT.from_string(source)
    except TemplateError as error:
        raise UserError(
            f"{where}: not a valid template ({error})", hint="fields are written {{ field }}"
        ) from None


def render(source: str, fields: Mapping[str, Any], *, where: str) -> str:
    """Render ``source`` over ``fields``. The fields' own text is never read as a template. Raises
    UserError.
    """
    try:
        return _compiled(source, where).render(fields)
    except UndefinedError as error:
        raise UserError(
            f"{where}: {error.message}",
            hint=f"the fields here are: {', '.join(sorted(fields)) or 'none'}",
        ) from None
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{where}: the template failed ({error})", hint="simplify the template"
        ) from None


def fields_of(source: str, *, where: str) -> set[str]:
    """Names of the fields that a template uses."""
    _compiled(source, where)
    return set(meta.find_undeclared_variables(_ENVIRONMENT.parse(source)))
