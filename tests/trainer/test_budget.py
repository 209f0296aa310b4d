"""The budget of a run's steps: what a checkpoint keeps of it, and where it is found anew."""

import json
from dataclasses import asdict, replace

from tests.ranks import run_ranks
from tests.trainer.worlds import world_of
from trainer.budget import CPU_BUDGET, RunBudget, find_budget, kept_budget
from trainer.job import ChunkSettings

AUTO = ChunkSettings()


def test_a_halved_budget_is_kept_and_another_job_or_world_finds_its_own():
    world = world_of()
    found = find_budget(AUTO, None, None, world)
    assert (found.chunk_tokens, found.keep_graphs) == (CPU_BUDGET.chunk_tokens, CPU_BUDGET.keep_graphs)
    halved = RunBudget(**json.loads(json.dumps(asdict(found.halved()))))
    assert kept_budget(halved, AUTO, world) == halved and halved.chunk_tokens == CPU_BUDGET.chunk_tokens // 2
    assert kept_budget(halved, ChunkSettings(tokens=64), world) is None, "what the job says goes before what was found"
    assert kept_budget(halved, ChunkSettings(memory_gib=1.0), world) is None
    assert kept_budget(halved, AUTO, replace(world, num_ranks=2)) is None
    assert kept_budget(None, AUTO, world) is None, "checkpoints of older versions have none"


class EmptyBatch:
    towers, keys = (), ()


def probe_without_rows(rank):
    from tests.gradcache.test_step import TinyEncoder, make_batch

    encoder = TinyEncoder(0, 0.0)
    batch = EmptyBatch() if rank else make_batch(0, 6, [encoder])
    return find_budget(ChunkSettings(memory_gib=0.6), batch, encoder, world_of(rank))


def test_a_rank_without_rows_takes_what_the_others_find():
    here, there = run_ranks(probe_without_rows, 2)
    assert here == there and 0 < here.chunk_tokens <= 4096
