"""`results.json`: what became of a run, with intervals and a verdict. Rank 0 only.

The trainer writes it when it ends, and `negpool run` again with BM25's figures.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from trainer.evaluate import MEASURES, means
from trainer.handoff.manifest import write_atomically
from trainer.measures import MEASURE_TITLES
from trainer.metrics import read_status
from trainer.scores import TESTED, read_scores
from trainer.verdict import all_intervals, verdict


def write_results(
    run: Path, split: str, measure: str, bm25_QM: np.ndarray | None = None, collapsed: str | None = None, **more: Any
) -> dict[str, Any]:
    """Judge a run that has ended by its evaluations on a split, keep that in `results.json` and return it.

    measure: which decides. bm25_QM: BM25's, of each query. collapsed: why the run ended before its time. more: further figures.
    """
    kept = {name: read_scores(run, name) for name in TESTED}
    tested = {name: scores for name, scores in kept.items() if scores is not None and scores.split == split}
    rows = {name: scores.measures for name, scores in tested.items()}
    each = {name: scores.each_QM for name, scores in tested.items() if scores.each_QM is not None}
    if bm25_QM is not None:
        rows, each = {"bm25": means(bm25_QM), **rows}, {"bm25": bm25_QM, **each}
    num_queries = max((len(each_QM) for each_QM in each.values()), default=0)
    each = {name: each_QM for name, each_QM in each.items() if len(each_QM) == num_queries}
    intervals = all_intervals(each, list(MEASURES))
    judged = verdict(rows, intervals, measure, MEASURE_TITLES[measure], num_queries)
    if collapsed is not None:
        judged = {"level": "collapsed", "sentence": collapsed, "warnings": []}
    judged["warnings"] += _of_both_sides(run)
    results = {
        **rows,
        "steps": {name: scores.step for name, scores in tested.items() if name != "untrained"},
        "intervals": intervals,
        "verdict": judged,
        "measure": measure,
        "versions_swapped": sum(version > 0 for _, version in read_status(run, "trainer").get("swaps", [])),
        "num_test_queries": num_queries,
        **more,
    }
    write_atomically(run / "results.json", json.dumps(results, indent=1))
    return results


def _of_both_sides(run: Path) -> list[dict[str, str]]:
    """Return what both sides warned of last."""
    found = [warning for side in ("trainer", "miner") for warning in read_status(run, side).get("warnings") or []]
    return [{"kind": warning["kind"], "sentence": warning["sentence"]} for warning in found]
