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


def _printable(value: Any) -> Any:
    """Refuse to print a list or an object, which would come out in Python's spelling."""
    if isinstance(value, list | tuple | dict):
        kind = "an object" if isinstance(value, dict) else "a list"
        raise UserError(
            f"the template prints {kind} ({value!r:.60})",
            hint="write its parts, e.g. {{ field | join(', ') }} or {{ field | tojson }}",
        )
    return value


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=_printable
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
    except UserError as error:
        raise UserError(f"{where}: {error.problem}", hint=error.hint) from None
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
