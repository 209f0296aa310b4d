"""Finds candidates with the encoder and in the last version, and scores any pair of query and passage.

Every candidate is scored by the encoder, whichever search found it, so that margins and samplers compare scores of one kind.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from mining.find.asked import Asker
from mining.find.known_pairs import KnownPairs, Listed, Scored
from mining.find.search import Finder, best_of_ranks, share_of
from mining.ranks import Ranks
from mining.table.filters import is_listed
from mining.table.judgements import Judgements
from trainer.encoder.topk import merge_top_k
from trainer.handoff.negatives import Negatives


class Retriever(Protocol):
    """Finds and scores candidates. Every rank calls `find` and `score` for every tile."""

    def find(self, tile: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores float32, ids int64), each (n, K), best first, of this rank's share of a tile of queries."""
        ...

    def score(self, places: slice, ids_nR: np.ndarray) -> np.ndarray:
        """Return the scores of any passages for the queries of this rank's share, (n, R) float32; -inf where the id is -1."""
        ...

    def score_positives(self, places: slice) -> np.ndarray | None:
        """Return the score of every positive of these queries, in the order of the judgements, (p,) float32, if known."""
        ...


@dataclass
class DenseRetriever:
    """What the finders of all ranks have found, scored by the encoder: pairs that were known before the stream from what the
    ranks took then, all others from the shards.

    Memory and messages are of the size of a tile's candidates, and none goes by way of one rank.
    """

    ranks: Ranks
    judgements: Judgements
    finder: Finder
    known: KnownPairs
    asker: Asker
    top_k: int
    words: Listed | None = None  # candidates of a search by words, which are added. Source: AR2 and CET take several retrievers'
    _scored: Scored = field(default_factory=Scored.none, init=False)  # of the last tile

    def find(self, tile: slice) -> tuple[np.ndarray, np.ndarray]:
        self._scored = self.known.bring(self.ranks, tile)
        scores_nK, ids_nK = best_of_ranks(self.ranks, self.finder, tile)
        share = share_of(tile.stop - tile.start, self.ranks.rank, self.ranks.num_ranks)
        places = slice(tile.start + share.start, tile.start + share.stop)
        if not self.finder.is_exact:
            scores_nK, ids_nK = merge_top_k([(self.score(places, ids_nK), ids_nK)], self.top_k)
        if self.words is None:
            return scores_nK, ids_nK
        return with_others(self, places, scores_nK, ids_nK, self.words.table(places))

    def score(self, places: slice, ids_nR: np.ndarray) -> np.ndarray:
        rows, at = np.nonzero(ids_nR >= 0)
        scores_nR = np.full(ids_nR.shape, -np.inf, np.float32)
        scores_nR[rows, at] = self._score_pairs(rows + places.start, ids_nR[rows, at])
        return scores_nR

    def score_positives(self, places: slice) -> np.ndarray:
        indptr, rows = self.judgements.positives(places)
        return self._score_pairs(np.repeat(np.arange(places.start, places.stop), np.diff(indptr)), rows)

    def _score_pairs(self, query_places: np.ndarray, passage_rows: np.ndarray) -> np.ndarray:
        scores = self._scored.of(query_places, passage_rows)
        unknown = np.flatnonzero(np.isnan(scores))
        scores[unknown] = self.asker.ask_scores(query_places[unknown], passage_rows[unknown])
        return scores


def with_others(
    retriever: Retriever, places: slice, scores_nK: np.ndarray, ids_nK: np.ndarray, ids_nR: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, ids), each (n, K + R), of candidates and of others that may be among them already, best first."""
    indptr = torch.arange(len(ids_nK) + 1) * ids_nK.shape[1]
    is_there = is_listed(torch.from_numpy(ids_nR), indptr, torch.from_numpy(ids_nK).flatten())
    ids_nR = np.where(is_there.numpy(), -1, ids_nR)
    return merge_top_k([(scores_nK, ids_nK), (retriever.score(places, ids_nR), ids_nR)], ids_nK.shape[1] + ids_nR.shape[1])


def last_negatives(last: Negatives, places: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return the negatives of some queries in the last version: ids and their scores when first drawn, each (n, longest).

    -1 and -inf fill up.
    """
    counts = np.diff(last.indptr[places.start : places.stop + 1])
    is_there = np.arange(counts.max(initial=0)) < counts[:, None]
    ids_nL, scores_nL = np.full(is_there.shape, -1, np.int64), np.full(is_there.shape, -np.inf, np.float32)
    at = slice(last.indptr[places.start], last.indptr[places.stop])
    ids_nL[is_there] = last.ids[at]
    scores_nL[is_there] = (last.scores if last.first_scores is None else last.first_scores)[at]
    return ids_nL, scores_nL
