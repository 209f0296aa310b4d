"""The batches of steps: a thread puts the next one together while a step runs.

What a batch holds depends on the step, the order of data and the negatives in force, and on nothing else. The thread takes it
that order and negatives stay as they are; where they do not, its work is thrown away and the batch is made anew. So a step has
the batch that it would have without the thread.
"""

import functools
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from gradcache import Batch
from trainer.data.collate import RowEncoder, TrainingSet, Wants, collate
from trainer.data.sampler import Order, Part, rank_slice, step_parts
from trainer.handoff.negatives import Negatives
from trainer.job import TrainJob
from trainer.world import World


class Share(NamedTuple):
    """A rank's share of a part of a step."""

    part: Part
    batch: Batch


class _Ahead(NamedTuple):
    """A step's shares on their way, and what they are made of."""

    step: int
    order: Order
    negatives: Negatives | None
    shares: Future[list[Share]]

    def is_of(self, step: int, order: Order, negatives: Negatives | None) -> bool:
        return self.step == step and self.order is order and self.negatives is negatives


class Batches:
    """This rank's shares of the steps of a run, in their order."""

    def __init__(
        self,
        job: TrainJob,
        world: World,
        dataset: TrainingSet,
        encoder: RowEncoder,
        num_steps: int,
        wants: Mapping[int | None, Wants],
    ):
        """wants: what the objective of each source wants of a batch, and that of mixed ones under None."""
        self._job, self._world, self._dataset, self._encoder, self._num_steps = job, world, dataset, encoder, num_steps
        self._wants = wants
        is_gpu = world.device.type == "cuda"  # threads begin on the first one, which may be another rank's
        start = functools.partial(torch.cuda.set_device, world.device) if is_gpu else None
        self._thread = ThreadPoolExecutor(1, "batches", initializer=start)
        self._ahead: _Ahead | None = None

    def of_step(self, step: int, order: Order, negatives: Negatives | None) -> list[Share]:
        """Return the shares of a step, and begin the next step's. Raises what putting them together raised."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or not ahead.is_of(step, order, negatives):
            ahead = self._begun(step, order, negatives)
        shares = ahead.shares.result()
        if step + 1 < self._num_steps:
            self._ahead = self._begun(step + 1, order, negatives)
        return shares

    def close(self) -> None:
        """End the thread; what it is at is finished first, and thrown away."""
        self._thread.shutdown(cancel_futures=True)

    def _begun(self, step: int, order: Order, negatives: Negatives | None) -> _Ahead:
        # Always in the thread, because an order keeps results for its next call and is not made for two at once.
        return _Ahead(step, order, negatives, self._thread.submit(self._shares, step, order, negatives))

    def _shares(self, step: int, order: Order, negatives: Negatives | None) -> list[Share]:
        return [Share(part, self._batch(part, step, negatives)) for part in step_parts(order, step)]

    def _batch(self, part: Part, step: int, negatives: Negatives | None) -> Batch:
        return collate(
            self._dataset,
            negatives,
            rank_slice(part.rows, self._world.rank, self._world.num_ranks),
            self._encoder,
            per_query=self._job.negatives.per_query,
            seed=self._job.run.seed,
            step=step,
            wants=self._wants[part.source],
        )
