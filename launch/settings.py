"""Every setting of a job, with its type, its default and its description, as its section has them."""

import dataclasses
import difflib
import inspect
import json
import re
import typing
from typing import Any

from launch.jobfile import SOURCES, LaunchJob
from launch.tables import Part, Sheet
from mining.job import MineJob
from trainer.errors import InputError
from trainer.handoff.settings import SourceSettings
from trainer.job import TrainJob
from trainer.ranges import descriptions, in_words


def all_settings(section: str | None) -> dict[str, dict[str, Any]]:
    """Return each section's `about` and `settings`, of one section or of all; raises InputError for an unknown one."""
    fields = {field.name: field for job in (TrainJob, MineJob, LaunchJob) for field in dataclasses.fields(job)}
    if section is not None and section not in fields:
        near = difflib.get_close_matches(section, fields, n=1, cutoff=0.7) or [", ".join(fields)]
        raise InputError(f"there is no section {section}; did you mean {near[0]}?")
    names = fields if section is None else [section]
    return {name: _describe(SourceSettings if name == SOURCES else fields[name].type) for name in names}


def settings_parts(found: dict[str, dict[str, Any]]) -> list[Part]:
    """Return a table for each section."""
    columns = ("key", "type", "default", "")
    rows = {name: [tuple(setting.values()) for setting in about["settings"]] for name, about in found.items()}
    return [Sheet(f"{name}: {about['about']}".removesuffix(": "), columns, rows[name]) for name, about in found.items()]


def section_parts() -> list[Part]:
    """Return what the sections of a job file are about, as a table, and where their settings are listed."""
    rows = [(name, about["about"], ", ".join(s["key"] for s in about["settings"])) for name, about in all_settings(None).items()]
    return [Sheet("sections of JOB.toml", ("", "about", "settings"), rows), "negpool settings SECTION says more of each."]


def _describe(settings: Any) -> dict[str, Any]:
    about = re.sub(r"^Section `[\w.]+`( of a job)?[.:,]? ?", "", " ".join((inspect.getdoc(settings) or "").split()))
    hints, meanings = typing.get_type_hints(settings, include_extras=True), descriptions(settings)
    return {
        "about": about,
        "settings": [
            {
                "key": field.name,
                "type": in_words(hints[field.name]),
                "default": _as_toml(field.default),
                "meaning": meanings[field.name],
            }
            for field in dataclasses.fields(settings)
        ],
    }


def _as_toml(value: Any) -> str:
    """Return a default as a job file would have it; nothing where there is none."""
    return "" if value is None or value is dataclasses.MISSING else json.dumps(value, default=str)
