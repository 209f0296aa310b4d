"""`run_ranks(fn, num_ranks)`: a function on several real ranks of a gloo group, in a fraction of a second.

Processes come from a fork server that has imported torch once; starting Python anew for each would take seconds.
"""

import datetime
import multiprocessing
import multiprocessing.connection
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# All that ranks import: each process pays for what is missing here, one of transformers' models takes two seconds.
PRELOAD = ["torch.distributed.fsdp", "transformers.models.bert.modeling_bert", "deepspeed", "trainer.train", "tests.ranks"]
PRELOAD += ["mining.service", "launch.__main__", "launch.commands", "launch.sides"]  # not MPI, which starts when it is imported


def run_ranks(
    fn: Callable,
    num_ranks: int,
    *args: Any,
    timeout_s: float = 120,
    start: str = "forkserver",
    before: Callable[[int], None] | None = None,
) -> list[Any]:
    """Return fn(rank, *args) of every rank; fn is a module's function, and the default group connects the ranks.

    start: "spawn" for ranks that use a GPU, which a fork of a process that has looked for GPUs cannot.
    before: called with the rank on each rank, before the group is made.
    Raises AssertionError with the remote traceback of the first rank that fails; ends all others.
    """
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(num_ranks):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(fn, rank, num_ranks, Path(folder) / "store", send, args, before))
            process.start()
            send.close()
            pipes.append(receive)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, timeout=max(0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {[r for r in range(len(pipes)) if r not in results]} gave no answer in time")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                error, results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
    return [results[rank] for rank in range(len(pipes))]


def _run(fn: Callable, rank: int, num_ranks: int, store: Path, send, args: tuple, before: Callable | None) -> None:
    torch.set_num_threads(1)
    try:
        if before is not None:
            before(rank)
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(store), num_ranks), rank=rank, world_size=num_ranks, timeout=timeout
        )
        answer = None, fn(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answer = traceback.format_exc(), None
    # As plain bytes: torch would pass tensors by a handle that dies with this process.
    send.send_bytes(pickle.dumps(answer))
    send.close()
