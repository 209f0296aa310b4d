"""The choice between exact search and an IVF index."""

import json
from dataclasses import replace

import pytest
import torch

from mining.find import cost, rates
from mining.find.cost import Load, choose_index, estimate_costs, numbers_of_lists
from mining.find.rates import Rates, clustered, measure_rates
from mining.state import read_state

LOAD = Load(num_queries=1000, num_passages=2_000_000, width=64, top_k=200, nprobe=8, num_audited=256)
RATES = Rates(exact_score_s=1e-8, assign_s=1e-8, train_s=1e-8, visit_s=4e-8, nprobe=4)


def test_many_queries_pay_for_an_index_and_few_do_not():
    few, many = (estimate_costs(replace(LOAD, num_queries=n), RATES) for n in (300, 1_000_000))
    assert min(few, key=few.get) == "exact" and min(many, key=many.get) == "IVF2048,Flat"
    assert few["exact"] == pytest.approx(300 * 2e6 * 1e-8)


def test_more_queries_take_more_lists_and_a_lower_recall_fewer_visits():
    cheapest = [
        max(estimate_costs(replace(LOAD, num_queries=n), RATES), key=lambda name: name != "exact") for n in (10**3, 10**6)
    ]
    assert cheapest == ["IVF128,Flat", "IVF2048,Flat"]
    many = replace(LOAD, num_queries=10**6)
    hard, easy = (min(estimate_costs(many, replace(RATES, nprobe=n)).values()) for n in (64, 4))
    assert easy < hard


def test_ranks_share_exact_search_and_filling_but_not_training():
    one, four = (estimate_costs(replace(LOAD, num_queries=10**6, num_ranks=n), RATES) for n in (1, 4))
    assert one["exact"] == pytest.approx(4 * four["exact"])
    assert min(one.values()) < 4 * min(four.values())


def test_a_corpus_too_small_for_lists_leaves_exact_search_alone():
    assert list(estimate_costs(replace(LOAD, num_passages=3000), RATES)) == ["exact"]


def test_lists_have_passages_enough_to_be_trained():
    assert numbers_of_lists(replace(LOAD, num_passages=64 * 64 - 1)) == []
    for num in (4096, 10**5, 10**6, 10**8):
        lists = numbers_of_lists(replace(LOAD, num_passages=num))
        assert (
            lists[0] == 64 and 64 * lists[-1] <= num and lists[-1] <= 4 * num**0.5 and 2 * lists[-1] > min(4 * num**0.5, num / 64)
        )


@pytest.mark.parametrize("has_sample", [False, True])
def test_what_is_measured_is_what_runs(has_sample, monkeypatch):
    monkeypatch.setattr(rates, "MEASURED_LISTS", 16)
    monkeypatch.setattr(rates, "SAMPLE_PASSAGES", 1024)
    monkeypatch.setattr(rates, "SAMPLE_QUERIES", 64)
    sample = clustered(3000, 24) if has_sample else None
    easy, hard = (measure_rates(24, 20, 20_000, recall, torch.device("cpu"), sample) for recall in (0.3, 1.0))
    assert all(value > 0 for value in vars(easy).values()) and 1 <= easy.nprobe < hard.nprobe <= 16


def test_made_embeddings_have_neighbours_in_several_lists_as_texts_have():
    assert measure_rates(64, 200, 100_000, 0.9, torch.device("cpu")).nprobe >= 4


def test_what_was_chosen_stays_chosen_for_the_same_work(tmp_path, monkeypatch):
    slow_lists, slow_exact = replace(RATES, assign_s=1.0), replace(RATES, exact_score_s=1.0)
    for found, load, expected in (
        (slow_lists, LOAD, "exact"),
        (slow_exact, LOAD, "exact"),
        (slow_exact, replace(LOAD, num_queries=2000), "IVF256,Flat"),
    ):
        monkeypatch.setattr(cost, "measure_rates", lambda *_, found=found: found)
        assert choose_index(tmp_path, load, torch.device("cpu")) == expected
    kept = read_state(tmp_path, "index")
    assert kept["factory"] == "IVF256,Flat" and json.dumps(kept)
