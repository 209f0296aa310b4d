"""A version of negatives drawn at random, in the place of a miner's: as many to choose from, and so as many in a step."""

import time

import numpy as np

from trainer.handoff.negatives import publish_negatives
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
