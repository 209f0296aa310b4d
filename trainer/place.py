"""Which place a launcher gave this process: its number, the ranks of its machine, and the GPU that is its own.

torchrun, accelerate, deepspeed and srun say it in the environment. All GPUs of a machine may be visible, and then the rank's
place on the machine chooses; or its own one alone, as under `srun --gpus-per-task=1`, and then it is the first.
"""

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainer.errors import InputError

if TYPE_CHECKING:
    import torch.distributed as dist

MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what several ranks need to find each other
GPU, CLASH, NUM_TOLD, VERDICT = (f"negpool/{name}" for name in ("gpu", "gpu_clash", "gpus_told", "gpus_verdict"))  # in the store


@dataclass(frozen=True)
class Place:
    """Where this process stands."""

    rank: int
    num_ranks: int
    local_rank: int  # among those of its machine
    ranks_per_node: int | None  # of its machine; None: the launcher does not say
    device: torch.device

    @property
    def backend(self) -> str:
        """What the ranks' tensors travel by."""
        return "gloo" if self.device.type == "cpu" else "nccl"


def find_place(environment: Mapping[str, str], num_gpus: int) -> Place:
    """Return the place that the environment describes; raises InputError for one that cannot be.

    num_gpus: that this process sees.
    """
    num_ranks = int(environment.get("WORLD_SIZE", "1"))
    if environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        num_gpus = 0
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    on_node = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")  # deepspeed has the second
    ranks_per_node = None if on_node is None else int(on_node)
    gpu = gpu_of(local_rank, ranks_per_node, num_gpus)
    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    return Place(int(environment.get("RANK", "0")), num_ranks, local_rank, ranks_per_node, device)


def refuse_lonely(environment: Mapping[str, str]) -> None:
    """Raise InputError where the environment speaks of several ranks and not of where they meet."""
    if missing := [name for name in MEETING if name not in environment]:
        raise InputError(
            f"the environment says WORLD_SIZE={environment['WORLD_SIZE']} and nothing of {', '.join(missing)}; start the ranks "
            "by torchrun, accelerate launch, deepspeed or srun, or take WORLD_SIZE away"
        )


def gpu_of(local_rank: int, ranks_per_node: int | None, num_gpus: int) -> int | None:
    """Return the number of a rank's own GPU among those that it sees; None where there is none.

    A single one may be its own or everybody's: `refuse_shared` finds that out. Raises InputError for more ranks than GPUs.
    """
    if num_gpus <= 1:
        return 0 if num_gpus else None
    started = max(local_rank + 1, ranks_per_node or 0)
    if started > num_gpus:
        raise InputError(
            f"{started} ranks were started on {socket.gethostname()}, which has {num_gpus} GPUs; start one rank for each GPU, "
            "or hide them with CUDA_VISIBLE_DEVICES= to work on the cores"
        )
    return local_rank


def refuse_shared(store: "dist.Store", num_ranks: int, gpu: str) -> None:
    """Raise InputError, on every rank alike, where two ranks have one GPU, which NCCL cannot use. Collective over the store.

    gpu: what no other GPU of the cluster is called.
    """
    if store.add(f"{GPU}/{gpu}", 1) > 1:
        store.set(CLASH, gpu)
    if store.add(NUM_TOLD, 1) == num_ranks:  # the last one knows of all
        store.set(VERDICT, store.get(CLASH).decode() if store.check([CLASH]) else "")
    if clash := store.get(VERDICT).decode():
        raise InputError(
            f"several ranks were given one GPU ({clash}); start one rank for each GPU, under srun with --gpus-per-task=1 or "
            "--gpus-per-node, or hide the GPUs with CUDA_VISIBLE_DEVICES= to work on the cores"
        )


def name_of_gpu(device: torch.device) -> str:
    """Return what no other GPU of the cluster is called."""
    return f"{socket.gethostname()}, {torch.cuda.get_device_properties(device).uuid}"
