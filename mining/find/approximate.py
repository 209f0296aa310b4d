"""Approximate search: an index of FAISS over this rank's shards, in the one trained state that all ranks have.

Lists are chosen in fixed batches, each by one thread: a product's last bits depend on its shape and its threads, and a passage
or a query that stands between two lists must not change sides with the number of ranks. A score within a list depends on the
query and the passage alone. So what the ranks find together depends on the trained state and on nothing else, but for HNSW.

A GPU takes over the lists when the first query comes. Its scores have other last bits: they are taken anew from the embeddings.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mining.find.embeddings import Embeddings
from mining.find.entries import Entries
from mining.find.index import SCORES_ARE_EXACT, ivf_of, load_faiss
from mining.find.on_gpu import GPU_MOST, gpu_copy, nearest_lists
from trainer.encoder.score_keys import NOTHING

BATCH = 256  # rows or queries whose lists are chosen by one product: counted from the first of a shard, or of all queries
SPARE = 2  # candidates for each one that is wanted, where scores are approximate


class ApproximateFinder:
    """A `Finder` (see search.py) for any queries, and any number of passes. Memory: `bytes_of_passage` for each entry."""

    def __init__(
        self,
        factory: str,
        index: Any,
        entries: Entries,
        queries: Embeddings | None,
        k: int,
        shard_rows: int,
        device: torch.device,
    ):
        """index: of FAISS, trained, empty. queries: whose `keys` are asked for; None: only `search` is. k: passages wanted."""
        self._faiss = load_faiss(factory)
        self._entries, self._queries, self._shard_rows, self._device = entries, queries, shard_rows, device
        self._ivf = ivf_of(self._faiss, index)
        self._index = index if self._ivf is not None else self._faiss.IndexIDMap(index)
        self._inner = index
        self._gpu: Any = None
        self._kept: Any = None  # what has to live as long as that
        self._is_sealed = False
        self._seen = set[int]()
        self._wants_gpu = device.type == "cuda" and self._ivf is not None
        self.is_exact = SCORES_ARE_EXACT.fullmatch(factory) is not None and not self._wants_gpu
        self.depth = k if self.is_exact else SPARE * k
        self._nprobe = 1

    @property
    def nprobe(self) -> int:
        """How many lists a query looks into; of a graph, how many passages it keeps in sight."""
        return self._nprobe

    @property
    def most_nprobe(self) -> int:
        """The largest nprobe that changes anything."""
        if self._ivf is None:
            return max(1, self._index.ntotal)
        return min(self._ivf.nlist, GPU_MOST) if self._gpu is not None else self._ivf.nlist

    def set_nprobe(self, nprobe: int) -> None:
        self._seal()
        self._nprobe = min(nprobe, self.most_nprobe)
        for index in (self._ivf, self._gpu):
            if index is not None:
                index.nprobe = self._nprobe
        if hasattr(self._inner, "hnsw"):
            self._inner.hnsw.efSearch = self._nprobe

    def see(self, shard: int, vectors: Tensor | np.ndarray) -> None:
        """Add the entries of a shard."""
        assert shard not in self._seen and not self._is_sealed, f"shard {shard} is added twice, or after the first query"
        self._seen.add(shard)
        first = shard * self._shard_rows
        row_n = np.flatnonzero(self._entries.is_entry_N[first : first + len(vectors)])
        if not len(row_n):
            return
        id_n = row_n + first
        lists_n = None if self._ivf is None else nearest_lists(self._faiss, self._ivf, self._inner, vectors, row_n, BATCH)
        table = vectors.cpu().numpy() if isinstance(vectors, Tensor) else vectors
        passage_nD = np.ascontiguousarray(table[row_n], np.float32)
        if self._ivf is None:
            self._index.add_with_ids(passage_nD, id_n)
            return
        batches = [slice(start, start + BATCH) for start in range(0, len(row_n), BATCH)]
        with _single_threads(self._faiss) as map_batches:
            moved_nD = np.concatenate(list(map_batches(lambda rows: self._moved(passage_nD[rows]), batches)))
            if not self._takes_lists:
                list(map(lambda rows: self._ivf.add_with_ids(moved_nD[rows], id_n[rows]), batches))
                return
            if lists_n is None:
                lists_n = np.concatenate(list(map_batches(lambda rows: self._lists(moved_nD[rows], 1)[1][:, 0], batches)))
        pointers = (self._faiss.swig_ptr(each) for each in (moved_nD, id_n, lists_n))
        self._ivf.add_core(len(id_n), *pointers)

    def keys(self, places: slice) -> np.ndarray:
        """Return the best of the shards seen, (Q, depth) int64 in no order."""
        assert self._queries is not None
        first, stop = places.start // BATCH * BATCH, min(-(-places.stop // BATCH) * BATCH, self._queries.shards.num_rows)
        wanted = slice(places.start - first, places.stop - first)
        return self.search(self._queries.read(np.arange(first, stop)), wanted)

    def search(self, query_QD: np.ndarray, wanted: slice | None = None) -> np.ndarray:
        """Return the best for some rows of a table of queries, float32, as `keys` does. The table begins with a batch."""
        self._seal()
        wanted = slice(0, len(query_QD)) if wanted is None else wanted

        def find(start: int) -> np.ndarray:
            batch_BD = self._moved(query_QD[start : start + BATCH])
            rows = slice(max(0, wanted.start - start), min(len(batch_BD), wanted.stop - start))
            chosen = None if self._ivf is None or self._gpu is not None else self._lists(batch_BD, self._nprobe)
            return self._best(batch_BD[rows], None if chosen is None else [each[rows] for each in chosen])

        with _single_threads(self._faiss, 1 if self._gpu is not None else None) as map_batches:
            starts = range(wanted.start // BATCH * BATCH, wanted.stop, BATCH)
            return np.concatenate([np.empty((0, self.depth), np.int64), *map_batches(find, starts)])

    def list_sizes(self) -> np.ndarray:
        """Return how many entries are in each list here, (L,) int64; one list where there are none."""
        if self._ivf is None:
            return np.array([self._index.ntotal])
        lists = self._ivf.invlists
        return np.array([lists.list_size(number) for number in range(self._ivf.nlist)])

    @property
    def _takes_lists(self) -> bool:
        """Whether rows can be added to lists that were chosen before; packed codes are added by their own way."""
        return not isinstance(self._ivf, self._faiss.IndexIVFFastScan)

    def _best(self, query_BD: np.ndarray, chosen: list[np.ndarray] | None) -> np.ndarray:
        """Return the best passages of some queries; asks for more entries while what is cut off may be as good."""
        found_Bk = np.full((len(query_BD), self.depth), NOTHING)
        most = min(self._index.ntotal if self._ivf is None else self._ivf.ntotal, GPU_MOST if self._gpu is not None else 1 << 31)
        num_asked, open_rows = min(self.depth + 1, most), np.arange(len(query_BD) if most else 0)
        while len(open_rows):
            scores, ids = self._ask(query_BD[open_rows], num_asked, None if chosen is None else [c[open_rows] for c in chosen])
            is_settled = self._entries.are_settled(scores, ids, self.depth) | (num_asked == most)
            found_Bk[open_rows[is_settled]] = self._entries.spread(scores[is_settled], ids[is_settled], self.depth)
            open_rows, num_asked = open_rows[~is_settled], min(2 * num_asked, most)
        return found_Bk

    def _ask(self, query_BD: np.ndarray, num_asked: int, chosen: list[np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
        if chosen is None:
            return (self._index if self._gpu is None else self._gpu).search(query_BD, num_asked)
        scores_BL, lists_BL = chosen
        return self._ivf.search_preassigned(query_BD, num_asked, lists_BL, scores_BL)

    def _lists(self, batch_BD: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, numbers) of the lists nearest to each row, (B, num) each."""
        return self._ivf.quantizer.search(batch_BD, num)

    def _moved(self, batch_BD: np.ndarray) -> np.ndarray:
        """Return rows as the lists have them, behind the index's transformations."""
        moved_BD = np.ascontiguousarray(batch_BD, np.float32)
        if self._ivf is not None and isinstance(self._inner, self._faiss.IndexPreTransform):
            for place in range(self._inner.chain.size()):
                moved_BD = self._faiss.downcast_VectorTransform(self._inner.chain.at(place)).apply(moved_BD)
        return moved_BD

    def _seal(self) -> None:
        """Let no more shards come, and hand the lists to the GPU where there is one."""
        if not self._is_sealed and self._wants_gpu and self.depth < GPU_MOST:
            self._gpu, self._kept = gpu_copy(self._faiss, self._ivf, self._device) or (None, None)
        self._is_sealed = True


@contextmanager
def _single_threads(faiss: Any, num_workers: int | None = None) -> Iterator[Any]:
    """Yield a map whose calls run side by side, each on one thread of FAISS's and of its products'."""
    with ThreadPoolExecutor(num_workers or torch.get_num_threads(), initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        yield pool.map
