"""A data set in BEIR's form as memory-mapped Arrow tables and row numbers.

The files are read and checked once; the tables are kept under the digest of the files' content, so a changed file is read
again and an unchanged one is opened in milliseconds. A data set with any problem is refused whole.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.beir import Judgement, Problem, read_judgements, read_texts
from trainer.data.cache import build_once, cache_folder
from trainer.errors import InputError

SIDES = ("corpus", "queries")
FORMAT = 1  # of the tables below; another number reads the files again


@dataclass(frozen=True)
class Qrels:
    """Judgements of one split, sorted by query row, then corpus row."""

    query_rows: np.ndarray  # (n,) int64
    corpus_rows: np.ndarray  # (n,) int64
    scores: np.ndarray  # (n,) float32; above 0 is relevant


@dataclass(frozen=True)
class RetrievalData:
    """Texts by row number, and who is judged relevant to whom."""

    path: Path
    cache: Path
    corpus: datasets.Dataset  # columns "_id" and "text", title included
    queries: datasets.Dataset
    qrels: dict[str, Qrels]  # by split: train, dev, test as there are
    digest: str  # SHA-256 of the files

    def training_queries(self, split: str = "train") -> np.ndarray:
        """Return the rows of the queries with a positive in a split, in file order, int64.

        Row q of a negatives table belongs to the q-th of these.
        """
        qrels = self._qrels(split)
        return np.unique(qrels.query_rows[qrels.scores > 0])

    def positives(self, query_rows: np.ndarray, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """Return the positives of some queries as (indptr, corpus rows), int64: those of the i-th in its slice."""
        qrels = self._qrels(split)
        is_positive = qrels.scores > 0
        queries, passages = qrels.query_rows[is_positive], qrels.corpus_rows[is_positive]
        low, high = np.searchsorted(queries, query_rows), np.searchsorted(queries, query_rows, side="right")
        indptr = np.concatenate([[0], np.cumsum(high - low)])
        within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], high - low)
        return indptr, passages[np.repeat(low, high - low) + within]

    @cached_property
    def _splits(self) -> str:
        return ", ".join(sorted(self.qrels))

    def _qrels(self, split: str) -> Qrels:
        if split not in self.qrels:
            raise InputError(f"{self.path} has no qrels/{split}.tsv, only {self._splits}; choose one of these as split")
        return self.qrels[split]


def open_dataset(path: Path, cache: Path | None = None) -> RetrievalData:
    """Return the data set in a folder; raises InputError with file, line and reason at the first problem."""
    cache = cache_folder(cache)
    files = dataset_files(path)
    digest = _digest(files)
    folder = build_once(cache / f"data-{FORMAT}-{digest[:24]}", lambda staging: _build(files, staging))
    corpus, queries = (datasets.Dataset.from_file(str(folder / f"{side}.arrow")) for side in SIDES)
    qrels = {}
    for file in sorted(folder.glob("qrels-*.npy")):
        rows = np.load(file, allow_pickle=False)
        qrels[file.stem.removeprefix("qrels-")] = Qrels(rows["query"], rows["passage"], rows["score"])
    return RetrievalData(path, cache, corpus, queries, qrels, digest)


def dataset_files(path: Path) -> dict[str, Path]:
    """Return the files of a data set by name: corpus, queries, and qrels-SPLIT; raises InputError if there are none."""
    if not path.is_dir():
        raise InputError(f"there is no data set in {path}; data.path must be a folder with corpus.jsonl and queries.jsonl")
    files = {side: path / f"{side}.jsonl" for side in SIDES}
    splits = {f"qrels-{file.stem}": file for file in sorted((path / "qrels").glob("*.tsv"))}
    for file in files.values():
        if not file.is_file():
            raise InputError(f"{file} is missing; a data set needs corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv")
    if not splits:
        raise InputError(f"{path / 'qrels'} holds no judgements; a data set needs at least one qrels/SPLIT.tsv")
    return files | splits


def find_rows(ids: pa.ChunkedArray, wanted: list[str]) -> np.ndarray:
    """Return the row of each wanted id, int64, -1 where there is none."""
    rows = pc.index_in(pa.array(wanted, pa.string()), value_set=ids.cast(pa.string()))
    return pc.fill_null(rows, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _digest(files: dict[str, Path]) -> str:
    digests = {}
    for name, file in files.items():
        with open(file, "rb") as content:
            digests[name] = hashlib.file_digest(content, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def refuse(problem: Problem) -> None:
    """Raise the problem as an InputError."""
    raise InputError(str(problem))


def _build(files: dict[str, Path], folder: Path) -> None:
    ids = {}
    for side in SIDES:
        _write_table(files[side], folder / f"{side}.arrow")
        ids[side] = datasets.Dataset.from_file(str(folder / f"{side}.arrow")).data.column("_id")
    for name, file in files.items():
        if name not in SIDES:
            np.save(folder / f"{name}.npy", _judged_rows(file, ids), allow_pickle=False)


def _write_table(file: Path, out: Path) -> None:
    from datasets.arrow_writer import ArrowWriter

    first_line: dict[bytes, int] = {}
    features = datasets.Features({"_id": datasets.Value("string"), "text": datasets.Value("string")})
    with ArrowWriter(path=str(out), features=features) as writer:
        for number, row_id, text in read_texts(file, refuse):
            # A hash of 16 bytes for each id, not the id: ten million stay within a gigabyte.
            key = hashlib.blake2b(row_id.encode(), digest_size=16).digest()
            if (earlier := first_line.setdefault(key, number)) != number:
                refuse(duplicate_id(file, number, row_id, earlier))
            writer.write({"_id": row_id, "text": text})
        if not first_line:
            refuse(Problem(file, 0, "empty", "this file has no line; expected at least one text"))
        writer.finalize()


def duplicate_id(file: Path, line: int, row_id: str, earlier: int) -> Problem:
    """Return the problem of an id that stood on an earlier line."""
    return Problem(file, line, "duplicate id", f"_id {row_id!r} stands on line {earlier} already; ids must differ")


def _judged_rows(file: Path, ids: dict[str, pa.ChunkedArray]) -> np.ndarray:
    judgements = list(read_judgements(file, refuse))
    for problem in judgement_problems(file, judgements, ids):
        refuse(problem)
    rows = np.zeros(len(judgements), [("query", np.int64), ("passage", np.int64), ("score", np.float32)])
    rows["query"] = find_rows(ids["queries"], [j.query for j in judgements])
    rows["passage"] = find_rows(ids["corpus"], [j.passage for j in judgements])
    rows["score"] = [j.score for j in judgements]
    return np.unique(rows)


def judgement_problems(file: Path, judgements: list[Judgement], ids: dict[str, pa.ChunkedArray]) -> Iterator[Problem]:
    """Yield the judgements that name what is not there, and the queries without a positive."""
    if not judgements:
        yield Problem(file, 0, "empty", "this file has no judgement; remove it or fill it")
        return
    for side, names in (("queries", [j.query for j in judgements]), ("corpus", [j.passage for j in judgements])):
        what = "query" if side == "queries" else "document"
        for i in np.flatnonzero(find_rows(ids[side], names) < 0):
            sentence = f"{what} {names[i]!r} is not in {side}.jsonl; add it there or remove this line"
            yield Problem(file, judgements[i].line, f"unknown {what}", sentence)
    with_positive = {j.query for j in judgements if j.score > 0}
    first = {j.query: j.line for j in reversed(judgements) if j.query not in with_positive}
    for query, line in sorted(first.items(), key=lambda item: item[1]):
        sentence = f"query {query!r} has no document with a score above 0; give it one or remove its lines"
        yield Problem(file, line, "no positive", sentence)
