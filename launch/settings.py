"""Every setting of a job, with its type, its default and what the code says of it, read from the code itself."""

import ast
import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union

from launch.jobfile import SOURCES, LaunchJob
from launch.tables import Part, Sheet
from mining.job import MineJob
from trainer.errors import InputError
from trainer.handoff.settings import SourceSettings
from trainer.job import TrainJob

WORDS: dict[Any, str] = {str: "text", Path: "path", bool: "true | false", tuple: "list"}


def all_settings(section: str | None) -> dict[str, dict[str, Any]]:
    """Return each section's `about` and `settings`, of one section or of all; raises InputError for an unknown one."""
    fields = {field.name: field for job in (TrainJob, MineJob, LaunchJob) for field in dataclasses.fields(job)}
    if section is not None and section not in fields:
        near = difflib.get_close_matches(section, fields, n=1, cutoff=0.4) or [", ".join(fields)]
        raise InputError(f"there is no section {section}; did you mean {near[0]}?")
    names = fields if section is None else [section]
    return {name: _describe(SourceSettings if name == SOURCES else fields[name].type) for name in names}


def settings_parts(found: dict[str, dict[str, Any]]) -> list[Part]:
    """Return a table for each section."""
    columns = ("key", "type", "default", "")
    rows = {name: [tuple(setting.values()) for setting in about["settings"]] for name, about in found.items()}
    return [Sheet(f"{name}: {about['about']}".removesuffix(": "), columns, rows[name]) for name, about in found.items()]


def _describe(settings: Any) -> dict[str, Any]:
    about = re.sub(r"^Section `[\w.]+`( of a job)?[.:,]? ?", "", " ".join((inspect.getdoc(settings) or "").split()))
    comments, hints = _comments(settings), typing.get_type_hints(settings)
    return {
        "about": about,
        "settings": [
            {
                "key": field.name,
                "type": " | ".join(_types(hints[field.name])),
                "default": _as_toml(field.default),
                "meaning": comments[field.name],
            }
            for field in dataclasses.fields(settings)
        ],
    }


def _comments(settings: Any) -> dict[str, str]:
    """Return the comment of each field: the lines above it, and what stands behind it."""
    lines = inspect.getsource(settings).splitlines()
    (tree,) = ast.parse("\n".join(lines)).body
    found = {}
    for field in getattr(tree, "body", []):
        if isinstance(field, ast.AnnAssign):
            first = field.lineno - 1
            while lines[first - 1].strip().startswith("#"):
                first -= 1
            behind = lines[(field.end_lineno or 0) - 1][field.end_col_offset :]
            words = [line.strip().removeprefix("#").strip() for line in (*lines[first : field.lineno - 1], behind)]
            found[ast.unparse(field.target)] = " ".join(word for word in words if word)
    return found


def _types(hint: Any) -> Iterator[str]:
    """Yield what a value may be, as a job file has it."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        for choice in typing.get_args(hint):
            yield from _types(choice)
    elif origin is Literal:
        yield from (json.dumps(choice) for choice in typing.get_args(hint))
    elif hint is not type(None):
        yield WORDS.get(origin or hint, str(getattr(hint, "__name__", hint)))


def _as_toml(value: Any) -> str:
    """Return a default as a job file would have it; nothing where there is none."""
    return "" if value is None or value is dataclasses.MISSING else json.dumps(value, default=str)
