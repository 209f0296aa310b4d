"""What kind of data set stands at a path: found by what is there, never told.

A folder in BEIR's form; a folder that `save_to_disk` of Hugging Face `datasets` wrote; files of records, or a folder of
them; or the name of a data set of the hub. Files named train, dev (validation) or test are those splits.
"""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from trainer.data.files import SUFFIXES
from trainer.data.records import FORMS
from trainer.errors import InputError
from trainer.handoff.rights import unreadable

SPLIT_NAMES = {"train": "train", "dev": "dev", "validation": "dev", "valid": "dev", "val": "dev", "test": "test"}
SPLIT_FILE = re.compile(rf"({'|'.join(SPLIT_NAMES)})([-_.].*)?$")
FOLDERS = ("qrels", "corpus", "queries", "data")  # that a data set may have below its own
NO_COLUMNS: Mapping[str, str] = MappingProxyType({})
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?$|[a-z][\w-]+(:[\w.-]+)?$")


@dataclass(frozen=True)
class Source:
    """The files of one data set."""

    path: Path
    kind: str  # "beir" or "records"
    files: dict[str, list[Path]]  # beir: corpus, queries and qrels-SPLIT; records: by split
    columns: Mapping[str, str] = field(default_factory=dict)  # as data.columns: our name -> the file's


def find_source(path: Path, columns: Mapping[str, str] = NO_COLUMNS) -> Source:
    """Return the files of the data set at a path; raises InputError with what was found and the forms known.

    columns: as data.columns.
    """
    for place in (path, *(path / name for name in FOLDERS)):
        if (told := unreadable(place)) is not None:
            raise InputError(told)
    source = _find(path)
    if (told := next(filter(None, map(unreadable, itertools.chain(*source.files.values()))), None)) is not None:
        raise InputError(told)
    return replace(source, columns=columns)


def _find(path: Path) -> Source:
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path} is no {', '.join(SUFFIXES)}; set data.path to {FORMS}")
        return Source(path, "records", {_split_of(path) or "train": [path]})
    if not path.is_dir():
        return _from_hub(path)
    if (path / "corpus.jsonl").exists() or (path / "queries.jsonl").exists() or (path / "qrels").is_dir():
        return _beir(path)
    saved = path / "dataset_dict.json", path / "state.json"
    if saved[0].is_file():
        splits = _listed(saved[0], "splits")
        return Source(path, "records", {SPLIT_NAMES.get(split, split): _saved_files(path / split) for split in splits})
    if saved[1].is_file():
        return Source(path, "records", {"train": _saved_files(path)})
    return Source(path, "records", _record_files(path))


def _beir(path: Path) -> Source:
    files = {side: path / f"{side}.jsonl" for side in ("corpus", "queries")}
    for file in files.values():
        if not file.is_file():
            raise InputError(f"{file} is missing; a data set needs corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv")
    splits = {f"qrels-{file.stem}": [file] for file in sorted((path / "qrels").glob("*.tsv"))}
    if not splits:
        raise InputError(f"{path / 'qrels'} holds no judgements; a data set needs at least one qrels/SPLIT.tsv")
    return Source(path, "beir", {side: [file] for side, file in files.items()} | splits)


def _saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a saved `datasets.Dataset`."""
    files = [folder / entry["filename"] for entry in _listed(folder / "state.json", "_data_files")]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing, and state.json beside it names it; save the data set anew")
    return files


def _record_files(path: Path) -> dict[str, list[Path]]:
    """Return the record files of a folder, or of its folder data, by split."""
    folders = [path, path / "data"]
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir()) if file.name.endswith(SUFFIXES)]
    files = [file for file in files if file.is_file() and file.name not in ("dataset_info.json", "dataset_infos.json")]
    if not files:
        raise InputError(f"{path} holds no file of a data set; set data.path to {FORMS}, in {', '.join(SUFFIXES)}")
    splits = {file: _split_of(file) for file in files}
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


def _from_hub(path: Path) -> Source:
    """Return the files of a data set of the hub, downloaded or found in the cache of `datasets`."""
    nothing = f"there is no data set in {path}; data.path must be a folder or a file: {FORMS}; or a name of the hub"
    if not HUB_NAME.match(str(path)):
        raise InputError(nothing)
    import datasets

    name, _, config = str(path).partition(":")
    try:
        found = datasets.load_dataset(name, config or None)
    except Exception as error:  # what a hub, a network and a data set of others can raise has no common class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{nothing}, and the hub has not given it: {reason}") from error
    splits = {split: [Path(entry["filename"]) for entry in table.cache_files] for split, table in found.items()}
    return Source(path, "records", {SPLIT_NAMES.get(split, split): files for split, files in splits.items()})


def _listed(path: Path, key: str) -> list:
    """Return what a JSON file of a saved data set lists under a key."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} does not list {key} of a saved data set ({error!r}); save the data set anew") from error
