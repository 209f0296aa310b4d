"""What `loss.objective` can be: each name with its source and what it takes, as its class has them."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from gradcache import OBJECTIVES, InfoNCE, parameters_of

BASE = "info_nce"  # the others of its kind take its parameters, too
WIDTH = 80  # of a terminal that everybody has


def all_objectives() -> dict[str, dict[str, Any]]:
    """Return of each objective what it is, where it comes from, its parameters, and its cost: of InfoNCE's time, on a CPU."""
    return {name: {**_describe(named.make, named.source), "cost": named.cost} for name, named in OBJECTIVES.items()}


def objectives_text(found: dict[str, dict[str, Any]]) -> Text:
    """Return the objectives one below the other, each parameter as a job file has it."""
    return Text("\n").join(line for name, about in found.items() for line in _lines(name, about))


def _lines(name: str, about: dict[str, Any]) -> Iterator[Text]:
    yield Text(f'loss.objective = "{name}"', style="bold")
    yield from map(Text, textwrap.wrap(about["about"], WIDTH))
    cost = "no tile of scores is looked at" if about["cost"] is None else f"{about['cost']:.2f} of InfoNCE's time"
    yield Text(f"{about['source']}; {cost}", style="dim")
    for parameter in about["parameters"]:
        yield Text.assemble("  ", (parameter["name"], "bold cyan"), f" = {parameter['default']}  ", (parameter["type"], "dim"))
        yield from map(Text, textwrap.wrap(parameter["meaning"], WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6))
    if about["takes_those_of"]:
        yield Text(f"  and the parameters of {about['takes_those_of']} that have a meaning here")
    yield Text("")


def _describe(make: Any, source: str) -> dict[str, Any]:
    meanings, known = _meanings(make), parameters_of(make)
    extends = BASE if make is not InfoNCE and issubclass(make, InfoNCE) else None
    shared = parameters_of(InfoNCE) if extends else {}
    return {
        "about": _first_paragraph(make.__doc__),
        "source": source,
        "takes_those_of": extends,
        "parameters": [
            {
                "name": name,
                "type": parameter.words(),
                "default": _as_toml(parameter.default),
                "published": parameter.range.published if parameter.range else "",
                "meaning": meanings.get(name, ""),
            }
            for name, parameter in known.items()
            if name not in shared
        ],
    }


def _as_toml(value: Any) -> str:
    if value is None:
        return "not set"
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else f"{value:g}"


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())


def _meanings(make: type) -> dict[str, str]:
    """Return what stands below each field of a dataclass, or in the docstring of an `__init__` as `name: meaning.`."""
    if not dataclasses.is_dataclass(make):
        words = " ".join((make.__init__.__doc__ or "").split())  # type: ignore[misc]
        names = list(parameters_of(make))
        starts = sorted((words.find(f"{name}: "), name) for name in names)
        ends = [start for start, _ in starts[1:]] + [len(words)] * bool(starts)
        return {name: words[start + len(name) + 2 : end].strip() for (start, name), end in zip(starts, ends, strict=True)}
    found: dict[str, str] = {}
    for of_class in reversed(make.__mro__):
        if dataclasses.is_dataclass(of_class):
            found |= _below_fields(of_class)
    return found


def _below_fields(of_class: type) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(of_class))).body
    assert isinstance(tree, ast.ClassDef), "a class has been parsed"
    pairs = zip(tree.body, tree.body[1:], strict=False)
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }
