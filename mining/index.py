"""One index over each shard: exact search in torch, or any FAISS index by its factory string, on a GPU where there is one.

An index per shard, not per rank, makes the result independent of the number of ranks; the price is that IVF trains its
centroids on one shard. Passages that must not be found are left out of the index, not filtered afterwards.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mining.encode import Embeddings
from trainer.encoder.topk import top_k
from trainer.errors import InputError

log = logging.getLogger(__name__)

EXACT = "exact"


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """Section `index`."""

    factory: str = EXACT  # "exact", or a FAISS factory string for each shard: "Flat", "IVF64,Flat", "IVF64,SQ8", ...
    nprobe: int = 16  # cells of an IVF index that a query looks into; more: slower, better recall

    def __post_init__(self) -> None:
        if self.nprobe < 1:
            raise InputError(f"index.nprobe={self.nprobe} must be at least 1")


class ShardIndex(Protocol):
    """Finds passages of one shard."""

    def search(self, query_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores float32, ids int64), each (Q, k), best first; -inf and -1 fill up."""
        ...


@dataclass(frozen=True)
class ExactIndex:
    """The shard itself, memory-mapped."""

    passage_ND: np.ndarray
    first_id: int
    allowed_N: np.ndarray

    def search(self, query_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return top_k(query_QD, self.passage_ND, k, self.first_id, self.allowed_N)


@dataclass(frozen=True)
class FaissIndex:
    """A FAISS index of the shard's allowed passages."""

    index: object  # faiss.Index
    id_of_place: np.ndarray  # (allowed passages,) int64

    def search(self, query_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, places = self.index.search(np.ascontiguousarray(query_QD), k)  # type: ignore[attr-defined]
        # FAISS fills up with place -1 and a score of its own.
        found = places >= 0
        return np.where(found, scores, -np.inf).astype(np.float32), np.where(found, self.id_of_place[places], -1)


def build_indexes(
    settings: IndexSettings, passages: Embeddings, shards: Iterable[int], allowed_N: np.ndarray, device: int
) -> list[ShardIndex]:
    """Return an index over each of the given shards.

    allowed_N: passages that may be found, over the whole corpus.
    device: number of this rank's GPU, used if FAISS sees any.
    Raises InputError if the factory string is none. A shard with fewer passages than the index needs to be trained is
    searched exactly, and that is said.
    """
    exact = [_exact(passages, shard, allowed_N) for shard in shards]
    if settings.factory == EXACT:
        return list(exact)
    gpu = _gpu_resources()
    log.info("index %s on %s", settings.factory, "the GPU" if gpu else "the CPU: this FAISS sees no GPU")
    built = [_faiss(settings, index, gpu, device) for index in exact]
    num_small = sum(isinstance(index, ExactIndex) for index in built)
    if num_small:
        log.warning(
            "%d of %d shards are too small to train %s and are searched exactly",
            num_small,
            len(built),
            settings.factory,
        )
    return built


def _exact(passages: Embeddings, shard: int, allowed_N: np.ndarray) -> ExactIndex:
    rows = passages.shards.rows(shard)
    return ExactIndex(passages.shard(shard), int(rows[0]), allowed_N[rows])


def _faiss(settings: IndexSettings, exact: ExactIndex, gpu, device: int) -> ShardIndex:
    import faiss  # here: an exact search does without it, and it brings an OpenMP of its own

    passage_ND = np.ascontiguousarray(exact.passage_ND[exact.allowed_N])
    try:
        index = faiss.index_factory(exact.passage_ND.shape[1], settings.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"index.factory={settings.factory!r} is not a FAISS index for {exact.passage_ND.shape[1]} dimensions; "
            'expected "exact" or a factory string such as "Flat" or "IVF64,Flat"'
        ) from error
    if len(passage_ND) < max(1, _num_centroids(faiss, index)):
        return exact
    _set_nprobe(faiss, index, settings.nprobe)
    if not index.is_trained:
        index.train(passage_ND)
    index.add(passage_ND)
    if gpu is not None:
        index = faiss.index_cpu_to_gpu(gpu, device % faiss.get_num_gpus(), index)
    return FaissIndex(index, np.flatnonzero(exact.allowed_N) + exact.first_id)


def _num_centroids(faiss, index) -> int:
    """Return how many passages training needs at least: one for each centroid of its largest quantiser."""
    inner = faiss.downcast_index(index.index) if hasattr(index, "index") else index
    num_codes = 1 << inner.pq.nbits if hasattr(inner, "pq") else 1
    if hasattr(inner, "nlist"):
        inner.cp.min_points_per_centroid = 1  # small shards are meant; FAISS would warn on every one
        return max(inner.nlist, num_codes)
    return num_codes


def _set_nprobe(faiss, index, nprobe: int) -> None:
    inner = faiss.downcast_index(index.index) if hasattr(index, "index") else index
    if hasattr(inner, "nprobe"):
        inner.nprobe = min(nprobe, inner.nlist)


def _gpu_resources():
    """Return FAISS's memory on the GPU, one for all shards of a rank; None: no GPU, or a FAISS without."""
    import faiss

    has_gpu = getattr(faiss, "get_num_gpus", lambda: 0)() > 0
    return faiss.StandardGpuResources() if has_gpu else None
