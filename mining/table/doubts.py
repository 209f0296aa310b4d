"""What makes mined negatives doubtful: too many candidates dropped, more false negatives than before, hardly any that is hard.

Pure functions of a version's manifest and of the job. Nothing here refuses a version; section `audit` has limits that do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mining.job import MineJob
from mining.settings import KNOWN
from trainer.handoff.manifest import TornVersion, read_manifest, versions
from trainer.handoff.negatives import negatives_folder

MOST = 0.5  # of candidates, or of the corpus. MiniLM on code drops 1 to 3 percent of its candidates by score
JUMP = 2.0, 0.05  # times the last version's share of likely false negatives, and so much more: a small share doubles by chance
HARD = 0.25  # of the way from random passages to positives: the quickstart is at .3, and .16 against .65 of positives at .2
BY_PLACE = ("range", "rerank_top_k", "higher")  # filters that cut by rank, as they are told to


def mining_defeats(job: MineJob, num_passages: int) -> dict[str, str | None]:
    """Return a sentence for each kind of setting that cannot do what it is for in a corpus of so many passages, or None."""
    found: dict[str, str | None] = dict.fromkeys(("top_k", "bm25_top_k", "num_negatives"))
    lower = max(job.sample.num_negatives, num_passages // 10)
    for kind, name, depth in (
        ("top_k", "search.top_k", job.search.top_k),
        ("bm25_top_k", "mine.bm25_top_k", job.mine.bm25_top_k),
    ):
        if depth > MOST * num_passages:
            found[kind] = (
                f"{name}={depth} is most of the corpus of {num_passages} passages: candidates are hardly nearer to a query than "
                f"random ones; set it to {lower} or less"
            )
    if job.sample.num_negatives > MOST * num_passages:
        found["num_negatives"] = (
            f"sample.num_negatives={job.sample.num_negatives} is most of the corpus of {num_passages} passages; set it lower"
        )
    return found


def doubts(manifest: Mapping[str, Any], last_suspected: float | None) -> dict[str, str | None]:
    """Return a sentence for each kind of doubt about a version, None where there is none.

    last_suspected: of the last version's candidates, the share that scored as positives do; None: unknown.
    """
    return {
        "most_dropped": _most_dropped(manifest["counts"]["candidates"], manifest["filter"]["dropped"]),
        "false_negatives_jump": _jump(manifest["audit"]["share_suspected_false"], last_suspected),
        "hardly_hard": _hardly_hard(manifest),
    }


def last_suspected(run: Path) -> float | None:
    """Return the newest version's share of candidates that score as positives do, None where no model has mined it."""
    for folder in reversed(versions(negatives_folder(run))):
        try:
            return read_manifest(folder).get("audit", {}).get("share_suspected_false")
        except TornVersion:
            continue
    return None


def random_score(query_nD: np.ndarray, passage_nD: np.ndarray) -> float | None:
    """Return the median score of queries with passages that are not theirs but by chance, None where there are none."""
    scores = query_nD.astype(np.float32) @ passage_nD.astype(np.float32).T
    return float(np.median(scores)) if scores.size else None


def hardness(negative: float, positive: float, at_random: float) -> float | None:
    """Return where negatives are between random passages, 0, and positives, 1; None where positives score like random ones.

    So it is the same for encoders that put all texts near to each other and for those that spread them out, where a difference
    of scores is not, nor their ratio. All three are medians of scores.
    """
    return (negative - at_random) / (positive - at_random) if positive > at_random else None


def _most_dropped(num_candidates: int, dropped: Mapping[str, int]) -> str | None:
    by_score = {name: count for name, count in dropped.items() if name not in (*KNOWN, *BY_PLACE) and count}
    num_judged = num_candidates - sum(dropped.get(name, 0) for name in (*KNOWN, *BY_PLACE))
    num_dropped = sum(by_score.values())
    if num_dropped <= MOST * max(1, num_judged):
        return None
    names = ", ".join(f"{name} {count:,}" for name, count in by_score.items())
    return (
        f"{num_dropped / num_judged:.0%} of the candidates are dropped for their scores ({names}): the model does not tell "
        "positives from other passages yet, or many passages are unjudged positives; set filter.relative_margin lower"
    )


def _jump(suspected: float | None, last: float | None) -> str | None:
    times, more = JUMP
    if suspected is None or last is None or suspected <= max(times * last, last + more):
        return None
    return (
        f"{suspected:.1%} of the candidates score as positives do, and {last:.1%} did in the version before: more of the "
        "negatives may be false; the model may have become worse"
    )


def _hardly_hard(manifest: Mapping[str, Any]) -> str | None:
    audit, at_random, share = manifest["audit"], manifest.get("random_score"), manifest["sample"]["random_share"]
    negative, positive = (audit[name].get("q50") for name in ("scores", "positive_scores"))
    if at_random is None or negative is None or positive is None or share >= MOST:  # random ones were asked for
        return None
    found = hardness(negative, positive, at_random)
    if found is None or found >= HARD:
        return None
    return (
        f"hardly any negative is hard: their median score is {negative:.2f}, that of positives {positive:.2f}, and of random "
        f"passages {at_random:.2f}; set search.top_k lower, or sample.method to top or simans"
    )
