"""Gradients of a step against the oracle, over settings of which every pair of values occurs in some case."""

import copy
import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, FSDP2Sync, LossOptions, NoSync, Temperature, cached_step, reference_step
from tests.gradcache.named import NAMED
from tests.gradcache.test_backends import full_gradients, shard
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.gradcache.test_testing import LearnedMargin
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks

VALUES: dict[str, list] = {
    "rows": [(5,), (5, 3), (0, 4), (2, 4, 3), (3, 0, 1)],  # queries of each rank
    "backend": ["plain", "fsdp2", "fsdp2, each chunk reduced"],  # plain: DDP on several ranks
    "num_towers": [1, 2],
    "num_negatives": [0, 1, 7],  # hard ones of a query
    "chunk_tokens": [22, 35, 10_000],  # two rows of 11, sizes that do not divide, one chunk
    "keep_graphs": [0, 2, "all"],
    "dropout": [0.0, 0.2],
    "gather": ["passages", "queries"],
    "objective": ["info_nce", "info_nce_multi", "margin"],  # one positive, several, own parameters
    "symmetric": [False, True],
    "same_side": [False, True],
    "widths": [(None, None), ((32, 12, 5), None), ((20, 7), (1.0, 0.5))],  # and their weights
    "is_weighted": [False, True],
    "tile_rows": [None, 1, 2, 3],
    "keep_scores_gib": [None, 0.0],
}
FOUR_RANKS = dict(
    rows=(2, 0, 3, 1), backend="plain", num_towers=1, num_negatives=1, chunk_tokens=35, keep_graphs=2, dropout=0.2,
    gather="queries", objective="info_nce_multi", symmetric=True, same_side=True, widths=((32, 12), None), is_weighted=True,
    tile_rows=3, keep_scores_gib=None,
)  # fmt: skip
STEP = {"seed": 3, "step": 7}
Case = dict[str, Any]


def cover(values: Mapping[str, Sequence], seed: int) -> list[Case]:
    """Return cases of which every pair of values of two settings occurs in one, by taking what covers most new pairs."""
    draw, names = random.Random(seed), list(values)
    missing = {
        (a, x, b, y) for a, b in itertools.combinations(names, 2) for x in range(len(values[a])) for y in range(len(values[b]))
    }
    cases = []
    while missing:
        a, x, b, y = draw.choice(sorted(missing))
        chosen = {a: x, b: y}
        for name in draw.sample(names, len(names)):
            if name not in chosen:
                places = draw.sample(range(len(values[name])), len(values[name]))
                chosen[name] = max(places, key=lambda place: len(missing & _pairs(names, chosen | {name: place})))
        missing -= _pairs(names, chosen)
        cases.append({name: values[name][chosen[name]] for name in names})
    return cases


def _pairs(names: Sequence[str], chosen: Mapping[str, int]) -> set[tuple[str, int, str, int]]:
    known = [name for name in names if name in chosen]
    return {(a, chosen[a], b, chosen[b]) for a, b in itertools.combinations(known, 2)}


CASES = [*cover(VALUES, 0), *cover(VALUES, 1), FOUR_RANKS]


def test_every_pair_of_settings_is_in_some_case():
    for a, b in itertools.combinations(VALUES, 2):
        found = {(repr(case[a]), repr(case[b])) for case in CASES}
        assert found >= {(repr(x), repr(y)) for x in VALUES[a] for y in VALUES[b]}, (a, b)
    assert 40 <= len(CASES) <= 120


def build(case: Case):
    encoders = [TinyEncoder(seed, case["dropout"]).train() for seed in range(case["num_towers"])]
    objective = LearnedMargin() if case["objective"] == "margin" else copy.deepcopy(NAMED[case["objective"]])
    widths, weights = case["widths"]
    names = ("symmetric", "same_side", "gather", "tile_rows", "keep_scores_gib")
    known = {name: case[name] for name in names}
    options = LossOptions(objective=objective, widths=widths, width_weights=weights, **known)
    return encoders, Temperature(0.1, learnable=True), options


def batch_of(case: Case, rank: int, encoders):
    num_queries = case["rows"][rank]
    batch = make_batch(rank, num_queries, encoders, num_negatives=case["num_negatives"])
    weight = torch.linspace(0.5, 2, num_queries)
    return replace(batch, query_values={"weight": weight}) if case["is_weighted"] else batch


def gradients(encoders, temperature, options):
    found = full_gradients(encoders, temperature)
    return found | ({"objective": options.objective.margins.grad} if isinstance(options.objective, LearnedMargin) else {})


def steps(rank: int, cases: list[Case]):
    """Return the loss and the gradients of each case."""
    found = []
    for case in cases:
        encoders, temperature, options = build(case)
        group = dist.group.WORLD if len(case["rows"]) > 1 or case["backend"] != "plain" else None
        if case["backend"] != "plain":
            called = [shard(encoder) for encoder in encoders]
            sync = FSDP2Sync(*called, reduce_every_chunk=case["backend"] != "fsdp2")
        elif group is not None:
            called = [DistributedDataParallel(encoder, broadcast_buffers=False) for encoder in encoders]
            sync = DDPSync(*called)
        else:
            called, sync = encoders, NoSync()
        result = cached_step(
            batch_of(case, rank, called), loss=options, temperature=temperature, sync=sync, group=group,
            chunk_tokens=case["chunk_tokens"], keep_graphs=case["keep_graphs"], **STEP,
        )  # fmt: skip
        found.append((result.loss, gradients(encoders, temperature, options)))
    return found


def expected(case: Case):
    encoders, temperature, options = build(case)
    batches = [batch_of(case, rank, encoders) for rank in range(len(case["rows"]))]
    loss = reference_step(
        batches, loss=options, temperature=temperature, chunk_tokens=case["chunk_tokens"],
        equal_chunks=case["backend"] != "plain", **STEP,
    )  # fmt: skip
    return loss, gradients(encoders, temperature, options)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_gradients_are_the_references(num_ranks):
    cases = [case for case in CASES if len(case["rows"]) == num_ranks]
    by_rank = run_ranks(steps, num_ranks, cases, timeout_s=300)
    for number, case in enumerate(cases):
        loss, wanted = expected(case)
        for rank, (found_loss, found) in enumerate(of_rank[number] for of_rank in by_rank):
            try:
                assert found_loss == pytest.approx(loss, rel=1e-5)
                assert_same_gradients(found, wanted)
            except AssertionError as error:
                raise AssertionError(f"rank {rank} of case {case}: {error}") from error


@functools.cache
def keys_of_ranks(num_negatives: int):
    case = FOUR_RANKS | {"rows": (5, 3), "num_negatives": num_negatives}
    return [batch_of(case, rank, [None]).keys for rank in range(2)]


def test_some_texts_stand_on_several_ranks():
    for num_negatives in VALUES["num_negatives"]:
        one, other = keys_of_ranks(num_negatives)
        assert set(one[5:].tolist()) & set(other[3:].tolist())
        assert len(one) == 5 * (2 + num_negatives)
