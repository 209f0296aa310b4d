"""The proofs of the search of a GPU again, by the kernels that Triton compiles for one; beyond them what takes a GPU to try."""

import itertools

import numpy as np
import pytest
import torch

from tests.trainer.encoder.test_topk_gpu import (  # noqa: F401 - pytest collects them here, with the fixtures below
    Way,
    normal,
    search,
    test_all_passages_alike_are_found_by_id,
    test_an_infinite_number_hides_nothing,
    test_equal_scores_are_ordered_by_id_and_repeated_vectors_are_all_found,
    test_many_tiles_mark_what_reaches_the_limit,
    test_only_allowed_passages_are_found,
    test_pairs_score_alike_to_the_bit_whatever_stands_beside_them,
    test_parts_of_several_ranks_join_to_the_same_bytes_in_any_order,
    test_queries_whose_places_do_not_suffice_are_searched_again,
    test_sums_in_another_order_lose_no_passage,
    test_the_best_are_those_of_a_sort_of_all_scores,
    test_the_type_of_embeddings_changes_no_bit,
    test_what_another_search_has_found_is_joined,
    test_what_is_not_a_number_is_never_found_and_hides_nothing,
)
from trainer.encoder.pair_scores import can_launch, plain_pair_scores, score_pairs, sums_of_pairs
from trainer.encoder.score_keys import pack_keys
from trainer.encoder.topk import BestOf, best_of_keys
from trainer.encoder.topk_steps import plain_take, take_by_kernels

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["plain", "compiled"])
def way(request):
    if request.param == "plain":
        return Way(lambda fn, *args: fn(*args), plain_take, plain_pair_scores, device="cuda")
    return request.getfixturevalue("interpreter")


@pytest.fixture
def interpreter():
    """The compiled kernels, where a test of the interpreter asks for no plain way."""
    return Way(lambda fn, *args: fn(*args), take_by_kernels, score_pairs, device="cuda")


def test_the_kernels_run_on_a_gpu():
    assert can_launch(torch.device("cuda", 0))


def unit(num_rows, width, seed=0):
    return torch.nn.functional.normalize(normal(num_rows, width, torch.float32, seed), dim=1).half().cuda()


@pytest.mark.parametrize("width", [384, 768])
def test_many_queries_and_blocks_find_what_a_sort_of_all_scores_finds(width):
    query_QD, passage_ND = unit(300, width, 1), unit(50_000, width)
    passage_ND[::7] = passage_ND[3]
    ids_N = torch.arange(len(passage_ND), device="cuda")
    wanted = []
    for query_D in query_QD:
        score_N = sums_of_pairs(query_D.expand(len(passage_ND), -1), passage_ND)
        wanted.append(pack_keys(score_N, ids_N).topk(200).values)
    found = []
    for cuts in ([0, 50_000], [0, 3, 8_195, 21_000, 50_000]):
        best = BestOf(query_QD, 200, "cuda")
        for start, stop in itertools.pairwise(cuts):
            best.look_at(passage_ND, np.arange(start, stop))
        found.append(np.sort(best.keys(), axis=1)[:, ::-1])
    assert len(best.keys(slice(7, 19))) == 12
    for keys in found:
        np.testing.assert_array_equal(keys, torch.stack(wanted).cpu().numpy())


def test_scores_of_a_gpu_are_those_of_plain_torch_on_a_cpu_to_the_bit():
    query_QD, passage_ND = unit(40, 768, 1), unit(3000, 768)
    keys, _ = search("cuda", take_by_kernels, query_QD, passage_ND, 50, [1000], 1024)
    on_cpu, _ = search("cpu", plain_take, query_QD.cpu(), passage_ND.cpu(), 50, [], 1024)
    np.testing.assert_array_equal(keys, on_cpu)
    scores, ids = best_of_keys([keys], 50)
    row_n = torch.arange(40, device="cuda").repeat_interleave(50)
    pairs = score_pairs(query_QD, passage_ND, row_n, torch.from_numpy(ids.flatten() - 100).cuda())
    np.testing.assert_array_equal(pairs.cpu().numpy(), scores.flatten())


def test_the_host_waits_for_no_block_on_a_gpu():
    query_QD, passage_ND = unit(500, 384, 1), unit(40_000, 384)
    host_ND, gaps_n = passage_ND.cpu().numpy(), np.flatnonzero(np.arange(8192) % 3)
    best = BestOf(query_QD, 20, "cuda")

    def look():
        for start in range(0, 32_000, 8000):
            best.look_at(passage_ND, np.arange(start, start + 8000))
        best.look_at(host_ND, np.arange(32_000, 40_000))
        best.look_at(passage_ND[:8192], gaps_n, first_id=50_000)

    look()  # kernels are built at their first use
    best = BestOf(query_QD, 20, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        look()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (best_of_keys([best.keys()], 20)[1] >= 0).all()


def test_tensorfloat_32_changes_nothing(way):
    query_QD, passage_ND = normal(33, 64, torch.float32, 1), normal(3000, 64, torch.float32)
    exact, _ = search("cpu", plain_take, query_QD, passage_ND, 20, [], 1024)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        found, _ = search("cuda", way.take, query_QD, passage_ND, 20, [], 1024)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    np.testing.assert_array_equal(found, exact)
