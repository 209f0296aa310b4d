"""What `index.factory = "auto"` means: the cheaper of exact search and an IVF index, by rates measured on this machine.

Below tens of millions of passages exact search is often cheaper, because an index has to be trained and filled anew for every
checkpoint, and only many queries make up for that. The choice is kept in the run folder, because it depends on measured times,
and the versions of a run must not depend on these.
"""

import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from mining.find.index import load_faiss, num_gpus_of
from mining.settings import AUTO, EXACT
from trainer.encoder.topk import BestOf
from trainer.handoff.manifest import write_atomically

log = logging.getLogger(__name__)

SAMPLE_PASSAGES, SAMPLE_QUERIES = 16384, 256  # of the measurement, which takes a second or two
PASSAGES_OF_CELL = 39  # least that FAISS wants to train a centroid from


@dataclass(frozen=True)
class Load:
    """The amount of search, as for one rank; with more ranks the costs of both ways fall alike."""

    num_queries: int
    num_passages: int
    shard_rows: int
    width: int
    top_k: int
    nprobe: int
    num_audited: int  # queries that an index other than exact is audited with


@dataclass(frozen=True)
class Rates:
    """Seconds for one unit of work on this machine."""

    exact_score_s: float  # a product of query and passage, and its part in the selection
    ivf_build_s: float  # a passage and a cell, in training and adding
    ivf_visit_s: float  # a query and a centroid or a passage of a visited cell


def choose_index(run: Path, load: Load, device: torch.device) -> str:
    """Return "exact" or a factory string, and say what both would cost. Rank 0 only."""
    path = run / "status" / "index.json"
    about = asdict(load)
    try:
        kept = json.loads(path.read_text())
        if kept["about"] == about:
            return kept["factory"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing was chosen yet
    costs = estimate_costs(load, measure_rates(load, device))
    factory = min(costs, key=lambda name: costs[name])
    log.info(
        "index.factory=auto takes %s: %s for %d queries and %d passages on one rank",
        factory,
        ", ".join(f"{name} {seconds:.3g} s" for name, seconds in costs.items()),
        load.num_queries,
        load.num_passages,
    )
    write_atomically(path, json.dumps({"about": about, "factory": factory, "costs_s": costs}))
    return factory


def estimate_costs(load: Load, rates: Rates) -> dict[str, float]:
    """Return the seconds of a refresh by factory: search and, for IVF, training, filling and the audit."""
    exact_query_s = load.num_passages * rates.exact_score_s
    costs = {EXACT: load.num_queries * exact_query_s}
    cells = num_cells(min(load.shard_rows, load.num_passages))
    if cells > load.nprobe:  # else it would look everywhere
        num_shards = load.num_passages / load.shard_rows
        build_s = load.num_passages * cells * rates.ivf_build_s
        visited = num_shards * cells + load.num_passages * load.nprobe / cells
        costs[f"IVF{cells},Flat"] = build_s + load.num_queries * visited * rates.ivf_visit_s + load.num_audited * exact_query_s
    return costs


def num_cells(shard_rows: int) -> int:
    """Return how many cells an IVF index of a shard has: about 4 times the root of its passages, a power of two."""
    most = max(1, min(4 * math.isqrt(shard_rows), shard_rows // PASSAGES_OF_CELL))
    return 1 << (most.bit_length() - 1)


def measure_rates(load: Load, device: torch.device) -> Rates:
    """Return this machine's rates for vectors of a width, on random ones."""
    faiss = load_faiss(AUTO)
    passage_ND, query_QD = (_unit(n, load.width) for n in (SAMPLE_PASSAGES, SAMPLE_QUERIES))

    def exact() -> None:
        best = BestOf(query_QD, load.top_k, device)
        best.look_at(passage_ND, np.arange(SAMPLE_PASSAGES))
        best.keys()

    cells = num_cells(SAMPLE_PASSAGES)
    index = faiss.index_factory(load.width, f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
    index.nprobe = load.nprobe
    if num_gpus_of(faiss) and device.type == "cuda":
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)

    def build() -> None:
        index.train(passage_ND)
        index.add(passage_ND)

    exact()  # the first call loads what it needs
    exact_s, build_s = _seconds(exact), _seconds(build)
    search_s = _seconds(lambda: index.search(query_QD, load.top_k))
    visited = cells + SAMPLE_PASSAGES * min(1, load.nprobe / cells)
    return Rates(
        exact_s / (SAMPLE_QUERIES * SAMPLE_PASSAGES),
        build_s / (SAMPLE_PASSAGES * cells),
        search_s / (SAMPLE_QUERIES * visited),
    )


def _unit(num_rows: int, width: int) -> np.ndarray:
    vectors = np.random.default_rng(num_rows).standard_normal((num_rows, width), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
