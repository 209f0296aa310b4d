"""What travels between ranks with uneven rows: every value arrives, once, by one collective of equal parts."""

import itertools

import pytest
import torch
import torch.distributed as dist

from gradcache import exchange
from gradcache.exchange import Counts, Keys, gather_keys, gather_rows, scatter_gradients
from gradcache.ragged import Ragged
from tests.ranks import run_ranks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROWS = [
    [(2,), (3,)],
    [(2, 2), (1, 1)],
    [(4, 1), (0, 2)],
    [(0, 3, 1), (2, 0, 0)],
    [(0, 0), (0, 0)],
]  # of each part the rows of each rank
WIDTH = 3


def rows_of(part, rank, num_rows, dtype):
    generator = torch.Generator().manual_seed(10 * part + rank)
    return torch.randn(num_rows, WIDTH, generator=generator).to(dtype)


def counted(name, calls):
    original = getattr(exchange, name)

    def call(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    return call


def sent_and_received(rank, counts, device="cpu"):
    """Return by type what a rank gets of all ranks' rows, and of the sum of their gradients, and which collectives it called."""
    calls: list[str] = []
    for name in ("_all_gather", "_reduce_scatter"):
        setattr(exchange, name, counted(name, calls))
    found = {}
    for dtype in DTYPES:
        mine = [rows_of(part, rank, of_ranks[rank], dtype).to(device) for part, of_ranks in enumerate(counts)]
        every = gather_rows(mine, counts, dist.group.WORLD)
        # Each rank has a gradient for every row: the row times its own number.
        wide = [(rank + 1) * rows.to(torch.promote_types(dtype, torch.float32)) for rows in every]
        found[dtype] = [rows.cpu() for rows in every], [rows.cpu() for rows in scatter_gradients(wide, counts, dist.group.WORLD)]
    return found, calls


def assert_all_arrived(found, counts):
    """Compare what the ranks received with what they were given, to the bit where nothing is added."""
    num_ranks = len(counts[0])
    factor = sum(range(1, num_ranks + 1))
    for rank, (of_rank, calls) in enumerate(found):
        assert calls == ["_all_gather", "_reduce_scatter"] * len(DTYPES), "one collective each, whatever the rows"
        for dtype, (every, own) in of_rank.items():
            for part, of_ranks in enumerate(counts):
                sent = [rows_of(part, r, n, dtype) for r, n in enumerate(of_ranks)]
                assert every[part].dtype == dtype and torch.equal(every[part], torch.cat(sent))
                torch.testing.assert_close(own[part], factor * sent[rank].to(own[part].dtype))


@pytest.mark.parametrize("counts", ROWS, ids=str)
def test_rows_of_all_ranks_arrive_and_their_gradients_return(counts):
    assert_all_arrived(run_ranks(sent_and_received, len(counts[0]), counts), counts)


def keys_of_all(rank, queries, passages, hidden):
    """Return what a rank knows of all ranks' keys; rank r has keys from 100 r on, and each query as many positives as its row.

    hidden: keys of each query that are hidden.
    """

    def keys(count, first):
        return torch.arange(count) + 100 * rank + first

    num_queries, num_passages = queries[rank], passages[rank]
    counts_n = torch.arange(num_queries)
    positives = Ragged(keys(int(counts_n.sum()), 50), counts_n)
    mine = Keys(
        passage_P=keys(num_passages, 0),
        extra_X=keys(0, 0),
        query_Q=keys(num_queries, 20),
        target_Q=keys(num_queries, 30),
        positives=positives,
        hidden=Ragged(keys(num_queries * hidden, 70), torch.full_like(counts_n, hidden)),
        values_QV=torch.full((num_queries, 2), 0.1 + rank, dtype=torch.float64),
    )
    num_positives = [n * (n - 1) // 2 for n in queries]
    counts = Counts(
        queries=queries,
        passages=passages,
        extra=[0] * len(queries),
        positives=num_positives,
        hidden=[n * hidden for n in queries],
    )
    found = gather_keys(mine, counts, dist.group.WORLD)
    ragged = {"positives": found.positives, "hidden": found.hidden}
    return {**vars(found), **{name: (each.values_m.tolist(), each.counts_n.tolist()) for name, each in ragged.items()}}


@pytest.mark.parametrize(("queries", "passages"), [([2], [3]), ([4, 0], [1, 5]), ([0, 3, 1], [0, 0, 2]), ([3, 3], [2, 2])])
@pytest.mark.parametrize("hidden", [0, 2])
def test_keys_of_all_ranks_arrive_with_the_bits_of_their_values(queries, passages, hidden):
    for found in run_ranks(keys_of_all, len(queries), queries, passages, hidden):
        of_rank = [[100 * rank + 70 + i for i in range(n * hidden)] for rank, n in enumerate(queries)]
        assert found["hidden"] == (list(itertools.chain(*of_rank)), [hidden] * sum(queries))
        for name, first, counts in (("passage_P", 0, passages), ("query_Q", 20, queries), ("target_Q", 30, queries)):
            assert found[name].tolist() == [100 * rank + first + i for rank, n in enumerate(counts) for i in range(n)]
        values, per_query = found["positives"]
        assert per_query == [i for n in queries for i in range(n)]
        assert values == [100 * rank + 50 + i for rank, n in enumerate(queries) for i in range(n * (n - 1) // 2)]
        wanted = torch.tensor([0.1 + rank for rank, n in enumerate(queries) for _ in range(n)], dtype=torch.float64)
        assert torch.equal(found["values_QV"], wanted[:, None].expand(-1, 2))


def exchanged(rank, sent):
    """Return what a rank gets of several parts, of which rank r sends rank q as many values as sent[part][r][q]."""
    parts = [torch.arange(float(sum(of_ranks[rank]))) + 100 * part + 1000 * rank for part, of_ranks in enumerate(sent)]
    received = [[from_rank[rank] for from_rank in of_ranks] for of_ranks in sent]
    return exchange.exchange(parts, [list(of_ranks[rank]) for of_ranks in sent], received, dist.group.WORLD)


@pytest.mark.parametrize(
    "sent",
    [
        [[(2, 2), (2, 2)]],
        [[(3, 1), (0, 2)]],
        [[(2, 2), (2, 2)], [(1, 1), (1, 1)]],
        [[(2, 2), (2, 2)], [(0, 3), (1, 0)]],
        [[(0, 2), (0, 2)], [(0, 0), (0, 0)]],
    ],
    ids=str,
)
def test_each_rank_gets_its_values_of_every_part_from_all(sent):
    for rank, found in enumerate(run_ranks(exchanged, 2, sent)):
        for part, of_ranks in enumerate(sent):
            wanted = []
            for other, counts in enumerate(of_ranks):
                first = sum(counts[:rank])
                wanted += [100 * part + 1000 * other + first + i for i in range(counts[rank])]
            assert found[part].tolist() == wanted


def test_even_parts_are_cut_and_joined_as_uneven_ones_are_and_hold_nothing_beside():
    blocks, sizes = torch.randn(5, 9), [(2, 0, 4)] * 5
    pieces = exchange._joined([block[:6] for block in blocks], sizes)
    found = exchange._by_part(blocks, sizes)
    assert all(torch.equal(one, other) for one, other in zip(found, pieces, strict=True))
    assert all(part.untyped_storage().data_ptr() != blocks.untyped_storage().data_ptr() for part in found)
    packed = exchange._by_rank(found, list(zip(*sizes, strict=True)))
    assert torch.equal(packed, blocks[:, :6].flatten())
