"""Exact search: the k best passages of each query, by (score descending, id ascending); `topk_gpu.py` does it on a GPU.

On a CPU one tile of scores is held at a time. One comparison of a group's largest score with the k-th best so far drops what
cannot be among the k best. So nearly all of the time goes into the product; selecting from every score would take longer than
the product. A score and an id are kept as one integer whose order is the wanted one. The order is total, so the
result does not depend on how the passages were cut into parts, but for the last bits of a product.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.encoder.fit import fits
from trainer.encoder.score_keys import NOTHING, pack_keys, unpack_keys
from trainer.encoder.topk_gpu import BestOnGpu, bytes_on_gpu

log = logging.getLogger(__name__)

# Scores of a tile: on a CPU a few MB, which its caches hold, with enough rows for the product's full rate.
TILE_SCORES, TILE_SCORES_GPU = 1 << 21, 1 << 28
MIN_COLUMNS, MAX_COLUMNS = 4096, 65536  # of a tile; 16 k within these: selecting costs k for each tile
LANES = 8  # columns of a group


class Search(Protocol):
    """What finds the k best passages on one kind of device."""

    def look_at(self, passage_ND: np.ndarray | Tensor, rows_n: np.ndarray, first_id: int = 0) -> None: ...

    def add(self, scores_QK: np.ndarray, ids_QK: np.ndarray) -> None: ...

    def keys(self, places: slice | None = None) -> np.ndarray: ...


class BestOf:
    """The k best passages so far of some queries. Memory: `bytes_of_query`, and a tile or a block while it looks at passages."""

    def __init__(self, query_QD: np.ndarray | Tensor, k: int, device: torch.device | str = "cpu"):
        """query_QD: float32 or float16, on the host or on the device; it must not be written to."""
        device = torch.device(device)
        self._search: Search = BestOnGpu(query_QD, k, device) if device.type == "cuda" else BestOnCpu(query_QD, k, device)

    def look_at(self, passage_ND: np.ndarray | Tensor, rows_n: np.ndarray, first_id: int = 0) -> None:
        """Let every query see some rows of a table of passages, each passage once.

        passage_ND: float16 or float32: a map of a file for example, read tile by tile; or a tensor, on the device of the search
        or elsewhere. A GPU may read a tensor until `keys` is called or two more are looked at: it must not be written to.
        rows_n: int64, ascending; ids are first_id + row, from 0 to 2^32 - 2.
        """
        self._search.look_at(passage_ND, rows_n, first_id)

    def add(self, scores_QK: np.ndarray, ids_QK: np.ndarray) -> None:
        """Take in what another search has found, (Q, K) each; id -1: nothing."""
        self._search.add(scores_QK, ids_QK)

    def keys(self, places: slice | None = None) -> np.ndarray:
        """Return what was found, (Q, k) int64 in no order; `best_of_keys` joins the keys of several searches.

        places: of these queries only.
        """
        return self._search.keys(places)


class BestOnCpu:
    """The search of `BestOf` by tiles of scores, in plain torch."""

    def __init__(self, query_QD: np.ndarray | Tensor, k: int, device: torch.device):
        self.k = k
        if isinstance(query_QD, np.ndarray) and not query_QD.flags.writeable:  # a map of a file, which torch warns of
            query_QD = query_QD.copy()
        self._query_QD = torch.as_tensor(query_QD, dtype=torch.float32, device=device)
        self._keys_Qk = torch.full((len(query_QD), k), NOTHING, device=device)
        self._most_rows = max(1, len(query_QD))  # of a tile; fewer once memory was too small, which moves the last bits of scores

    def look_at(self, passage_ND: np.ndarray | Tensor, rows_n: np.ndarray, first_id: int = 0) -> None:
        passage_ND = passage_ND.cpu().numpy() if isinstance(passage_ND, Tensor) else passage_ND
        tile_rows, tile_columns = tile_shape(self.k, self._query_QD.device.type)
        tiles = [slice(row, row + tile_rows) for row in range(0, len(self._query_QD), tile_rows)]
        device, spaces = self._query_QD.device, threading.local()

        def select(rows: slice) -> None:
            query_tD = self._query_QD[rows]
            if not hasattr(spaces, "scores") or len(spaces.scores) < len(query_tD) * tile_columns:  # fresh memory is slower
                spaces.scores = self._query_QD.new_empty(len(query_tD) * tile_columns)
            score_tC = spaces.scores[: len(query_tD) * len(passage_CD)].view(len(query_tD), len(passage_CD))
            torch.mm(query_tD, passage_CD.T, out=score_tC)
            score_tC[:, len(seen_C) :] = -torch.inf
            self._keys_Qk[rows] = _select(self._keys_Qk[rows], score_tC, ids_C)

        def select_fitting(rows: slice) -> None:
            first, stop = rows.start, min(rows.stop, len(self._query_QD))
            middle = (first + stop) // 2
            if stop - first <= self._most_rows:
                if fits(lambda: select(slice(first, stop)), may_halve=stop - first > 1):
                    return
                vars(spaces).clear()
                self._most_rows = max(1, middle - first)
                log.warning("out of memory: the search goes on with %d queries at once", self._most_rows)
            select_fitting(slice(first, middle))
            select_fitting(slice(middle, stop))

        with _side_by_side(len(tiles)) as map_tiles:
            for start in range(0, len(rows_n), tile_columns):
                seen_C = rows_n[start : start + tile_columns]
                passage_CD = _padded(_rows_of(passage_ND, seen_C), np.float32, device)
                ids_C = _padded(first_id + seen_C, np.int64, device)
                list(map_tiles(select_fitting, tiles))

    def add(self, scores_QK: np.ndarray, ids_QK: np.ndarray) -> None:
        device, k = self._keys_Qk.device, self.k
        keys_QK = pack_keys(torch.as_tensor(scores_QK, device=device), torch.as_tensor(ids_QK, device=device))
        self._keys_Qk = torch.cat([self._keys_Qk, keys_QK], 1).topk(k, sorted=False).values

    def keys(self, places: slice | None = None) -> np.ndarray:
        return self._keys_Qk[places if places is not None else slice(None)].numpy()


def best_of_keys(parts: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores float32, ids int64), each (Q, k), of the best keys of several searches for the same queries."""
    keys_Qn = torch.from_numpy(np.concatenate(parts, axis=1))
    keys_Qk = keys_Qn.topk(k).values if keys_Qn.shape[1] > k else keys_Qn.sort(descending=True).values
    scores_Qk, ids_Qk = unpack_keys(keys_Qk)
    return scores_Qk.numpy(), ids_Qk.numpy()


def merge_top_k(parts: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best k of several (scores, ids) of the same queries, by score descending, then id; -1 ids last."""
    return best_of_keys([pack_keys(torch.as_tensor(scores), torch.as_tensor(ids)).numpy() for scores, ids in parts], k)


def top_k(
    query_QD: np.ndarray,
    passage_ND: np.ndarray,
    k: int,
    first_id: int = 0,
    allowed_N: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores float32, ids int64), each (Q, k), of the best inner products, best first.

    first_id: number of the first passage; ids are first_id + row.
    allowed_N: passages that may be returned; None: all.
    Fewer than k passages: the rest is filled with score -inf and id -1.
    """
    best = BestOf(query_QD, k, device)
    rows = np.arange(len(passage_ND)) if allowed_N is None else np.flatnonzero(allowed_N)
    best.look_at(passage_ND, rows, first_id)
    return best_of_keys([best.keys()], k)


@contextlib.contextmanager
def _side_by_side(num_tiles: int) -> Iterator[Callable[..., Iterator]]:
    """Yield a map over tiles. Each thread takes whole tiles: threads that share one wait for each other at every operation."""
    num_threads = torch.get_num_threads()
    num_workers = min(num_threads, num_tiles)
    if num_workers <= 1:
        yield map
        return
    # set_num_threads is about the thread that calls it, and about threads that are yet to begin.
    with ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(num_threads // num_workers,)) as pool:
        yield pool.map
    torch.set_num_threads(num_threads)


def bytes_of_query(k: int, width: int, device_type: str, stored_bytes: int = 2) -> int:
    """Return the bytes that a query takes for as long as it is searched for, on the device.

    stored_bytes: of a number of an embedding on disk, float16 or float32. A CPU computes in float32 whatever is stored. Where a
    GPU is given float32 queries it holds them, too, until it has seen that float16 is enough.
    """
    return 4 * width + 8 * k if device_type == "cpu" else bytes_on_gpu(k, width, stored_bytes)


def tile_shape(k: int, device_type: str) -> tuple[int, int]:
    """Return (queries, passages) of a tile of scores. It decides the last bits of a product: nothing else may."""
    columns = min(MAX_COLUMNS, max(MIN_COLUMNS, 1 << (16 * k - 1).bit_length()))
    return (TILE_SCORES if device_type == "cpu" else TILE_SCORES_GPU) // columns, columns


def _rows_of(passage_ND: np.ndarray, rows_n: np.ndarray) -> np.ndarray:
    """Return some rows; consecutive ones as a view, because the caller copies them anyway."""
    first, last = int(rows_n[0]), int(rows_n[-1])
    return passage_ND[first : last + 1] if last - first + 1 == len(rows_n) else passage_ND[rows_n]


def _padded(values_C: np.ndarray, dtype: type, device: torch.device) -> Tensor:
    """Return a tile's passages or ids on the device, followed by zeros up to whole groups."""
    padded_C = np.zeros((-(-len(values_C) // LANES) * LANES, *values_C.shape[1:]), dtype)
    padded_C[: len(values_C)] = values_C
    return torch.from_numpy(padded_C).to(device)


def _select(keys_tk: Tensor, score_tC: Tensor, ids_C: Tensor) -> Tensor:
    """Return the k largest keys of those there and those of a tile of scores, (t, k)."""
    (num_rows, k), num_columns = keys_tk.shape, score_tC.shape[1]
    num_groups = num_columns // LANES  # group g: columns g, g + num_groups, ...
    best_tG = score_tC.view(num_rows, LANES, num_groups).amax(1)
    least_t = unpack_keys(keys_tk.amin(1))[0]
    if num_groups >= k and bool(torch.isneginf(least_t).any()):
        # k groups whose best is as good as this have k passages as good.
        least_t = torch.maximum(least_t, best_tG.topk(k, sorted=False).values.amin(1))
    least_t = least_t.clamp(min=torch.finfo(torch.float32).min)  # what fills up a tile has less
    group_g = _where((best_tG >= least_t[:, None]).flatten())[:, None]
    row_g = group_g // num_groups
    place_gL = row_g * num_columns + group_g % num_groups + num_groups * torch.arange(LANES, device=ids_C.device)
    score_gL = score_tC.flatten().index_select(0, place_gL.flatten()).view(place_gL.shape)
    survivor_n = _where((score_gL >= least_t[row_g]).flatten())
    place_n = place_gL.flatten().index_select(0, survivor_n)
    row_n = place_n // num_columns
    keys_n = pack_keys(score_gL.flatten().index_select(0, survivor_n), ids_C.index_select(0, place_n % num_columns))
    # From a list of survivors, ordered by row, to a table as wide as the row with the most of them.
    num_t = torch.bincount(row_n, minlength=num_rows)
    order_n = torch.arange(len(row_n), device=row_n.device) - (num_t.cumsum(0) - num_t)[row_n]
    pool_tK = keys_tk.new_full((num_rows, k + int(num_t.amax())), NOTHING)
    pool_tK[:, :k] = keys_tk
    pool_tK[row_n, k + order_n] = keys_n
    return pool_tK.topk(k, sorted=False).values


def _where(is_so_n: Tensor) -> Tensor:
    """Return the places of what is so; numpy's search takes a tenth of torch's time."""
    return torch.from_numpy(np.flatnonzero(is_so_n.numpy()))
