"""Exact search on a GPU: the k best passages of each query by a score that depends on the two embeddings alone.

Each query has k places for the best and a capacity for what came since. A block of passages is taken by `topk_steps.py`, which
appends what reaches the k-th best of a query; now and then the places are put in order, which raises that score. A block is cut
and the places are put in order by how many passages were seen: of n more, k n / seen are expected among the best of a corpus
without order. A query that has more than its capacity is searched again, in pieces that cannot overflow. Which ones, the host
reads while the next block is at work; so it waits for no block, but for one before the last.

The result is that of sorting all scores of `sums_of_pairs`: it depends neither on blocks nor on their order, so parts that
ranks have searched join to the same bytes.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gradcache.transfers import Arriving, upload
from trainer.encoder.fit import fits
from trainer.encoder.pair_scores import can_launch
from trainer.encoder.score_keys import NOTHING, pack_keys
from trainer.encoder.topk_steps import MAX_COLUMNS, Block, Queries, Take, plain_take, take_by_kernels

log = logging.getLogger(__name__)

MIN_CAPACITY = 1024  # places of a query beside its k
QUERIES_AT_ONCE = 65536  # bits of their scores: 64 MiB; putting them in order: 16 k bytes a query
PLAIN_QUERIES = 512  # of the plain way, which holds their scores


class BestOnGpu:
    """The k best passages so far of some queries. Memory: `bytes_on_gpu`, and some hundred MiB while it works."""

    def __init__(self, query_QD: np.ndarray | Tensor, k: int, device: torch.device, take: Take | None = None):
        """query_QD: float32 or float16. take: None: by kernels where Triton works."""
        given_QD = query_QD.to(device) if isinstance(query_QD, Tensor) else torch.tensor(query_QD, device=device)
        half_QD = _half_if_exact(given_QD)
        num_queries, capacity = len(half_QD), capacity_of(k)
        self._queries = Queries(
            half_QD,
            torch.linalg.vector_norm(half_QD, dim=1, dtype=torch.float32),
            torch.full((num_queries,), -torch.inf, device=device),
            torch.full((num_queries, k + capacity), NOTHING, device=device),
            torch.zeros(num_queries, dtype=torch.int32, device=device),
            k,
        )
        self._capacity, self._take = capacity, take or (take_by_kernels if can_launch(device) else plain_take)
        # Queries at once; fewer once memory was too small.
        self._most_rows = PLAIN_QUERIES if self._take is plain_take else QUERIES_AT_ONCE
        self._num_seen = self._num_ordered = 0  # passages; when the places were last put in order
        self._expected = 0.0  # places taken since
        self._waiting: list[tuple[Block, Tensor, Arriving]] = []  # blocks, which queries had too few places, how many

    def look_at(self, passage_ND: np.ndarray | Tensor, rows_n: np.ndarray, first_id: int = 0) -> None:
        """Let every query see some rows of a table; see `BestOf`."""
        start = 0
        while start < len(rows_n):
            rows = rows_n[start : start + self._size_of_next(len(rows_n) - start)]
            self._look_at_block(self._block(passage_ND, rows, first_id))
            start += len(rows)

    def add(self, scores_QK: np.ndarray, ids_QK: np.ndarray) -> None:
        """Take in what another search has found, (Q, K) each; id -1: nothing."""
        device = self._queries.key_QS.device
        key_QK = pack_keys(torch.as_tensor(scores_QK, device=device), torch.as_tensor(ids_QK, device=device))
        for part_QK in key_QK.split(self._capacity, 1):
            self._put_in_order()
            self._queries.key_QS[:, self._queries.k : self._queries.k + part_QK.shape[1]] = part_QK
        self._put_in_order()

    def keys(self, places: slice | None = None) -> np.ndarray:
        """Return what was found, (Q, k) int64 in no order; places: of these queries. Waits for the GPU."""
        self._search_again(num_left=0)
        key_qS = self._queries.key_QS[places if places is not None else slice(None)]
        best_qk = torch.empty(len(key_qS), self._queries.k, dtype=torch.int64, device=key_qS.device)

        def select(rows: slice) -> None:
            best_qk[rows] = key_qS[rows].topk(self._queries.k, sorted=False).values

        self._by_rows(len(key_qS), select)
        return best_qk.cpu().numpy()

    def _size_of_next(self, num_left: int) -> int:
        """Return how many passages the next block has; puts the places in order where they would hardly hold it."""
        wanted = min(num_left, MAX_COLUMNS)
        share, limit = self._expectation()
        if self._expected and self._expected + wanted * share > limit:
            self._put_in_order()
            share, limit = self._expectation()
        return min(wanted, max(1, int((limit - self._expected) / share)))

    def _expectation(self) -> tuple[float, int]:
        """Return the share of passages that are expected to take a place, and how many places may be expected to be taken.

        Of few passages all take a place, neither more nor fewer. Later numbers spread, for small k by much.
        """
        k = self._queries.k
        if self._num_ordered < k:
            return 1.0, self._capacity
        return k / self._num_ordered, min(self._capacity // 2, 4 * k)

    def _look_at_block(self, block: Block) -> None:
        over_Q = torch.empty(len(self._queries.count_Q), dtype=torch.uint8, device=block.passage_CD.device)
        self._by_rows(len(over_Q), lambda rows: self._take(self._queries.of(rows), block, over_Q[rows]))
        self._waiting.append((block, over_Q, Arriving(over_Q.sum()[None])))
        self._num_seen += len(block.passage_CD)
        self._expected += len(block.passage_CD) * self._expectation()[0]
        self._search_again(num_left=1)

    def _put_in_order(self) -> None:
        self._by_rows(len(self._queries.count_Q), lambda rows: self._queries.of(rows).put_in_order())
        self._num_ordered, self._expected = self._num_seen, 0.0

    def _search_again(self, num_left: int) -> None:
        """Search all blocks but the last ones again for the queries that had too few places."""
        while len(self._waiting) > num_left:
            block, over_Q, arriving = self._waiting.pop(0)
            if arriving.read()[0]:
                numbers_n = over_Q.nonzero()[:, 0]
                self._by_rows(len(numbers_n), functools.partial(self._in_pieces, block, numbers_n))

    def _in_pieces(self, block: Block, numbers_n: Tensor, rows: slice) -> None:
        """Search a block for some of the queries with these numbers, in pieces of as many passages as there are places."""
        numbers_n = numbers_n[rows]
        queries = self._queries.of(numbers_n)
        over_n = torch.empty(len(numbers_n), dtype=torch.uint8, device=numbers_n.device)
        for start in range(0, len(block.id_C), self._capacity):
            queries.put_in_order()
            self._take(queries, block.of(slice(start, start + self._capacity)), over_n)
        queries.put_in_order()
        self._queries.key_QS[numbers_n] = queries.key_QS
        self._queries.least_Q[numbers_n] = queries.least_Q
        self._queries.count_Q[numbers_n] = 0

    def _by_rows(self, num_rows: int, work: Callable[[slice], None]) -> None:
        """Do some work for slices of queries that fit into memory; where it does not fit it has changed nothing."""
        start = 0
        while start < num_rows:
            rows = slice(start, min(start + self._most_rows, num_rows))
            if fits(functools.partial(work, rows), may_halve=rows.stop - start > 1):
                start = rows.stop
            else:
                self._most_rows = (rows.stop - start) // 2
                log.warning("out of memory: the search goes on with %d queries at once", self._most_rows)

    def _block(self, passage_ND: np.ndarray | Tensor, rows_n: np.ndarray, first_id: int) -> Block:
        """Return some rows on the device, and all queries in one type with them."""
        device, first, last = self._queries.key_QS.device, int(rows_n[0]), int(rows_n[-1])
        is_slice = last - first + 1 == len(rows_n)
        if isinstance(passage_ND, Tensor):
            rows = slice(first, last + 1) if is_slice else upload(torch.from_numpy(rows_n), passage_ND.device)
            passage_CD = passage_ND[rows].to(device).contiguous()
        else:
            passage_CD = _from_host(passage_ND[first : last + 1] if is_slice else passage_ND[rows_n], device)
        if is_slice:
            id_C = torch.arange(first_id + first, first_id + last + 1, device=device)
        else:
            id_C = upload(torch.from_numpy(rows_n + first_id), device)
        if passage_CD.dtype != torch.float16 and self._queries.query_QD.dtype == torch.float16:
            self._queries = replace(self._queries, query_QD=self._queries.query_QD.float())
        passage_CD = passage_CD.to(self._queries.query_QD.dtype)
        norm_C = torch.linalg.vector_norm(passage_CD, dim=1, dtype=torch.float32)
        return Block(passage_CD, id_C, norm_C.nan_to_num(nan=0.0, posinf=torch.inf).amax())


def capacity_of(k: int) -> int:
    """Return how many passages a query has places for beside its k best: twice as many or more."""
    return max(MIN_CAPACITY, 1 << (2 * k - 1).bit_length())


def bytes_on_gpu(k: int, width: int, stored_bytes: int) -> int:
    """Return the bytes of a query: its embedding, places, norm, least score, count and the marks of two blocks."""
    return stored_bytes * width + 8 * (k + capacity_of(k)) + 3 * 4 + 2


def _half_if_exact(query_QD: Tensor) -> Tensor:
    """Return queries in float16 where that loses nothing, as it does of embeddings that were stored so; else in float32."""
    if query_QD.dtype == torch.float16:
        return query_QD.contiguous()
    query_QD = query_QD.float().contiguous()
    parts = query_QD.split(QUERIES_AT_ONCE)
    is_exact = all(torch.equal(part.half().float().nan_to_num(), part.nan_to_num()) for part in parts)
    return query_QD.half() if is_exact else query_QD


def _from_host(passage_CD: np.ndarray, device: torch.device) -> Tensor:
    """Return rows of a table, which may be a file's, on the device; neither side waits for the other."""
    dtype = torch.float16 if passage_CD.dtype == np.float16 else torch.float32
    host_CD = torch.empty(passage_CD.shape, dtype=dtype, pin_memory=device.type == "cuda")
    host_CD.numpy()[...] = passage_CD
    return host_CD.to(device, non_blocking=True)
