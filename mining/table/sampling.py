"""Which of the candidates that passed become negatives: seeded by (seed, version, query row, corpus row).

Every method gives each candidate a priority, and the highest win; of a random method it follows from a uniform number that a
64-bit mix of those four numbers decides. So the draw is the same for any number of ranks, tiles and shards, and without
replacement. Candidates are tensors on one device; only those that may be drawn are looked at.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mining.settings import SampleSettings
from mining.table.filters import places_of
from mining.table.judgements import Judgements
from trainer.data.shuffle import mix

RANDOM_STREAM = np.uint64(0x52414E44)  # keeps the rows drawn from the whole corpus apart from the noise of candidates


def choose_candidates(
    settings: SampleSettings,
    chance: tuple[int, int],
    query_rows: np.ndarray,
    ids_QK: Tensor,
    scores_QK: Tensor,
    keep_QK: Tensor,
    positive_score_Q: np.ndarray | None,
    stays_QK: Tensor | None = None,
) -> Tensor:
    """Return which candidates are drawn, (Q, K) bool: num_negatives of each query but for the random ones, or all there are.

    chance: seed and version.
    query_rows: (Q,) rows of queries.jsonl.
    ids_QK, scores_QK: candidates, best first; keep_QK: those that may be drawn.
    positive_score_Q: score of the positive that decides for each query; None (BM25): what needs scores of embeddings draws
    uniformly.
    stays_QK: those that are drawn before all others.
    """
    method = "uniform" if positive_score_Q is None and settings.method in PRIORITIES else settings.method
    num_drawn = settings.num_negatives - settings.num_random
    if num_drawn == 0 or len(ids_QK) == 0:
        return torch.zeros_like(keep_QK)
    stays_QK = torch.zeros_like(keep_QK) if stays_QK is None else keep_QK & stays_QK
    if method == "top1":  # candidates are sorted, best first
        stays_QK = stays_QK | (keep_QK & (keep_QK.cumsum(1) == 1))
    if settings.pool != "all":
        keep_QK = keep_QK & ((keep_QK.cumsum(1) <= settings.pool) | stays_QK)
    stays_QK = stays_QK & (stays_QK.cumsum(1) <= num_drawn)
    priority_QK = torch.full(ids_QK.shape, -torch.inf, dtype=torch.float64, device=ids_QK.device)
    at_n = places_of(keep_QK)
    priority_QK.view(-1)[at_n] = _priorities(method, settings, chance, query_rows, ids_QK, scores_QK, positive_score_Q, at_n)
    priority_QK.masked_fill_(stays_QK, torch.inf)
    best_Qd = priority_QK.topk(min(num_drawn, ids_QK.shape[1]), 1).indices
    return torch.zeros_like(keep_QK).scatter_(1, best_Qd, True) & keep_QK


def _priorities(
    method: str,
    settings: SampleSettings,
    chance: tuple[int, int],
    query_rows: np.ndarray,
    ids_QK: Tensor,
    scores_QK: Tensor,
    positive_score_Q: np.ndarray | None,
    at_n: Tensor,
) -> Tensor:
    """Return the priorities of some places of the table, (n,) float64, no two of a query alike."""
    row_n = at_n // max(1, ids_QK.shape[1])
    if method == "top":
        return -at_n.double()
    uniform_n = uniform_numbers(chance, query_rows, row_n, ids_QK.flatten()[at_n])
    if method not in PRIORITIES:
        return uniform_n  # in the order of its Gumbel noise. Source: ANCE, arXiv 2007.00808.
    assert positive_score_Q is not None
    positive_n = torch.tensor(positive_score_Q, dtype=torch.float64, device=at_n.device)[row_n]
    return PRIORITIES[method](settings, scores_QK.flatten()[at_n].double(), positive_n, gumbel_noise(uniform_n))


def lowest_candidates(num: int, keep_QK: Tensor) -> Tensor:
    """Return the mask of the `num` candidates of the lowest scores of each query, (Q, K): candidates stand best first."""
    num_before_QK = keep_QK.cumsum(1)
    return keep_QK & (num_before_QK > num_before_QK[:, -1:] - num)


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


def is_easy(settings: SampleSettings, now: Tensor, at_first: Tensor) -> Tensor:
    """Tell which negatives have become easy since they were first drawn.

    Source: Conan-embedding, arXiv 2408.15710, section on dynamic hard negatives.
    """
    return (settings.easy_ratio * now < at_first) & (now.abs() < settings.easy_below)


def uniform_numbers(chance: tuple[int, int], query_rows: np.ndarray, row_n: Tensor, ids_n: Tensor) -> Tensor:
    """Return a number in (0, 1) for each pair of a query and a passage, (n,) float64, a pure function of (seed, version) and of
    the two rows in their files.

    row_n: places of the queries in query_rows.
    """
    per_query = mix(stream(*chance) + query_rows.astype(np.uint64)).view(np.int64)
    bits_n = mix_int64(torch.from_numpy(per_query).to(ids_n.device)[row_n] + ids_n)
    return (_shifted(bits_n, 11).double() + 0.5) * 2.0**-53  # never at an end


def gumbel_noise(uniform_n: Tensor) -> Tensor:
    """Return standard Gumbel noise for uniform numbers, in the same order.

    The k largest of log p + noise are k draws without replacement from p. Source: Gumbel top-k, arXiv 1903.06059.
    """
    return -torch.log(-torch.log(uniform_n))


def mix_int64(x: Tensor) -> Tensor:
    """Return what `mix` returns, on any device: its 64 bits as int64, because torch has no arithmetic of uint64."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x.bitwise_xor_(_shifted(x, 30)).mul_(0xBF58476D1CE4E5B9 - (1 << 64))  # in place: memory takes most of the time
    x.bitwise_xor_(_shifted(x, 27)).mul_(0x94D049BB133111EB - (1 << 64))
    return x.bitwise_xor_(_shifted(x, 31))


def stream(seed: int, version: int) -> np.ndarray:
    """Return where the numbers of a seed and a version begin, (1,) uint64."""
    return mix(mix(np.array([seed], np.uint64)) + np.uint64(version))


def _shifted(x: Tensor, num_bits: int) -> Tensor:
    """Return x shifted to the right as 64 bits without a sign."""
    return (x >> num_bits).bitwise_and_((1 << (64 - num_bits)) - 1)


def _simans(settings: SampleSettings, score_n: Tensor, positive_n: Tensor, noise_n: Tensor) -> Tensor:
    # Source: SimANS, arXiv 2210.11773.
    return noise_n - settings.simans_a * (score_n - positive_n - settings.simans_b) ** 2


def _laplace(settings: SampleSettings, score_n: Tensor, positive_n: Tensor, noise_n: Tensor) -> Tensor:
    # Source: the authors' code of SimANS for MS MARCO passages.
    return noise_n - settings.laplace_a * (score_n - positive_n - settings.simans_b).abs()


def _softmax(settings: SampleSettings, score_n: Tensor, positive_n: Tensor, noise_n: Tensor) -> Tensor:
    return noise_n + score_n / settings.softmax_temperature


PRIORITIES: dict[str, Callable[..., Tensor]] = {"simans": _simans, "simans_laplace": _laplace, "softmax": _softmax}
