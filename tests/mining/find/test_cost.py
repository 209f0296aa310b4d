"""The choice between exact search and an IVF index."""

import json
from dataclasses import replace

import pytest
import torch

from mining.find import cost
from mining.find.cost import Load, Rates, choose_index, estimate_costs, num_cells

LOAD = Load(num_queries=1000, num_passages=2_000_000, shard_rows=32768, width=64, top_k=200, nprobe=16, num_audited=256)
RATES = Rates(exact_score_s=1e-8, ivf_build_s=2e-7, ivf_visit_s=4e-8)


def test_many_queries_pay_for_an_index_and_few_do_not():
    few, many = (estimate_costs(replace(LOAD, num_queries=n), RATES) for n in (1000, 1_000_000))
    assert min(few, key=few.get) == "exact" and min(many, key=many.get) == "IVF512,Flat"
    assert few["exact"] == pytest.approx(1000 * 2e6 * 1e-8)


def test_shards_too_small_for_cells_leave_exact_search_alone():
    assert list(estimate_costs(replace(LOAD, num_passages=3000, shard_rows=128), RATES)) == ["exact"]


@pytest.mark.parametrize("rows, cells", [(1, 1), (128, 2), (4096, 64), (32768, 512), (65536, 1024)])
def test_cells_have_passages_enough_to_be_trained(rows, cells):
    assert (num_cells(rows) == cells and rows >= 39 * cells) or cells == 1


def test_what_was_chosen_stays_chosen_for_the_same_work(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "SAMPLE_PASSAGES", 2048)
    factory = choose_index(tmp_path, LOAD, torch.device("cpu"))
    kept = json.loads((tmp_path / "status" / "index.json").read_text())
    assert factory == kept["factory"] and all(seconds > 0 for seconds in kept["costs_s"].values())
    slow_ivf, slow_exact = RATES, replace(RATES, exact_score_s=1.0)
    for rates, load, expected in ((slow_ivf, LOAD, factory), (slow_exact, replace(LOAD, num_queries=2000), "IVF512,Flat")):
        monkeypatch.setattr(cost, "measure_rates", lambda load, device, rates=rates: rates)
        assert choose_index(tmp_path, load, torch.device("cpu")) == expected
