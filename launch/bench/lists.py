"""An index of lists against exact search over made embeddings in clusters: the figure "IVF at recall .95 against exact".

All that a refresh does for the index counts: training, filling, and doubling nprobe on the audit's queries until enough is
found, their exact neighbours included. The number of lists is the one that `index.factory = "auto"` takes for a measured machine.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mining.find.approximate import ApproximateFinder
from mining.find.cost import Load, estimate_costs
from mining.find.entries import Entries
from mining.find.index import num_lists, num_trained
from mining.find.rates import clustered, measure_rates
from mining.find.trained import sample_rows, train_index
from mining.settings import EXACT, AuditSettings, IndexSettings
from mining.table.audit import recall_of_each
from trainer.encoder.shards import rows_of_shard
from trainer.encoder.topk import BestOf, best_of_keys

CLUSTER = 1000  # embeddings of a cluster


class Table:
    """Embeddings in memory, as a finder reads those of queries."""

    def __init__(self, embedding_QD: np.ndarray):
        self.embedding_QD, self.shards, self.num_rows = embedding_QD, self, len(embedding_QD)

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.embedding_QD[rows]


def measure_lists(
    num_passages: int = 1_000_000,
    num_queries: int = 10_000,
    width: int = 384,
    k: int = 200,
    min_recall: float = 0.95,
    device: torch.device | str = "cpu",
    factory: str | None = None,
) -> dict[str, Any]:
    """Return the seconds of both ways and of the parts of an index, its recall over all queries, and the ratio.

    factory: None: the number of lists that is estimated to be cheapest.
    """
    device, num_clusters = torch.device(device), max(1, num_passages // CLUSTER)
    passage_ND, query_QD = (clustered(n, width, n, num_clusters) for n in (num_passages, num_queries))
    rows, num_audited = rows_of_shard(num_passages), min(num_queries, AuditSettings().num_queries)
    load = Load(num_queries, num_passages, width, k, IndexSettings().nprobe, num_audited, 1, min_recall)
    if factory is None:
        costs = estimate_costs(load, measure_rates(width, k, num_passages, min_recall, device))
        factory = min((cost, name) for name, cost in costs.items() if name != EXACT)[1]
    shards = range(0, num_passages, rows)

    def exact(query_QD: np.ndarray) -> np.ndarray:
        best = BestOf(query_QD, k, device)
        for start in shards:
            here_nD = passage_ND[start : start + rows]
            best.look_at(here_nD, np.arange(len(here_nD)), start)
        return best_of_keys([best.keys()], k)[1]

    entries, seconds = Entries(np.ones(num_passages, bool)), dict[str, float]()
    exact_ids = _timed(seconds, "exact", lambda: exact(query_QD))
    sample = passage_ND[sample_rows(entries.is_entry_N, num_trained(factory, num_passages), 0)]
    index = _timed(seconds, "train", lambda: train_index(factory, sample, device))
    finder = ApproximateFinder(factory, index, entries, Table(query_QD), k, rows, device)  # type: ignore[arg-type]
    _timed(seconds, "fill", lambda: _fill(finder, passage_ND, rows))
    _timed(seconds, "audit", lambda: _raise_nprobe(finder, load, query_QD[:num_audited], exact(query_QD[:num_audited])))
    keys_Qn = _timed(seconds, "search", lambda: finder.search(query_QD))
    recall = float(recall_of_each(best_of_keys([keys_Qn], finder.depth)[1], exact_ids).mean())
    about = {"passages": num_passages, "queries": num_queries, "width": width, "top_k": k, "factory": factory}
    about |= {"lists": num_lists(factory), "nprobe": finder.nprobe, "recall": round(recall, 4)}
    ratio = (sum(seconds.values()) - seconds["exact"]) / seconds["exact"]
    return {**about, "seconds": {name: round(value, 3) for name, value in seconds.items()}, "of_exact": round(ratio, 3)}


def _fill(finder: ApproximateFinder, passage_ND: np.ndarray, rows: int) -> None:
    for shard, start in enumerate(range(0, len(passage_ND), rows)):
        finder.see(shard, passage_ND[start : start + rows])


def _raise_nprobe(finder: ApproximateFinder, load: Load, query_QD: np.ndarray, exact_ids: np.ndarray) -> None:
    finder.set_nprobe(load.nprobe)
    while finder.nprobe < finder.most_nprobe:
        found_ids = best_of_keys([finder.search(query_QD)], finder.depth)[1]
        if recall_of_each(found_ids, exact_ids).mean() >= load.min_recall:
            return
        finder.set_nprobe(2 * finder.nprobe)


def _timed(seconds: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    made = work()
    seconds[name] = time.perf_counter() - started
    return made
