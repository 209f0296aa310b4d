"""What a person gives as objects, as files: everything else here reads files.

They lie in the cache under the digest of what they hold. So the same objects are the same files: a run goes on with them, and
refuses others.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from trainer.errors import InputError

if TYPE_CHECKING:
    import datasets
    from sentence_transformers import SentenceTransformer

PathLike: TypeAlias = "str | os.PathLike[str]"
Model: TypeAlias = "PathLike | SentenceTransformer"
Records: TypeAlias = "Iterable[Mapping[str, Any]]"
# Queries and passages by id, a passage as a text or as {"title": …, "text": …}; ids of the relevant, with grades or without.
Collection: TypeAlias = "tuple[Mapping[Any, Any], Mapping[Any, Any], Mapping[Any, Any]]"
Splits: TypeAlias = "Mapping[str, datasets.Dataset] | Mapping[str, Sequence[Mapping[str, Any]]]"
Data: TypeAlias = "PathLike | datasets.Dataset | Collection | Splits | Records"
KINDS = "a path, a name of the hub, a datasets.Dataset or DatasetDict, a list of records, or a tuple of (queries, corpus, qrels)"
NOT_CONTENT = ("state.json", "dataset_info.json", "README.md", "manifest.json")  # they hold marks of the time they were written
DIGITS = 24


def model_folder(model: Model, root: Path) -> str:
    """Return the name or the folder of a model; a SentenceTransformer is saved below `root`."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    peers = sys.modules.get("sentence_transformers")
    if peers is None or not isinstance(model, peers.SentenceTransformer):
        raise InputError(f"model is a {type(model).__name__}; expected a name, a folder or a SentenceTransformer")
    return str(_kept(root, "model", lambda folder: model.save_pretrained(str(folder), create_model_card=False)))


def data_path(data: Data, split: str, root: Path) -> str:
    """Return the path or the name of a data set; one in memory is written below `root`. split: of data that names none."""
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    return str(_kept(root, "data", _writer(data, split)))


def _kept(root: Path, what: str, write: Callable[[Path], Any]) -> Path:
    """Return the folder of what `write` writes, under the digest of its content, whole or not at all."""
    from trainer.data.cache import build_once

    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="given-", dir=root) as beside:
        written = Path(beside) / what
        write(written)
        digest = hashlib.sha256()
        for file in sorted(path for path in written.rglob("*") if path.is_file() and path.name not in NOT_CONTENT):
            with open(file, "rb") as content:
                digest.update(str(file.relative_to(written)).encode() + hashlib.file_digest(content, "sha256").digest())
        folder = root / f"given-{digest.hexdigest()[:DIGITS]}"
        return build_once(folder, f"the {what} given", partial(_move, written)) / what


def _move(written: Path, staging: Path) -> None:
    shutil.move(written, staging)


def _writer(data: Any, split: str) -> Callable[[Path], Any]:
    """Return what writes a data set in memory into a folder; raises InputError for what is none."""
    import datasets

    if isinstance(data, datasets.Dataset):
        return datasets.DatasetDict({split: data}).save_to_disk
    if (library := type(data).__module__.split(".")[0]) in ("pandas", "polars"):
        is_pandas = library == "pandas"
        table = datasets.Dataset.from_pandas(data, preserve_index=False) if is_pandas else datasets.Dataset.from_polars(data)
        return datasets.DatasetDict({split: table}).save_to_disk
    if isinstance(data, tuple) and len(data) == 3 and all(isinstance(part, Mapping) for part in data):
        return lambda folder: _write_collection(folder, *data, split)
    if isinstance(data, Mapping) and data and all(isinstance(part, datasets.Dataset) for part in data.values()):
        return datasets.DatasetDict(data).save_to_disk
    if isinstance(data, Mapping) and all(isinstance(part, list) and not _is_records(part) for part in data.values()):
        return datasets.DatasetDict({split: datasets.Dataset.from_dict(dict(data))}).save_to_disk
    if isinstance(data, Mapping) and all(_is_records(part) for part in data.values()):
        return lambda folder: _write_splits(folder, data)
    if _is_records(data):
        return lambda folder: _write_splits(folder, {split: data})
    raise InputError(f"data is a {type(data).__name__}; expected {KINDS}")


def _is_records(data: Any) -> bool:
    is_list = isinstance(data, list | tuple) and all(isinstance(record, Mapping) for record in data)
    return is_list or (isinstance(data, Iterable) and not isinstance(data, Sequence | Mapping | str | bytes))


def _write_splits(folder: Path, splits: Mapping[str, Records]) -> None:
    """Write records as JSON lines, a file for each split."""
    from trainer.data.layout import SPLIT_NAMES

    folder.mkdir()
    for split, records in splits.items():
        if split not in SPLIT_NAMES:
            raise InputError(f"data names the split {split!r}; expected one of {', '.join(SPLIT_NAMES)}")
        number = 0
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for number, record in enumerate(records, 1):
                if not isinstance(record, Mapping):
                    raise InputError(f"record {number} of data is a {type(record).__name__}; expected a dictionary by column")
                file.write(_as_line(record, number))
        if not number:
            raise InputError(f"data holds no record for the split {split}")


def _as_line(record: Mapping[str, Any], number: int) -> str:
    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):  # numpy's numbers and arrays
            return value.tolist()
        raise InputError(f"record {number} of data holds a {type(value).__name__}; expected texts, numbers and lists of them")

    return json.dumps(dict(record), ensure_ascii=False, default=plain) + "\n"


def _write_collection(folder: Path, queries: Mapping, corpus: Mapping, qrels: Mapping, split: str) -> None:
    """Write BEIR's files of dictionaries, as BEIR and sentence-transformers' evaluators have them."""
    from trainer.data.peers.beir import write_judgements, write_texts
    from trainer.data.row import Entry

    def entries(texts: Mapping[Any, Any], what: str) -> Iterator[Entry]:
        for text_id, text in texts.items():
            title, rest = (str(text.get("title") or ""), text.get("text")) if isinstance(text, Mapping) else ("", text)
            if not isinstance(rest, str):
                raise InputError(f"the {what} {text_id!r} of data is {text!r}; expected a text")
            yield Entry(str(text_id), f"{title} {rest}" if title else rest, title_length=len(title))

    (folder / "qrels").mkdir(parents=True)
    write_texts(folder / "corpus.jsonl", entries(corpus, "passage"))
    write_texts(folder / "queries.jsonl", entries(queries, "query"))
    for name, judged in (qrels if _has_splits(qrels) else {split: qrels}).items():
        write_judgements(
            folder / "qrels" / f"{name}.tsv", itertools.chain.from_iterable(itertools.starmap(_rows, judged.items()))
        )


def _has_splits(qrels: Mapping[Any, Any]) -> bool:
    """Tell whether judgements stand by split, and not by query."""
    first = next(iter(qrels.values()), None)
    return isinstance(first, Mapping) and not isinstance(next(iter(first.values()), 0), int | float)


def _rows(query: Any, judged: Any) -> Iterator[tuple[str, str, float]]:
    graded = judged.items() if isinstance(judged, Mapping) else ((passage, 1) for passage in sorted(judged, key=str))
    yield from ((str(query), str(passage), float(grade)) for passage, grade in graded)
