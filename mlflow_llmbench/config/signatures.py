"""Signatures of functions that take measurement parameters, as seen by `help`, `inspect` and completion in notebooks.

Type checkers and editors read the typed dictionaries of `parameter_types`, which are generated from the declarations.
"""

from __future__ import annotations

import functools
import inspect
import os
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar, cast, get_type_hints

from ..records.cell import PARAMETERS
from ..records.errors import UsageError
from ..records.parameter import PANELS

F = TypeVar("F", bound=Callable[..., Any])


def with_parameters(kind: type[Any], names: tuple[str, ...]) -> Callable[[F], F]:
    """Return a decorator for a function that ends in `**parameters`: its signature gets each of them by name.

    `kind` is the typed dictionary that has their types. Its docstring gets their meanings. Raises UsageError, when the
    function is called, for a value without a name.
    """

    def decorate(function: F) -> F:
        plain = inspect.signature(function)
        own = [one for one in plain.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        [replaced] = plain.parameters.keys() - {one.name for one in own}
        del function.__annotations__[replaced]  # `Unpack`, which Python 3.10 does not have
        types, told = get_type_hints(kind), get_type_hints(function)
        hints = {name: types[name] for name in names} | told
        given = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=shown_default(name), annotation=hints[name])
            for name in names
        ]
        own = [one.replace(annotation=hints[one.name]) for one in own]

        @functools.wraps(function)
        def by_name(*positional: object, **given: object) -> Any:
            if positional:
                raise UsageError(_advice(function.__name__, positional[0], names))
            return function(**given)

        changed = cast(Any, by_name)
        changed.__signature__ = inspect.Signature([*given, *own], return_annotation=hints["return"])
        changed.__annotations__ = hints
        changed.__doc__ = f"{inspect.getdoc(function)}\n\n{_meanings(names)}"
        return cast(F, by_name)

    return decorate


def _advice(function: str, value: object, names: tuple[str, ...]) -> str:
    """Return the message for a value without a name, which is a model or an address in most cases."""
    name = "url" if "url" in names and "://" in str(value) else "model"
    text = f'"{value}"' if isinstance(value, str | os.PathLike) else "..."
    return f"{function} takes parameters by name only: {text}. Write {function}({name}={text})."


def shown_default(name: str) -> object:
    """Return the default of a parameter as a signature shows it: the word `auto`, or None for none."""
    declared = PARAMETERS[name]
    return "auto" if declared.default is None and declared.metadata["unset"] == "auto" else declared.default


def _meanings(names: tuple[str, ...]) -> str:
    """Return the parameters with their meanings, panel by panel. † marks those that take a list."""
    panels: dict[str, list[str]] = {panel: [] for panel in PANELS}
    for name in names:
        about = PARAMETERS[name].metadata
        text = f"{name}{' †' if about['sweep'] else ''}: {about['help']}"
        panels[about["panel"]].append(textwrap.fill(text, 116, initial_indent=" " * 4, subsequent_indent=" " * 8))
    told = [f"{PANELS[panel]}:\n" + "\n".join(lines) for panel, lines in panels.items() if lines]
    return "\n\n".join(["Parameters (those with † take a list, which makes a sweep):", *told])
