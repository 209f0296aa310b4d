"""Approximate search against exact search: what an index takes, its build included, and what it finds for what it looks at.

The index is the service's own: one for the whole corpus, with as many lists as `index.factory = "auto"` would take, whose nprobe
is doubled until it finds enough. Beside it stands an index for every block of 65,536 passages, with lists of the same size: at
the same work it finds less, because a query's neighbours are in every block, and in each it looks into its share of the lists.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from launch.bench.exact_search import SHARD_ROWS
from launch.output import messages
from mining.find.approximate import ApproximateFinder
from mining.find.cost import Load, estimate_costs
from mining.find.entries import Entries
from mining.find.index import num_lists, num_trained
from mining.find.rates import measure_rates
from mining.find.trained import sample_rows, train_index
from mining.settings import EXACT
from mining.table.audit import recall_of_each
from trainer.encoder.topk import BestOf, best_of_keys, merge_top_k

TOP_K, MIN_RECALL = 200, 0.95
CLUSTER = 1000  # made embeddings around one middle: a query's neighbours are a fifth of them
PROBED_QUERIES = 512  # whose recall is measured for every nprobe
BLOCK_ROWS = 65536  # of an index of its own, at most, in the comparison
ENOUGH = 0.995  # recall beyond which there is nothing more to see
MOST_SHARE = 0.5  # of the corpus that a query looks at, in a picture


@dataclass(frozen=True)
class Searched:
    """Embeddings, float32, and how they are searched."""

    query_QD: np.ndarray
    passage_ND: np.ndarray
    device: torch.device

    def probed(self) -> np.ndarray:
        """Return the queries whose recall is measured."""
        return self.query_QD[:: -(-len(self.query_QD) // PROBED_QUERIES)]


Made = Callable[[int, int, int, int], np.ndarray]  # so many vectors, of a width, of a seed, in so many clusters


def made_embeddings(make: Made, num_queries: int, num_passages: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return made embeddings of queries and passages around the same middles, in random order."""
    num_clusters = max(4, num_passages // CLUSTER)
    return make(num_queries, width, 1, num_clusters), make(num_passages, width, 0, num_clusters)


@dataclass(frozen=True)
class Point:
    """What is found by what is looked at."""

    nprobe: int
    share: float  # of the corpus, that a query looks at
    recall: float
    seconds_of_query: float


def measure_index(searched: Searched, wanted: float | None = None) -> dict[str, Any]:
    """Return what exact search takes and what an index takes, for all queries, and the index's recall by what it looks at."""
    exact_s, _ = _timed(lambda: _exact_ids(searched, searched.query_QD))
    exact_Pk = _exact_ids(searched, searched.probed())
    factory = _factory_of(searched)
    messages().print(f"[dim]exact search: {exact_s:.1f} s; now {factory}[/dim]")
    train_s, index = _timed(lambda: train_index(factory, _sample(factory, searched.passage_ND), searched.device))
    entries = Entries(np.ones(len(searched.passage_ND), bool))
    finder = ApproximateFinder(factory, index, entries, None, TOP_K, SHARD_ROWS, searched.device)
    add_s, _ = _timed(lambda: _add(finder, searched.passage_ND))
    points = list(_points_of_one(finder, index, searched, exact_Pk))
    best = next((point for point in points if point.recall >= MIN_RECALL), points[-1])
    finder.set_nprobe(best.nprobe)
    search_s, _ = _timed(lambda: finder.search(searched.query_QD))
    seconds = train_s + add_s + search_s
    return {
        "queries": len(searched.query_QD),
        "passages": len(searched.passage_ND),
        "width": searched.passage_ND.shape[1],
        "top_k": TOP_K,
        "min_recall": MIN_RECALL,
        "factory": factory,
        "nprobe": best.nprobe,
        "recall": best.recall,
        "seconds": {"exact": exact_s, "training": train_s, "adding": add_s, "searching": search_s},
        "index_s": seconds,
        "ratio": round(seconds / exact_s, 3),
        "wanted": wanted,
        "points": [asdict(point) for point in points],
        "points_of_blocks": [asdict(point) for point in _points_of_blocks(searched, num_lists(factory), exact_Pk)],
    }


def _exact_ids(searched: Searched, query_QD: np.ndarray) -> np.ndarray:
    best = BestOf(query_QD, TOP_K, searched.device)
    for first in range(0, len(searched.passage_ND), SHARD_ROWS):
        shard_ND = searched.passage_ND[first : first + SHARD_ROWS]
        best.look_at(shard_ND, np.arange(len(shard_ND)), first)
    return best_of_keys([best.keys()], TOP_K)[1]


def _factory_of(searched: Searched) -> str:
    """Return the cheapest index of lists, by the rates that the service measures."""
    num, width = searched.passage_ND.shape
    load = Load(len(searched.query_QD), num, width, TOP_K, nprobe=1, num_audited=0, min_recall=MIN_RECALL)
    rates = measure_rates(width, TOP_K, num, MIN_RECALL, searched.device, searched.passage_ND)
    costs = estimate_costs(load, rates)
    costs.pop(EXACT)
    return min(costs, key=lambda name: costs[name])


def _sample(factory: str, passage_ND: np.ndarray) -> np.ndarray:
    return passage_ND[sample_rows(np.ones(len(passage_ND), bool), num_trained(factory, len(passage_ND)), seed=0)]


def _add(finder: ApproximateFinder, passage_ND: np.ndarray) -> None:
    for shard, first in enumerate(range(0, len(passage_ND), SHARD_ROWS)):
        finder.see(shard, passage_ND[first : first + SHARD_ROWS])


def _points_of_one(finder: ApproximateFinder, index: Any, searched: Searched, exact_Pk: np.ndarray) -> Iterator[Point]:
    """Yield what the index finds with nprobe 1, 2, 4 and so on, until it is enough."""
    query_PD, sizes_L, nprobe = searched.probed(), finder.list_sizes(), 1
    while True:
        finder.set_nprobe(nprobe)
        seconds, keys_Pn = _timed(lambda: finder.search(query_PD))
        recall = float(recall_of_each(best_of_keys([keys_Pn], TOP_K)[1], exact_Pk).mean())
        share = _visited(index, sizes_L, query_PD, finder.nprobe) / len(searched.passage_ND)
        yield Point(finder.nprobe, share, recall, seconds / len(query_PD))
        if recall >= ENOUGH or (recall >= MIN_RECALL and share > MOST_SHARE) or finder.nprobe == finder.most_nprobe:
            return
        nprobe = 2 * finder.nprobe


def _points_of_blocks(searched: Searched, lists: int, exact_Pk: np.ndarray) -> Iterator[Point]:
    """Yield the same of an index for every block, until it is enough; one block is in memory at a time."""
    query_PD, num = searched.probed(), len(searched.passage_ND)
    if num <= BLOCK_ROWS:
        return  # one index, too
    num_blocks = -(-num // BLOCK_ROWS)
    edges = np.linspace(0, num, num_blocks + 1).astype(int)  # blocks of one size
    of_block = max(1, lists // num_blocks)
    probes = [1 << bits for bits in range(of_block.bit_length())]
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in probes]
    visited_n, seconds_n = np.zeros(len(probes)), np.zeros(len(probes))
    for first, stop in itertools.pairwise(edges.tolist()):
        index, sizes_L = _of_block(searched.passage_ND[first:stop], of_block, searched.device)
        for place, nprobe in enumerate(probes):
            index.nprobe = nprobe
            started = time.perf_counter()
            scores, ids = index.search(query_PD, TOP_K)
            seconds_n[place] += time.perf_counter() - started
            visited_n[place] += _visited(index, sizes_L, query_PD, nprobe)
            parts[place].append((scores, np.where(ids < 0, -1, ids + first)))
    for place, nprobe in enumerate(probes):
        recall = float(recall_of_each(merge_top_k(parts[place], TOP_K)[1], exact_Pk).mean())
        yield Point(nprobe, visited_n[place] / num, recall, seconds_n[place] / len(query_PD))
        if recall >= ENOUGH:
            return


def _of_block(block_ND: np.ndarray, lists: int, device: torch.device) -> tuple[Any, np.ndarray]:
    """Return an index of some passages alone, and the sizes of its lists."""
    factory = f"IVF{lists},Flat"
    index = train_index(factory, _sample(factory, block_ND), device)
    index.add(block_ND)
    return index, np.array([index.invlists.list_size(number) for number in range(lists)])


def _visited(index: Any, sizes_L: np.ndarray, query_QD: np.ndarray, nprobe: int) -> float:
    """Return how many passages a query looks at, the mean of some."""
    return float(sizes_L[index.quantizer.search(query_QD, nprobe)[1]].sum(1).mean())


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    made = work()
    return time.perf_counter() - started, made
