"""Clusters that the miner publishes with its negatives, taken over where an epoch begins.

Within an epoch the assignment must not change, or queries would come twice. So it is kept in a file of the epoch. A run that
resumes inside the epoch reads that file, whatever was published since.
Sources: NGAME (arXiv 2207.04452), which clusters anew as training goes; topic clusters (arXiv 2407.18887).
"""

import logging
from dataclasses import replace
from pathlib import Path

from trainer.data.clusters import Clusters, read_clusters, write_clusters
from trainer.data.sampler import Order
from trainer.handoff.negatives import Negatives
from trainer.world import World

log = logging.getLogger(__name__)


class MinedClusters:
    """The clusters of the present epoch."""

    def __init__(self, world: World, run: Path, num_queries: int):
        self._world, self._folder, self._num_queries = world, run / "clusters", num_queries
        self._epoch: int | None = None

    def order_of(self, order: Order, step: int, in_force: Negatives | None) -> Order:
        """Return the order with the clusters of a step's epoch: at its beginning those of the negatives in force.

        Collective: every rank calls it before every step, with the same negatives.
        """
        epoch, place = divmod(step, order.steps_per_epoch)
        if epoch == self._epoch:
            return order
        self._epoch = epoch
        return replace(
            order, clusters=self._world.broadcast(self._of_epoch(epoch, place, in_force) if self._world.speaks else None)
        )

    def _of_epoch(self, epoch: int, place: int, in_force: Negatives | None) -> Clusters | None:
        path = self._folder / f"epoch-{epoch:06d}.npz"
        if place == 0 and not path.exists() and in_force is not None and in_force.clusters is not None:
            write_clusters(path, Clusters(in_force.clusters, in_force.version))
        if not path.exists():
            log.info("epoch %d: no clusters are published yet; its batches are random", epoch)
            return None
        found = read_clusters(path, self._num_queries)
        log.info("epoch %d: batches of whole clusters, from negatives v%d", epoch, found.version)
        return found
