"""Several ranks with tensors on GPUs: two on one GPU, over gloo; and over NCCL where there are two GPUs, also when one dies.

gloo takes the collectives of a step from a GPU: all-gather, all-reduce, reduce-scatter (which it makes of an all-reduce),
all-to-all and broadcast. It knows no bfloat16, which travels as bytes.
"""

import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from gradcache import cached_step, reference_step
from gradcache.exchange import all_reduce
from tests.gpu.test_gpu import on_gpu
from tests.gradcache.test_backends import LOSS, SETTINGS, build, full_gradients, make_batch
from tests.gradcache.test_exchange import assert_all_arrived, sent_and_received
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks
from tests.trainer.test_place import free_port
from trainer import lost_ranks
from trainer.backends import parallelize
from trainer.errors import EXIT_FAILED, EXIT_REFUSED, InputError, MachineFailed
from trainer.job import OptimSettings, ParallelSettings
from trainer.lost_ranks import naming_lost
from trainer.world import World, join_world

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
ROWS = (5, 3)


def spawn_ranks(fn, *args):
    return run_ranks(fn, 2, *args, timeout_s=240, start="spawn")


def join(rank, port):
    """Join as one of two ranks under torchrun, in the place of the group that `run_ranks` has made."""
    dist.destroy_process_group()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
    return join_world(timeout_s=60)


def leave(world):
    world.leave()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # which run_ranks will leave


def on_one_gpu(rank):
    """Return the world of a rank that shares the first GPU with the others."""
    group = dist.group.WORLD
    return World(rank, group.size(), torch.device("cuda", 0), group, group, group.size())


def steps_of(rank, backend, world):
    """Return loss and gradients of two steps of this rank under a backend, on the CPU."""
    torch.cuda.set_device(world.device)
    (encoder,), temperature = build(1)
    parallel = parallelize(encoder, world, ParallelSettings(backend=backend), OptimSettings())
    temperature.to(world.device)
    found = []
    for seed in range(2):
        temperature.zero_grad(set_to_none=True)
        result = cached_step(
            make_batch(rank, ROWS[rank], [on_gpu(parallel.module)], seed=seed),
            temperature=temperature,
            sync=parallel.sync,
            group=world.group,
            keep_graphs=1,
            loss=LOSS,
            **SETTINGS,
        )
        gradients = {f"tower0.{name}": gradient.cpu() for name, gradient in parallel.full_gradients().items()}
        found.append((result.loss, {"temperature.log_scale": temperature.log_scale.grad.cpu(), **gradients}))
        parallel.clear_gradients()
    return found


def assert_references(found_of_ranks, equal_chunks):
    """Compare with one graph in one process on a GPU: dropout draws other numbers there than on a CPU."""
    wanted = []
    for seed in range(2):
        encoders, temperature = build(1)
        encoders, temperature = [encoder.cuda() for encoder in encoders], temperature.cuda()
        batches = [make_batch(rank, n, [on_gpu(e) for e in encoders], seed=seed) for rank, n in enumerate(ROWS)]
        loss = reference_step(batches, temperature=temperature, equal_chunks=equal_chunks, loss=LOSS, **SETTINGS)
        wanted.append((loss, {name: g.cpu() for name, g in full_gradients(encoders, temperature).items()}))
    for found in found_of_ranks:
        for (loss, gradients), (wanted_loss, wanted_gradients) in zip(found, wanted, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-5)
            assert_same_gradients(gradients, wanted_gradients)


def shared_steps(rank):
    return steps_of(rank, "ddp", on_one_gpu(rank))


def test_gradients_of_two_ranks_on_one_gpu_are_the_references():
    assert_references(spawn_ranks(shared_steps), equal_chunks=False)


def shared_exchange(rank, counts):
    return sent_and_received(rank, counts, device="cuda")


@pytest.mark.parametrize("counts", [[(2,), (3,)], [(4, 1), (0, 2)]], ids=str)
def test_uneven_rows_of_two_ranks_on_one_gpu_arrive(counts):
    assert_all_arrived(spawn_ranks(shared_exchange, counts), counts)


def refused(rank, port):
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # each sees one GPU, as under --gpus-per-task=1, and it is the same one
    try:
        join(rank, port)
    except InputError as error:
        said = str(error)
    except SystemExit as left:
        said = left.code
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return said


def test_two_ranks_that_are_given_one_gpu_are_refused_before_nccl_begins():
    first, second = spawn_ranks(refused, free_port())
    assert second == EXIT_REFUSED
    assert "2 ranks" not in first and "several ranks were given one GPU" in first and "hide the GPUs" in first


def nccl_steps(rank, port):
    world = join(rank, port)
    assert dist.get_backend() == "nccl" and world.device == torch.device("cuda", rank) == dist.group.WORLD.bound_device_id
    found = {backend: steps_of(rank, backend, world) for backend in ("ddp", "fsdp2")}
    leave(world)
    return found


@two_gpus
def test_gradients_over_nccl_are_the_references():
    found = spawn_ranks(nccl_steps, free_port())
    for backend, equal_chunks in (("ddp", False), ("fsdp2", True)):
        assert_references([of_rank[backend] for of_rank in found], equal_chunks)


def nccl_exchange(rank, port, counts):
    world = join(rank, port)
    found = sent_and_received(rank, counts, device=world.device)
    leave(world)
    return found


@two_gpus
@pytest.mark.parametrize("counts", [[(2,), (3,)], [(4, 1), (0, 2)]], ids=str)
def test_uneven_rows_arrive_over_nccl(counts):
    assert_all_arrived(spawn_ranks(nccl_exchange, free_port(), counts), counts)


def rank_of_two(rank, folder, port, how):
    """Rank 1 fails or dies, and rank 0 waits for its GPU, which waits for rank 1."""
    lost_ranks.LOOK_EVERY_S, lost_ranks.SILENT_S, lost_ranks.GRACE_S = 0.1, 2.0, 2.0
    os.dup2(os.open(folder / f"{rank}", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # which `join` leaves
    world = join(rank, port)
    try:
        with naming_lost(world):
            values = all_reduce(torch.ones(1024, device=world.device), world.group)
            assert values.sum().item() == 2048
            if rank == 1 and how == "fails":
                raise RuntimeError("an illegal memory access")
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1)
            all_reduce(values, world.group)
            torch.cuda.synchronize()
    except (RuntimeError, MachineFailed) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)
    os._exit(0)


@two_gpus
@pytest.mark.parametrize(("how", "told"), [("fails", "rank 1 failed: RuntimeError: an illegal"), ("dies", "rank 1 gave no sign")])
def test_a_rank_that_is_lost_over_nccl_ends_the_other(tmp_path, how, told):
    context = multiprocessing.get_context("spawn")
    port = free_port()
    ranks = [context.Process(target=rank_of_two, args=(rank, tmp_path, port, how)) for rank in range(2)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        code, said = ranks[0].exitcode, (tmp_path / "0").read_text()
    finally:
        for process in ranks:
            process.kill()
            process.join()
    # NCCL's watchdog may see the closed connection first; then it ends the process, in words of its own.
    assert (code == EXIT_FAILED and told in said) or (code == -signal.SIGABRT and "NCCL" in said), said[-2000:]
