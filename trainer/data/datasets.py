"""Data sets of any form as memory-mapped Arrow tables and row numbers; several sources become one.

The files are read and checked once; the tables are kept under the digest of the files' content, so a changed file is read
again and an unchanged one is opened in milliseconds. A data set with a problem is refused whole; one with
blemishes, which can be lived with, opens without what is blemished, and says so once.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np

from trainer.data.build import build_source
from trainer.data.cache import build_once, cache_folder, file_digest
from trainer.data.combine import combine_sources
from trainer.data.forms import NO_COLUMNS, Source, find_source
from trainer.data.judged import ABSENT, SIDES
from trainer.data.problems import Blemishes, Refusal
from trainer.data.texts import read_table
from trainer.errors import InputError
from trainer.handoff.settings import DataSettings, Sources, SourceSettings, columns_of, places_of

log = logging.getLogger(__name__)

BLEMISHES = "blemishes.json"  # what of the files was left out or read otherwise, by kind
FORMAT = 3  # of the tables below; another number reads the files again


@dataclass(frozen=True)
class Qrels:
    """Judgements of one split, sorted by query row, then corpus row; memory-mapped."""

    query_rows: np.ndarray  # (n,) int64
    corpus_rows: np.ndarray  # (n,) int64
    scores: np.ndarray  # (n,) float32 grades; above 0 is relevant
    teacher: np.ndarray  # (n,) float32, a teacher's score of the pair, NaN where there is none
    # Judgements that name no document of the corpus, so that nothing can find them: ideal lists and recall count them.
    absent_query_rows: np.ndarray  # (a,) int64
    absent_scores: np.ndarray  # (a,) float32 grades


@dataclass(frozen=True)
class Given:
    """Negatives that the data set itself names, by query: those of query row q are ids[indptr[q]:indptr[q + 1]]."""

    indptr: np.ndarray  # (num_queries + 1,) int64, over all queries
    ids: np.ndarray  # (n,) int64 corpus rows
    scores: np.ndarray  # (n,) float32, a teacher's score of the pair, NaN where there is none


@dataclass(frozen=True)
class SourceRows:
    """One source's place in the tables, and its settings. It has the rows from here to the next source."""

    name: str
    first_query: int
    first_passage: int  # a passage that several sources have belongs to the first of them
    settings: SourceSettings

    def first_row(self, side: str) -> int:
        """Return its first row of "queries" or "corpus"."""
        return self.first_query if side == "queries" else self.first_passage


@dataclass(frozen=True)
class RetrievalData:
    """Texts by row number, and who is judged relevant to whom."""

    path: Path
    cache: Path
    corpus: datasets.Dataset  # the columns of SCHEMA (texts.py): "_id", "text", title included, …
    queries: datasets.Dataset
    qrels: dict[str, Qrels]  # by split: train, dev, test as there are
    digest: str  # SHA-256 of the files
    content: dict[str, str]  # of "corpus" and "queries": SHA-256 over the keys of all texts
    text_keys: dict[str, np.ndarray]  # of both: 64-bit keys of the texts as they are, int64, memory-mapped
    sources: tuple[SourceRows, ...]
    has_prompts: dict[str, bool]  # of both: whether a text has a prompt of its own
    own_rows: np.ndarray  # (num_queries,) int64: the document that is never found for a query, as it has its id; -1: none
    given: Given | None = None
    num_proc: int | None = None  # processes that tokenise
    form: str = "BEIR"  # what the files were, for people

    def training_queries(self, split: str = "train") -> np.ndarray:
        """Return the rows of the queries with a positive in a split, in file order, int64.

        Row q of a negatives table belongs to the q-th of these.
        """
        qrels = self._qrels(split)
        return np.unique(qrels.query_rows[qrels.scores > 0])

    def evaluated_queries(self, split: str) -> np.ndarray:
        """Return the rows of the queries with a relevant document in a split, in the corpus or not, in file order, int64."""
        if split not in self.qrels:
            known = sorted(self.qrels)
            choice = f"--split {'train' if 'train' in known else known[0]}"
            raise InputError(
                f"{self.path} has no qrels/{split}.tsv, only {', '.join(known)}; choose one of these with {choice}, or let "
                "negpool data split set queries aside"
            )
        qrels = self.qrels[split]
        return np.union1d(self.training_queries(split), qrels.absent_query_rows[qrels.absent_scores > 0])

    def positives(self, query_rows: np.ndarray, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """Return the positives of some queries as (indptr, corpus rows), int64: those of the i-th in its slice."""
        indptr, at = self.positive_judgements(query_rows, split)
        return indptr, self.qrels[split].corpus_rows[at]

    def positive_judgements(self, query_rows: np.ndarray, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """Return where in the split's judgements the positives of some queries stand, as (indptr, places), int64."""
        qrels = self._qrels(split)
        is_positive = np.flatnonzero(qrels.scores > 0)
        queries = qrels.query_rows[is_positive]
        low, high = np.searchsorted(queries, query_rows), np.searchsorted(queries, query_rows, side="right")
        indptr = np.concatenate([[0], np.cumsum(high - low)])
        within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], high - low)
        return indptr, is_positive[np.repeat(low, high - low) + within]

    def source_of(self, side: str, rows: np.ndarray) -> np.ndarray:
        """Return which source each row of "queries" or "corpus" belongs to, int64."""
        return np.searchsorted([source.first_row(side) for source in self.sources], rows, side="right") - 1

    def _qrels(self, split: str) -> Qrels:
        if split not in self.qrels:
            splits = ", ".join(sorted(self.qrels))
            choice = "choose one of these: data.train_split names the one to train on"
            raise InputError(f"{self.path} has no qrels/{split}.tsv, only {splits}; {choice}")
        return self.qrels[split]


def open_data(settings: DataSettings, sources: Sources) -> RetrievalData:
    """Return the data of a job: that of data.path, or that of all sources as one; raises InputError."""
    data = _opened(settings, sources)
    own_rows = data.own_rows if settings.ignore_identical_ids else np.full_like(data.own_rows, -1)
    return replace(data, num_proc=settings.num_proc, own_rows=own_rows)


def _opened(settings: DataSettings, sources: Sources) -> RetrievalData:
    if not sources:
        return open_dataset(settings.path, settings.cache, settings.columns, settings.strict)
    parts = [
        _named(open_dataset(source.path, settings.cache, columns_of(settings, source), settings.strict), name, source)
        for name, source in sources.items()
    ]
    if len(parts) == 1 and not parts[0].sources[0].settings.id_prefix:
        return parts[0]
    cache = cache_folder(settings.cache)
    depends_on = [[part.digest, part.sources[0].settings.id_prefix] for part in parts]
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    folders = [(_folder(cache, part.digest), part.sources[0]) for part in parts]
    folder = build_once(_folder(cache, digest), "texts of all sources", lambda staging: combine_sources(folders, staging))
    firsts = json.loads((folder / "about.json").read_text())["first_rows"]
    rows = tuple(
        SourceRows(name, query, passage, source) for (name, source), (query, passage) in zip(sources.items(), firsts, strict=True)
    )
    path = Path(" + ".join(str(source.path) for source in sources.values()))
    return replace(_open_tables(path, cache, folder, digest), sources=rows)


def open_dataset(
    path: Path, cache: Path | None = None, columns: Mapping[str, str] = NO_COLUMNS, strict: bool = False
) -> RetrievalData:
    """Return the data set at a path; raises InputError with file, line and reason at the first problem.

    Blemishes are counted and said once; with strict they are refused, too. columns: as data.columns.
    """
    cache = cache_folder(cache)
    source = find_source(path, columns)
    digest = _digest(source, cache)
    folder = build_once(_folder(cache, digest), f"texts of {path}", lambda staging: _build(source, staging))
    blemishes = [Blemishes(*each) for each in json.loads((folder / BLEMISHES).read_text())]
    for kind, times, first in blemishes:
        if strict:
            raise InputError(f"{first}; data.strict=true refuses that, data.strict=false reads the rest")
        log.info("%s%s", first, f"; … and {times - 1:,} more: {kind}" if times > 1 else "")
    return _open_tables(path, cache, folder, digest)


def _build(source: Source, folder: Path) -> None:
    report = Refusal()
    build_source(source, folder, report)
    (folder / BLEMISHES).write_text(json.dumps(report.blemishes()))


def data_files(settings: DataSettings, sources: Sources) -> dict[str, str]:
    """Return the SHA-256 of every file of a job's data, by path; an unchanged one is not read again. Raises InputError.

    What comes from a hub by name has no files that a person changes, and none here.
    """
    cache = cache_folder(settings.cache)
    found = [find_source(path, columns).files for path, columns in places_of(settings, sources) if path.exists()]
    return {str(file): file_digest(file, cache) for files in found for listed in files.values() for file in listed}


def _open_tables(path: Path, cache: Path, folder: Path, digest: str) -> RetrievalData:
    corpus, queries = (read_table(folder / f"{side}.arrow") for side in SIDES)
    qrels = {}
    for file in sorted(folder.glob("qrels-*.npy")):
        rows = np.load(file, mmap_mode="r", allow_pickle=False)
        split = file.stem.removeprefix("qrels-")
        absent_file = folder / f"absent-{split}.npy"
        absent = np.load(absent_file, allow_pickle=False) if absent_file.exists() else np.zeros(0, ABSENT)
        known = rows["query"], rows["passage"], rows["score"], rows["teacher"]
        qrels[split] = Qrels(*known, absent["query"], absent["score"])
    given = None
    if (folder / "given-ids.npy").exists():
        given = Given(*(np.load(folder / f"given-{name}.npy", mmap_mode="r") for name in ("indptr", "ids", "scores")))
    about = json.loads((folder / "about.json").read_text())
    whole = SourceRows("data", 0, 0, SourceSettings(path=path))
    keys = {side: np.load(folder / f"{side}-keys.npy", mmap_mode="r")[1].view(np.int64) for side in SIDES}
    own = np.load(folder / "own.npy", mmap_mode="r", allow_pickle=False)
    tables = (corpus, queries, qrels, digest, about["content"], keys, (whole,), about["has_prompts"], own, given)
    return RetrievalData(path, cache, *tables, form=about["form"])


def _named(part: RetrievalData, name: str, settings: SourceSettings) -> RetrievalData:
    return replace(part, sources=(SourceRows(name, 0, 0, settings),))


def _folder(cache: Path, digest: str) -> Path:
    return cache / f"data-{FORMAT}-{digest[:24]}"


def _digest(source: Source, cache: Path) -> str:
    digests = {name: [file_digest(file, cache) for file in files] for name, files in source.files.items()}
    depends_on = [source.kind, digests, dict(source.columns)]
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
