"""A version of negatives drawn at random, in the place of a miner's: as many to choose from, and so as many in a step."""

import time

import numpy as np

from trainer.data.collate import TrainingSet
from trainer.errors import InputError
from trainer.handoff.negatives import Negatives, publish_negatives
from trainer.prepare import Training
from trainer.train import switch_negatives

LOOK_S = 0.1


def publish_random(run: Training, per_query: int) -> None:
    """Publish version 0, of `per_query` random passages of the corpus for each query, and bring it into force. Collective.

    They are of the corpus' lengths; mined ones may be longer or shorter. It is of no checkpoint, and so never too old.
    """
    num_queries, num_passages = run.dataset.num_queries, len(run.data.corpus)
    if run.world.speaks:
        draw = np.random.default_rng(run.job.run.seed)
        indptr = np.arange(num_queries + 1, dtype=np.int64) * per_query
        ids = draw.integers(0, num_passages, int(indptr[-1]))
        publish_negatives(
            run.job.run.folder,
            0,
            indptr,
            ids,
            np.zeros(len(ids), np.float32),
            {"checkpoint_step": None, "origin": "drawn at random for a measurement"},
            teacher_scores=np.zeros(len(ids), np.float32),
        )
    run.world.barrier()
    while run.feed.in_force is None:  # before_step asks all ranks
        switch_negatives(run)
        time.sleep(LOOK_S)


def drawn_negatives(dataset: TrainingSet, query_n: np.ndarray, per_query: int) -> Negatives | None:
    """Return so many random passages for each of some queries: each once, as far as there are enough, and no positive of them."""
    if not per_query:
        return None
    starts, stops = dataset.positive_indptr[query_n], dataset.positive_indptr[query_n + 1]
    taken = np.concatenate([dataset.positive_rows[start:stop] for start, stop in zip(starts, stops, strict=True)])
    others = np.setdiff1d(np.arange(len(dataset.passage_keys)), taken)
    if not len(others):
        raise InputError("the corpus has no passages but positives; set negatives.per_query=0")
    drawn = np.random.default_rng(0).permutation(others)
    per_row = min(per_query, len(drawn))
    count = np.zeros(dataset.num_queries, np.int64)
    count[query_n] = per_row
    ids = np.resize(drawn, len(query_n) * per_row)
    return Negatives(np.concatenate([[0], np.cumsum(count)]), ids, np.zeros(len(ids), np.float32), 0, {})
