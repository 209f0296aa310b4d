"""The approximate index of a version: opened before the stream, filled by it, audited, and made better where it falls short.

The audit's queries are searched exactly by the same pass over the shards. nprobe is doubled until the index finds enough of
what exact search finds; then the state is trained anew, if it is an earlier version's; then "auto" gives way to exact search.
"""

import logging
from dataclasses import asdict, replace

import numpy as np
import torch

from mining.find.approximate import ApproximateFinder
from mining.find.dense_search import DenseSearch
from mining.find.entries import Entries
from mining.find.index import empty_index, is_exact, least_trained, load_faiss, num_lists, num_trained
from mining.find.search import ExactFinder
from mining.find.trained import Trained, TrainedStates, sample_rows, train_index, unevenness
from mining.settings import AUTO, EXACT
from mining.table.audit import audit_recall, audit_sample
from mining.watch import Task
from mining.work import Work
from trainer.encoder.stream import Look

log = logging.getLogger(__name__)


def open_index(work: Work, task: Task, search: DenseSearch) -> "Index | None":
    """Return the index of a version, or None where the search is exact. Collective; raises InputError."""
    factory, judgements = search.source.index.factory, work.judgements
    if is_exact(factory):
        return None
    key_N = search.source.keys[0].passage_N if search.source.keys else None
    entries = Entries(judgements.allowed_N, key_N)
    index = work.ranks.together(lambda: empty_index(factory, search.source.width))
    least, num = least_trained(load_faiss(factory), index), entries.num_entries
    if num < least:
        log.warning("%s needs %d passages at least, and there are %d different ones: the search is exact", factory, least, num)
        return None
    if num_lists(factory) == 0:
        log.warning("%s has no lists: what it finds depends on the number of ranks, as an IVF index does not", factory)
    return Index(work, task, search, entries)


class Index:
    """A version's index over this rank's shards, and the exact search of the audit's sample. All methods but `looks` and `about`
    are collective.
    """

    def __init__(self, work: Work, task: Task, search: DenseSearch, entries: Entries):
        self._work, self._search, self._entries = work, search, entries
        self.settings, self.recall, self.unevenness = search.source.index, 0.0, 1.0
        texts = search.source.texts.get("passage")
        about = {
            "factory": self.settings.factory,
            "width": search.source.width,
            "data": work.data.digest,
            "tokens": None if texts is None else texts.tokens.digest,
            "seed": work.job.run.seed,
        }
        self._version, self._states = task.version, TrainedStates(work.job.run.folder, task.version, about)
        self._places = audit_sample(work.job.audit, work.job.run.seed, task.version, work.judgements.query_rows)
        self._exact = self._open_exact()
        self.finder: ApproximateFinder | None = None  # None: not trained yet, or exact search after all
        self.trained: Trained | None = work.ranks.decide(self._states.find)
        if self.trained is not None:
            self._open(self.trained)

    def looks(self) -> list[Look]:
        """Return what has to see the stream."""
        return [self._exact.see, *([] if self.finder is None else [self.finder.see])]

    def build(self) -> None:
        """Train what could not be trained before the passages were encoded, and add them."""
        if self.finder is None:
            self._train()

    def audit(self) -> None:
        """Measure the recall, and do what there is to do about one that is too low."""
        work, factory = self._work, self.settings.factory
        exact_Qk = self._exact.keys(slice(0, len(self._places)))
        self._raise_nprobe(exact_Qk)
        assert self.trained is not None
        if self.recall < work.job.audit.min_recall and self.trained.version != self._version:
            log.warning(
                "%s as trained for version %d finds %.3f of the exact neighbours: it is trained anew",
                factory, self.trained.version, self.recall,
            )  # fmt: skip
            self._train()
            self._raise_nprobe(exact_Qk)
        if self.recall < work.job.audit.min_recall and work.job.index.factory == AUTO:
            log.warning("%s finds %.3f of the exact neighbours: the search is exact", factory, self.recall)
            self.settings, self.recall, self.finder, self.trained = replace(self.settings, factory=EXACT), 1.0, None, None
            return
        trained, nprobe = self.trained, self.settings.nprobe
        work.ranks.decide(lambda: self._states.settle(trained, self.unevenness, nprobe))

    def about(self) -> dict[str, object]:
        """Return what a manifest says of it."""
        if self.finder is None:
            return {"factory": self.settings.factory}
        uneven = {"unevenness": round(self.unevenness, 4), "trained": None if self.trained is None else asdict(self.trained)}
        return {"factory": self.settings.factory, "nprobe": self.settings.nprobe, **uneven}

    def _raise_nprobe(self, exact_Qk: np.ndarray) -> None:
        """Double nprobe until enough is found, from what the job says."""
        ranks, finder, wanted = self._work.ranks, self.finder, self._work.job.audit.min_recall
        assert finder is not None
        sizes = ranks.gather(finder.list_sizes())
        self.unevenness = ranks.decide(lambda: unevenness(np.sum(sizes, axis=0)))
        query_QD, nprobe = self._search.queries.read(self._places), self._work.job.index.nprobe
        while True:
            finder.set_nprobe(nprobe)
            # Of a graph the most depends on the rank.
            most, nprobe = (max(ranks.exchange([each] * ranks.num_ranks)) for each in (finder.most_nprobe, finder.nprobe))
            found_Qn = ranks.together(lambda: finder.search(query_QD))
            self.recall = audit_recall(ranks, found_Qn, exact_Qk)
            log.info("%s with nprobe=%d finds %.3f of the exact neighbours", self.settings.factory, nprobe, self.recall)
            if self.recall >= wanted or nprobe >= most:
                break
            nprobe = min(2 * nprobe, most)
        self.settings = replace(self.settings, nprobe=nprobe)

    def _train(self) -> None:
        """Train a state for this version, and add all passages to an index of it."""
        sample = self._gather_sample()
        factory, device = self.settings.factory, self._work.device
        self.trained = self._work.ranks.decide(lambda: self._states.publish(train_index(factory, sample, device)))
        self._open(self.trained)
        assert self.finder is not None
        self._search.replay([self.finder.see])

    def _open(self, trained: Trained) -> None:
        work, search = self._work, self._search
        index = work.ranks.together(lambda: self._states.open(trained))
        rows = search.source.passages.shard_rows
        what = self.settings.factory, index, self._entries, search.queries, work.job.search.top_k
        self.finder = ApproximateFinder(*what, rows, work.device)

    def _open_exact(self) -> ExactFinder:
        work, search = self._work, self._search
        query_QD = torch.from_numpy(search.queries.read_stored(self._places)).to(work.device)
        rows, allowed_N = search.source.passages.shard_rows, work.judgements.allowed_N
        return ExactFinder(slice(0, len(query_QD)), query_QD, work.job.search.top_k, rows, allowed_N, work.device)

    def _gather_sample(self) -> np.ndarray:
        """Return the embeddings that a state is trained from on rank 0, float32, in the order of their rows; each rank reads its
        own.
        """
        ranks, passages = self._work.ranks, self._search.passages
        num = num_trained(self.settings.factory, self._entries.num_entries)
        rows = sample_rows(self._entries.is_entry_N, num, self._work.job.run.seed)
        owner_n = self._search.owner_of_shard[rows // passages.shards.shard_rows]
        own = ranks.together(lambda: passages.read_stored(rows[owner_n == ranks.rank]))
        parts = [own if rank == 0 else own[:0] for rank in range(ranks.num_ranks)]
        found = np.concatenate(ranks.exchange_arrays(parts))
        if not ranks.speaks:
            return found
        sample_nD = np.empty(found.shape, np.float32)
        sample_nD[np.argsort(owner_n, kind="stable")] = found
        return sample_nD
