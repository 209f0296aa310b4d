"""One index over each block of shards: exact search in torch, or any FAISS index by its factory string, on a GPU if there is one.

FAISS is an extra of the installation; exact search, the default, does not need it.

An index per block of shards, not per rank, makes the result independent of the number of ranks; the price is that IVF trains
its centroids on one block. Passages that must not be found are left out of the index, not filtered afterwards.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from mining.find.centroids import Centroids
from mining.find.embeddings import Embeddings
from mining.settings import EXACT, IndexSettings
from trainer.encoder.topk import BestOf
from trainer.errors import InputError

log = logging.getLogger(__name__)

GPU_MAX_K = 2048  # of FAISS


class ShardIndex(Protocol):
    """Finds passages of one shard."""

    @property
    def device(self) -> torch.device:
        """Where what was found is kept."""
        ...

    def search_into(self, best: BestOf) -> None:
        """Add what the shard has for the queries of `best`."""
        ...


@dataclass(frozen=True)
class ExactIndex:
    """The shard itself, memory-mapped; its pages leave the process when it has been searched."""

    passages: Embeddings
    shard: int
    allowed_n: np.ndarray  # rows of the shard that may be found
    device: torch.device

    def search_into(self, best: BestOf) -> None:
        best.look_at(self.passages.shard(self.shard), self.allowed_n, int(self.passages.shards.rows(self.shard)[0]))
        self.passages.let_go(self.shard)


@dataclass(frozen=True)
class FaissIndex:
    """A FAISS index of the allowed passages of a block."""

    index: object  # faiss.Index
    id_of_place: np.ndarray  # (allowed passages,) int64
    device: ClassVar = torch.device("cpu")

    def search_into(self, best: BestOf) -> None:
        scores, places = self.index.search(np.ascontiguousarray(best.query_QD), best.k)  # type: ignore[attr-defined]
        # FAISS fills up with place -1 and a score of its own.
        best.add(scores, np.where(places >= 0, self.id_of_place[places], -1))


def build_indexes(
    settings: IndexSettings,
    passages: Embeddings,
    blocks: Iterable[int],
    allowed_N: np.ndarray,
    device: torch.device,
    k: int,
    centroids: Centroids,
) -> list[ShardIndex]:
    """Return what searches the given blocks: an index over each, or the shards themselves.

    allowed_N: passages that may be found, over the whole corpus.
    device: of exact search, and of FAISS if it sees any GPU.
    k: how many will be asked for; FAISS on a GPU finds at most GPU_MAX_K, and beyond that it works on the CPU.
    centroids: of IVF indexes; where there are some of a block its index starts from them.
    Raises InputError if the factory string is none, or needs a FAISS that is not there. A block with fewer passages than
    the index needs to be trained is searched exactly, and that is said.
    """
    exact = {block: [_exact(passages, shard, allowed_N, device) for shard in passages.block(block)] for block in blocks}
    if settings.factory == EXACT:
        return [index for block in exact.values() for index in block]
    faiss = load_faiss(settings.factory)
    gpu = faiss.StandardGpuResources() if k <= GPU_MAX_K and num_gpus_of(faiss) else None
    why = f"search.top_k={k} is more than {GPU_MAX_K}" if k > GPU_MAX_K else "this FAISS sees no GPU"
    log.info("index %s on %s", settings.factory, "the GPU" if gpu else f"the CPU: {why}")
    found = {block: _faiss(faiss, settings, block, indexes, gpu, centroids) for block, indexes in exact.items()}
    built: list[ShardIndex] = []
    for block, index in found.items():
        built += exact[block] if index is None else [index]
    num_small = sum(index is None for index in found.values())
    if num_small:
        log.warning(
            "%d of %d blocks are too small to train %s and are searched exactly",
            num_small,
            len(found),
            settings.factory,
        )
    return built


def _exact(passages: Embeddings, shard: int, allowed_N: np.ndarray, device: torch.device) -> ExactIndex:
    return ExactIndex(passages, shard, np.flatnonzero(allowed_N[passages.shards.rows(shard)]), device)


def load_faiss(factory: str) -> Any:
    """Return FAISS for an index that is not exact search; raises InputError where it is not installed."""
    try:
        import faiss  # here: exact search does without it, and it brings an OpenMP of its own
    except ImportError as error:
        raise InputError(
            f"index.factory={factory!r} needs FAISS, which cannot be imported ({error}); run pip install 'negpool[faiss]', "
            "or 'negpool[faiss-gpu]' for one that uses CUDA, or set index.factory to \"exact\""
        ) from error
    return faiss


def _faiss(faiss, settings: IndexSettings, block: int, exact: list[ExactIndex], gpu, centroids: Centroids) -> FaissIndex | None:
    """Return an index over what the shards of a block have, or None if that is too little to train it."""
    passages = exact[0].passages
    passage_ND = np.concatenate([np.asarray(passages.shard(part.shard)[part.allowed_n], np.float32) for part in exact])
    for part in exact:
        passages.let_go(part.shard)
    index = _empty(faiss, settings.factory, passage_ND.shape[1])
    if len(passage_ND) < max(1, _num_centroids(faiss, index)):
        return None
    _set_nprobe(faiss, index, settings.nprobe)
    quantizer = _flat_quantizer(faiss, index)
    if quantizer is not None and (kept_KD := centroids.of_shard(block)) is not None:
        quantizer.train(kept_KD)
        quantizer.add(kept_KD)  # training is then left to what compresses
    if not index.is_trained:
        index.train(passage_ND)
    if quantizer is not None:
        centroids.keep(block, quantizer.reconstruct_n(0, quantizer.ntotal))
    index.add(passage_ND)
    if gpu is not None:
        index = faiss.index_cpu_to_gpu(gpu, (exact[0].device.index or 0) % faiss.get_num_gpus(), index)
    return FaissIndex(index, np.concatenate([part.allowed_n + int(passages.shards.rows(part.shard)[0]) for part in exact]))


def _flat_quantizer(faiss, index):
    """Return what holds the centroids of an IVF index one by one; None: none does, or in a space that is trained, too."""
    quantizer = getattr(index, "quantizer", None)
    quantizer = None if quantizer is None else faiss.downcast_index(quantizer)
    return quantizer if isinstance(quantizer, faiss.IndexFlat) else None


def _inner(faiss, index):
    """Return the index behind a transformation of its vectors, if there is one."""
    return faiss.downcast_index(index.index) if hasattr(index, "index") else index


def _num_centroids(faiss, index) -> int:
    """Return how many passages training needs at least: one for each centroid of its largest quantiser."""
    inner = _inner(faiss, index)
    num_codes = 1 << inner.pq.nbits if hasattr(inner, "pq") else 1
    if hasattr(inner, "nlist"):
        inner.cp.min_points_per_centroid = 1  # small shards are meant; FAISS would warn on every one
        return max(inner.nlist, num_codes)
    return num_codes


def _set_nprobe(faiss, index, nprobe: int) -> None:
    inner = _inner(faiss, index)
    if hasattr(inner, "nprobe"):
        inner.nprobe = min(nprobe, inner.nlist)


def num_gpus_of(faiss) -> int:
    """Return how many GPUs a FAISS sees."""
    return getattr(faiss, "get_num_gpus", lambda: 0)()


def bytes_of_passage(factory: str, width: int) -> int:
    """Return how many bytes a passage takes in an index; 0: exact search, which maps files. Raises InputError."""
    if factory == EXACT:
        return 0
    faiss = load_faiss(factory)
    index = _empty(faiss, factory, width)
    inner = _inner(faiss, index)
    links = 5 * inner.hnsw.nb_neighbors(0) if hasattr(inner, "hnsw") else 0  # 4 bytes each, and those of higher levels
    holder = faiss.downcast_index(inner.storage) if links else index
    room = 1.25 if hasattr(inner, "nlist") else 1  # lists of cells grow by doubling
    return math.ceil(room * (holder.sa_code_size() + links + 8)) + 8  # ids of FAISS, and ours


def _empty(faiss, factory: str, width: int):
    try:
        return faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"index.factory={factory!r} is not a FAISS index for {width} dimensions; "
            'expected "exact", "auto" or a factory string such as "Flat" or "IVF64,Flat"'
        ) from error
