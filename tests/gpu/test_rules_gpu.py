"""The tests of filters, samplers and of a whole draw, with the tables of candidates on a GPU: the same numbers come out."""

import numpy as np
import pytest
import torch

from tests.mining.table import device
from tests.mining.table.test_draw import (  # noqa: F401
    test_a_corpus_with_nothing_to_offer_leaves_rows_empty,
    test_a_cross_encoder_filters_and_its_scores_stand_beside_every_negative,
    test_a_query_without_any_candidate_gets_random_passages,
    test_a_share_of_random_passages_is_mixed_in,
    test_negatives_stay_until_they_are_easy,
    test_or_its_candidates_of_the_lowest_scores_that_the_rules_on_scores_admit,
    test_random_negatives_do_not_stay,
    test_the_best_that_pass_the_margin_are_taken,
)
from tests.mining.table.test_filters import (  # noqa: F401
    test_a_table_with_few_slots_lists_the_same,
    test_each_keeps_what_one_positive_admits_by_all_margins_at_once,
    test_each_rule_keeps_what_its_formula_says_for_scores_of_any_sign,
    test_every_filter_counts_what_the_earlier_ones_left,
    test_listed_values_are_those_of_the_row_itself,
    test_no_margin_lets_a_score_as_high_as_the_positives_pass,
    test_nothing_is_listed_in_empty_lists,
    test_the_first_kept_one_of_equal_texts_stays,
    test_the_positive_that_decides_is_the_lowest_unless_the_settings_say_otherwise,
)
from tests.mining.table.test_rules import (  # noqa: F401
    any_settings,
    draw,
    test_a_rank_without_queries_draws_nothing,
    test_no_negative_breaks_a_rule,
    test_the_negatives_are_what_they_have_always_been,
)
from tests.mining.table.test_sampling import (  # noqa: F401
    test_a_draw_has_the_probabilities_of_its_formula,
    test_a_draw_is_that_of_plain_python,
    test_fewer_that_passed_are_all_taken,
    test_noise_has_the_mean_of_gumbels,
    test_the_lowest_candidates_are_the_last_that_are_left,
    test_the_mix_of_int64_is_that_of_uint64,
    test_what_stays_is_drawn_first_even_outside_the_pool_but_never_if_it_was_dropped,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    monkeypatch.setattr(device, "DEVICE", torch.device("cuda"))


@pytest.mark.parametrize("seed", range(24))
def test_a_gpu_draws_what_a_cpu_draws(seed, monkeypatch):
    on_gpu = draw(any_settings(seed))
    monkeypatch.setattr(device, "DEVICE", torch.device("cpu"))
    on_cpu = draw(any_settings(seed))
    assert (on_gpu.counts, on_gpu.dropped) == (on_cpu.counts, on_cpu.dropped) and len(on_gpu.ids)
    for name in ("indptr", "ids", "scores"):
        np.testing.assert_array_equal(getattr(on_gpu, name), getattr(on_cpu, name))
    assert on_gpu.more.keys() == on_cpu.more.keys()
    for name, found in on_gpu.more.items():
        np.testing.assert_array_equal(found, on_cpu.more[name])
