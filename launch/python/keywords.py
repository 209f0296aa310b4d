"""Settings of a job as keyword arguments: a section as a dictionary, `optim={"lr": 2e-5}`, or a key, `**{"optim.lr": 2e-5}`.

They become the same overrides as the words of a command line, and are checked by the same code.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from launch.jobfile import SECTIONS, SOURCES, LaunchJob
from launch.options import SHORT, Short
from mining.job import MineJob
from trainer.errors import InputError
from trainer.job import TrainJob

Pair = tuple[str, Any]
ARGUMENTS = {"model": "model.name", "data": "data.path"}  # sections that are arguments, too, and what these stand for


def overrides_of(settings: Mapping[str, object], **arguments: object) -> list[Pair]:
    """Return settings as overrides; raises InputError for what is no setting, or is given twice.

    arguments: model and data, where they are sections or names; None: not given.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    pairs = [(name, _plain(value)) for name, value in _pairs(settings)]
    for name, value in given.items():
        section = value if isinstance(value, Mapping) else {ARGUMENTS[name].split(".")[1]: value}
        pairs += [(f"{name}.{key}", _plain(each)) for key, each in section.items()]
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{twice} is given twice; leave one of them out")
    return pairs


def reading_overrides(settings: Mapping[str, object], options: Mapping[str, Short] = SHORT) -> list[Pair]:
    """Return the same for a model that is there; options of the commands, as `query_prefix="query: "`, are settings, too."""
    for name in settings:
        if name in options and options[name].setting in settings:
            raise InputError(f"{name} is the setting {options[name].setting}, which is given as well; leave one of them out")
    return overrides_of({options[name].setting if name in options else name: value for name, value in settings.items()})


def _pairs(settings: Mapping[str, object]) -> Iterator[Pair]:
    for name, value in settings.items():
        if "." in name:
            yield name, value
        elif name not in SECTIONS or not isinstance(value, Mapping):
            raise InputError(_no_section(name, value))
        elif name == SOURCES:
            yield from ((f"{name}.{source}.{key}", each) for source, keys in value.items() for key, each in dict(keys).items())
        else:
            yield from ((f"{name}.{key}", each) for key, each in value.items())


def _no_section(name: str, value: object) -> str:
    """Return the sentence for a keyword that is no section: one of its name, or one that has such a key."""
    if name in SECTIONS:
        return f"{name}={value!r} is no section; give its settings as a dictionary: {name}={{...}}"
    parts = [part for job in (TrainJob, MineJob, LaunchJob) for part in dataclasses.fields(job)]
    having = sorted({part.name for part in parts if name in getattr(part.type, "__dataclass_fields__", ())})
    if having:
        meant = " or ".join(f'{section}={{"{name}": {value!r}}}' for section in having)
        return f"{name}={value!r} is a setting without its section; write {meant}"
    near = difflib.get_close_matches(name, SECTIONS, n=1) or [", ".join(SECTIONS)]
    return f"{name} is no section of a job; did you mean {near[0]}?"


def _plain(value: Any) -> Any:
    """Return a value without numpy's types, which TOML does not hold."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.item() if hasattr(value, "item") and hasattr(value, "dtype") else value
