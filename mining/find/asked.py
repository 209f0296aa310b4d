"""Scores of pairs that nobody knew before the stream: the rank that owns a passage's shard reads it and answers.

A pair is summed in the order in which known pairs are, on the same device: its score has the same bits.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from mining.find.embeddings import Embeddings
from mining.ranks import Ranks
from trainer.encoder.pair_scores import score_pairs


@dataclass(frozen=True)
class Asker:
    """Asks the owners of shards. Every rank has one, and answers while it asks."""

    ranks: Ranks
    owner_of_shard: np.ndarray  # (num_shards,) int32, the same on every rank
    queries: Embeddings
    passages: Embeddings
    device: torch.device | str

    def ask_scores(self, query_places: np.ndarray, passage_rows: np.ndarray) -> np.ndarray:
        """Return the score of each pair, (n,) float32. Collective; 12 bytes of messages for each pair.

        Raises GivenUp on every rank for a shard that one rank cannot read.
        """
        num_ranks = self.ranks.num_ranks
        owner_n = self.owner_of_shard[passage_rows // self.passages.shards.shard_rows]
        order = np.argsort(owner_n, kind="stable")
        pair_n2 = np.stack([query_places, passage_rows], 1).astype(np.uint32)[order]
        ends = np.searchsorted(owner_n[order], np.arange(num_ranks), side="right")
        asked = self.ranks.exchange_arrays(np.split(pair_n2, ends[:-1]))
        answered = self.ranks.together(lambda: self._answer(np.concatenate(asked).astype(np.int64)))
        ends = np.cumsum([len(part) for part in asked])
        scores = np.empty(len(order), np.float32)
        scores[order] = np.concatenate(self.ranks.exchange_arrays(np.split(answered, ends[:-1])))
        return scores

    def _answer(self, pair_n2: np.ndarray) -> np.ndarray:
        """Return the score of pairs whose passages are in this rank's shards, one shard after the other."""
        scores, shard_rows = np.empty(len(pair_n2), np.float32), self.passages.shards.shard_rows
        shard_n = pair_n2[:, 1] // shard_rows
        order = np.argsort(shard_n, kind="stable")
        found, starts = np.unique(shard_n[order], return_index=True)
        for shard, (start, stop) in zip(found.tolist(), pairwise([*starts, len(order)]), strict=True):
            self.ranks.check_stop()
            here = order[start:stop]
            scores[here] = self._score(shard, pair_n2[here, 0], pair_n2[here, 1] - shard * shard_rows)
        return scores

    def _score(self, shard: int, place_n: np.ndarray, row_n: np.ndarray) -> np.ndarray:
        (places, query_n), (rows, passage_n) = (np.unique(each, return_inverse=True) for each in (place_n, row_n))
        tables = self.queries.read_stored(places), self.passages.shard(shard)[rows]
        self.passages.let_go(shard)
        on_device = [torch.from_numpy(each).to(self.device) for each in (*tables, query_n, passage_n)]
        return score_pairs(*on_device).cpu().numpy()
