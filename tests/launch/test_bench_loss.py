"""The benchmark of the loss at a size of milliseconds: one process, two real ranks, bfloat16 on a CPU."""

import pytest
import torch

import launch.bench.loss
from launch.bench.loss import bench_loss
from launch.bench.loss_ranks import AGAIN, KEPT, PASSAGES, measure
from launch.bench.stage import BareProducts, make_stage, unit_rows
from launch.loss_tables import loss_parts, loss_rank_parts
from launch.tables import as_markdown
from tests.ranks import run_ranks
from tests.trainer.worlds import world_of
from trainer.errors import InputError

CPU = torch.device("cpu")


def two_ranks(rank):
    launch.bench.loss.matmul_rate = lambda *_: 1e9  # a second of products
    return measure(world_of(rank), rows=61, columns=90, width=8, rounds=2, half=None)


def test_one_process_is_measured_against_bare_products(monkeypatch):
    monkeypatch.setattr(launch.bench.loss, "matmul_rate", lambda *_: 1e9)
    found = bench_loss(rows=50, columns=70, width=8, rounds=2, half=True, peer=False)
    (size,) = found["sizes"]
    assert (size["rows"], size["columns"], found["precision"]) == (50, 70, "bf16")
    assert size["sides"]["ours"]["ratio"] > 0 and size["sides"]["bare products"]["ratio"] == 1
    said = as_markdown(loss_parts(found))
    assert "50 x 70, width 8, bf16" in said and "| ours |" in said


def test_two_ranks_are_measured_both_ways_and_bytes_do_not_follow_hard_negatives():
    found, other = run_ranks(two_ranks, 2)
    assert found["sides"].keys() == other["sides"].keys() == {"bare products", KEPT, AGAIN, PASSAGES}
    assert (found["rows"], found["columns"]) == (60, 45), "of all ranks against a rank's own"
    none, one, seven = found["memory"]["by_negatives"]
    more = {way: seven[way]["moved_bytes"] - none[way]["moved_bytes"] for way in ("queries", "passages")}
    # 7 more passages for each of a rank's 30 queries: a key of 8 bytes each, or also 8 components and a gradient of 4 bytes each.
    assert more == {"queries": 30 * 7 * 8, "passages": 30 * 7 * (8 + 8 * 8)}
    foreseen = {way: [row[way]["foreseen_bytes"] for row in (none, one, seven)] for way in ("queries", "passages")}
    assert foreseen == {"queries": [30 * (8 * 8 + 8)] * 3, "passages": [30 * n * 8 * 8 for n in (1, 2, 8)]}
    said = as_markdown(loss_rank_parts(found))
    assert "each 60 x 45 scores" in said and f"| {KEPT} |" in said and "| queries travel, 7 hard negatives |" in said


def test_bare_products_are_the_three_of_the_loss():
    rows, columns = (unit_rows(n, 4, CPU, torch.bfloat16, seed=n) for n in (6, 9))
    bare = BareProducts(rows, columns)
    bare.run()
    wide, score = rows.float(), rows.float() @ columns.float().T
    assert bare.score_tP.dtype == torch.float32, "a sum in half precision would be another product"
    for found, expected in (
        (bare.score_tP, score),
        (bare.row_gradient_BD, score @ columns.float()),
        (bare.column_gradient_PD, score.T @ wide),
    ):
        torch.testing.assert_close(found, expected)


def test_a_stage_is_the_loss_of_its_embeddings():
    stage = make_stage(5, 8, 4, torch.float64, CPU)
    assert stage.loss().travels == "passages" and stage.loss(gather="queries").travels == "queries"


def test_more_rows_than_columns_are_refused_before_anything_is_measured():
    with pytest.raises(InputError, match="there are 5; set --columns higher"):
        bench_loss(rows=9, columns=5, width=8, rounds=1, half=None, peer=True)
