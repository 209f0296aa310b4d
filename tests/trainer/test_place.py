"""Which GPU is a rank's own under every launcher, and what is refused before any of them waits for another."""

import os
import socket

import pytest
import torch
import torch.distributed as dist

from launch.srun import tasks_of_node, world_of_trainers
from tests.launch.test_srun import TASK
from tests.ranks import run_ranks
from trainer.errors import InputError, MachineFailed
from trainer.place import find_place, gpu_of, refuse_lonely, refuse_shared
from trainer.world import join_world

MEET = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
TORCHRUN = MEET | {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
DEEPSPEED = MEET | {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_SIZE": "8"}
SRUN = world_of_trainers(TASK | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"})


@pytest.mark.parametrize(
    ("environment", "num_gpus", "device", "ranks_per_node"),
    [
        ({}, 0, "cpu", None),
        ({}, 4, "cuda:0", None),
        (TORCHRUN, 8, "cuda:1", 8),
        (DEEPSPEED, 8, "cuda:1", 8),
        (SRUN, 8, "cuda:1", 4),
        (SRUN, 1, "cuda:0", 4),  # --gpus-per-task=1: all that it sees is its own
        (TORCHRUN, 0, "cpu", 8),
        (TORCHRUN | {"ACCELERATE_USE_CPU": "true"}, 8, "cpu", 8),
    ],
)
def test_a_rank_takes_the_gpu_of_its_place(environment, num_gpus, device, ranks_per_node):
    place = find_place(environment, num_gpus)
    assert (place.device, place.ranks_per_node) == (torch.device(device), ranks_per_node)
    assert place.backend == ("nccl" if num_gpus and device != "cpu" else "gloo")
    assert (place.rank, place.local_rank) == (int(environment.get("RANK", "0")), int(environment.get("LOCAL_RANK", "0")))


@pytest.mark.parametrize(("local_rank", "ranks_per_node", "started"), [(0, 4, 4), (3, None, 4), (2, 4, 4)])
def test_more_ranks_than_gpus_are_refused(local_rank, ranks_per_node, started):
    told = rf"{started} ranks were started on {socket.gethostname()}, which has 2 GPUs; start one rank for each GPU, or hide them"
    with pytest.raises(InputError, match=told):
        gpu_of(local_rank, ranks_per_node, 2)


def test_a_world_without_a_meeting_place_is_refused():
    with pytest.raises(InputError, match="says WORLD_SIZE=2 and nothing of MASTER_ADDR, MASTER_PORT; start the ranks by"):
        refuse_lonely({"WORLD_SIZE": "2", "RANK": "0"})
    refuse_lonely(TORCHRUN)


@pytest.mark.parametrize(
    ("counts", "node", "tasks"), [("2", 0, 2), ("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("2(x3),1", 4, None), ("", 0, None)]
)
def test_slurm_says_how_many_ranks_a_node_has(counts, node, tasks):
    assert tasks_of_node(counts, node) == tasks


def told_of_gpus(rank, gpus):
    store = dist.PrefixStore("test", dist.distributed_c10d._get_default_store())
    try:
        refuse_shared(store, len(gpus), gpus[rank])
    except InputError as error:
        return str(error)
    return None


def test_two_ranks_on_one_gpu_are_refused_on_every_rank():
    assert run_ranks(told_of_gpus, 3, ["n1, a", "n1, b", "n2, a"]) == [None] * 3
    for said in run_ranks(told_of_gpus, 3, ["n1, a", "n1, b", "n1, a"]):
        assert said.startswith("several ranks were given one GPU (n1, a); start one rank for each GPU, under srun with")


def joined(rank, port):
    """Join as under torchrun, without the group that this test's ranks have."""
    dist.destroy_process_group()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    world = join_world(timeout_s=60)
    found = world.rank, world.num_ranks, world.ranks_per_node, world.device.type, world.all_max([rank, -rank])
    assert dist.get_backend(world.group) == dist.get_backend(world.control) == "gloo"
    world.leave()
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # which run_ranks will leave
    return found


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def test_ranks_join_and_leave_by_themselves():
    assert run_ranks(joined, 2, free_port()) == [(rank, 2, 2, "cpu", [1, 0]) for rank in range(2)]


def test_a_rank_that_finds_nobody_says_so(monkeypatch):
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in (where | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineFailed, match=r"rank 1 does not reach the others by gloo: .*; GLOO_SOCKET_IFNAME names a network"):
        join_world(timeout_s=0.5)
