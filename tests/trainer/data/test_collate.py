"""What a rank encodes in a step: positives first, hard negatives of the query, the same on any number of ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.collate import RowEncoder, Wants, choose_passages, collate, training_set
from trainer.data.datasets import open_dataset
from trainer.data.sampler import rank_slice
from trainer.encoder.tokens import tokenize
from trainer.errors import InputError
from trainer.handoff.negatives import Negatives

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("collate")
    data = open_dataset(write_tiny_dataset(root / "data"), root / "cache")
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_encoder(root / "encoder"))
    options = {"prefix": "", "max_tokens": 16, "cache": root / "cache"}
    queries = tokenize(data.queries.select(data.training_queries()), tokenizer, **options)
    return training_set(data, "train", queries, tokenize(data.corpus, tokenizer, **options))


@pytest.fixture(scope="module")
def negatives(dataset):
    """0 to 4 negatives a query, each a passage that is no positive."""
    counts = np.arange(dataset.num_queries) % 5
    draw = np.random.default_rng(0)
    rows = [draw.choice(np.setdiff1d(np.arange(64), positives(dataset, q)), n, replace=False) for q, n in enumerate(counts)]
    return Negatives(np.concatenate([[0], np.cumsum(counts)]), np.concatenate(rows).astype(np.int64), np.zeros(0), 3, {})


def positives(dataset, q):
    return dataset.positive_rows[dataset.positive_indptr[q] : dataset.positive_indptr[q + 1]]


def keys_of(ragged):
    """The keys of each row."""
    return [set(keys.tolist()) for keys in ragged.values_m.split(ragged.counts_n.tolist())]


def make(dataset, negatives, query_n, per_query=2, step=5):
    return collate(dataset, negatives, query_n, RowEncoder(print, CPU), per_query=per_query, seed=1, step=step)


def tokens(batch, rows):
    """The real token ids of some rows of the batch."""
    inputs = batch.towers[0].load(torch.tensor(rows))
    masks = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))  # none where all rows are of one length
    return [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(inputs["input_ids"], masks, strict=True)]


def of_table(table, rows):
    padded = table.pad(np.asarray(rows))
    pairs = zip(padded["input_ids"], padded["attention_mask"], strict=True)
    return [tuple(ids[mask.bool()].tolist()) for ids, mask in pairs]


def test_rows_are_the_queries_their_positives_and_negatives_of_their_lists(dataset, negatives):
    query_n = np.array([3, 0, 14, 21])
    batch = make(dataset, negatives, query_n)
    number = len(batch.keys)
    found = tokens(batch, list(range(number)))
    assert found[:4] == of_table(dataset.queries, query_n)
    for i, q in enumerate(query_n):
        assert found[4 + i] in of_table(dataset.passages, positives(dataset, q))
    expected = []
    for q in query_n:
        row = negatives.ids[negatives.indptr[q] : negatives.indptr[q + 1]]
        expected += [(of_table(dataset.passages, row), min(2, len(row)))]
    at = 8
    for texts, count in expected:
        chosen = found[at : at + count]
        assert set(chosen) <= set(texts) and len(chosen) == count
        at += count
    assert at == number and batch.target.tolist() == [0, 1, 2, 3]
    assert [len(text) for text in found] == batch.towers[0].lengths.tolist()


def test_a_chunk_may_mix_queries_and_passages_in_any_order(dataset, negatives):
    batch = make(dataset, negatives, np.array([3, 0, 14, 21]))
    every = tokens(batch, list(range(len(batch.keys))))
    for rows in ([5, 0, 7, 2], [1], [6, 4], [9, 3, 3]):
        assert tokens(batch, rows) == [every[row] for row in rows]


def test_the_ranks_together_bring_what_one_rank_would(dataset, negatives):
    query_n = np.array([3, 0, 14, 21, 8, 30, 19])
    whole = make(dataset, negatives, query_n)
    for num_ranks in (2, 3):
        parts = [make(dataset, negatives, rank_slice(query_n, rank, num_ranks)) for rank in range(num_ranks)]
        for side in (lambda b: b.keys[: b.num_queries], lambda b: b.keys[b.num_queries :]):
            keys = torch.cat([side(part) for part in parts])
            assert sorted(keys.tolist()) == sorted(side(whole).tolist())


def test_the_choice_changes_from_step_to_step_and_not_within_one(dataset, negatives):
    query_n = np.arange(20)
    drawn = {tuple(make(dataset, negatives, query_n, step=step).keys.tolist()) for step in (1, 2, 3, 3)}
    assert len(drawn) == 3


def test_all_judged_positives_are_known_by_key(dataset, negatives):
    query_n = np.arange(dataset.num_queries)
    batch = make(dataset, negatives, query_n)
    found = keys_of(batch.positive_keys)
    assert {len(keys) for keys in found} == {1, 2} and batch.positive_keys.counts_n.sum() == len(batch.positive_keys.values_m)
    for q in query_n:
        assert found[q] == set(dataset.passages.keys(positives(dataset, q)).tolist())


def test_a_query_of_a_thousand_positives_costs_a_thousand_keys_and_the_others_one_each(dataset):
    counts = np.array([*[1] * 500, 1000, *[1] * 500])
    indptr, rows = np.concatenate([[0], np.cumsum(counts)]), np.zeros(2000, np.int64)
    rows[500:1500] = np.arange(1000) % len(dataset.passage_keys)
    query_n, none = np.arange(1001) % dataset.num_queries, np.zeros(2000, np.float32)
    wide = replace(
        dataset,
        queries=dataset.queries.select(query_n),
        query_keys=dataset.query_keys[query_n],
        own_rows=np.full(1001, -1),
        positive_indptr=indptr,
        positive_rows=rows,
        positive_grades=none,
        positive_teacher=none,
    )
    found = make(wide, None, np.arange(1001)).positive_keys
    assert found.counts_n.tolist() == counts.tolist() and len(found.values_m) == 1000 + 1000
    assert found.values_m.tolist() == dataset.passage_keys[rows].tolist()
    assert found.values_m.untyped_storage().nbytes() == 8 * 2000


EACH = {"positive": "each", "relative_margin": 0.1, "absolute_margin": "off", "adaptive_margin": "off", "teacher_margin": 0.5}


@pytest.fixture(scope="module")
def held(dataset):
    """Six passages a query that keep the margins to some of its positives only, by their scores and a teacher's."""
    draw, num_queries = np.random.default_rng(1), dataset.num_queries
    rows = [draw.choice(np.setdiff1d(np.arange(64), positives(dataset, q)), 6, replace=False) for q in range(num_queries)]
    scores, teacher = draw.random((2, 6 * num_queries)).astype(np.float32)
    of_positives = 0.5 + 1.5 * draw.random((2, len(dataset.positive_rows))).astype(np.float32)
    table = np.arange(num_queries + 1) * 6, np.concatenate(rows), scores, 3, {"margins": EACH}
    return Negatives(*table, teacher_scores=teacher, positive_scores=of_positives[0], positive_teacher_scores=of_positives[1])


def test_negatives_keep_the_margins_to_the_positive_that_is_drawn(dataset, held):
    query_n, used, fewer = np.arange(dataset.num_queries), set(), 0
    for step in range(12):
        chosen = choose_passages(dataset, held, query_n, 4, seed=1, step=step)
        for q in query_n:
            at = dataset.positive_indptr[q] + positives(dataset, q).tolist().index(chosen.rows[q])
            own = slice(6 * q, 6 * q + 6)
            most = held.positive_scores[at] * np.float32(0.9), held.positive_teacher_scores[at] - np.float32(0.5)
            allowed = held.ids[own][(held.scores[own] < most[0]) & (held.teacher_scores[own] < most[1])]
            drawn = chosen.rows[len(query_n) :][chosen.query[len(query_n) :] == q]
            assert set(drawn) <= set(allowed) and len(set(drawn)) == len(drawn) == min(4, len(allowed))
            used |= {(q, row) for row in drawn}
            fewer += len(drawn) < 4
    assert len(used) > dataset.num_queries and fewer > 50, "places stay empty where too few are admitted"
    apart = [choose_passages(dataset, held, query_n[part], 4, 1, 11) for part in (slice(0, 9), slice(9, None))]
    assert chosen.rows[len(query_n) :].tolist() == [row for part, n in zip(apart, (9, 27), strict=True) for row in part.rows[n:]]


def test_scores_of_other_positives_are_refused(dataset, held):
    other = replace(held, positive_scores=held.positive_scores[1:])
    with pytest.raises(InputError, match=r"have scores of \d+ positives, .* the same data\.train_split"):
        make(dataset, other, np.arange(3))


@pytest.mark.parametrize("query_n", [np.array([], np.int64), np.array([0])])
def test_a_rank_may_have_no_query_or_no_negative(dataset, negatives, query_n):
    batch = make(dataset, negatives, query_n)
    assert len(batch.keys) == 2 * len(query_n)
    assert make(dataset, None, query_n).num_queries == len(query_n)


def test_two_towers_have_the_rows_of_one_and_are_told_their_side(dataset, negatives):
    query_n = np.arange(5)
    one, two = (
        collate(dataset, negatives, query_n, RowEncoder(lambda *_, **said: said, CPU, is_two), per_query=2, seed=1, step=5)
        for is_two in (False, True)
    )
    assert [len(tower.lengths) for tower in two.towers] == [5, len(one.keys) - 5] and two.keys.equal(one.keys)
    assert torch.cat([tower.lengths for tower in two.towers]).equal(one.towers[0].lengths)
    assert torch.cat([tower.encode_keys for tower in two.towers]).equal(one.towers[0].encode_keys)
    for tower, first, side in zip(two.towers, (0, 5), ("query", "passage"), strict=True):
        assert tower.encode({}) == {"side": side} and tower.encode_kept({}) == {"side": side, "keep_activations": True}
        found, wanted = tower.load(torch.tensor([2, 0])), one.towers[0].load(torch.tensor([2, 0]) + first)
        assert found["input_ids"].equal(wanted["input_ids"])
        assert len(tower.load(torch.tensor([], dtype=torch.int64))["input_ids"]) == 1
    assert one.towers[0].encode({}) == {}


def test_the_document_with_the_id_of_a_query_is_no_negative_of_it(dataset, negatives):
    query_n, own_n = np.array([3, 0, 14]), np.array([7, -1, 9])
    own_rows = np.full(dataset.num_queries, -1)
    own_rows[query_n] = own_n
    pair = dataset, replace(dataset, own_rows=own_rows)
    without, found = (keys_of(make(each, negatives, query_n).positive_keys) for each in pair)
    for row, (before, after, own) in enumerate(zip(without, found, own_n, strict=True)):
        more = {int(dataset.passage_keys[own])} if own >= 0 else set()
        assert after == before | more, row


@pytest.mark.parametrize("has_two_towers", [False, True])
def test_packed_towers_have_the_rows_of_padded_ones(dataset, negatives, has_two_towers):
    query_n = np.array([3, 0, 14, 21])
    padded = make(dataset, negatives, query_n)
    encoder = RowEncoder(lambda *_, **said: said, CPU, has_two_towers, is_packed=True)
    packed, first = collate(dataset, negatives, query_n, encoder, per_query=2, seed=1, step=5), 0
    for tower in packed.towers:
        assert tower.is_packed
        rows = torch.randperm(len(tower.lengths))
        inputs = tower.load(rows)
        parts = inputs["input_ids"].split(inputs["starts"].diff().tolist())
        assert [tuple(ids.tolist()) for ids in parts] == tokens(padded, (rows + first).tolist())
        first += len(rows)
    assert first == len(padded.keys)


def test_own_negatives_are_cells_of_their_query_and_no_columns_of_its_row(dataset, negatives):
    query_n = np.arange(dataset.num_queries)
    encoder = RowEncoder(print, CPU)
    batch = collate(dataset, negatives, query_n, encoder, per_query=3, seed=1, step=5, wants=Wants(own_negatives=True))
    chosen = choose_passages(dataset, negatives, query_n, 3, 1, 5)
    keys, known = batch.keys[batch.num_queries :], keys_of(batch.positives)
    cells, hidden = batch.candidates, keys_of(batch.hidden)
    for query in query_n.tolist():
        brought = {int(keys[p]) for p in np.flatnonzero(chosen.query == query) if p >= len(query_n)} - known[query]
        places = cells.passage[cells.query == query]
        assert sorted(keys[places].tolist()) == sorted(brought), "each text once, and none that is a positive"
        assert (chosen.query[places.numpy()] == query).all() and hidden[query] == brought
    assert len(cells.query) > 20 and bool((cells.query.diff() >= 0).all()) and batch.own_only is None
    alone = collate(
        dataset, negatives, query_n, encoder, per_query=3, seed=1, step=5, wants=Wants(own_negatives=True, columns=False)
    )
    assert bool(alone.own_only.all()) and torch.equal(alone.candidates.passage, cells.passage)


def test_grades_are_those_of_the_positives_that_are_drawn(dataset):
    graded = replace(dataset, positive_grades=np.arange(len(dataset.positive_rows), dtype=np.float32))
    query_n = np.arange(dataset.num_queries)
    batch = collate(graded, None, query_n, RowEncoder(print, CPU), per_query=0, seed=1, step=5, wants=Wants(grades=True))
    drawn = choose_passages(graded, None, query_n, 0, 1, 5).rows
    grades = batch.query_values["grade"].numpy().astype(int)
    assert (graded.positive_rows[grades] == drawn).all() and len(set(grades)) == len(query_n)
