"""From query numbers to what one rank encodes in a step.

A query brings one of its positives and some of its hard negatives, fewer where there are fewer; which ones is a
pure function of (seed, step, query).
Passages are ordered positives first, so query i's target is passage i.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gradcache import Batch, Candidates, Objective, Ragged, Tower
from trainer.data.cache import build_once
from trainer.data.datasets import RetrievalData
from trainer.data.sampler import choice
from trainer.data.texts import join_keys
from trainer.encoder.step_tokens import StepTokens
from trainer.encoder.tokens import TokenTable
from trainer.errors import InputError
from trainer.handoff.negatives import Negatives

GIVEN = -1  # version of the negatives that come with the data
POSITIVE_DRAW, NEGATIVE_DRAW = 1, 2  # keep the draws of one step apart


@dataclass(frozen=True)
class TrainingSet:
    """The training queries, their positives, and the tokens of both sides. Query q is row q of every negatives table."""

    queries: TokenTable  # of the training queries alone, row q
    passages: TokenTable  # of the whole corpus
    query_keys: np.ndarray  # (num_queries,) int64 content keys: equal texts have equal ones, whatever prefix stands before them
    passage_keys: np.ndarray  # of the whole corpus
    positive_indptr: np.ndarray  # (num_queries + 1,) int64
    positive_rows: np.ndarray  # corpus rows, int64
    positive_grades: np.ndarray  # float32, of relevance
    positive_teacher: np.ndarray  # float32, a teacher's scores, NaN where there are none
    own_rows: np.ndarray  # (num_queries,) int64 corpus row with the query's own id, no negative of it; -1: none

    @property
    def num_queries(self) -> int:
        return len(self.positive_indptr) - 1


def training_set(data: RetrievalData, split: str, queries: TokenTable, passages: TokenTable) -> TrainingSet:
    """Return the training set of a split; `queries` holds the tokens of data.training_queries(split), in order."""
    indptr, at = data.positive_judgements(data.training_queries(split), split)
    qrels = data.qrels[split]
    keys = _content_keys(data, "queries", queries, data.training_queries(split)), _content_keys(data, "corpus", passages)
    own_rows = data.own_rows[data.training_queries(split)]
    return TrainingSet(queries, passages, *keys, indptr, qrels.corpus_rows[at], qrels.scores[at], qrels.teacher[at], own_rows)


def _content_keys(data: RetrievalData, side: str, tokens: TokenTable, rows: np.ndarray | None = None) -> np.ndarray:
    """Return a key for each text of a side, or of some rows of it: equal where the texts are equal, or their tokens.

    Under one rule for all texts the keys of tokens are that. Sources with prefixes or limits of their own, and texts with
    prompts, make two inputs of one text: then keys of texts and of tokens are joined, once for all processes of a machine.
    """
    word = "query" if side == "queries" else "passage"
    names = f"{word}_prefix", f"max_{word}_tokens"
    num_rules = len({tuple(getattr(source.settings, name) for name in names) for source in data.sources})
    if num_rules == 1 and not data.has_prompts[side]:
        return tokens.key_of_row
    raw = data.text_keys[side] if rows is None else data.text_keys[side][rows]
    folder = build_once(
        data.cache / f"keys-{tokens.digest[:24]}",
        f"keys of {side}",
        lambda staging: np.save(staging / "keys.npy", join_keys(tokens.key_of_row, raw), allow_pickle=False),
    )
    return np.load(folder / "keys.npy", mmap_mode="r", allow_pickle=False)


def given_negatives(data: RetrievalData, split: str) -> Negatives | None:
    """Return the negatives that the data set itself names, as a table of the training queries; None: it names none.

    Their scores are a teacher's, NaN where there are none. Version GIVEN, for no miner has made them.
    """
    if data.given is None:
        return None
    rows = data.training_queries(split)
    start, count = data.given.indptr[rows], np.diff(data.given.indptr)[rows]
    indptr = np.concatenate([[0], np.cumsum(count)])
    at = np.repeat(start - indptr[:-1], count) + np.arange(indptr[-1])
    scores = data.given.scores[at]
    return Negatives(indptr, data.given.ids[at], scores, GIVEN, {"origin": "the data set"}, teacher_scores=scores)


@dataclass(frozen=True)
class RowEncoder:
    """What makes embeddings of a step's rows, and how it takes them."""

    encode: Callable[..., Tensor]  # inputs of a chunk -> (m, D)
    device: torch.device
    has_two_towers: bool = False  # `encode` is then told the side of its texts
    is_packed: bool = False  # its inputs are not padded


@dataclass(frozen=True)
class Wants:
    """What an objective wants of a batch beyond texts and their positives."""

    own_negatives: bool = False  # as cells of their query, and no columns of its row
    columns: bool = True  # False: no passage is a negative of another query
    grades: bool = False  # of each query's positive

    @classmethod
    def of(cls, objective: Objective) -> "Wants":
        """Return what an objective wants."""
        return cls(objective.wants_own_negatives, objective.sees_columns, "grade" in objective.row_values)


PLAIN = Wants()


def collate(
    dataset: TrainingSet,
    negatives: Negatives | None,
    query_n: np.ndarray,
    encoder: RowEncoder,
    *,
    per_query: int | Literal["all"],
    seed: int,
    step: int,
    wants: Wants = PLAIN,
) -> Batch:
    """Return what this rank encodes and contrasts in a step; query_n: numbers of its queries, (n,) int64, n may be 0."""
    chosen = choose_passages(dataset, negatives, query_n, per_query, seed, step)
    passage_p = chosen.rows
    keys = np.concatenate([dataset.query_keys[query_n], dataset.passage_keys[passage_p]])
    positive_keys = _positive_keys(dataset, query_n)
    input_keys = np.concatenate([dataset.queries.keys(query_n), dataset.passages.keys(passage_p)])
    lengths = np.concatenate([dataset.queries.lengths[query_n], dataset.passages.lengths[passage_p]])
    tokens = StepTokens([(dataset.queries, query_n), (dataset.passages, passage_p)], encoder.device, encoder.is_packed)

    def tower(encode: Callable[..., Tensor], first: int, stop: int) -> Tower:
        return Tower(
            encode=encode,
            encode_kept=functools.partial(encode, keep_activations=True),
            lengths=torch.from_numpy(lengths[first:stop].astype(np.int64)),
            load=lambda rows: tokens.load(rows + first),
            # Of the token ids, prefix included: equal ones are equal inputs of a tower.
            encode_keys=torch.from_numpy(input_keys[first:stop]),
            is_packed=encoder.is_packed,
        )

    cuts = [("query", 0, len(query_n)), ("passage", len(query_n), len(keys))]
    sides = [tower(functools.partial(encoder.encode, side=side), *cut) for side, *cut in cuts]
    return Batch(
        towers=sides if encoder.has_two_towers else [tower(encoder.encode, 0, len(keys))],
        num_queries=len(query_n),
        keys=torch.from_numpy(keys),
        target=torch.arange(len(query_n)),
        positive_keys=positive_keys,
        candidates=_own_negatives(keys[len(query_n) :], chosen.query, positive_keys) if wants.own_negatives else None,
        own_only=None if wants.columns else torch.ones(len(passage_p), dtype=torch.bool),
        query_values={"grade": torch.from_numpy(chosen.grade_n)} if wants.grades else {},
    )


def _own_negatives(key_p: np.ndarray, query_p: np.ndarray, positive_keys: Ragged) -> Candidates:
    """Return the hard negatives that each query brings as its candidates, each text once, and none that is a positive of it.

    key_p, query_p: of the passages, of which the first are the queries' positives.
    """
    num_queries = len(positive_keys.counts_n)
    pair_p = np.stack([query_p, key_p], axis=1)[num_queries:]
    known = np.stack([positive_keys.rows_m.numpy(), positive_keys.values_m.numpy()], axis=1)
    # The positives stand first, so that the first of equal pairs is one of them wherever there is one.
    _, first = np.unique(np.concatenate([known, pair_p]), axis=0, return_index=True)
    place = np.sort(first[first >= len(known)]) - len(known)
    query = torch.from_numpy(pair_p[place, 0])
    return Candidates(query=query, passage=torch.from_numpy(place + num_queries), are_columns=False)


@dataclass(frozen=True)
class Chosen:
    """The passages of some queries: the positive of each, then their negatives, query after query."""

    rows: np.ndarray  # (p,) int64 corpus rows
    query: np.ndarray  # (p,) int64: which of the n queries each belongs to
    teacher: np.ndarray  # (p,) float32: a teacher's score of each, NaN where there is none
    grade_n: np.ndarray  # (n,) float32: of relevance, of each query's positive


def choose_passages(
    dataset: TrainingSet,
    negatives: Negatives | None,
    query_n: np.ndarray,
    per_query: int | Literal["all"],
    seed: int,
    step: int,
) -> Chosen:
    """Return the passages of some queries in a step: one positive of each, and up to `per_query` of its negatives.

    Raises InputError if the negatives were mined for other positives than the data set has.
    """
    at_n = _choose_positives(dataset, query_n, seed, step)
    at_m, query_m = _choose_negatives(dataset, negatives, query_n, at_n, per_query, seed, step)
    ids = np.zeros(0, np.int64) if negatives is None else negatives.ids
    teacher = None if negatives is None else negatives.teacher_scores
    teacher_m = np.full(len(at_m), np.nan, np.float32) if teacher is None else teacher[at_m]
    return Chosen(
        np.concatenate([dataset.positive_rows[at_n], ids[at_m]]),
        np.concatenate([np.arange(len(query_n)), query_m]),
        np.concatenate([dataset.positive_teacher[at_n], teacher_m]),
        dataset.positive_grades[at_n],
    )


def _choose_positives(dataset: TrainingSet, query_n: np.ndarray, seed: int, step: int) -> np.ndarray:
    """Return where one positive of each query stands, uniform among them."""
    start, stop = dataset.positive_indptr[query_n], dataset.positive_indptr[query_n + 1]
    draw = choice(seed, step, query_n, POSITIVE_DRAW)
    return start + (draw * (stop - start)).astype(np.int64)


def _choose_negatives(
    dataset: TrainingSet,
    negatives: Negatives | None,
    query_n: np.ndarray,
    positive_at_n: np.ndarray,
    per_query: int | Literal["all"],
    seed: int,
    step: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return where up to `per_query` distinct ones of each query's list stand, uniform, and whose they are.

    positive_at_n: where the positive stands that each query has in this step, which its negatives may have to stay below.
    """
    nothing = np.empty(0, np.int64), np.empty(0, np.int64)
    if negatives is None or per_query == 0 or len(query_n) == 0:
        return nothing
    start, stop = negatives.indptr[query_n], negatives.indptr[query_n + 1]
    longest = int((stop - start).max(initial=0))
    if longest == 0:
        return nothing
    # (n, longest): a random number for every candidate, 2 where none may be taken; the smallest are
    draw_nm = np.stack([choice(seed, step, query_n, NEGATIVE_DRAW + j) for j in range(longest)], axis=1)
    is_there_nm = np.arange(longest) < (stop - start)[:, None]
    if negatives.margins is not None:
        _check_positives(dataset, negatives)
        is_there_nm &= negatives.admit(np.where(is_there_nm, start[:, None] + np.arange(longest), 0), positive_at_n[:, None])
    draw_nm[~is_there_nm] = 2
    taken_nk = np.argsort(draw_nm, axis=1, kind="stable")[:, : None if per_query == "all" else per_query]
    is_there_nk = np.take_along_axis(draw_nm, taken_nk, 1) < 2
    return (start[:, None] + taken_nk)[is_there_nk], np.nonzero(is_there_nk)[0]


def _check_positives(dataset: TrainingSet, negatives: Negatives) -> None:
    num_scored = 0 if negatives.positive_scores is None else len(negatives.positive_scores)
    if num_scored != len(dataset.positive_rows):
        raise InputError(
            f"negatives v{negatives.version} have scores of {num_scored} positives, and the training split has "
            f"{len(dataset.positive_rows)}; let the miner and the trainer have the same data.train_split"
        )


def _positive_keys(dataset: TrainingSet, query_n: np.ndarray) -> Ragged:
    """Return the content keys of all positives of each query and of the document with its id: no text of these is a negative
    of the query.
    """
    start, count = dataset.positive_indptr[query_n], dataset.positive_indptr[query_n + 1] - dataset.positive_indptr[query_n]
    place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    rows, query = dataset.positive_rows[np.repeat(start, count) + place], np.repeat(np.arange(len(query_n)), count)
    own_n = dataset.own_rows[query_n]
    rows, query = np.concatenate([rows, own_n[own_n >= 0]]), np.concatenate([query, np.flatnonzero(own_n >= 0)])
    order = np.argsort(query, kind="stable")
    counts = np.bincount(query, minlength=len(query_n))
    return Ragged(torch.from_numpy(dataset.passage_keys[rows[order]]), torch.from_numpy(counts))
