"""What `save_to_disk` of Hugging Face `datasets` leaves: a table in Arrow files, or one for each split."""

import json
from pathlib import Path

from trainer.errors import InputError


def is_saved(folder: Path) -> bool:
    """Return whether a folder holds a saved `Dataset` or `DatasetDict`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_files(folder: Path) -> dict[str | None, list[Path]]:
    """Return the Arrow files by split, None for that of a `Dataset`; raises InputError if any is missing."""
    if (folder / "dataset_dict.json").is_file():
        return {split: _files(folder / split) for split in _listed(folder / "dataset_dict.json", "splits")}
    return {None: _files(folder)}


def _files(folder: Path) -> list[Path]:
    """Return the Arrow files of a saved `datasets.Dataset`."""
    files = [folder / entry["filename"] for entry in _listed(folder / "state.json", "_data_files")]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing, and state.json beside it names it; save the data set anew")
    return files


def _listed(path: Path, key: str) -> list:
    """Return what a JSON file of a saved data set lists under a key."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} does not list {key} of a saved data set ({error!r}); save the data set anew") from error
