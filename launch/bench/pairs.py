"""Pairs of a query and a passage, as a step takes them: query i belongs to passage i."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from gradcache import Batch
from launch.counted import counted
from trainer.data.collate import RowEncoder, TrainingSet, collate
from trainer.data.datasets import RetrievalData, open_dataset
from trainer.encoder.tokens import TokenTable, tokenize
from trainer.errors import InputError


@dataclass(frozen=True)
class Pairs:
    """Texts of this rank."""

    texts: tuple[Any, Any]
    tables: tuple[TokenTable, TokenTable]

    def __len__(self) -> int:
        return len(self.texts[0])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every text."""
        return np.concatenate([table.lengths for table in self.tables])

    def select(self, rows: np.ndarray) -> "Pairs":
        """Return some pairs, in their order."""
        return Pairs(tuple(side.select(rows) for side in self.texts), tuple(table.select(rows) for table in self.tables))  # type: ignore[arg-type]

    def tokens(self, pairs: int) -> np.ndarray:
        """Return the tokens of each text of the first pairs."""
        return np.concatenate([table.lengths[:pairs] for table in self.tables])

    def batch(self, pairs: int, encoder: RowEncoder) -> Batch:
        """Return the first pairs as a job's step collates them, from the first again where there are too few.

        Texts that repeat are encoded again: they stand for others.
        """
        batch = collate(self._training_set(), None, np.arange(pairs) % len(self), encoder, per_query=0, seed=0, step=0)
        return replace(batch, towers=[replace(tower, encode_keys=None) for tower in batch.towers])

    def _training_set(self) -> TrainingSet:
        queries, passages = self.tables
        every = np.arange(len(self))
        return TrainingSet(
            queries=queries,
            passages=passages,
            query_keys=queries.keys(every),
            passage_keys=passages.keys(every),
            positive_indptr=np.arange(len(self) + 1),
            positive_rows=every,
            positive_grades=np.ones(len(self), np.float32),
            positive_teacher=np.full(len(self), np.nan, np.float32),
            own_rows=np.full(len(self), -1),
        )


def read_pairs(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    num_pairs: int,
    max_tokens: int,
    rank: int = 0,
    num_ranks: int = 1,
    only: str | None = None,
) -> Pairs:
    """Return this rank's share of judged pairs of a data set, texts of at most so many tokens; as many on every rank.

    only: the split that they are from. Raises InputError where there are fewer.
    """
    data = open_dataset(path, None)
    rows = distinct_pairs(data, num_pairs, only)
    per_rank = len(rows) // num_ranks  # as many everywhere: the peer hangs otherwise
    rows = rows[rank * per_rank : (rank + 1) * per_rank]
    return tokenized((data.queries.select(rows[:, 0]), data.corpus.select(rows[:, 1])), tokenizer, max_tokens)


def tokenized(texts: tuple[Any, Any], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Pairs:
    """Return pairs of texts of at most so many tokens."""
    queries, passages = (tokenize(side, tokenizer, prefix="", max_tokens=max_tokens) for side in texts)
    return Pairs(texts, (queries, passages))


def distinct_pairs(data: RetrievalData, num_pairs: int, only: str | None = None) -> np.ndarray:
    """Return (query row, corpus row) of judged pairs with distinct texts on both sides, (n, 2) int64; only: a split."""
    keys = data.text_keys
    seen: dict[str, set[int]] = {"queries": set(), "corpus": set()}
    pairs = []
    for split in sorted(data.qrels if only is None else {only} & data.qrels.keys(), key=lambda name: name != "train"):
        rows = data.training_queries(split)
        indptr, positives = data.positives(rows, split)
        for query, passage in zip(rows.tolist(), positives[indptr[:-1]].tolist(), strict=True):
            found = {"queries": int(keys["queries"][query]), "corpus": int(keys["corpus"][passage])}
            if all(key not in seen[side] for side, key in found.items()):
                for side, key in found.items():
                    seen[side].add(key)
                pairs.append((query, passage))
            if len(pairs) == num_pairs:
                return np.array(pairs)
    of, lower = ("", "--queries") if only is None else (f" in its split {only}", "--queries or --steps")
    raise InputError(
        f"{data.path} has {counted(len(pairs), 'pair')} of distinct texts{of}, fewer than {num_pairs}; lower {lower}"
    )
