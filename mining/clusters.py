"""Clusters of the training queries, for batches whose texts are near to each other: k-means on the miner's embeddings.

Sources: TAS-B (arXiv 2104.06967), NGAME (arXiv 2207.04452) and "Embedding and Clustering Your Data Can Improve
Contrastive Pretraining" (arXiv 2407.18887).
"""

from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeInt

from mining.encode import Embeddings
from mining.judgements import Judgements
from mining.sampling import stream
from trainer.errors import InputError
from trainer.ranges import job_section

ITERATIONS = 20
POINTS_PER_CENTROID = 256  # k-means is trained on so many at most, drawn by the seed
TILE = 65536  # rows whose embeddings are in memory at once, but for those that train


@job_section
class ClusterSettings:
    """Section `clusters`: published with a version, for `batch` to draw from."""

    num: NonNegativeInt = 0
    """Clusters; 0: none."""
    of: Literal["queries", "passages"] = "queries"
    """What is clustered; with "passages" a query is where its first positive is."""


def check_clusters(settings: ClusterSettings, num_queries: int) -> None:
    """Raise InputError if there are not enough queries."""
    if settings.num > num_queries:
        raise InputError(
            f"clusters.num={settings.num} is more than the {num_queries} training queries; set it to {num_queries // 2} or lower"
        )


def cluster_queries(
    settings: ClusterSettings, seed: int, version: int, judgements: Judgements, queries: Embeddings, passages: Embeddings
) -> np.ndarray:
    """Return the cluster of each training query, (Q,) int64; a function of embeddings, seed and version.

    One rank does it, so the number of ranks changes nothing. Memory: 256 * num embeddings, and a tile of 65,536.
    """
    table, rows = queries, np.arange(judgements.num_queries)
    if settings.of == "passages":
        table, rows = passages, judgements.positive_rows[judgements.positive_indptr[:-1]]
    return k_means(table, rows, settings.num, int(stream(seed, version)[0] % np.uint64(1 << 31)))


def num_clustered(settings: ClusterSettings, num_queries: int) -> int:
    """Return how many embeddings k-means holds at once."""
    return min(num_queries, max(TILE, settings.num * POINTS_PER_CENTROID)) if settings.num else 0


def k_means(table: Embeddings, rows: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Return the nearest of `num` centroids for each of the rows of a table, (n,) int64."""
    import faiss  # here: it brings an OpenMP of its own

    order = np.random.default_rng(seed).permutation(len(rows))[: num * POINTS_PER_CENTROID]
    # One point for a centroid is enough for us; FAISS would warn of fewer than 39.
    found = faiss.Kmeans(
        table.width, num, niter=ITERATIONS, seed=seed, min_points_per_centroid=1, max_points_per_centroid=POINTS_PER_CENTROID
    )
    found.train(np.ascontiguousarray(table.read(rows[np.sort(order)])))
    tiles = [rows[start : start + TILE] for start in range(0, len(rows), TILE)]
    return np.concatenate([found.index.search(table.read(tile), 1)[1][:, 0] for tile in tiles])


def describe_clusters(settings: ClusterSettings, clusters: np.ndarray | None) -> dict[str, Any] | None:
    """Return what the manifest says of clusters."""
    if clusters is None:
        return None
    sizes = np.bincount(clusters, minlength=settings.num)
    spread = {"smallest": sizes.min(), "median": np.median(sizes), "largest": sizes.max(), "empty": (sizes == 0).sum()}
    return {"num": settings.num, "of": settings.of, "sizes": {name: int(value) for name, value in spread.items()}}
