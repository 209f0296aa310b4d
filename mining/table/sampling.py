"""Which of the candidates that passed become negatives: seeded by (seed, version, query row, corpus row).

Every method gives each candidate a priority, and the highest win; a random method adds noise that a 64-bit mix of those
four numbers decides. So the draw is the same for any number of ranks, tiles and shards, and without replacement.
"""

from collections.abc import Callable

import numpy as np

from mining.settings import SampleSettings
from mining.table.judgements import Judgements
from trainer.data.shuffle import mix

RANDOM_STREAM = np.uint64(0x52414E44)  # keeps the rows drawn from the whole corpus apart from the noise of candidates
DENSE_ONLY = ("simans", "simans_laplace", "softmax")  # their constants are for scores of embeddings, not for BM25's


def choose_candidates(
    settings: SampleSettings,
    seed: int,
    version: int,
    query_rows: np.ndarray,
    ids_QK: np.ndarray,
    scores_QK: np.ndarray,
    keep_QK: np.ndarray,
    positive_score_Q: np.ndarray | None,
    stays_QK: np.ndarray | None = None,
) -> np.ndarray:
    """Return which candidates are drawn, (Q, K) bool: num_negatives of each query but for the random ones, or all there are.

    query_rows: (Q,) rows of queries.jsonl.
    ids_QK, scores_QK: candidates, best first; keep_QK: those that may be drawn.
    positive_score_Q: score of the positive that decides for each query; None (BM25): what needs scores of embeddings draws
    uniformly.
    stays_QK: those that are drawn before all others.
    """
    method = "uniform" if positive_score_Q is None and settings.method in DENSE_ONLY else settings.method
    stays_QK = keep_QK & (False if stays_QK is None else stays_QK)
    if method == "top1":  # candidates are sorted, best first
        stays_QK = stays_QK | (keep_QK & (keep_QK.cumsum(1) == 1))
    if settings.pool != "all":
        keep_QK = keep_QK & ((keep_QK.cumsum(1) <= settings.pool) | stays_QK)
    noise_QK = gumbel_noise(seed, version, query_rows, ids_QK)
    priority_QK = PRIORITIES[method](settings, np.where(keep_QK, scores_QK, 0), positive_score_Q, noise_QK)
    priority_QK = np.where(stays_QK, np.inf, priority_QK)
    num_drawn = settings.num_negatives - settings.num_random
    order = np.argsort(np.where(keep_QK, -priority_QK, np.inf), axis=1, kind="stable")[:, :num_drawn]
    is_drawn = np.zeros(keep_QK.shape, bool)
    np.put_along_axis(is_drawn, order, True, 1)
    return is_drawn & keep_QK


def lowest_candidates(num: int, keep_QK: np.ndarray) -> np.ndarray:
    """Return the mask of the `num` candidates of the lowest scores of each query, (Q, K): candidates stand best first."""
    after_QK = keep_QK[:, ::-1].cumsum(1)[:, ::-1]
    return keep_QK & (after_QK <= num)


def random_numbers(seed: int, version: int, query_rows: np.ndarray, draws: range, below: int) -> np.ndarray:
    """Return what each query draws in some of its draws, (Q, draws) int64, uniform from 0 up to `below`; they may repeat."""
    if below == 0:
        return np.full((len(query_rows), len(draws)), -1, np.int64)
    per_query = mix(stream(seed, version) + query_rows.astype(np.uint64))
    bits_QR = mix(mix(per_query ^ RANDOM_STREAM)[:, None] + np.arange(draws.start, draws.stop, dtype=np.uint64))
    return (bits_QR % np.uint64(below)).astype(np.int64)


def random_rows(judgements: Judgements, seed: int, version: int, query_rows: np.ndarray, draws: range) -> np.ndarray:
    """Return the corpus rows that each query draws in some of its draws, (Q, draws) int64; -1 where nothing may be drawn."""
    num_allowed = len(judgements.allowed_N) - judgements.num_held_out
    return judgements.allowed_rows(random_numbers(seed, version, query_rows, draws, num_allowed))


def is_easy(settings: SampleSettings, now: np.ndarray, at_first: np.ndarray) -> np.ndarray:
    """Tell which negatives have become easy since they were first drawn.

    Source: Conan-embedding, arXiv 2408.15710, section on dynamic hard negatives.
    """
    return (np.float32(settings.easy_ratio) * now < at_first) & (np.abs(now) < np.float32(settings.easy_below))


def gumbel_noise(seed: int, version: int, query_rows: np.ndarray, ids_QK: np.ndarray) -> np.ndarray:
    """Return standard Gumbel noise, (Q, K) float64, a pure function of its four arguments.

    The k largest of log p + noise are k draws without replacement from p. Source: Gumbel top-k, arXiv 1903.06059.
    """
    per_query = mix(stream(seed, version) + query_rows.astype(np.uint64))
    bits_QK = mix(per_query[:, None] + ids_QK.astype(np.uint64))
    uniform_QK = ((bits_QK >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), never at an end
    return -np.log(-np.log(uniform_QK))


def stream(seed: int, version: int) -> np.ndarray:
    """Return where the numbers of a seed and a version begin, (1,) uint64."""
    return mix(mix(np.array([seed], np.uint64)) + np.uint64(version))


def _uniform(settings: SampleSettings, scores_QK: np.ndarray, positive_score_Q, noise_QK: np.ndarray) -> np.ndarray:
    # Source: ANCE, arXiv 2007.00808.
    return noise_QK


def _top(settings: SampleSettings, scores_QK: np.ndarray, positive_score_Q, noise_QK: np.ndarray) -> np.ndarray:
    return scores_QK


def _simans(settings: SampleSettings, scores_QK: np.ndarray, positive_score_Q: np.ndarray, noise_QK: np.ndarray) -> np.ndarray:
    # Source: SimANS, arXiv 2210.11773.
    return noise_QK - settings.simans_a * _distance(settings, scores_QK, positive_score_Q) ** 2


def _laplace(settings: SampleSettings, scores_QK: np.ndarray, positive_score_Q: np.ndarray, noise_QK: np.ndarray) -> np.ndarray:
    # Source: the authors' code of SimANS for MS MARCO passages.
    return noise_QK - settings.laplace_a * np.abs(_distance(settings, scores_QK, positive_score_Q))


def _softmax(settings: SampleSettings, scores_QK: np.ndarray, positive_score_Q, noise_QK: np.ndarray) -> np.ndarray:
    return noise_QK + scores_QK.astype(np.float64) / settings.softmax_temperature


def _distance(settings: SampleSettings, scores_QK: np.ndarray, positive_score_Q: np.ndarray) -> np.ndarray:
    return scores_QK.astype(np.float64) - positive_score_Q[:, None] - settings.simans_b


PRIORITIES: dict[str, Callable[..., np.ndarray]] = {
    "uniform": _uniform,
    "top": _top,
    "top1": _uniform,  # Source: NV-Retriever, arXiv 2407.15831: the best one, and others sampled from the top 10
    "simans": _simans,
    "simans_laplace": _laplace,
    "softmax": _softmax,
}
