"""Plans of chunks: every row once, within the budget, little padding, as many as asked for."""

import pytest
import torch

from gradcache.chunks import equalize_chunks, plan_chunks, unique_rows


def random_lengths(num_rows, seed=0):
    torch.manual_seed(seed)
    return (torch.randn(num_rows).exp() * 30).long().clamp(1, 256)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 100, 1001])
@pytest.mark.parametrize("max_tokens", [1, 64, 300, 4096, 10**6])
def test_every_row_is_in_one_chunk_within_the_budget(num_rows, max_tokens):
    lengths = random_lengths(num_rows)
    chunks = plan_chunks(lengths, max_tokens)
    assert sorted(torch.cat([*chunks, torch.empty(0, dtype=torch.int64)]).tolist()) == list(range(num_rows))
    for rows in chunks:
        assert len(rows) == 1 or len(rows) * int(lengths[rows].max()) <= max_tokens
    longest = [int(lengths[rows].max()) for rows in chunks]
    assert longest == sorted(longest, reverse=True), "the longest first, so that memory is tried at once"


def test_less_than_a_twelfth_of_the_tokens_is_padding():
    lengths = random_lengths(1000)
    for max_tokens in (2048, 8192):
        chunks = plan_chunks(lengths, max_tokens)
        padded = sum(len(rows) * int(lengths[rows].max()) for rows in chunks)
        assert int(lengths.sum()) > padded * 11 / 12
        assert len(chunks) < 40 + padded / max_tokens


def test_a_budget_below_one_text_is_said_once_and_raised_to_it(caplog):
    lengths = torch.tensor([50, 9])
    assert [rows.tolist() for rows in plan_chunks(lengths, 13)] == [[0], [1]]
    assert [rows.tolist() for rows in plan_chunks(lengths, 13)] == [[0], [1]]
    assert [record.getMessage() for record in caplog.records] == [
        "chunk_tokens=13 is less than one text of 50 tokens, which is encoded alone"
    ]
    with pytest.raises(ValueError, match="chunk_tokens=0 must be at least 1"):
        plan_chunks(lengths, 0)


@pytest.mark.parametrize("num_rows, num_chunks", [(0, 3), (1, 4), (10, 4), (10, 10), (10, 13)])
def test_equalized_chunks_hold_the_same_rows_and_empty_ones_behind(num_rows, num_chunks):
    chunks = equalize_chunks(plan_chunks(random_lengths(num_rows), 200), num_chunks)
    assert sorted(torch.cat(chunks).tolist()) == list(range(num_rows))
    filled = [len(rows) > 0 for rows in chunks]
    assert filled == sorted(filled, reverse=True)
    assert len(chunks) >= num_chunks and sum(filled) >= min(num_rows, num_chunks)


def test_equal_rows_are_encoded_once():
    first, place = unique_rows(torch.tensor([7, 3, 7, 7, 5, 3]), 6)
    assert torch.equal(first[place], torch.tensor([0, 1, 0, 0, 4, 1]))


@pytest.mark.parametrize("num_rows", [0, 1, 7, 100, 1001])
@pytest.mark.parametrize("max_tokens", [1, 64, 300, 4096, 10**6])
def test_packed_rows_make_the_fewest_chunks_that_fit_and_even_ones(num_rows, max_tokens):
    lengths = random_lengths(num_rows)
    chunks = plan_chunks(lengths, max_tokens, is_packed=True)
    assert sorted(torch.cat([*chunks, torch.empty(0, dtype=torch.int64)]).tolist()) == list(range(num_rows))
    tokens = [int(lengths[rows].sum()) for rows in chunks]
    assert all(len(rows) == 1 or n <= max_tokens for rows, n in zip(chunks, tokens, strict=True))
    in_order = torch.cat([lengths[rows] for rows in chunks]).tolist() if chunks else []
    assert in_order == sorted(in_order, reverse=True), "the longest first, so that memory is tried at once"
    if max_tokens >= 4096:  # room for many rows
        assert len(chunks) == -(-int(lengths.sum()) // max_tokens)
        assert max(tokens, default=0) - min(tokens, default=0) <= 256, "no chunk differs from another by more than a row"


def test_a_few_tokens_too_many_make_two_halves_and_no_tiny_chunk():
    lengths = torch.full((700,), 100)
    assert [len(rows) for rows in plan_chunks(lengths, 65536, is_packed=True)] == [350, 350]
    assert [len(rows) for rows in plan_chunks(lengths, 65536)] == [655, 45]


@pytest.mark.parametrize("seed", range(20))
def test_packed_chunks_are_no_more_than_a_greedy_filling_needs(seed):
    lengths = random_lengths(200, seed)
    greedy, room = 0, 0
    for length in lengths.sort(descending=True).values.tolist():
        if length > room:
            greedy, room = greedy + 1, 300
        room -= length
    assert len(plan_chunks(lengths, 300, is_packed=True)) <= greedy
