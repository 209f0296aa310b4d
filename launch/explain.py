"""`negpool train JOB.toml --explain`: the settings of a job that are not left open, and who says so."""

from typing import Any

from rich.table import Table

from launch.jobfile import TABLE, Jobs
from launch.presets import PRESETS


def explain(jobs: Jobs) -> dict[str, Any]:
    """Return the preset with its source, what the job says otherwise, and each setting with its value and origin."""
    preset = jobs.train.loss.preset
    found = PRESETS[preset] if preset else None
    return {
        "preset": found and {"name": preset, "source": found.source, "note": found.note},
        "remarks": list(jobs.remarks),
        "settings": [
            {"name": name, "value": value, "from": jobs.origins.get(name, "the job")} for name, value in _settings(jobs).items()
        ],
    }


def explain_table(found: dict[str, Any]) -> Table:
    """Return the settings one below the other."""
    preset = found["preset"]
    title = "; ".join(filter(None, (preset["source"], preset["note"]))) if preset else None
    table = Table("setting", "value", "from", title=title, title_justify="left")
    for row in found["settings"]:
        table.add_row(row["name"], str(row["value"]), row["from"])
    return table


def _settings(jobs: Jobs) -> dict[str, Any]:
    """Return what the job or a preset sets, by name; each parameter of an objective by itself."""
    resolved = jobs.resolved()
    settings: dict[str, Any] = {}
    for name in sorted({*jobs.given, *(name for name in jobs.origins if f".{TABLE}." not in name)}):
        section, _, key = name.partition(".")
        value = resolved.get(section, {}).get(key)
        if isinstance(value, dict):
            settings |= {f"{name}.{inner}": of for inner, of in value.items()}
        elif value is not None:
            settings[name] = value
    return settings
