"""How fast this machine searches, by exact search and in lists: measured with the code that a refresh runs, in some seconds."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mining.find.approximate import ApproximateFinder
from mining.find.entries import Entries
from mining.find.index import POINTS_PER_LIST
from mining.find.trained import train_index
from mining.table.audit import recall_of_each
from trainer.encoder.topk import BestOf, best_of_keys

MEASURED_LISTS = 256
SAMPLE_PASSAGES, SAMPLE_QUERIES = MEASURED_LISTS * POINTS_PER_LIST, 256
COPIES = 4  # of the sample in the lists that are timed: more than caches hold
VISITED = 8  # lists that are looked into for a time, at least
ITERATIONS = 10
DIMENSIONS, BESIDE = 24, 0.1  # of those whose clusters overlap: dimensions that matter, and the deviation in all others
CLUSTERS, SPREAD = 200, 0.7  # of made embeddings: how far a passage is from the middle of its cluster, in lengths of the middle


@dataclass(frozen=True)
class Rates:
    """Seconds for one unit of work on this machine, and how many lists a query needs."""

    exact_score_s: float  # a product of query and passage, and its part in the selection
    assign_s: float  # a product of passage or query and centroid
    train_s: float  # a passage of the sample and a centroid, in one iteration
    visit_s: float  # a query and a passage of a list that it looks into
    nprobe: float  # of MEASURED_LISTS lists, that find enough


def measure_rates(
    width: int, k: int, num_passages: int, min_recall: float, device: torch.device, sample_nD: np.ndarray | None = None
) -> Rates:
    """Return the rates for embeddings of a width.

    sample_nD: embeddings of passages; None: random ones in clusters that overlap, as those of texts do.
    k: neighbours among num_passages; of the sample's, as many are looked for as lie within the same distance.
    """
    if sample_nD is None or len(sample_nD) < 2 * SAMPLE_QUERIES:
        sample_nD = overlapping(SAMPLE_PASSAGES + SAMPLE_QUERIES, width)
    query_QD, passage_ND = np.split(np.asarray(sample_nD[: SAMPLE_PASSAGES + SAMPLE_QUERIES], np.float32), [SAMPLE_QUERIES])
    num = len(passage_ND)

    def exact(k: int) -> np.ndarray:
        best = BestOf(query_QD, k, device)
        best.look_at(passage_ND, np.arange(num))
        return best.keys()

    nearest = max(1, round(k * num / max(num, num_passages)))
    exact_ids = best_of_keys([exact(nearest)], nearest)[1]  # the first call loads what it needs
    exact_s = _seconds(lambda: exact(k))
    train_s, index = _timed(lambda: train_index(f"IVF{MEASURED_LISTS},Flat", passage_ND, device))
    finder = _finder(index, nearest, num, device)
    assign_s = _seconds(lambda: finder.see(0, passage_ND))
    finder.set_nprobe(1)
    while recall_of_each(best_of_keys([finder.search(query_QD)], finder.depth)[1], exact_ids).mean() < min_recall:
        if finder.nprobe == finder.most_nprobe:
            break
        finder.set_nprobe(2 * finder.nprobe)
    nprobe = finder.nprobe
    timed = _finder(train_index(f"IVF{MEASURED_LISTS},Flat", passage_ND[: 4 * MEASURED_LISTS], device), k, num, device)
    for copy in range(COPIES):
        timed.see(copy, passage_ND)
    timed.set_nprobe(max(VISITED, nprobe))
    visit_s = _seconds(lambda: timed.search(query_QD))
    choosing_s = assign_s / (num * MEASURED_LISTS) * len(query_QD) * MEASURED_LISTS
    visited = len(query_QD) * COPIES * num * timed.nprobe / MEASURED_LISTS
    return Rates(
        exact_s / (len(query_QD) * num),
        assign_s / (num * MEASURED_LISTS),
        train_s / (num * MEASURED_LISTS * ITERATIONS),
        max(0.1 * visit_s, visit_s - choosing_s) / visited,
        nprobe,
    )


def clustered(num: int, width: int, seed: int = 0, num_clusters: int = CLUSTERS) -> np.ndarray:
    """Return unit vectors around some middles, (num, width) float32, shuffled; the middles do not depend on the seed."""
    middle_CD = np.random.default_rng(num_clusters).standard_normal((num_clusters, width), np.float32)
    draw = np.random.default_rng([seed, num])
    vectors = middle_CD[draw.integers(num_clusters, size=num)]
    vectors += SPREAD * draw.standard_normal(vectors.shape, np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def overlapping(num: int, width: int, seed: int = 0, num_clusters: int = CLUSTERS) -> np.ndarray:
    """Return the same near a space of few dimensions, in which clusters overlap.

    In hundreds of free directions clusters are so far apart that one list of an index has all that a query looks for.
    """
    draw = np.random.default_rng(num_clusters)
    middle_Cd = draw.standard_normal((num_clusters, DIMENSIONS), np.float32)
    direction_dD = draw.standard_normal((DIMENSIONS, width), np.float32) / np.float32(np.sqrt(DIMENSIONS))
    draw = np.random.default_rng([seed, num])
    vectors = middle_Cd[draw.integers(num_clusters, size=num)] + draw.standard_normal((num, DIMENSIONS), np.float32)
    vectors = vectors @ direction_dD
    vectors += BESIDE * draw.standard_normal(vectors.shape, np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _finder(index, k: int, num: int, device: torch.device) -> ApproximateFinder:
    entries = Entries(np.ones(COPIES * num, bool))
    return ApproximateFinder(f"IVF{MEASURED_LISTS},Flat", index, entries, None, k, num, device)


def _timed(work: Callable[[], object]) -> tuple[float, object]:
    started = time.perf_counter()
    made = work()
    return time.perf_counter() - started, made


def _seconds(work: Callable[[], object]) -> float:
    return _timed(work)[0]
