"""Ranks that lose one end in one sentence with code 1, also where no collective of theirs ever raises: real ranks."""

import datetime
import multiprocessing
import os
import sys
import time

import pytest
import torch.distributed as dist

from tests.ranks import PRELOAD
from tests.trainer.worlds import world_of
from trainer import lost_ranks
from trainer.errors import EXIT_FAILED, InputError, MachineFailed
from trainer.lost_ranks import naming_lost

ERRORS = {"a bug": RuntimeError("CUDA error: an illegal memory access"), "a refusal": InputError("no such data; set data.path")}


def rank_of_two(rank: int, folder, error: str, waits: str) -> None:
    """Rank 1 fails; rank 0 waits for it in a collective, or, as under NCCL, where nothing is raised."""
    lost_ranks.LOOK_EVERY_S, lost_ranks.GRACE_S = 0.1, 0.3 if waits == "elsewhere" else 30
    os.dup2(os.open(folder / f"{rank}", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    store, limit = dist.FileStore(str(folder / "store"), 2), datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    world = world_of(rank)
    try:
        with naming_lost(world):
            dist.barrier()
            if rank == 1:
                raise ERRORS[error]
            if waits == "elsewhere":
                time.sleep(60)
            while True:
                world.all_max([0])
    except (RuntimeError, InputError, MachineFailed) as ended:
        print(f"{type(ended).__name__}: {ended}", file=sys.stderr, flush=True)
    os._exit(7)


@pytest.mark.parametrize(
    ("waits", "code", "begins"), [("in a collective", 7, "MachineFailed: "), ("elsewhere", EXIT_FAILED, "negpool: ")]
)
@pytest.mark.parametrize("error", ERRORS)
def test_a_rank_that_fails_ends_the_others_with_its_reason(tmp_path, error, waits, code, begins):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ranks = [context.Process(target=rank_of_two, args=(rank, tmp_path, error, waits)) for rank in range(2)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(180)
        assert [process.exitcode for process in ranks] == [code, 7]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    said = f"{type(ERRORS[error]).__name__}: {ERRORS[error]}"
    assert (tmp_path / "1").read_text() == f"{said}\n", "its own error stays what it is"
    told = f"rank 1 failed: {said}; start the run again, it goes on from its last checkpoint"
    assert (tmp_path / "0").read_text() == f"{begins}{told}\n"


def test_one_process_waits_for_nobody():
    with pytest.raises(RuntimeError, match="gloo"), naming_lost(world_of()):
        raise RuntimeError("gloo")
