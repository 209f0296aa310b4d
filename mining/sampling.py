"""Which of the candidates that passed become negatives: seeded by (seed, version, query row, corpus row).

Every method gives each candidate a priority, and the highest win; a random method adds noise that a 64-bit mix of those
four numbers decides. So the draw is the same for any number of ranks, tiles and shards, and without replacement.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.data.sampler import mix
from trainer.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Section `sample`."""

    # of those that passed among the search.top_k best: any (ANCE), the best, or those that score near the positive
    method: Literal["uniform", "top", "simans"] = "uniform"
    num_negatives: int = 16  # of each query; fewer where fewer passed
    # SimANS: p ~ exp(-a (s - s_pos - b)^2). The paper's a = 0.5 is for raw dot products of some tens; on unit vectors,
    # whose loss divides scores by 0.05, the same curve has a = 0.5 / 0.05^2.
    simans_a: float = 200.0
    simans_b: float = 0.0

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise InputError(f"sample.num_negatives={self.num_negatives} must be at least 1")
        if self.simans_a < 0:
            raise InputError(f"sample.simans_a={self.simans_a} is negative; expected 0 or more")


def sample_negatives(
    settings: SampleSettings,
    seed: int,
    version: int,
    query_rows: np.ndarray,
    ids_QK: np.ndarray,
    scores_QK: np.ndarray,
    keep_QK: np.ndarray,
    positive_score_Q: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (counts (Q,), ids, scores) of the negatives drawn, row after row, each row by score descending.

    query_rows: (Q,) rows of queries.jsonl.
    ids_QK, scores_QK: candidates, best first; keep_QK: those that may be drawn.
    positive_score_Q: score of each query's best positive; None: simans draws uniformly.
    """
    method = "uniform" if settings.method == "simans" and positive_score_Q is None else settings.method
    noise_QK = gumbel_noise(seed, version, query_rows, ids_QK)
    priority_QK = PRIORITIES[method](settings, scores_QK, positive_score_Q, noise_QK)
    order = np.argsort(np.where(keep_QK, -priority_QK, np.inf), axis=1, kind="stable")[:, : settings.num_negatives]
    is_drawn = np.zeros(keep_QK.shape, bool)
    np.put_along_axis(is_drawn, order, True, 1)
    is_drawn &= keep_QK
    return is_drawn.sum(1), ids_QK[is_drawn], scores_QK[is_drawn]


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
    return noise_QK


def _top(settings: SampleSettings, scores_QK: np.ndarray, positive_score_Q, noise_QK: np.ndarray) -> np.ndarray:
    return scores_QK


def _simans(settings: SampleSettings, scores_QK: np.ndarray, positive_score_Q: np.ndarray, noise_QK: np.ndarray) -> np.ndarray:
    # Source: SimANS, arXiv 2210.11773.
    distance_QK = scores_QK.astype(np.float64) - positive_score_Q[:, None] - settings.simans_b
    return noise_QK - settings.simans_a * distance_QK**2


PRIORITIES: dict[str, Callable[..., np.ndarray]] = {"uniform": _uniform, "top": _top, "simans": _simans}
