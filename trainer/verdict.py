"""Whether training has made a model better, in a sentence, as far as so many test queries can tell.

A paired bootstrap over queries: models are compared on the same queries, so what is hard for both cancels out. Source: Sakai
2006, "Evaluating evaluation metrics based on the bootstrap", SIGIR. Pure functions of each query's measures.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

# Q queries, C columns, b resamples at once

Level = Literal["better", "unclear", "worse", "collapsed"]

RESAMPLES = 2000  # the ends of an interval move by some 3 percent of its width with the seed
COVERAGE = 0.95
FEWEST = 20  # queries; of fewer the bootstrap's intervals are far too narrow, and nothing is called clear
HELD = 2**22  # numbers drawn at once: 32 MiB


def intervals(column_QC: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the 95 % interval of each column's mean over the queries, (C, 2), by percentiles; the same resamples for all."""
    num_queries, draw = len(column_QC), np.random.default_rng(seed)
    means, at_once = [], max(1, HELD // num_queries)
    for first in range(0, RESAMPLES, at_once):
        num = min(at_once, RESAMPLES - first)
        drawn_bQ = draw.integers(0, num_queries, (num, num_queries)) + np.arange(num)[:, None] * num_queries
        count_bQ = np.bincount(drawn_bQ.ravel(), minlength=num * num_queries).reshape(num, num_queries)
        means.append(count_bQ @ column_QC / num_queries)
    tail = (1 - COVERAGE) / 2
    return np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0).T


def paired_interval(value_Q: np.ndarray, other_Q: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference of two models on the same queries."""
    low, high = intervals((value_Q - other_Q)[:, None])[0].tolist()
    return low, high


def compare(value_Q: np.ndarray | None, other_Q: np.ndarray | None) -> Literal["better", "unclear", "worse"]:
    """Return how a model stands to another on the same queries; unclear where they are few, unknown or not the same."""
    if value_Q is None or other_Q is None or len(value_Q) != len(other_Q) or len(value_Q) < FEWEST:
        return "unclear"
    low, high = paired_interval(value_Q, other_Q)
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def all_intervals(each: Mapping[str, np.ndarray], measures: list[str]) -> dict[str, dict[str, list[float]]]:
    """Return the intervals of every row and measure, and those of the differences "trained - untrained" and "trained - bm25".

    each: (Q, M) by row, columns in the order of measures, of the same queries.
    """
    columns = dict(each)
    for other in ("untrained", "bm25"):
        if "trained" in each and other in each:
            columns[f"trained - {other}"] = each["trained"] - each[other]
    if not columns:
        return {}
    found_CE = intervals(np.concatenate(list(columns.values()), axis=1)).round(5).tolist()
    rows = [found_CE[i : i + len(measures)] for i in range(0, len(found_CE), len(measures))]
    return {name: dict(zip(measures, row, strict=True)) for name, row in zip(columns, rows, strict=True)}


def verdict(
    rows: Mapping[str, Mapping[str, float]],
    found: Mapping[str, Mapping[str, list[float]]],
    measure: str,
    title: str,
    num_queries: int,
) -> dict[str, Any]:
    """Return level, sentence and warnings of a run that has ended, as `results.json` has them.

    rows: measures by model. found: what `all_intervals` gave for them. measure, title: which one decides, and for people.
    """
    if "trained" not in rows or "untrained" not in rows:
        return {"level": "unclear", "sentence": "Nothing tells whether the model is better: it was not tested.", "warnings": []}

    def against(other: str) -> tuple[str, str]:
        """Return how the trained model stands to another, and the figures in words."""
        before, after = rows[other][measure], rows["trained"][measure]
        words, end = f"{title} {before:.3f} -> {after:.3f} ({after - before:+.3f}", f"{num_queries:,} queries)"
        interval = found.get(f"trained - {other}", {}).get(measure)
        if interval is None:
            return "unclear", f"{words}, {end}"
        low, high = interval
        level = "unclear" if num_queries < FEWEST else "better" if low > 0 else "worse" if high < 0 else "unclear"
        return level, f"{words}, 95 % interval {low:+.3f} to {high:+.3f}, {end}"

    level, figures = against("untrained")
    head = {"better": "Better than the untrained model", "worse": "Worse than the untrained model"}
    sentence = f"{head.get(level, 'No clear difference to the untrained model')}: {figures}."
    warnings = [{"kind": "below_untrained", "sentence": sentence}] if level == "worse" else []
    if "bm25" in rows:
        of_bm25, figures = against("bm25")
        if of_bm25 == "worse":
            warnings.append({"kind": "below_bm25", "sentence": f"Worse than BM25: {figures}."})
            sentence = f"{sentence} {warnings[-1]['sentence']}"
    return {"level": level, "sentence": sentence, "warnings": warnings}
