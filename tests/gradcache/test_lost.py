"""Ranks that die, hang or fail while others wait for them: real ranks, and each of the others says whom it lost, and why."""

import datetime
import multiprocessing
import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, FSDP2Sync, NoSync, Temperature, cached_step, lost
from tests.gradcache.test_backends import LOSS, SETTINGS, shard
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.ranks import PRELOAD

NUM_RANKS = 3


class FailingEncoder(TinyEncoder):
    """Fails in the second encoding of a step."""

    def forward(self, inputs):
        if torch.is_grad_enabled():
            raise RuntimeError("an illegal memory access\nin a long traceback")
        return super().forward(inputs)


def stepping_rank(rank: int, backend: str, how: str, folder) -> None:
    """Take steps until one raises, and leave what it says; rank 1 is the one that is lost."""
    torch.set_num_threads(1)
    lost.PATIENCE_S = 3
    store, limit = dist.FileStore(str(folder / "store"), NUM_RANKS), datetime.timedelta(seconds=5 if how == "hangs" else 60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=limit)
    encoder = (FailingEncoder if rank == 1 and how == "fails" else TinyEncoder)(0, 0.0)
    if backend == "ddp":
        called = DistributedDataParallel(encoder, broadcast_buffers=False)
        sync = DDPSync(called)
    elif backend == "fsdp2":
        called = shard(encoder)
        sync = FSDP2Sync(called)
    else:
        called, sync = encoder, NoSync()
    dist.barrier()
    if rank == 1 and how == "hangs":
        time.sleep(60)
    if rank == 1 and how == "dies":
        os._exit(9)
    try:
        while True:
            loss = replace(LOSS, keep_scores_gib=1e9) if rank == 1 and how == "refuses" else LOSS
            step = {"loss": loss, "sync": sync, "group": dist.group.WORLD, "keep_graphs": 0, **SETTINGS}
            cached_step(make_batch(rank, 3, [called]), temperature=Temperature(0.1), **step)
    except (RuntimeError, ValueError) as error:
        (folder / f"{rank}").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)  # as a rank does that has nothing left to say: its connections close


def said_by_ranks(tmp_path, backend: str, how: str) -> list[str | None]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ranks = [context.Process(target=stepping_rank, args=(rank, backend, how, tmp_path)) for rank in range(NUM_RANKS)]
    for process in ranks:
        process.start()
    try:
        for process in (ranks[0], ranks[2]):
            process.join(60)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    files = [tmp_path / f"{rank}" for rank in range(NUM_RANKS)]
    return [file.read_text() if file.exists() else None for file in files]


@pytest.mark.parametrize("backend", ["none", "ddp", "fsdp2"])
def test_a_rank_that_fails_tells_the_others_why(tmp_path, backend):
    first, own, third = said_by_ranks(tmp_path, backend, "fails")
    assert own == "RuntimeError: an illegal memory access\nin a long traceback", "its own error stays what it is"
    told = "LostRank: rank 1 failed: RuntimeError: an illegal memory access; start the run again"
    assert first == third == f"{told}, it goes on from its last checkpoint"


def test_what_one_rank_alone_refuses_is_told_to_the_others(tmp_path):
    first, own, third = said_by_ranks(tmp_path, "none", "refuses")
    assert own.startswith("ValueError: keep_scores_gib=1e+09 is more than the ") and own.endswith("set it lower")
    assert first == third == f"LostRank: rank 1 failed: {own}; start the run again, it goes on from its last checkpoint"


@pytest.mark.parametrize(("backend", "how"), [("none", "dies"), ("none", "hangs"), ("ddp", "dies"), ("fsdp2", "dies")])
def test_a_rank_that_is_gone_without_a_word_is_named(tmp_path, backend, how):
    first, own, third = said_by_ranks(tmp_path, backend, how)
    assert own is None
    for said in (first, third):
        assert said.startswith("LostRank: rank 1 died or did not answer in time (") and "start the run again" in said


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:5"), True),
        (dist.DistBackendError("NCCL error in: …"), True),
        (dist.DistNetworkError("failed to recv"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("gloo"), False),
    ],
)
def test_only_errors_of_a_collective_are_taken_for_a_lost_rank(error, is_lost):
    assert lost.is_of_collective(error) == is_lost
