"""The search of a GPU against a sort of all scores, to the bit: in plain torch, and by the kernels under Triton's interpreter.

`tests/gpu/test_topk_gpu.py` repeats these proofs with the kernels compiled.
"""

import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.allocator import Memory
from tests.host import forbids_host_reads
from tests.triton import interpreted
from trainer.encoder import pair_scores, topk_gpu, topk_steps
from trainer.encoder.pair_scores import can_launch, pair_scores_by_kernel, plain_pair_scores, sums_of_pairs
from trainer.encoder.score_keys import pack_keys
from trainer.encoder.topk import BestOf, best_of_keys, bytes_of_query
from trainer.encoder.topk_gpu import BestOnGpu
from trainer.encoder.topk_steps import Block, Queries, Take, mark_by_kernel, plain_limit, plain_take, take_by_kernels

HALF, WHOLE = torch.float16, torch.float32


@dataclass(frozen=True)
class Way:
    """Where and how passages are taken and pairs are scored."""

    call: Callable[..., Any]
    take: Take = take_by_kernels
    score: Callable[..., torch.Tensor] = pair_scores_by_kernel
    device: str = "cpu"


@pytest.fixture(scope="module")
def interpreter():
    """One process for this file."""
    with interpreted(__name__) as call:
        yield Way(call)


@pytest.fixture(params=["plain", "interpreted"])
def way(request):
    if request.param == "interpreted":
        return request.getfixturevalue("interpreter")
    return Way(lambda fn, *args: fn(*args), plain_take, plain_pair_scores)


def normal(num_rows, width, dtype, seed=0):
    chance = torch.Generator().manual_seed(1000 * num_rows + width + seed)
    return torch.randn(num_rows, width, generator=chance).to(dtype)


def many_pairs(device):
    """Let the interpreter, whose every operation takes long, score more pairs at once, which changes no score."""
    return patch.object(topk_steps, "PAIRS_AT_ONCE", 128 if device == "cpu" else topk_steps.PAIRS_AT_ONCE)


def search(device, take, query_QD, passage_ND, k, cuts=(), capacity=16, allowed=None):
    """Return the sorted keys that are found when the passages come in parts, and in how many searches a query was repeated."""
    num_repeated = []

    def counted(self, block, numbers_n, rows):
        num_repeated.append(len(numbers_n))
        return in_pieces(self, block, numbers_n, rows)

    in_pieces = BestOnGpu._in_pieces
    rows_n = np.arange(len(passage_ND)) if allowed is None else np.flatnonzero(allowed)
    with patch.object(topk_gpu, "MIN_CAPACITY", capacity), patch.object(BestOnGpu, "_in_pieces", counted), many_pairs(device):
        best = BestOnGpu(query_QD.to(device), k, torch.device(device), take)
        for start, stop in itertools.pairwise([0, *cuts, len(passage_ND)]):
            best.look_at(passage_ND.to(device), rows_n[(rows_n >= start) & (rows_n < stop)], first_id=100)
        return np.sort(best.keys(), axis=1)[:, ::-1].copy(), num_repeated


def sort_all(query_QD, passage_ND, k, allowed=None):
    """Return the sorted keys of the k best of all scores, ids from 100."""
    (num_queries, _), num_passages = query_QD.shape, len(passage_ND)
    row_n, column_n = (n.flatten() for n in torch.meshgrid(torch.arange(num_queries), torch.arange(num_passages), indexing="ij"))
    score_n = sums_of_pairs(query_QD[row_n], passage_ND[column_n])
    id_n = column_n + 100 if allowed is None else torch.where(torch.from_numpy(allowed)[column_n], column_n + 100, -1)
    key_QN = pack_keys(score_n, id_n).view(num_queries, num_passages)
    key_QN = torch.cat([key_QN, torch.full((num_queries, k), -(1 << 63))], 1)
    return key_QN.sort(1, descending=True).values[:, :k].numpy()


def assert_found(way, query_QD, passage_ND, k, **about):
    """Compare with the sort of all scores; returns in how many searches a query was repeated."""
    found, num_repeated = way.call(functools.partial(search, **about), way.device, way.take, query_QD, passage_ND, k)
    np.testing.assert_array_equal(found, sort_all(query_QD, passage_ND, k, about.get("allowed")))
    return num_repeated


@pytest.mark.parametrize("dtype", [HALF, WHOLE], ids=str)
@pytest.mark.parametrize(
    ("num_queries", "num_passages", "width", "k", "cuts"),
    [(1, 1, 1, 1, []), (3, 40, 7, 3, [9]), (2, 300, 33, 10, [100, 101, 290]), (2, 30, 64, 50, [11, 19]), (1, 700, 300, 200, [])],
)
def test_the_best_are_those_of_a_sort_of_all_scores(way, num_queries, num_passages, width, k, cuts, dtype):
    query_QD, passage_ND = normal(num_queries, width, dtype, 1), normal(num_passages, width, dtype)
    assert_found(way, query_QD, passage_ND, k, cuts=cuts)


def marks(device, query_QD, passage_ND, least_Q):
    norm_Q, largest = query_QD.float().norm(dim=1), passage_ND.float().norm(dim=1).nan_to_num().amax()
    no_keys_QS, no_count_Q = torch.empty(len(query_QD), 0), torch.empty(len(query_QD))
    queries = Queries(query_QD, norm_Q, least_Q, no_keys_QS, no_count_Q, 1)
    block = Block(passage_ND, torch.arange(len(passage_ND)), largest)
    queries, block = (replace(x, **{n: v.to(device) for n, v in vars(x).items() if n != "k"}) for x in (queries, block))
    return mark_by_kernel(queries, block).cpu(), plain_limit(queries, block).cpu()


@pytest.mark.parametrize("dtype", [HALF, WHOLE], ids=str)
@pytest.mark.parametrize("width", [32, 77, 128])
def test_many_tiles_mark_what_reaches_the_limit(interpreter, width, dtype):
    """Whole numbers, whose products are exact in any order."""
    query_QD, passage_ND = (normal(n, width, dtype, 1).round() for n in (300, 555))
    query_QD[7, 0], passage_ND[9, 1], least_Q = torch.nan, torch.nan, torch.linspace(-30, 30, 300).round() + 0.5
    least_Q[13] = -torch.inf
    words, limit = interpreter.call(marks, interpreter.device, query_QD, passage_ND, least_Q)
    wanted = query_QD.double() @ passage_ND.double().T >= limit[:, None]
    found = torch.from_numpy(np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")).bool()
    assert torch.equal(found[:, :555], wanted) and not found[:, 555:].any()
    assert wanted[13].sum() == 554 and not wanted[7].any() and 0.1 < wanted.float().mean() < 0.9


def test_equal_scores_are_ordered_by_id_and_repeated_vectors_are_all_found(way):
    passage_ND = normal(200, 12, HALF).round()
    passage_ND[::3] = passage_ND[1]
    assert_found(way, normal(2, 12, HALF, 1).round(), passage_ND, 100, cuts=[50, 133])


def test_sums_in_another_order_lose_no_passage(way, monkeypatch):
    """All scores are one number but for their rounding: the product and the score of a pair disagree about which is larger."""
    order = torch.stack([torch.randperm(300, generator=torch.Generator().manual_seed(n)) for n in range(200)])
    sizes = torch.randn(300, generator=torch.Generator().manual_seed(1)) * 2
    passage_ND = (torch.randn(300, generator=torch.Generator().manual_seed(2)) * sizes.exp()).half()[order]
    query_QD = torch.full((2, 300), 1.2345).half()
    scores = np.unique(sort_all(query_QD, passage_ND, 200) >> 32)
    assert len(scores) > 2
    assert_found(way, query_QD, passage_ND, 20, cuts=[100])
    if way.take is plain_take:
        monkeypatch.setattr(topk_steps, "ROUNDING", 0.0)
        with pytest.raises(AssertionError):
            assert_found(way, query_QD, passage_ND, 20, cuts=[100])


def test_queries_whose_places_do_not_suffice_are_searched_again(way):
    query_QD, passage_ND = normal(3, 24, HALF, 1).abs(), normal(200, 24, HALF).abs() * torch.linspace(0.1, 9, 200)[:, None]
    query_QD[:1] = -query_QD[:1]  # of these no passage is better than those before
    num_repeated = assert_found(way, query_QD, passage_ND.half(), 8, cuts=[50, 120])
    assert max(num_repeated) == 2 and len(num_repeated) > 2


def test_all_passages_alike_are_found_by_id(way):
    assert max(assert_found(way, normal(2, 24, HALF, 1), normal(1, 24, HALF).expand(150, 24), 8, cuts=[60])) == 2


def test_only_allowed_passages_are_found(way):
    query_QD, passage_ND = normal(3, 20, HALF, 1), normal(300, 20, HALF)
    allowed = np.random.default_rng(0).random(300) < 0.3
    allowed[100:150] = False
    assert_found(way, query_QD, passage_ND, 30, cuts=[100, 150], allowed=allowed)


@pytest.mark.parametrize("dtype", [HALF, WHOLE], ids=str)
def test_what_is_not_a_number_is_never_found_and_hides_nothing(way, dtype):
    query_QD, passage_ND = normal(5, 20, dtype, 1), normal(120, 20, dtype)
    passage_ND[3:90:7, 4], query_QD[2, 1] = torch.nan, torch.nan
    query_QD[4] = 0
    passage_ND[10] = -0.0
    found, _ = way.call(search, way.device, way.take, query_QD, passage_ND, 110)
    np.testing.assert_array_equal(found, sort_all(query_QD, passage_ND, 110))
    scores, ids = best_of_keys([found], 110)
    assert (ids[2] == -1).all() and not np.isnan(scores).any()
    assert (ids[[0, 1, 3, 4]] >= 0).sum(1).tolist() == [108] * 4
    assert not np.signbit(scores[4, :108]).any() and (np.diff(ids[4, :108]) > 0).all(), "minus zero is zero"


def test_an_infinite_number_hides_nothing(way):
    query_QD, passage_ND = normal(3, 20, HALF, 1), normal(90, 20, HALF)
    passage_ND[50, 3] = torch.inf
    query_QD[1, 3] = 0
    found, _ = way.call(functools.partial(search, cuts=[40]), way.device, way.take, query_QD, passage_ND, 30)
    assert (found[1] == sort_all(query_QD, passage_ND, 30)[1]).all(), "infinity times zero is not a number"
    others = np.isfinite(best_of_keys([found], 30)[0])
    assert others.sum(1).min() >= 29


def test_parts_of_several_ranks_join_to_the_same_bytes_in_any_order(way):
    query_QD, passage_ND = normal(2, 100, HALF, 1), normal(330, 100, HALF)
    wanted = best_of_keys([sort_all(query_QD, passage_ND, 12)], 12)
    parts = [way.call(several, way.device, way.take, query_QD, passage_ND, 12, rank) for rank in range(3)]
    for values, right in zip(best_of_keys(parts, 12), wanted, strict=True):
        np.testing.assert_array_equal(values, right)


def several(device, take, query_QD, passage_ND, k, rank):
    """Return the keys of every third part of the passages, the last part first."""
    with patch.object(topk_gpu, "MIN_CAPACITY", 16), many_pairs(device):
        best = BestOnGpu(query_QD.to(device), k, torch.device(device), take)
        for start in reversed(range(rank * 30, 330, 90)):
            best.look_at(passage_ND.numpy() if start % 180 else passage_ND.to(device), np.arange(start, start + 30), 100)
        parts = [best.keys(slice(0, 1)), best.keys(slice(1, 99))]
    return np.concatenate(parts)


def test_the_type_of_embeddings_changes_no_bit(way):
    query_QD, passage_ND = normal(2, 40, HALF, 1), normal(60, 40, HALF)
    wanted = sort_all(query_QD, passage_ND, 9)
    found = [
        way.call(search, way.device, way.take, query_QD.to(left), passage_ND.to(right), 9)[0]
        for left, right in itertools.product([HALF, WHOLE], repeat=2)
    ]
    for each in found:
        np.testing.assert_array_equal(each, wanted)
    query_QD = query_QD.float() + 1e-5
    assert_found(way, query_QD, passage_ND, 9)


def found_by_two(device, take, query_QD, passage_ND, other_scores, other_ids):
    with many_pairs(device):
        best = BestOnGpu(query_QD.to(device), 9, torch.device(device), take)
        best.look_at(passage_ND.to(device), np.arange(50), 100)
        best.add(other_scores, other_ids)
        best.look_at(passage_ND.to(device), np.arange(50, 100), 100)
        return best.keys()


def test_what_another_search_has_found_is_joined(way):
    query_QD, passage_ND = normal(5, 40, HALF, 1), normal(100, 40, HALF)
    scores = np.full((5, 12), 99.0, np.float32)
    scores[:, 1:] -= np.arange(11)
    scores[:, 5:], scores[2, 3] = -9e9, np.nan
    ids = np.where(np.arange(60).reshape(5, 12) % 12 == 4, -1, np.arange(60).reshape(5, 12) + 900)
    keys = way.call(found_by_two, way.device, way.take, query_QD, passage_ND, scores, ids)
    theirs = pack_keys(torch.from_numpy(scores), torch.from_numpy(ids)).numpy()
    wanted = best_of_keys([sort_all(query_QD, passage_ND, 9), theirs], 9)
    for values, right in zip(best_of_keys([keys], 9), wanted, strict=True):
        np.testing.assert_array_equal(values, right)
    assert 927 not in wanted[1] and (wanted[1] >= 900).sum() == 19


@pytest.mark.parametrize("dtype", [HALF, WHOLE], ids=str)
@pytest.mark.parametrize("width", [1, 77, 256, 768])
def test_pairs_score_alike_to_the_bit_whatever_stands_beside_them(way, width, dtype):
    query_QD, passage_ND = normal(9, width, dtype, 1).to(way.device), normal(23, width, WHOLE).to(way.device)
    query_n, passage_n = (torch.arange(30, device=way.device) * 7 % n for n in (9, 23))
    found = way.call(way.score, query_QD, passage_ND, query_n, passage_n)
    wanted = sums_of_pairs(query_QD[query_n].cpu(), passage_ND[passage_n].cpu())
    assert found.dtype == WHOLE and torch.equal(found.cpu(), wanted)
    exact = (query_QD[query_n].double() * passage_ND[passage_n].double()).sum(1).cpu()
    np.testing.assert_allclose(found.cpu(), exact, atol=2e-6 * width**0.5)
    alone = way.call(way.score, query_QD, passage_ND[1:], query_n[4:5], passage_n[4:5] - 1)
    assert torch.equal(alone, found[4:5])
    assert not len(way.call(way.score, query_QD, passage_ND, query_n[:0], passage_n[:0]))


def look_without_reads(query_QD, passage_ND):
    best = BestOnGpu(query_QD, 5, torch.device("cpu"), take_by_kernels)
    with forbids_host_reads(), many_pairs("cpu"):
        for start in (0, 60, 120):
            best.look_at(passage_ND, np.arange(start, start + 60))
        best._put_in_order()
    return best.keys()


def test_the_host_waits_for_no_block(interpreter):
    keys = interpreter.call(look_without_reads, normal(2, 20, HALF), normal(180, 20, HALF))
    assert (keys > 0).all()
    with pytest.raises(AssertionError, match="waits for the device"), forbids_host_reads():
        plain = BestOnGpu(normal(4, 20, HALF), 5, torch.device("cpu"), plain_take)
        plain.look_at(normal(180, 20, HALF), np.arange(60))


@pytest.mark.parametrize("capacity", [16, 1024])
def test_a_search_that_does_not_fit_goes_on_with_fewer_queries_and_finds_the_same(capacity, caplog):
    query_QD, passage_ND = normal(130, 24, HALF, 1), normal(300, 24, HALF)
    with Memory() as memory:
        wanted, _ = search("cpu", plain_take, query_QD, passage_ND, 8, [100], capacity)
    peak = memory.peak
    with Memory(limit=peak // 2) as memory:
        found, _ = search("cpu", plain_take, query_QD, passage_ND, 8, [100], capacity)
    assert memory.num_refused and "the search goes on with 65 queries at once" in caplog.text
    np.testing.assert_array_equal(found, wanted)


def test_a_query_takes_as_many_bytes_as_are_said():
    assert bytes_of_query(200, 768, "cuda") == 2 * 768 + 8 * (200 + 1024) + 14
    for stored, dtype in ((2, HALF), (4, WHOLE)):
        query_QD, passage_ND = normal(1000, 33, dtype), normal(10, 33, dtype)
        with Memory() as memory:
            best = BestOnGpu(query_QD, 600, torch.device("cpu"), plain_take)
            best.look_at(passage_ND, np.arange(10))
        beside = 1000 * stored * 33  # the queries were there, and nothing copies them on a CPU
        assert memory.live + beside == pytest.approx(1000 * bytes_of_query(600, 33, "cuda", stored), abs=3000)
    with Memory() as memory:
        best = BestOf(query_QD.numpy(), 600)
    assert memory.live + 1000 * 4 * 33 == 1000 * bytes_of_query(600, 33, "cpu")


def test_without_triton_plain_torch_searches(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "trainer.encoder.topk_kernels", raising=False)
    pair_scores.can_launch.cache_clear()
    assert not can_launch(torch.device("cpu")) and not can_launch(torch.device("cpu"))
    pair_scores.can_launch.cache_clear()
    assert len(caplog.messages) == 1 and "plain torch" in caplog.text


def compiled(kernel, architecture, constants, kinds, **options):
    """Return a kernel, compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_triton

    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*" or n == "width"}
    source = ASTSource(kernel, signature, constants, aligned)
    return compile_triton(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize(("architecture", "dtype", "tile"), [(90, "fp16", "LARGE_TILE"), (80, "fp32", "FLOAT32_TILE")])
def test_the_kernels_compile_for_gpus(architecture, dtype, tile, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from trainer.encoder.topk_kernels import mark_kernel, take_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = dict.fromkeys(("query_ptr", "passage_ptr"), f"*{dtype}") | dict.fromkeys(("id_ptr", "key_ptr"), "*i64")
    kinds |= dict.fromkeys(("least_ptr", "norm_ptr", "largest_ptr"), "*fp32") | dict.fromkeys(("word_ptr", "count_ptr"), "*i32")
    kinds |= {"over_ptr": "*u8", "slack": "fp32"}
    rows, columns, step, num_warps, num_stages = getattr(topk_steps, tile)
    constants = {"M": rows, "N": columns, "S": step, "IS_WHOLE": True}
    marks = compiled(mark_kernel, architecture, constants, kinds, num_warps=num_warps, num_stages=num_stages)
    assert ("wgmma" in marks.asm["ptx"]) == (dtype == "fp16") and "tf32" not in marks.asm["ptx"]
    assert marks.metadata.shared <= (160 if tile == "LARGE_TILE" else 48) << 10
    constants = {"W": topk_steps.MAX_COLUMNS // 32, "R": 4, "L": pair_scores.LANES, "HALVINGS": pair_scores.HALVINGS}
    takes = compiled(take_kernel, architecture, constants, kinds, num_warps=2, enable_fp_fusion=False)
    assert "fma.rn.f32" not in takes.asm["ptx"] and "mul" in takes.asm["ptx"]
