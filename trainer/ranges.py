"""What a setting may be: ranges as types, which are checked when a job is read, and their names for people.

A section of a job is a class under `job_section`. What stands in it is said once: a type with its range, a default, and below it
a description, from which `negpool settings` and `--help` are made.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, Union

import pydantic.dataclasses
from annotated_types import BaseMetadata, GroupedMetadata, Interval
from pydantic import ConfigDict

T = TypeVar("T")

Share = Annotated[float, Interval(ge=0, le=1)]
Rate = Annotated[float, Interval(ge=0, lt=1)]  # of dropout, or of an average: one would leave nothing
Precision = Literal["fp32", "bf16", "fp16"]  # of products; the one vocabulary of all sections
AUTO: Final = "auto"  # of a precision: what suits the device, see trainer/encoder/auto.py

WORDS: dict[Any, str] = {int: "whole number", float: "number", str: "text", Path: "path", bool: "true | false"}
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@typing.dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def job_section(cls: type[T]) -> type[T]:
    """Make a class a section of a job: frozen, named arguments only, types and ranges checked whoever makes one.

    A wrong value is pydantic's ValidationError; what contradicts another setting is the InputError of its __post_init__.
    """
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    return pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)  # type: ignore[return-value]


def descriptions(settings: Any) -> dict[str, str]:
    """Return the description of each setting of a section, by its name."""
    return {name: " ".join((field.description or "").split()) for name, field in settings.__pydantic_fields__.items()}


def in_words(hint: Any) -> str:
    """Return what a type takes, as a person reads it: `whole number > 0 | "auto"`."""
    return " | ".join(_choices(hint))


def _choices(hint: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = " and ".join(_bounds(arguments[1:]))
        yield f"{in_words(arguments[0])} {bounds}".strip()
    elif origin in (Union, types.UnionType):
        for choice in arguments:
            yield from _choices(choice)
    elif origin is Literal:
        yield from (json.dumps(choice) for choice in arguments)
    elif origin is tuple:
        items = ", ".join("…" if item is ... else in_words(item) for item in arguments)
        yield f"[{items}]"
    elif origin is dict:
        yield f"{{name = {in_words(arguments[1])}, …}}"
    elif dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        yield "{" + ", ".join(f"{name} = {in_words(value)}" for name, value in hints.items()) + "}"
    elif hint is not type(None):
        yield WORDS.get(hint, str(getattr(hint, "__name__", hint)))


def _bounds(metadata: Any) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, GroupedMetadata):
            yield from _bounds(item)
        elif isinstance(item, BaseMetadata):
            yield from (f"{sign} {getattr(item, name)}" for name, sign in SIGNS.items() if hasattr(item, name))
