"""Whether embeddings are healthy: how close positives are, how evenly vectors fill the sphere, who is found too often.

Pure functions of embeddings, scores and ranked lists, to be called at evaluations, on samples, never inside a step. Each
says what it costs.
"""

import numpy as np
import torch
from torch import Tensor

# n rows, Q queries, N passages, D width, k places of a ranked list, J judged pairs, j some of them

UNIFORMITY_T = 2.0  # as in the source
RANK_EPSILON = 1e-7  # as in the source, where float32 is used
SAMPLE_ROWS = 4096  # of each side, for what grows with their square
HUB_PLACES = 10  # of a list: who is found below is seen by nobody
NUM_BINS = 20  # of histograms over cosines, -1 to 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def alignment(query_JD: Tensor, positive_JD: Tensor) -> float:
    """Return the mean squared distance between queries and their positives, both unit length: 0 is closest, 4 opposite.

    Cost: J x D. Source: Wang & Isola 2020, arXiv 2005.10242, section 4.1, with its exponent 2.
    """
    return float((query_JD - positive_JD).square().sum(1).mean())


def uniformity(rows_nD: Tensor) -> float:
    """Return the logarithm of the mean Gaussian potential over all pairs of unit vectors: lower is more even, 0 collapsed.

    Holds n x n / 2 distances: meant for some thousands of rows. Cost: n x n x D.
    Source: Wang & Isola 2020, arXiv 2005.10242, section 4.1, with t = 2. Raises ValueError for fewer than two rows.
    """
    if len(rows_nD) < 2:
        raise ValueError(f"uniformity is about pairs, and there are {len(rows_nD)} rows; expected at least 2")
    exponents = torch.pdist(rows_nD).square().mul(-UNIFORMITY_T)
    return float(exponents.logsumexp(0) - np.log(len(exponents)))


def spread(rows_nD: Tensor) -> float:
    """Return 1 - the mean cosine over all pairs of unit vectors: 0 is one point. Cost: n x D. ValueError for fewer than two."""
    if len(rows_nD) < 2:
        raise ValueError(f"the spread is about pairs, and there are {len(rows_nD)} rows; expected at least 2")
    n = len(rows_nD)
    return 1 - float((rows_nD.double().sum(0).square().sum() - n) / (n * (n - 1)))


def effective_rank(rows_nD: Tensor) -> float:
    """Return how many dimensions the rows use: the exponential of the entropy of their singular values, 1 to min(n, D).

    Cost: a singular value decomposition, n x D x min(n, D). Source: RankMe, Garrido et al. 2023, arXiv 2210.02885, eq. 1.
    """
    values = torch.linalg.svdvals(rows_nD.float())
    share = values / values.sum() + RANK_EPSILON
    return float((-share * share.log()).sum().exp())


def hubness(ids_Qk: np.ndarray, num_passages: int) -> float:
    """Return the skewness of how often each passage is among the k best of a query: 0 none, above 1 a few hubs.

    ids_Qk: numbers below num_passages, -1 where a list is shorter. Passages that are never found count, too. Cost: Q x k + N.
    0 if all are found equally often. Source: k-occurrence skewness, Radovanovic et al. 2010, JMLR 11.
    """
    found_N = np.bincount(ids_Qk[ids_Qk >= 0], minlength=num_passages).astype(np.float64)
    deviation_N = found_N - found_N.mean()
    spread = float(np.sqrt(np.mean(deviation_N**2)))
    return 0.0 if spread == 0 else float(np.mean((deviation_N / spread) ** 3))


def distribution(scores: np.ndarray) -> dict[str, float | list[int]]:
    """Return quantiles `p05` to `p95` of cosines, and `counts`, their histogram in NUM_BINS equal bins from -1 to 1.

    Cosines that rounding has pushed over 1 count as 1. Cost: a sort. Raises ValueError for no scores.
    """
    if len(scores) == 0:
        raise ValueError("there are no scores to describe")
    counts, _ = np.histogram(np.clip(scores, -1, 1), bins=NUM_BINS, range=(-1, 1))
    quantiles = np.quantile(scores, QUANTILES)
    named: dict[str, float | list[int]] = {f"p{round(q * 100):02d}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)}
    return {**named, "counts": counts.tolist()}


def hardest_negatives(ids_Qk: np.ndarray, scores_Qk: np.ndarray, query_rows_J: np.ndarray, ids_J: np.ndarray) -> np.ndarray:
    """Return the score of the best passage of each query that is no positive of it; queries without one are left out.

    query_rows_J, ids_J: the judged pairs, rows of the lists and numbers of passages. Cost: Q x k, a few times.
    """
    width = 1 + max(int(ids_Qk.max(initial=0)), int(ids_J.max(initial=0)))
    cells = np.arange(len(ids_Qk))[:, None] * width + ids_Qk
    is_negative = (ids_Qk >= 0) & ~np.isin(cells, query_rows_J * width + ids_J)
    best_Q = np.where(is_negative, scores_Qk, -np.inf).max(1, initial=-np.inf)
    return best_Q[np.isfinite(best_Q)]


def evaluation_health(
    query_QD: np.ndarray,
    passage_ND: np.ndarray,
    ids_Qk: np.ndarray,
    scores_Qk: np.ndarray,
    query_rows_J: np.ndarray,
    ids_J: np.ndarray,
    sample_j: np.ndarray,
    positive_jD: np.ndarray,
    num_passages: int,
    seed: int = 0,
) -> dict[str, float | list[int]]:
    """Return all of the above under flat names, `health/alignment` and so on.

    query_QD: embeddings of the evaluated queries. passage_ND: those of a sample of the corpus.
    ids_Qk, scores_Qk: ranked passages of each query, best first, -1 where a list is shorter; of num_passages in all.
    query_rows_J, ids_J: judged pairs, a row of query_QD and the number of a passage.
    sample_j, positive_jD: which of these pairs to look at, and the embeddings of their passages.
    Embeddings of any length are made unit length; scores of hardest negatives are taken as they are.
    Cost: at most SAMPLE_ROWS queries and passages, some 128 MiB of distances and two decompositions: seconds on one core.
    """
    queries, passages, positives = (_unit(rows) for rows in (query_QD, passage_ND, positive_jD))
    of_pair_jD = queries[torch.from_numpy(query_rows_J[sample_j])]
    positive_scores = (of_pair_jD * positives).sum(1).numpy()
    query_sample, passage_sample = _sample(queries, seed), _sample(passages, seed)
    found: dict[str, float | list[int]] = {
        "alignment": alignment(of_pair_jD, positives),
        "hubness": hubness(ids_Qk[:, :HUB_PLACES], num_passages),
    }
    for name, rows_nD in (("queries", query_sample), ("passages", passage_sample)):
        found[f"effective_rank/{name}"] = effective_rank(rows_nD)
        if len(rows_nD) > 1:
            found[f"uniformity/{name}"] = uniformity(rows_nD)
            found[f"spread/{name}"] = spread(rows_nD)
    hardest = hardest_negatives(ids_Qk, scores_Qk, query_rows_J, ids_J)
    for name, scores in (("positive_score", positive_scores), ("hardest_negative_score", hardest)):
        if len(scores):
            found |= {f"{name}/{key}": value for key, value in distribution(scores).items()}
    return {f"health/{name}": value for name, value in found.items()}


def _unit(rows_nD: np.ndarray) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.array(rows_nD, np.float32)), dim=1)


def _sample(rows_nD: Tensor, seed: int) -> Tensor:
    """Return at most SAMPLE_ROWS of the rows, the same ones for the same seed."""
    if len(rows_nD) <= SAMPLE_ROWS:
        return rows_nD
    chosen = np.random.default_rng(seed).choice(len(rows_nD), SAMPLE_ROWS, replace=False)
    return rows_nD[torch.from_numpy(chosen)]
