"""The budget of a run's steps: what a checkpoint keeps of it, and where it is found anew."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from gradcache import InfoNCE, LossOptions
from tests.ranks import run_ranks
from tests.trainer.worlds import world_of
from trainer.budget import CPU_BUDGET, RunBudget, find_budget, kept_budget, own_bytes
from trainer.job import (
    BatchSettings,
    ChunkSettings,
    EmaSettings,
    OptimSettings,
    ParallelSettings,
    PrecisionSettings,
    TrainJob,
)
from trainer.loss_settings import LossSettings
from trainer.step_memory import GIB

AUTO = TrainJob()
LOSS = LossOptions(objective=InfoNCE())


def test_a_halved_budget_is_kept_and_another_job_or_world_finds_its_own():
    world = world_of()
    found = find_budget(AUTO, LOSS, None, None, world)
    assert (found.chunk_tokens, found.keep_graphs) == (CPU_BUDGET.chunk_tokens, CPU_BUDGET.keep_graphs)
    halved = RunBudget(**json.loads(json.dumps(asdict(found.halved()))))
    assert kept_budget(halved, AUTO, world) == halved and halved.chunk_tokens == CPU_BUDGET.chunk_tokens // 2
    assert kept_budget(halved, TrainJob(chunk=ChunkSettings(tokens=64)), world) is None, (
        "what the job says goes before what was found"
    )
    assert kept_budget(halved, TrainJob(chunk=ChunkSettings(memory_gib=1.0)), world) is None
    assert kept_budget(halved, AUTO, replace(world, num_ranks=2)) is None
    assert kept_budget(None, AUTO, world) is None, "checkpoints of older versions have none"


@pytest.mark.parametrize(
    "changed",
    [
        {"ema": EmaSettings(decay=0.9)},
        {"loss": LossSettings(symmetric=True)},
        {"loss": LossSettings(keep_scores_gib=0.5)},
        {"batch": BatchSettings(queries=64)},
        {"precision": PrecisionSettings(products="bf16")},
        {"parallel": ParallelSettings(backend="zero1")},
    ],
    ids=str,
)
def test_what_changes_the_memory_of_a_step_finds_another_budget(changed):
    world = world_of()
    found = find_budget(AUTO, LOSS, None, None, world)
    assert kept_budget(found, TrainJob(**changed), world) is None


def test_what_leaves_the_memory_of_a_step_keeps_the_budget():
    world = world_of()
    found = find_budget(AUTO, LOSS, None, None, world)
    other = TrainJob(loss=LossSettings(temperature=0.1, learn_temperature=True), optim=OptimSettings(lr=1.0, steps=7))
    assert kept_budget(RunBudget(**json.loads(json.dumps(asdict(found)))), other, world) == found


def test_the_share_of_a_shared_gpu_is_what_a_budget_is_found_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.7)
    assert own_bytes(torch.device("cuda")) == 56 * GIB and own_bytes(torch.device("cpu")) == 0


class EmptyBatch:
    towers, keys, num_queries, num_passages = (), (), 0, 0


def probe_without_rows(rank):
    from tests.gradcache.test_step import TinyEncoder, make_batch

    encoder = TinyEncoder(0, 0.0)
    batch = EmptyBatch() if rank else make_batch(0, 6, [encoder])
    return find_budget(TrainJob(chunk=ChunkSettings(memory_gib=0.6)), LOSS, batch, encoder, world_of(rank))


def test_a_rank_without_rows_takes_what_the_others_find():
    here, there = run_ranks(probe_without_rows, 2)
    assert here == there and 0 < here.chunk_tokens <= 4096
