"""Job files: TOML with the sections of TrainJob, MineJob and LaunchSettings, and overrides from the command line.

A key that no section knows is refused with the nearest one that exists; a value of the wrong type is refused by name.
"""

import dataclasses
import difflib
import json
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import tomli_w

from launch.presets import apply_preset
from launch.shares import LaunchSettings
from mining.job import MineJob
from trainer.errors import InputError
from trainer.job import TrainJob
from trainer.ranges import AUTO, in_words, job_section

Job = TypeVar("Job")
# Where and by how many something is made, not what.
HOW = {("data", "cache"), ("data", "num_proc"), ("encode", "device"), ("run", "trackers")}
SOURCES = "sources"  # the one section of sections, [sources.NAME]
TABLE = "parameters"  # a setting that has keys of its own
Override = str | tuple[str, Any]  # section.key=value, as the command line has it, or name and value, as Python has them
CALLED = {  # what other trainers' arguments are called here
    "learning_rate": "optim.lr",
    "num_train_epochs": "optim.epochs",
    "max_steps": "optim.steps",
    "warmup_ratio": "optim.warmup_share",
    "batch_size": "batch.queries",
    "per_device_train_batch_size": "batch.queries",
    "mini_batch_size": "chunk.tokens",
    "train_group_size": "negatives.per_query",
    "max_seq_length": "model.max_passage_tokens",
    "query_max_len": "model.max_query_tokens",
    "passage_max_len": "model.max_passage_tokens",
    "model_name_or_path": "model.name",
    "output_dir": "run.folder",
    "save_steps": "checkpoint.every_steps",
    "eval_steps": "eval.every_steps",
}
SHORT_NAME = 3  # letters: one wrong letter is much of such a name, as in optim.le
MAY_CHANGE = {"launch", "mine", "parallel", "chunk", "checkpoint", "eval", "profile"}  # sections, from start to start


@job_section
class LaunchJob:
    """The sections that only `negpool run` reads."""

    launch: LaunchSettings = dataclasses.field(default_factory=LaunchSettings)


# Each once: both sides read some of them.
SECTIONS = tuple(dict.fromkeys(field.name for job in (TrainJob, MineJob, LaunchJob) for field in dataclasses.fields(job)))


@dataclass(frozen=True)
class Jobs:
    """One job file as each side sees it."""

    train: TrainJob
    mine: MineJob
    launch: LaunchSettings
    # section.key of what the file or an override sets: how a job was told, not what it is
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)  # of what a preset has set
    remarks: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # where the job differs from its preset

    def resolved(self) -> dict[str, Any]:
        """Return every section with every value, defaults included, as TOML can hold it."""
        sections = dataclasses.asdict(self.train) | dataclasses.asdict(self.mine)
        return _plain(sections | {"launch": dataclasses.asdict(self.launch)})


def read_job(path: Path | None, overrides: Sequence[Override], backend: str | None = None) -> Jobs:
    """Return the jobs of a file, or of no file, with overrides applied; raises InputError.

    backend: what the launcher's own configuration asks for; the job may say the same or nothing.
    """
    from_python = bool(overrides) and not any(isinstance(override, str) for override in overrides)
    where = path or Path("the arguments" if from_python else "the command line")
    table = {} if path is None else read_toml(path, "job file", "launch/jobs/ has examples")
    for override in overrides:
        _apply(table, override)
    if "\\u0000" in json.dumps(table, default=str):
        raise InputError(f"{where} has a value with a NUL character in it, which no path and no text holds")
    _refuse_unknown_sections(table, where)
    if table.get(SOURCES) and any(name_of(override) == "data.path" for override in overrides):
        taken = ", ".join(f"sources.{name}" for name in table[SOURCES])
        raise InputError(f"data.path={table['data']['path']!r} (--data) has no effect beside {taken}; set sources.NAME.path")
    if backend is not None and (asked := table.setdefault("parallel", {}).setdefault("backend", backend)) != backend:
        raise InputError(
            f"the job asks for parallel.backend={asked!r}, and accelerate's configuration for {backend!r}; take parallel.backend "
            f"out of the job, or use launch/accelerate/{asked}.yaml"
        )
    given = frozenset(f"{section}.{key}" for section, values in table.items() for key in values)
    applied = apply_preset(table)
    sides = _build(TrainJob, table, where), _build(MineJob, table, where), _build(LaunchJob, table, where).launch
    return Jobs(*sides, given, applied.origins, tuple(applied.remarks))


def read_toml(path: Path, what: str, advice: str) -> dict[str, Any]:
    """Return what a TOML file holds; raises InputError. what: kind of the file, in words; advice: where one comes from."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no {what} {path}; {advice}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} is not a readable TOML file: {error}") from error


def write_job(path: Path, jobs: Jobs, remarks: Mapping[str, str] | None = None) -> None:
    """Write the resolved job; remarks: what stands beside a setting, by its name."""
    from trainer.handoff.manifest import write_atomically

    lines, section = tomli_w.dumps(jobs.resolved()).splitlines(), ""
    for number, line in enumerate(lines):
        section = line.strip("[]") if line.startswith("[") else section
        remark = (remarks or {}).get(f"{section}.{line.partition(' = ')[0]}")
        lines[number] = line if remark is None else f"{line}  # {remark}"
    write_atomically(path, "\n".join(lines) + "\n")


def refuse_other_job(path: Path, jobs: Jobs) -> None:
    """Raise InputError, naming the field, if the job kept in a run folder is another one.

    How many processes run, how they share the work and what is kept of it may change from start to start; what is
    trained, on which data and in which order may not.
    """
    if not path.exists():
        return
    kept, now = read_toml(path, "job file", "launch/jobs/ has examples"), jobs.resolved()
    for section in sorted(now.keys() - MAY_CHANGE):
        was = kept.get(section, {})
        if not isinstance(was, dict):
            raise InputError(f"{path} has {section}={was!r}, expected a section; set run.folder to a new folder")
        for key in sorted(now[section].keys() | was.keys()):
            before, after = was.get(key), now[section].get(key)
            # What is left open now may have been said, or resolved by an older version, before: the trainer tells what changes.
            is_open = after == AUTO and (section in ("precision", "encode") or key == "compile")
            if before != after and (section, key) not in HOW and not is_open:
                raise InputError(
                    f"{path.parent} holds a run with {section}.{key}={before!r}, and this job has {after!r}; "
                    "set run.folder to a new folder, or go on with --allow-change"
                )


def name_of(override: Override) -> str:
    """Return the setting that an override is about."""
    return override.partition("=")[0] if isinstance(override, str) else override[0]


def _apply(table: dict, override: Override) -> None:
    name = name_of(override)
    section, *rest = name.split(".")
    depth = (2 if section == SOURCES else 1) + (TABLE in rest[:-1])
    if not (section and len(rest) == depth and all(rest) and ("=" in override or not isinstance(override, str))):
        expected = "section.key=value, as in optim.lr=3e-5, sources.NAME.key=value, or loss.parameters.name=value"
        raise InputError(f"{override if isinstance(override, str) else name!r} is not an override; expected {expected}")
    value = _parsed(override.partition("=")[2]) if isinstance(override, str) else override[1]
    for place in name.split(".")[:depth]:
        table = table.setdefault(place, {})
        if not isinstance(table, dict):
            raise InputError(f"{place} is a value in the job, not a section; {override!r} cannot be applied")
    table[rest[-1]] = value
    if value is None:  # TOML has no word for it
        del table[rest[-1]]


def _parsed(value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value  # a bare word or path needs no quotes


def _refuse_unknown_sections(table: dict, path: Path) -> None:
    for section, values in table.items():
        if section not in SECTIONS:
            what = f"section [{section}]" if isinstance(values, dict) else f"key {section} outside of all sections"
            raise InputError(f"{path}: unknown {what}; {nearest(section, SECTIONS, _homes(section))}")
        if not isinstance(values, dict):
            raise InputError(f"{path}: {section} is {values!r}, expected a section [{section}] with keys")


def nearest(name: str, known: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    """Return what a person may have meant by an unknown name: its home in other sections, a known one like it, or any of them."""
    if name in CALLED:
        return f"it is called {CALLED[name]} here"
    if elsewhere:
        return f"it belongs to another section: {' or '.join(elsewhere)}"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5 if len(name) <= SHORT_NAME else 0.7)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"


def _homes(key: str) -> list[str]:
    """Return the settings of all sections, but of the sources, that have a name for their key."""
    fields = {field.name: field.type for job in (TrainJob, MineJob, LaunchJob) for field in dataclasses.fields(job)}
    sections = {name: section for name, section in fields.items() if dataclasses.is_dataclass(section)}
    return [f"{name}.{key}" for name, section in sections.items() if key in {field.name for field in dataclasses.fields(section)}]


def _build(job_class: type[Job], table: dict, path: Path) -> Job:
    own = {f.name: table[f.name] for f in dataclasses.fields(job_class) if f.name in table}  # type: ignore[arg-type]
    try:
        # Through JSON, in strict mode: no "5" for 5, but lists for tuples and strings for paths.
        return pydantic.TypeAdapter(job_class).validate_json(json.dumps(own, default=str), strict=True)
    except pydantic.ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] == "missing")  # a misspelt key is not missed under its own
        raise InputError(_sentence(job_class, first, path)) from error


def _sentence(job_class: type, error: Any, path: Path) -> str:
    """Return what is wrong with a value, by its name and what it may be."""
    *outer, last = error["loc"]
    if error["type"] == "unexpected_keyword_argument":
        name, hint = _setting_at(job_class, outer)
        return f"{path}: unknown key {name}.{last}; {nearest(str(last), list(typing.get_type_hints(hint)), _homes(str(last)))}"
    name, hint = _setting_at(job_class, error["loc"])
    if error["type"] == "missing":
        is_part = len(error["loc"]) > name.count(".") + 1
        if is_part:
            return f"{name} is missing a part; expected {in_words(hint)}"
        return f"{name} is missing; set it in the job file or as {name}=…"
    if error["type"] in ("dataclass_type", "dict_type"):
        return f"{path}: {name} is {error['input']!r}, expected a section [{name}] with keys"
    close = difflib.get_close_matches(str(error["input"]), re.findall(r'"([^"]+)"', in_words(hint)), n=1, cutoff=0.7)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"{name}={error['input']!r} cannot be used; expected {in_words(hint)}{meant}"


def _setting_at(job_class: Any, place: Sequence[int | str]) -> tuple[str, Any]:
    """Return the name and the type of what pydantic names by its place: sections and keys, then how it came to read it so."""
    names, hint = [], job_class
    for part in place:
        if typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        elif dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint, include_extras=True)[str(part)]
        else:
            break
        names.append(str(part))
    return ".".join(names), hint


def _plain(value: Any) -> Any:
    """Return a value as TOML holds it: no None, paths as strings, tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
