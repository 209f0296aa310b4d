"""A plan as files: numbers as JSON, tables as Markdown, the device as TOML, which --device takes again."""

import json
from pathlib import Path
from typing import Any

from launch.plan.devices import PlannedDevice, write_device
from launch.plan.plan_tables import plan_parts
from launch.tables import as_markdown
from trainer.errors import InputError


def write_plan(folder: Path, found: dict[str, Any]) -> None:
    """Write folder/plan.json, plan.md and device.toml; raises InputError if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(found, indent=1) + "\n")
        (folder / "plan.md").write_text(as_markdown(plan_parts(found)))
        write_device(folder / "device.toml", PlannedDevice(**found["device"]))
    except OSError as error:
        raise InputError(f"cannot write the plan to {folder}: {error.strerror}; set --out to another folder") from error
