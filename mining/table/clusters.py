"""Clusters of the training queries by k-means on the miner's embeddings, for batches of similar texts.

Sources: TAS-B (arXiv 2104.06967), NGAME (arXiv 2207.04452) and "Embedding and Clustering Your Data Can Improve
Contrastive Pretraining" (arXiv 2407.18887).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mining.find.embeddings import Embeddings
from mining.settings import ClusterSettings
from mining.table.judgements import Judgements
from mining.table.sampling import stream
from trainer.errors import InputError

ITERATIONS = 20
POINTS_PER_CENTROID = 256  # k-means is trained on so many at most, drawn by the seed
TILE = 65536  # rows whose embeddings are in memory at once, but for those that train
PRODUCTS = 1 << 24  # of points and centroids, computed at once: 64 MB


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
    order = np.random.default_rng(seed).permutation(len(rows))[: num * POINTS_PER_CENTROID]
    point_nD = torch.from_numpy(table.read(rows[np.sort(order)]))
    # The first rows of the permutation are a random sample; their places among the sorted rows are their ranks.
    centroid_KD = point_nD[torch.from_numpy(np.searchsorted(np.sort(order), order[:num]))]
    for _ in range(ITERATIONS):
        nearest_n, distance_n = nearest(point_nD, centroid_KD)
        centroid_KD = _means(point_nD, nearest_n, distance_n, centroid_KD)
    tiles = [rows[start : start + TILE] for start in range(0, len(rows), TILE)]
    return np.concatenate([nearest(torch.from_numpy(table.read(tile)), centroid_KD)[0].numpy() for tile in tiles])


def nearest(point_nD: Tensor, centroid_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centroid of each point, (n,) int64, and the square of its distance; holds PRODUCTS of both at once."""
    half_K = centroid_KD.square().sum(1) / 2
    step = max(1, PRODUCTS // len(centroid_KD))
    found = [torch.max(torch.addmm(half_K, part, centroid_KD.T, beta=-1), 1) for part in point_nD.split(step)]
    score_n, nearest_n = (torch.cat(parts) for parts in zip(*found, strict=True))
    return nearest_n, point_nD.square().sum(1) - 2 * score_n


def _means(point_nD: Tensor, nearest_n: Tensor, distance_n: Tensor, centroid_KD: Tensor) -> Tensor:
    """Return the mean of each centroid's points; a centroid without points moves to a point that is far from its centroid."""
    count_K = torch.bincount(nearest_n, minlength=len(centroid_KD))
    mean_KD = torch.zeros_like(centroid_KD).index_add_(0, nearest_n, point_nD) / count_K.clamp(min=1)[:, None]
    empty = torch.nonzero(count_K == 0)[:, 0]
    mean_KD[empty] = point_nD[distance_n.topk(len(empty)).indices]
    return mean_KD


def describe_clusters(settings: ClusterSettings, clusters: np.ndarray | None) -> dict[str, Any] | None:
    """Return what the manifest says of clusters."""
    if clusters is None:
        return None
    sizes = np.bincount(clusters, minlength=settings.num)
    spread = {"smallest": sizes.min(), "median": np.median(sizes), "largest": sizes.max(), "empty": (sizes == 0).sum()}
    return {"num": settings.num, "of": settings.of, "sizes": {name: int(value) for name, value in spread.items()}}
