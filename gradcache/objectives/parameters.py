"""An objective by its name and its parameters, as a job file has them: what it takes, and a plain word where it does not fit."""

import difflib
import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from gradcache.objectives.tile import Objective

EMPTY = inspect.Parameter.empty


@dataclass(frozen=True)
class Range:
    """What a number may be, and which one was published."""

    least: float
    most: float
    published: str = ""

    def words(self) -> str:
        """Return the range for a person."""
        return f"{self.least:g} to {self.most:g}" + (f" ({self.published})" if self.published else "")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """What an objective takes."""

    name: str
    kinds: tuple[type, ...]  # of its values
    choices: tuple[str, ...]  # its only values, if it has such
    range: Range | None
    default: Any  # EMPTY: it has to be given

    def words(self) -> str:
        """Return what is expected, for a person."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        numbers = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        kind = next(word for kind, word in numbers.items() if kind in self.kinds)
        return kind + (f" from {self.range.words()}" if self.range else "")


def parameters_of(make: Callable[..., Objective]) -> dict[str, Parameter]:
    """Return what an objective's class, or a function that returns one, takes by name."""
    called = make.__init__ if isinstance(make, type) else make  # type: ignore[misc]
    hints = get_type_hints(called, include_extras=True)
    signature = inspect.signature(make)
    return {
        name: _parameter(name, hints.get(name, Any), parameter.default)
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }


def make_objective(make: Callable[..., Objective], name: str, given: Mapping[str, Any]) -> Objective:
    """Return an objective. Raises ValueError, in words for a person, for parameters that do not fit."""
    known = parameters_of(make)
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            words = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise ValueError(f"the objective {name} has no parameter {key!r}; {words}")
        _check(name, known[key], value)
    missing = [key for key, parameter in known.items() if parameter.default is EMPTY and key not in given]
    if missing:
        raise ValueError(f"the objective {name} needs a parameter {missing[0]!r}: {known[missing[0]].words()}")
    try:
        made = make(**{key: float(value) if known[key].kinds == (float,) else value for key, value in given.items()})
    except ValueError as error:
        raise ValueError(f"the objective {name}: {error}") from error
    if not isinstance(made, Objective):
        raise ValueError(f"{name} makes a {type(made).__name__}; expected a gradcache.Objective")
    return made


def load(path: str) -> Callable[..., Objective]:
    """Return what `module:name` names, from the working folder if it is nowhere else on Python's path.

    Raises ValueError, in words for a person, where there is nothing of that name.
    """
    module, _, name = path.partition(":")
    sys.path.append(os.getcwd())  # last, so that no file of the folder stands for a package
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(
            f"{path!r}: the module {module} cannot be imported ({error}); expected it in the working folder or on Python's path"
        ) from error
    except AttributeError:
        raise ValueError(f"{path!r}: the module {module} has no {name!r}") from None
    finally:
        sys.path.pop()
    if not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}; expected a class, or a function that returns an objective")
    return found


def _parameter(name: str, hint: Any, default: Any) -> Parameter:
    span, choices, kinds = None, (), []
    for part in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if get_origin(part) is Annotated:
            part, *extras = get_args(part)
            span = next((extra for extra in extras if isinstance(extra, Range)), None)
        if get_origin(part) is Literal:
            choices, part = get_args(part), str
        kinds.append(part)
    kinds = [kind for kind in kinds if kind is not type(None)]
    return Parameter(name=name, kinds=tuple(kinds), choices=choices, range=span, default=default)


def _check(name: str, parameter: Parameter, value: Any) -> None:
    kinds = (*parameter.kinds, int) if float in parameter.kinds else parameter.kinds
    fits = Any in kinds or (isinstance(value, kinds) and isinstance(value, bool) == (bool in kinds))
    if fits and parameter.choices:
        fits = value in parameter.choices
    if fits and parameter.range is not None:
        fits = parameter.range.least <= value <= parameter.range.most
    if not fits:
        raise ValueError(f"the objective {name} has {parameter.name}={value!r}; expected {parameter.words()}")
