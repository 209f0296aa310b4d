"""How good a version is before anyone trains on it: recall of its index, overlap with the last version, its scores.

A version that fails is not published, and every reason is told.
"""

import numpy as np

from mining.find.search import best_of_found
from mining.ranks import Ranks
from mining.settings import KNOWN, AuditSettings
from mining.table.judgements import Judgements
from mining.table.kept import Drawn
from mining.table.sampling import stream
from trainer.data.shuffle import mix
from trainer.handoff.negatives import Negatives

# 1 - the mean cosine of some passages, or of some queries: less is a model that has collapsed, and what is near means nothing
MIN_SPREAD = 1e-3
OVERLAP_UNITS = 1 << 32  # sums of 10 million rows keep within 64 bits
MAX_SCORED = 1 << 16  # queries whose scores are looked at: a quantile of so many is right to a hundredth of their spread
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def reasons_against(
    settings: AuditSettings, factory: str, recall: float | None, suspected: float | None = None, without: float | None = None
) -> list[str]:
    """Return every reason not to publish a version, in words; None: not measured.

    factory: of the index. suspected, without: shares of candidates and of queries, as the settings have them.
    """
    reasons = []
    if recall is not None and recall < settings.min_recall:
        reasons.append(
            f"index.factory={factory} finds {recall:.3f} of the exact neighbours, less than "
            f"audit.min_recall={settings.min_recall}, however many lists are looked into; set index.factory to one that keeps "
            'more of each passage, such as "IVF1024,Flat", or to "exact"'
        )
    if suspected is not None and suspected > settings.max_suspected:
        reasons.append(
            f"{suspected:.1%} of the unjudged candidates score as positives do, more than audit.max_suspected="
            f"{settings.max_suspected}; set filter.relative_margin or search.top_k otherwise"
        )
    if without is not None and without > settings.max_without:
        reasons.append(
            f"for {without:.1%} of the queries no candidate passed the filters, more than audit.max_without="
            f"{settings.max_without}; set search.top_k higher, or filter.relative_margin lower"
        )
    return reasons


def reasons_of_collapse(sides: dict[str, np.ndarray]) -> list[str]:
    """Return why a checkpoint's embeddings are not worth a search, in words: they are nearly one.

    sides: some embeddings of queries and of passages, (n, D), by name.
    """
    reasons = []
    for name, found_nD in sides.items():
        unit_nD = found_nD / np.maximum(np.linalg.norm(found_nD.astype(np.float32), axis=1, keepdims=True), 1e-12)
        n = len(unit_nD)
        mean_cosine = float((np.square(unit_nD.sum(0, dtype=np.float64)).sum() - n) / max(1, n * (n - 1)))
        if n > 1 and 1 - mean_cosine < MIN_SPREAD:
            reasons.append(
                f"the model has collapsed: all {name} have nearly one embedding, with a mean cosine of {mean_cosine:.5f}"
            )
    return reasons


def audit_sample(settings: AuditSettings, seed: int, version: int, query_rows: np.ndarray) -> np.ndarray:
    """Return the places of the queries to audit, ascending; a pure function of seed, version and rows."""
    order = np.argsort(mix(stream(seed, version) + query_rows.astype(np.uint64)), kind="stable")
    return np.sort(order[: settings.num_queries])


def audit_recall(ranks: Ranks, found_Qn: np.ndarray, exact_Qk: np.ndarray) -> float:
    """Return the mean share of exact neighbours that were found, on every rank, whatever candidates they came among. Collective.

    found_Qn, exact_Qk: keys of this rank's shards for the same queries. With n > k the best k are chosen by exact scores later,
    and no exact neighbour loses its place by that.
    """
    (_, found_ids), (_, exact_ids) = best_of_found(ranks, found_Qn), best_of_found(ranks, exact_Qk)
    parts = ranks.gather(recall_of_each(found_ids, exact_ids))
    return ranks.decide(lambda: float(np.concatenate(parts).mean()))


def recall_of_each(found_Qk: np.ndarray, exact_Qk: np.ndarray) -> np.ndarray:
    """Return which share of each row's exact ids was found, (Q,); 1 where there is nothing to find. -1: no id."""
    listed = (exact_Qk[:, :, None] == found_Qk[:, None, :]).any(2) & (exact_Qk >= 0)
    num_exact = (exact_Qk >= 0).sum(1)
    return np.where(num_exact > 0, listed.sum(1) / np.maximum(1, num_exact), 1.0)


def jaccard_of_each(indptr: np.ndarray, ids: np.ndarray, other_indptr: np.ndarray, other_ids: np.ndarray) -> np.ndarray:
    """Return the overlap of each row of two tables in CSR form, (Q,): common ids by ids in either; 1 if both are empty."""
    num_rows = len(indptr) - 1
    rows, other_rows = (np.repeat(np.arange(num_rows), np.diff(p)) for p in (indptr, other_indptr))
    span = 1 + max(ids.max(initial=0), other_ids.max(initial=0))
    common = np.intersect1d(rows * span + ids, other_rows * span + other_ids) // span
    num_common = np.bincount(common, minlength=num_rows)
    num_either = np.diff(indptr) + np.diff(other_indptr) - num_common
    return np.where(num_either > 0, num_common / np.maximum(1, num_either), 1.0)


def overlap_with(ranks: Ranks, last: Negatives | None, drawn: Drawn) -> float | None:
    """Return the mean overlap of the rows with those of the last version, on every rank; None if none fits. Collective.

    Each rank compares the rows of its parts. They are summed as whole numbers of 2^-32, so the figure is the same however the
    rows are divided.
    """
    if last is None or last.num_queries != drawn.num_queries:
        return None

    def own_sum() -> int:
        total = 0
        for placed, part in drawn.read():
            indptr = np.asarray(last.indptr[placed.span.place : placed.span.stop + 1])
            there = np.asarray(last.ids[indptr[0] : indptr[-1]])
            each_Q = jaccard_of_each(row_ends(part.lengths), part.columns["ids"], indptr - indptr[0], there)
            total += int(np.rint(each_Q * OVERLAP_UNITS).astype(np.int64).sum())
        return total

    sums = ranks.gather(ranks.together(own_sum))
    return ranks.decide(lambda: round(sum(sums) / OVERLAP_UNITS / drawn.num_queries, 4))


def audit_scores(ranks: Ranks, judgements: Judgements, drawn: Drawn) -> dict[str, dict[str, float]]:
    """Return quantiles of the scores of negatives and of positives, on every rank. Collective.

    Of all queries, or of those among more than MAX_SCORED whose rows' hashes are lowest, about so many: the same ones whoever
    drew them. Their scores alone travel, to rank 0.
    """
    limit = min(1.0, MAX_SCORED / max(1, drawn.num_queries))
    names = "scores", "positive_scores"

    def own_scores() -> list[np.ndarray]:
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for placed, part in drawn.read():
            places = slice(placed.span.place, placed.span.stop)
            is_taken = mix(judgements.query_rows[places].astype(np.uint64)) / 2.0**64 < limit
            lengths = part.lengths, np.diff(judgements.positives(places)[0])
            for name, of_query in zip(names, lengths, strict=True):
                if name in part.columns:
                    found[name].append(part.columns[name][np.repeat(is_taken, of_query)])
        return [np.concatenate([np.zeros(0, np.float32), *found[name]]) for name in names]

    nobody = [np.zeros(0, np.float32)] * (ranks.num_ranks - 1)
    received = [ranks.exchange_arrays([own, *nobody]) for own in ranks.together(own_scores)]
    return ranks.decide(
        lambda: {name: score_quantiles(np.concatenate(parts)) for name, parts in zip(names, received, strict=True)}
    )


def row_ends(lengths: np.ndarray) -> np.ndarray:
    """Return the indptr of rows of some lengths, (Q + 1,)."""
    return np.concatenate([[0], np.cumsum(lengths)])


def score_quantiles(scores: np.ndarray) -> dict[str, float]:
    """Return some quantiles of scores by name, none if there are no scores."""
    if len(scores) == 0:
        return {}
    return {f"q{int(q * 100):02}": round(float(v), 4) for q, v in zip(QUANTILES, np.quantile(scores, QUANTILES), strict=True)}


def suspected_share(num_candidates: int, dropped: dict[str, int]) -> float | None:
    """Return the share of unjudged candidates above the relative margin, likely positives nobody judged; None: no margin."""
    if "relative_margin" not in dropped:
        return None
    known = sum(dropped.get(name, 0) for name in (*KNOWN, "range", "max_score", "min_score"))
    return round(dropped["relative_margin"] / max(1, num_candidates - known), 4)
