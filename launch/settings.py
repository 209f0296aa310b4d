"""Every setting of a job, with its type, its default and its description, as its section has them."""

import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from launch.jobfile import SOURCES, LaunchJob, nearest
from mining.job import MineJob
from trainer.errors import InputError
from trainer.handoff.settings import SourceSettings
from trainer.job import TrainJob
from trainer.ranges import descriptions, in_words

NOT_SET, REQUIRED = "not set", "required"  # in the place of a default that TOML has no word for
WIDTH, TYPE_COLUMN = 80, 36  # of a terminal that everybody has; where types begin


def all_settings(section: str | None) -> dict[str, dict[str, Any]]:
    """Return each section's `about` and `settings`, of one section or of all; raises InputError for an unknown one."""
    fields = {field.name: field for job in (TrainJob, MineJob, LaunchJob) for field in dataclasses.fields(job)}
    if section is not None and section not in fields:
        raise InputError(f"there is no section {section}; {nearest(section, tuple(fields))}")
    names = fields if section is None else [section]
    return {name: _describe(SourceSettings if name == SOURCES else fields[name].type) for name in names}


def settings_text(found: dict[str, dict[str, Any]]) -> Text:
    """Return the sections one below the other, each setting as a job file has it, with its type and its description."""
    return Text("\n").join(line for name, about in found.items() for line in _section_lines(name, about))


def section_text() -> Text:
    """Return what the sections of a job file are about, one a line, and where their settings are listed."""
    rows = [f"  {name:<12}{_first_sentence(about['about'])}" for name, about in all_settings(None).items()]
    last = "negpool settings SECTION lists what each of them can set."
    return Text("\n").join([Text("Sections of JOB.toml", style="bold"), *map(Text, rows), Text(last)])


def _section_lines(name: str, about: dict[str, Any]) -> Iterator[Text]:
    title = f"[{SOURCES}.NAME]" if name == SOURCES else f"[{name}]"
    yield Text(title, style="bold")
    yield from map(Text, textwrap.wrap(_capital(about["about"]), WIDTH))
    yield Text("")
    for setting in about["settings"]:
        value = f" ({setting['default']})" if setting["default"] in (NOT_SET, REQUIRED) else f" = {setting['default']}"
        shown = Text.assemble("  ", (setting["key"], "bold cyan"), value)
        if TYPE_COLUMN + len(setting["type"]) > WIDTH or shown.cell_len > TYPE_COLUMN - 2:
            yield shown
            yield from (Text(line, style="dim") for line in _indented(setting["type"]))
        else:
            yield Text.assemble(shown, " " * (TYPE_COLUMN - shown.cell_len), (setting["type"], "dim"))
        yield from map(Text, _indented(setting["meaning"]))
    yield Text("")


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _first_sentence(about: str) -> str:
    return textwrap.shorten(_capital(re.split(r"(?<=[^.])\. |: |; ", about)[0].rstrip(".")), WIDTH - 14, placeholder=" …")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _describe(settings: Any) -> dict[str, Any]:
    about = re.sub(r"^Section `[\w.]+`( of a job)?[.:,]? ?", "", " ".join((inspect.getdoc(settings) or "").split()))
    hints, meanings = typing.get_type_hints(settings, include_extras=True), descriptions(settings)
    return {
        "about": _without_none(about),
        "settings": [
            {
                "key": field.name,
                "type": in_words(hints[field.name]),
                "default": _as_toml(field),
                "meaning": _without_none(meanings[field.name]),
            }
            for field in dataclasses.fields(settings)
        ],
    }


def _as_toml(field: dataclasses.Field) -> str:
    """Return a default as a job file would have it, or why there is none."""
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return REQUIRED
        value = field.default_factory()
    return NOT_SET if value is None else json.dumps(value, default=str)


def _without_none(text: str) -> str:
    """Return a description in the words of TOML, which leaves a key out where Python says None."""
    return re.sub(r"\bNone\b", "not set", re.sub(r"(^|(?<=[.:] ))None\b", "Not set", text))
