"""The order of a job's data: sources and their batches, clusters, and queries that are kept out of each other's batch."""

from pathlib import Path

import numpy as np

from trainer.data.clusters import read_clusters
from trainer.data.collate import TrainingSet
from trainer.data.conflicts import Conflicts
from trainer.data.datasets import RetrievalData
from trainer.data.sampler import Order, SourceOrder
from trainer.errors import InputError
from trainer.handoff.settings import Mode


def build_order(
    data: RetrievalData,
    dataset: TrainingSet,
    split: str,
    *,
    seed: int,
    batch: int,
    mode: Mode = "mixed",
    avoid_duplicates: bool = False,
    clusters: Path | None = None,
) -> Order:
    """Return the order of a training set; the arguments after it are those of section `batch`.

    Raises InputError if a source has nothing to train on, or the clusters are those of other queries.
    """
    counts = np.bincount(data.source_of("queries", data.training_queries(split)), minlength=len(data.sources)).tolist()
    for source, count in zip(data.sources, counts, strict=True):
        if count == 0:
            raise InputError(
                f"{source.settings.path} has no query with a positive in the split {split!r}; "
                f"set data.train_split, or take sources.{source.name} away"
            )
    firsts = [sum(counts[:number]) for number in range(len(counts))]
    sources = tuple(
        SourceOrder(first, size, source.settings.batch or batch, source.settings.weight)
        for first, size, source in zip(firsts, counts, data.sources, strict=True)
    )
    keys = dataset.query_keys, dataset.positive_indptr, dataset.positive_rows, dataset.passage_keys
    conflicts = Conflicts(*keys) if avoid_duplicates else None
    found = None if clusters is None else read_clusters(clusters, dataset.num_queries)
    return Order(seed, batch, sources, mode, found, conflicts)
