"""Write the parts of the documentation that follow from the code: `python docs/generate.py`.

docs/settings.md is the reference of job files, from the same data as `negpool settings`; the end of docs/objectives.md is that of
losses. The map in docs/architecture.md has a line for each source file: the first paragraph of its docstring.
tests/docs/test_generated.py fails where one of them is not what this writes.
"""

import ast
import json
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from launch.objectives import all_objectives
from launch.presets import PRESETS
from launch.settings import all_settings
from mining.job import MineJob
from trainer.job import TrainJob

DOCS = Path(__file__).resolve().parent
PACKAGES = ("gradcache", "trainer", "mining", "launch")
MAP_HEADING = "## The map\n"
PRESETS_HEADING = "## Presets\n"


def pages() -> dict[Path, str]:
    """Return what each page should hold."""
    made = {
        DOCS / "architecture.md": (MAP_HEADING, _map()),
        DOCS / "objectives.md": (PRESETS_HEADING, _presets() + _parameters()),
    }
    by_hand = {page: page.read_text(encoding="utf-8").partition(heading)[0] for page, (heading, _) in made.items()}
    return {DOCS / "settings.md": _settings(), **{page: by_hand[page] + "".join(end) for page, end in made.items()}}


def _settings() -> str:
    parts = [
        "# The settings of a job file",
        "A job file is TOML. Each section below is a table of it, `[section]`, and each row one of its keys with its default, "
        "which holds where a job file leaves the key out. Where there is no default, the key is not set, or is required. "
        "On the command line a setting is `section.key=value`, which wins over the job file. `negpool settings SECTION` prints "
        "the same.",
        "This page is made from the code by `python docs/generate.py`.",
    ]
    for section, found in all_settings(None).items():
        heading = "sources.NAME" if section == "sources" else section
        about = found["about"]
        parts += [f"## {heading}", f"{about[:1].upper()}{about[1:]} Read by {_readers(section)}.".strip()]
        parts.append(_table(("key = default", "takes", "meaning"), map(_setting, found["settings"])))
    return "\n\n".join(parts) + "\n"


def _readers(section: str) -> str:
    sides = {"the trainer": TrainJob, "the miner": MineJob}
    readers = [side for side, job in sides.items() if section in {field.name for field in fields(job)}]
    return " and ".join(readers) or "`negpool run`"


def _setting(setting: dict[str, Any]) -> tuple[str, ...]:
    return _with_default(setting["key"], setting["default"]), f"`{setting['type']}`", setting["meaning"]


def _with_default(key: str, default: str) -> str:
    """Return a key with its default as a job file has them; words that are no TOML, such as `required`, stand behind the key."""
    try:
        tomllib.loads(f"{key} = {default}")
    except tomllib.TOMLDecodeError:
        return f"`{key}`, {default}" if default else f"`{key}`"
    return f"`{key} = {default}`"


def _presets() -> str:
    about = (
        "`loss.preset` sets what a published system does, wherever the job says nothing; what the job says otherwise holds, and "
        "is said. `negpool train JOB.toml --explain` prints each setting with its source. From here on this page is made from "
        "the code by `python docs/generate.py`."
    )
    rows = [
        (
            f"`{name}`",
            preset.source,
            " ".join(f"`{key}={json.dumps(value)}`" for key, value in preset.settings.items()),
            preset.note,
        )
        for name, preset in PRESETS.items()
    ]
    return f"\n{about}\n\n{_table(('preset', 'system', 'settings', 'beside them'), rows)}\n\n"


def _parameters() -> str:
    parts = ["## Parameters", "`negpool objectives` prints the same."]
    for name, found in all_objectives().items():
        also = f" It takes the parameters of {base}, too, where they have a meaning." if (base := found["takes_those_of"]) else ""
        parts += [f"### {name}", f"{found['about']} Source: {found['source']}.{also}"]
        rows = [(_with_default(row["name"], row["default"]), row["type"], row["meaning"]) for row in found["parameters"]]
        parts += [_table(("parameter = default", "takes", "meaning"), rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def _map() -> str:
    parts = []
    for package in PACKAGES:
        folders = sorted({file.parent for file in (DOCS.parent / package).rglob("*.py")})
        for folder in folders:
            rows = list(_files(folder))
            if rows:
                parts += [f"### {folder.relative_to(DOCS.parent)}/", _table(("file", "what it is"), rows)]
    return "\n" + "\n\n".join(parts) + "\n"


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each file of a folder with the first paragraph of its docstring; files without any code are left out."""
    for file in sorted(folder.glob("*.py")):
        if text := file.read_text(encoding="utf-8"):
            about = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
            yield f"`{file.name}`", " ".join(about.split())


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
