"""The same test queries before and after training: at which place the first relevant passage stood, and where it stands now.

Evaluations keep the measures of each query (`each` in `evaluations/NAME.json`), and MRR@10 of one query is one divided by that
place. So nothing is encoded here; the price is that below the tenth place only "up to 100" is known.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.jobfile import read_job
from launch.report.examples import excerpt
from trainer.data.datasets import RetrievalData, open_data
from trainer.data.row import Entry
from trainer.errors import InputError
from trainer.evaluate import MEASURES
from trainer.scores import read_scores

NUM_OF_A_KIND = 4  # shown: those that rose most, and those that fell most
DEEP, NOWHERE = 50, 1000  # stand for "11 to 100" and "not among the first 100" where places are compared
NAMES = ("untrained", "trained")


@dataclass(frozen=True)
class BeforeAfter:
    """How many queries changed, and some that changed most."""

    num_better: int
    num_worse: int
    num_same: int
    queries: list[dict[str, Any]]  # query, passage, before, after; those that rose first


def read_before_after(run: Path) -> BeforeAfter:
    """Return the comparison; raises InputError where the run has kept nothing of each query, or its data cannot be read."""
    measures = {name: measures_of_each(run, name) for name in NAMES}
    missing = [run / "evaluations" / f"{name}.json" for name, found in measures.items() if found is None]
    if there := [str(file) for file in missing if file.exists()]:
        raise InputError(f"nothing is known of single queries in {there[0]}: it holds no figure of each query")
    train = read_job(run / "job.toml", [f"run.folder={run}"]).train
    data, split = open_data(train.data, train.sources), train.eval.split
    if missing and split not in data.qrels:
        raise InputError(
            f"the run was not tested: {data.path} has no queries in eval.split={split!r}; negpool data split sets some aside"
        )
    if missing:
        raise InputError(f"the run was not tested on {split}, or has not ended: {missing[0]} is not there")
    query_rows = data.evaluated_queries(split)
    before_Q, after_Q = (places(found) for found in measures.values() if found is not None)
    if not len(before_Q) == len(after_Q) == len(query_rows):
        raise InputError(f"{run}/evaluations is about {len(before_Q)} queries, and {data.path} has {len(query_rows)} in {split}")
    # By what a person gains: from the third place to the first is more than from the tenth to the eighth.
    gain_Q = 1 / after_Q - 1 / before_Q
    order = np.argsort(-gain_Q, kind="stable")
    most = [*order[:NUM_OF_A_KIND], *order[::-1][:NUM_OF_A_KIND]]
    chosen = [q for q in dict.fromkeys(most) if gain_Q[q] != 0]
    return BeforeAfter(
        num_better=int((gain_Q > 0).sum()),
        num_worse=int((gain_Q < 0).sum()),
        num_same=int((gain_Q == 0).sum()),
        queries=[_shown(data, split, int(query_rows[q]), int(before_Q[q]), int(after_Q[q])) for q in chosen],
    )


def measures_of_each(run: Path, name: str) -> np.ndarray | None:
    """Return what an evaluation has kept of each query, (Q, M), columns as in MEASURES; None: nothing that can be read."""
    try:
        scores = read_scores(run, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None if scores is None else scores.each_QM


def places(each_QM: np.ndarray) -> np.ndarray:
    """Return the place of each query's first relevant passage, from 1; DEEP: 11 to 100, NOWHERE: not among the first 100."""
    reciprocal_Q, recall_Q = (each_QM[:, list(MEASURES).index(name)] for name in ("mrr@10", "recall@100"))
    with np.errstate(divide="ignore"):
        exact_Q = np.rint(1 / reciprocal_Q)
    return np.where(reciprocal_Q > 0, exact_Q, np.where(recall_Q > 0, DEEP, NOWHERE))


def _shown(data: RetrievalData, split: str, row: int, before: int, after: int) -> dict[str, Any]:
    _, relevant = data.positives(np.array([row]), split)
    passages = [excerpt(_entry(data.corpus[int(passage)])) for passage in relevant[:1]]
    words = {"before": _in_words(before), "after": _in_words(after), "is_better": after < before}
    return {"query": excerpt(_entry(data.queries[row])), "passages": passages, "more": max(0, len(relevant) - 1), **words}


def _in_words(place: int) -> str:
    return {DEEP: "11 to 100", NOWHERE: "not in 100"}.get(place, str(place))


def _entry(row: dict[str, Any]) -> Entry:
    return Entry(row["_id"], row["text"], title_length=row.get("title_length") or 0)
