"""The plan of a rank's memory, and a job that cannot fit."""

from dataclasses import replace

import pytest

from mining.find.dense_search import cut_into_passes
from mining.memory import GIB, QUERY_TILE, Sizes, plan_memory
from tests.mining.run import make_job, publish_checkpoint
from tests.mining.test_service import folder, mine
from trainer.encoder.topk import bytes_of_query, tile_shape
from trainer.errors import InputError

SIZES = Sizes(
    num_queries=100_000,
    num_passages=2_000_000,
    shard_rows=4096,
    width=384,
    stored_bytes=4,
    token_width=8000,
    top_k=200,
    num_candidates=200,
    num_known=100_000,
    num_clustered=0,
    num_ranks=1,
    index_bytes=0,
    num_trained=0,
    device_type="cpu",
)


def test_what_does_not_fit_is_searched_in_passes_and_drawn_in_smaller_tiles():
    plenty, (rows, _) = plan_memory(SIZES, GIB, 100 * GIB), tile_shape(SIZES.top_k, "cpu")
    assert (plenty.query_pass, plenty.query_tile) == (-(-100_000 // rows) * rows, QUERY_TILE)
    passes = plan_memory(SIZES, GIB, plenty.total - 1)
    assert passes.total < plenty.total and passes.query_pass < plenty.query_pass and passes.query_pass % rows == 0
    many = replace(SIZES, num_candidates=4000)
    tiles = plan_memory(many, GIB, plan_memory(many, GIB, 100 * GIB).total - 1)
    assert tiles.query_pass == plenty.query_pass and 0 < tiles.query_tile < QUERY_TILE
    assert plan_memory(replace(SIZES, num_ranks=4), GIB, 100 * GIB).query_tile == 4 * QUERY_TILE, (
        "a rank draws its share of a tile"
    )


def test_a_gpu_has_room_for_so_many_queries():
    on_gpu = replace(SIZES, device_type="cuda", num_queries=10_000_000)
    rows, of_query = tile_shape(200, "cuda")[0], bytes_of_query(200, 384, "cuda")
    plan = plan_memory(on_gpu, GIB, 100 * GIB, device_limit=4 * GIB)
    assert plan.query_pass * of_query <= 4 * GIB < 2 * (plan.query_pass + rows) * of_query
    assert "queries at once" not in plan.held


@pytest.mark.parametrize("num_queries, most, tile_rows", [(1000, 300, 128), (1000, 5000, 512), (90, 64, 32), (64, 1, 64)])
def test_passes_are_whole_tiles_of_what_is_to_be_done(num_queries, most, tile_rows):
    whole = cut_into_passes([slice(0, num_queries)], num_queries, most, tile_rows)
    assert [place for part in whole for place in range(part.start, part.stop)] == list(range(num_queries))
    assert all(part.start % tile_rows == 0 and part.stop - part.start <= max(most, tile_rows) for part in whole)
    late = slice(num_queries - 10, num_queries)
    (last, *others) = cut_into_passes([late], num_queries, most, tile_rows)[::-1]
    assert (last.start <= late.start < late.stop == last.stop and not others) or others[0].stop > late.start
    assert cut_into_passes([], num_queries, most, tile_rows) == []


def test_what_cannot_fit_is_refused_with_what_would():
    with pytest.raises(InputError, match=r"mine\.memory_gib=0\.50 is too little.*set mine\.memory_gib to \d\.\d+") as refused:
        plan_memory(SIZES, GIB // 2, GIB // 2)
    enough = float(str(refused.value).split("set mine.memory_gib to ")[1].split(" ")[0])
    assert plan_memory(SIZES, GIB // 2, int(enough * GIB)).total <= enough * GIB
    with pytest.raises(InputError):
        plan_memory(SIZES, GIB // 2, int((enough - 0.02) * GIB))


MORE = (
    {"width": 768},
    {"shard_rows": 65536},
    {"num_queries": 10**6},
    {"top_k": 4000, "num_candidates": 4000},
    {"num_clustered": 10**6},
    {"index_bytes": 400},
    {"num_known": 10**8},
    {"num_trained": 10**7},
)


@pytest.mark.parametrize("more", MORE, ids=str)
def test_more_of_anything_takes_more(more):
    assert plan_memory(replace(SIZES, **more), GIB, 100 * GIB).total > plan_memory(SIZES, GIB, 100 * GIB).total


def test_passages_are_read_from_disk_and_hardly_count():
    grown = plan_memory(replace(SIZES, num_passages=20_000_000), 0, 100 * GIB).total - plan_memory(SIZES, 0, 100 * GIB).total
    assert grown == 18_000_000 * 25  # lengths, keys of tokens and of texts, and which may be candidates


def test_a_service_that_cannot_fit_says_so_before_it_encodes(tmp_path):
    job = make_job(tmp_path, mine={"bm25_top_k": 0, "memory_gib": 0.1})
    publish_checkpoint(job, 10)
    with pytest.raises(InputError, match=r"mine\.memory_gib=0\.10 is too little"):
        mine(job)
    assert not list(folder(job).glob("shards/*/shard-*"))
