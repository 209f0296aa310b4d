"""Finds out what kind of data set is at a path, from the files that are there; no setting says it.

A folder of a collection, as BEIR has it; a folder that `save_to_disk` of Hugging Face `datasets` wrote; files of records,
or a folder of them; or the name of a data set of the hub. Files named train, dev (validation) or test are those splits.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from trainer.data.files import KINDS, SUFFIXES
from trainer.data.layout import SPLIT_NAMES, Candidate, find_layout, role_of
from trainer.data.records import FORMS
from trainer.data.saved import is_saved, saved_files
from trainer.errors import InputError
from trainer.handoff.rights import unreadable

SPLIT_FILE = re.compile(rf"({'|'.join(SPLIT_NAMES)})([-_.].*)?$")
FOLDERS = ("qrels", "corpus", "queries", "data", "default")  # that a data set may have below its own
NO_COLUMNS: Mapping[str, str] = MappingProxyType({})
ABOUT = ("dataset_info.json", "dataset_infos.json")  # what the hub writes beside data
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?$|[a-z][\w-]+(:[\w.-]+)?$")


@dataclass(frozen=True)
class Source:
    """The files of one data set."""

    path: Path
    kind: str  # "beir", a collection, or "records"
    files: dict[str, list[Path]]  # beir: those of a Layout; records: by split
    columns: Mapping[str, str] = field(default_factory=dict)  # as data.columns: our name -> the file's
    unread: tuple[Path, ...] = ()  # data files of a collection's folder that are not read

    @property
    def records(self) -> dict[str, list[Path]]:
        """The files of records by split."""
        if self.kind == "records":
            return self.files
        return {name.removeprefix("records-"): files for name, files in self.files.items() if name.startswith("records-")}

    @property
    def splits(self) -> set[str]:
        """The splits that the names of the files say; reading them may leave one out in which nothing is relevant."""
        return set(self.files) if self.kind == "records" else {name.partition("-")[2] for name in self.files} - {""}


def find_source(path: Path, columns: Mapping[str, str] = NO_COLUMNS) -> Source:
    """Return the files of the data set at a path; raises InputError with what was found and the forms known.

    columns: as data.columns.
    """
    for place in (path, *(path / name for name in FOLDERS)):
        if (told := unreadable(place)) is not None:
            raise InputError(told)
    source = _find(path, columns)
    if (told := next(filter(None, map(unreadable, itertools.chain(*source.files.values(), source.unread))), None)) is not None:
        raise InputError(told)
    return replace(source, columns=columns)


def _find(path: Path, columns: Mapping[str, str]) -> Source:
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path} is no {KINDS}; set data.path to {FORMS}")
        return Source(path, "records", {_split_of(path) or "train": [path]})
    if not path.is_dir():
        return _from_hub(path, columns)
    if layout := find_layout(path, columns):
        return Source(path, "beir", layout.files, unread=tuple(layout.unread))
    if is_saved(path):
        files = {SPLIT_NAMES.get(split or "train", split or "train"): files for split, files in saved_files(path).items()}
        return Source(path, "records", files)
    if splits := {file: _split_of(file) for folder in (path, path / "data") for file in _files_in(folder)}:
        return Source(path, "records", _by_split(splits))
    return _below(path, columns)


def _below(path: Path, columns: Mapping[str, str]) -> Source:
    """Return the data set in the subfolders of a folder without files: each subfolder is a split, or only one of them has
    data.
    """
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    by_split: dict[Path, str | None] = {file: _split_of(folder) for folder in folders for file in _files_in(folder)}
    if by_split and all(by_split.values()):
        return Source(path, "records", _by_split(by_split))
    holding = [folder for folder in folders if any(map(_files_in, (folder, *folder.iterdir())))]
    if len(holding) == 1:
        return _find(holding[0], columns)
    if holding:
        names = ", ".join(folder.name for folder in holding)
        raise InputError(f"{path} holds the data sets {names}; set data.path to one of them, as {holding[0]}")
    raise InputError(f"{path} holds no file of a data set; set data.path to {FORMS}, in {KINDS}")


def _files_in(folder: Path) -> list[Path]:
    """Return the files of records right in a folder, none if there is no such folder."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if file.name.endswith(SUFFIXES) and file.is_file() and file.name not in ABOUT]


def _by_split(splits: dict[Path, str | None]) -> dict[str, list[Path]]:
    """Return files by the split that each one's name says."""
    if any(splits.values()) and not all(splits.values()):
        odd = next(file for file, split in splits.items() if split is None)
        raise InputError(f"{odd} names no split, and others beside it do; name it train, dev or test, or move it away")
    found: dict[str, list[Path]] = {}
    for file, split in splits.items():
        found.setdefault(split or "train", []).append(file)
    return found


def _split_of(file: Path) -> str | None:
    match = SPLIT_FILE.match(file.name.lower())
    return SPLIT_NAMES[match[1]] if match else None


def _from_hub(path: Path, columns: Mapping[str, str]) -> Source:
    """Return the files of a data set of the hub, downloaded or found in the cache of `datasets`."""
    if not HUB_NAME.match(str(path)) or path.name.endswith(SUFFIXES):
        raise InputError(f"there is no data set in {path}: there is no such file or folder; set data.path to one that is there")
    import datasets

    name, _, config = str(path).partition(":")
    try:
        parts = [config] if config else _collection_parts(name)
        found = {part: datasets.load_dataset(name, part or None) for part in parts}
    except Exception as error:  # what a hub, a network and a data set of others can raise has no common class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        nothing = f"there is no data set in {path}: there is no such file or folder, the name is not on this machine"
        raise InputError(f"{nothing}, and the hub has not given it: {reason}") from error
    entries = [
        Candidate(part, split, [Path(entry["filename"]) for entry in table.cache_files])
        for part, splits in found.items()
        for split, table in splits.items()
    ]
    if layout := find_layout(path, columns, entries):
        return Source(path, "beir", layout.files, unread=tuple(layout.unread))
    return Source(path, "records", {SPLIT_NAMES.get(entry.name, entry.name): entry.files for entry in entries})


def _collection_parts(name: str) -> list[str]:
    """Return the configurations of a collection of the hub; one without a name if it is none, or no hub answers."""
    import datasets

    try:
        parts = datasets.get_dataset_config_names(name)
    except Exception:  # as below; loading says why
        return [""]
    return parts if {"corpus", "queries"} <= {role_of(part) for part in parts} else [""]
