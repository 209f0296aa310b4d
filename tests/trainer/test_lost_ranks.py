"""Ranks that lose one end in one sentence with code 1, also where no collective of theirs ever raises: real ranks."""

import datetime
import multiprocessing
import os
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from gradcache.lost import told_failure
from tests.ranks import PRELOAD, run_ranks
from tests.trainer.test_place import free_port
from tests.trainer.worlds import world_of
from trainer import lost_ranks
from trainer.errors import EXIT_FAILED, InputError, MachineFailed
from trainer.lost_ranks import Pulse, naming_lost

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


def rank_with_a_neighbour(rank: int, folder, port: int, lost: int | None) -> None:
    """One rank ends without a word, and the other waits where nothing is raised; or none does, and one works longer."""
    lost_ranks.LOOK_EVERY_S, lost_ranks.SILENT_S, lost_ranks.GRACE_S = 0.05, 1.0, 0.3
    os.dup2(os.open(folder / f"{rank}", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    store, limit = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0), datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    with naming_lost(world_of(rank)):
        dist.barrier()
        if lost == rank:
            os._exit(9)
        time.sleep(2 * rank if lost is None else 60)  # rank 0 has the store, and is through first
    os._exit(0)


@pytest.mark.parametrize(
    ("lost", "codes", "said"),
    [
        (1, [EXIT_FAILED, 9], "negpool: rank 1 gave no sign of life for 1 s; start the run again"),
        (0, [9, EXIT_FAILED], "negpool: rank 0 is gone, or the launcher by which the ranks met; start the run again"),
        (None, [0, 0], ""),
    ],
)
def test_a_rank_that_is_gone_ends_one_that_waits_elsewhere(tmp_path, lost, codes, said):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    arguments = tmp_path, int(free_port()), lost
    ranks = [context.Process(target=rank_with_a_neighbour, args=(rank, *arguments)) for rank in range(2)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(180)
        assert [process.exitcode for process in ranks] == codes
    finally:
        for process in ranks:
            process.kill()
            process.join()
    left = 0 if lost == 1 else 1
    told = (tmp_path / str(left)).read_text()
    # Where the store went with rank 0, the thread that looks for it and the collective that breaks find out at the same time.
    assert said in told or (lost == 0 and "a rank died or did not answer in time" in told)
    assert said or not (tmp_path / "0").read_text() + (tmp_path / "1").read_text()


def test_only_looks_without_a_sign_of_life_count():
    store = dist.HashStore()
    first, second = (Pulse(store, replace(world_of(rank), num_ranks=2, timeout_s=8.0)) for rank in range(2))
    first.beat()  # the other one is yet to come
    for _ in range(5):
        second.beat()
        first.beat()
    for look in range(2):
        assert told_failure(store) is None, f"look {look}: half of the time limit is two looks"
        first.beat()
    assert told_failure(store) == "rank 1 gave no sign of life for 4 s"


def test_one_process_waits_for_nobody():
    with pytest.raises(RuntimeError, match="gloo"), naming_lost(world_of()):
        raise RuntimeError("gloo")


def threads_left(rank: int) -> int:
    before = threading.active_count()
    with naming_lost(world_of(rank)):
        pass
    return threading.active_count() - before


def test_nobody_watches_any_more_when_all_have_left():
    # A thread that lets go of the groups while Python ends aborts its rank: the launcher then calls a good end a failure.
    assert run_ranks(threads_left, 2) == [0, 0]
