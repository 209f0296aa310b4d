"""Vectors that a person supplies in the place of an encoder: of a model behind an API, or of a graph of citations (SciNCL).

A folder holds `queries.npy` and `passages.npy`, each (rows, D) floats with a row for every query and passage of the data set
in its order, which is checked where `queries.ids.txt` and `passages.ids.txt` stand beside them. Scores are inner products.
They are copied into shards; from there on they are treated as embeddings are.
"""

import hashlib
import itertools
import json
from pathlib import Path

import datasets
import numpy as np

from mining.find.embeddings import Embeddings
from mining.work import Work
from trainer.data.datasets import RetrievalData
from trainer.encoder.shards import Shards, rows_of_shard
from trainer.errors import InputError
from trainer.handoff.rights import unreadable

QUERIES, PASSAGES = "queries.npy", "passages.npy"
VECTORS = "vectors"  # field of a checkpoint's manifest: the folder, where no encoder was trained


def holds_vectors(folder: Path) -> bool:
    return (folder / PASSAGES).is_file() or (folder / QUERIES).is_file()


def hash_vectors(folder: Path, data: RetrievalData) -> str:
    """Return the SHA-256 over both files; raises InputError unless their rows are those of the data set."""
    queries, passages = _open(folder / QUERIES, len(data.queries), "query"), _open(folder / PASSAGES, len(data.corpus), "passage")
    for name, texts in ((QUERIES, data.queries), (PASSAGES, data.corpus)):
        _check_ids(ids_file(folder / name), texts)
    if queries.shape[1] != passages.shape[1]:
        raise InputError(f"{folder}: {QUERIES} is {queries.shape[1]} numbers wide and {PASSAGES} {passages.shape[1]}")
    digest = hashlib.sha256()
    for name in (QUERIES, PASSAGES):
        with open(folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def ids_file(vectors: Path) -> Path:
    """Return where the ids of a file's rows stand, one on each line, if they do; `negpool encode` writes them."""
    return vectors.with_suffix(".ids.txt")


def copy_vectors(work: Work, folder: Path, digest: str) -> tuple[Embeddings, Embeddings]:
    """Return the vectors of training queries and of all passages, in shards; those that are there are not copied again.

    digest: of both files. Raises InputError, naming the text, for a vector that is not finite. Collective.
    """
    data, query_rows = work.data, work.judgements.query_rows
    queries = _copy(work, folder / QUERIES, digest, query_rows, data.queries)
    return queries, _copy(work, folder / PASSAGES, digest, np.arange(len(data.corpus)), data.corpus)


def _copy(work: Work, path: Path, digest: str, rows: np.ndarray, texts: datasets.Dataset) -> Embeddings:
    ranks, settings = work.ranks, work.job.encode
    depends_on = {"digest": digest, "file": path.name, "rows": hashlib.sha256(rows.tobytes()).hexdigest(), **settings.numbers}
    fingerprint = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:24]
    shards = Shards(work.job.run.folder / "shards" / fingerprint, len(rows), rows_of_shard(len(rows)), settings)

    def missing_ones() -> list[int]:
        work.pins.hold(shards.folder)
        for shard in set(range(shards.num_shards)) - set(shards.missing()):
            shards.drop_torn(shard)
        return shards.missing()

    missing = ranks.decide(missing_ones)

    def copy_mine() -> None:
        vector_ND = np.load(path, mmap_mode="r", allow_pickle=False)
        for shard in missing[ranks.rank :: ranks.num_ranks]:
            own = rows[shards.rows(shard)]
            with np.errstate(over="ignore"):  # what becomes infinite is refused
                vector_nD = vector_ND[own].astype(settings.stored_type)
            is_finite = np.isfinite(vector_nD).all(1)
            if not is_finite.all():
                row = int(own[np.argmin(is_finite)])
                name = f"row {row}, for the text with id {texts[row]['_id']!r},"
                raise InputError(f"{path}: {name} is not finite as {settings.stored}; mend it, or set encode.stored=fp32")
            shards.publish(shard, vector_nD)
            ranks.check_stop()

    ranks.together(copy_mine)
    return Embeddings(shards)


def _check_ids(path: Path, texts: datasets.Dataset) -> None:
    """Raise InputError if ids stand beside vectors, and they are not those of the data set in its order."""
    if not path.is_file():
        return
    known = (name for batch in texts.with_format("arrow").iter(10_000) for name in batch.column("_id").to_pylist())
    with open(path, encoding="utf-8", newline="\n") as file:
        for row, (line, name) in enumerate(itertools.zip_longest(file, known)):
            if line is None or name is None or line.rstrip("\n") != name:
                raise InputError(
                    f"{path}:{row + 1} names {line and line.strip()!r}, and row {row} of the data set is {name!r}; "
                    "put the vectors in its order: negpool encode MODEL DIR --side query (or passage) does"
                )


def _open(path: Path, num_rows: int, kind: str) -> np.ndarray:
    """Return a file's vectors, memory-mapped; raises InputError for what is none."""
    if (told := unreadable(path)) is not None:
        raise InputError(told)
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; vectors are {QUERIES} and {PASSAGES} in one folder") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is no whole .npy file: {error}") from error
    if found.ndim != 2 or found.dtype.kind != "f" or len(found) != num_rows:
        raise InputError(
            f"{path} holds {found.dtype} of shape {found.shape}, expected floats of shape ({num_rows}, D), "
            f"a row for each {kind} of the data set, in its order"
        )
    return found
