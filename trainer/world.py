"""Who this process is among the trainers, and what its launcher asks for. Only this module looks at the environment for it.

A launcher says where processes run. What they compute the job alone decides: what the environment says of it is taken out
before any library reads it, and said where the job says otherwise.
"""

import contextlib
import ctypes
import datetime
import json
import logging
import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from gradcache.gates import quiet_torch
from gradcache.spans import span
from trainer.encoder.auto import takes_bf16
from trainer.encoder.gpu_share import keep_to_share
from trainer.errors import TOLD, InputError, MachineFailed, exit_code
from trainer.place import Place, find_place, name_of_gpu, refuse_lonely, refuse_shared
from trainer.ranges import AUTO

log = logging.getLogger(__name__)
T = TypeVar("T")

PLACES = {  # of accelerate's variables, those that say where processes run; the others say what they compute
    "ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_DEBUG_RDV_FILE", "ACCELERATE_ENABLE_RICH",
}  # fmt: skip
TF32 = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")  # read by NVIDIA's libraries and by torch
COLLECTIVE_TIMEOUT_S = 600.0  # where no job says how long those who wait for a rank take it for alive


@dataclass(frozen=True)
class World:
    """This process's place, and the groups it talks through."""

    rank: int
    num_ranks: int
    device: torch.device
    group: dist.ProcessGroup | None  # for tensors on the device; None: alone
    control: dist.ProcessGroup | None  # for small messages on the CPU, between steps; None: alone
    ranks_per_node: int = 1  # of this rank's node
    timeout_s: float = COLLECTIVE_TIMEOUT_S  # after which those who wait for a lost rank give up
    is_guest: bool = False  # of a process that is not ours, see `stay_alone`

    @property
    def speaks(self) -> bool:
        """Whether this rank writes files and tells people."""
        return self.rank == 0

    def all_max(self, values: list[int]) -> list[int]:
        """Return the largest of each value over all ranks. Collective: every rank calls it with as many values."""
        if self.control is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        with span("control", "all_reduce", tensor):
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def gather_objects(self, value) -> list:
        """Return every rank's value on rank 0, an empty list elsewhere. Collective."""
        if self.control is None:
            return [value]
        found: list | None = [None] * self.num_ranks if self.rank == 0 else None
        dist.gather_object(value, found, dst=0, group=self.control)
        return found or []

    def broadcast(self, value):
        """Return rank 0's value on every rank. Collective."""
        if self.control is None:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self.control)
        return holder[0]

    def decide(self, choose: Callable[[], T]) -> T:
        """Return on every rank what `choose` returns on rank 0. Collective.

        If it raises one of TOLD, rank 0 raises it, and the others leave with its code.
        """
        value: T | None = None
        told: Exception | None = None
        if self.speaks:
            try:
                value = choose()
            except TOLD as error:
                told = error
        value, code = self.broadcast((value, 0 if told is None else exit_code(told)))
        if told is not None:
            raise told
        if code:
            raise SystemExit(code)  # one sentence is enough
        return value  # type: ignore[return-value]

    def leave(self) -> None:
        """Leave the process group; a guest has joined none."""
        if not self.is_guest and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for every rank. Collective."""
        if self.control is not None:
            dist.barrier(group=self.control)


def take_arithmetic(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Take out of the environment all that would change a step's numbers, and return it."""
    found = {name: environment[name] for name in environment if _is_arithmetic(name)}
    for name in found:
        del environment[name]
    return found


def contradictions(found: Mapping[str, str], encode: str, tf32: bool, compiles: bool | Literal["auto"]) -> list[str]:
    """Return a clause for each of what was found in the environment that the job does not ask for.

    encode, tf32, compiles: the job's precision.encode, precision.tf32 and model.compile.
    """
    clauses = []
    if (narrow := found.get("ACCELERATE_MIXED_PRECISION", "no")) not in ("no", encode):
        clauses.append(f'ACCELERATE_MIXED_PRECISION={narrow} and the job precision.encode="{encode}"')
    if (compiler := found.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no" and compiles is not True:
        clauses.append(f"ACCELERATE_DYNAMO_BACKEND={compiler} and the job model.compile={json.dumps(compiles)}")
    for name in TF32:
        if name in found and (found[name] == "1") != tf32:
            clauses.append(f"{name}={found[name]} and the job precision.tf32={str(tf32).lower()}")
    return clauses


def _is_arithmetic(name: str) -> bool:
    return name in TF32 or (name.startswith(("ACCELERATE_", "FP8_")) and name not in PLACES)


def join_world(
    encode: str = "fp32",
    tf32: bool = False,
    compiles: bool | Literal["auto"] = False,
    timeout_s: float = COLLECTIVE_TIMEOUT_S,
) -> World:
    """Join the process group that the launcher's environment describes (accelerate, torchrun, deepspeed), or stay alone.

    encode, tf32, compiles: as `contradictions` takes them, or "auto".
    timeout_s: how long a collective waits for a rank that does not come.
    Raises InputError, or leaves with its code where another rank says the sentence, where a GPU is not this rank's alone;
    MachineFailed where the ranks do not reach each other.
    """
    found = take_arithmetic(os.environ)
    quiet_torch()
    keep_freed_memory()
    place = _said_once(int(os.environ.get("LOCAL_RANK", "0")), lambda: find_place(os.environ, torch.cuda.device_count()))
    device = place.device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before anything is put on a GPU, which would be the first one's
        keep_to_share(device, os.environ)
        os.environ["LOCAL_RANK"] = str(device.index)  # which DeepSpeed takes for the GPU's number
    encode = ("bf16" if takes_bf16(device) else "fp32") if encode == AUTO else encode
    if place.rank == 0 and (clauses := contradictions(found, encode, tf32, compiles)):
        log.warning("the environment says %s; the job decides", ", ".join(clauses))
    timeout = datetime.timedelta(seconds=timeout_s)
    several = place.num_ranks > 1
    if several and not dist.is_initialized():
        _join_group(place, timeout)
    if several and device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return World(
        rank=place.rank,
        num_ranks=place.num_ranks,
        device=device,
        group=dist.group.WORLD if several else None,
        control=dist.new_group(backend="gloo", timeout=timeout) if several else None,
        ranks_per_node=place.ranks_per_node or place.num_ranks,
        timeout_s=timeout_s,
    )


def _join_group(place: Place, timeout: datetime.timedelta) -> None:
    """Make the default group: gloo's, or NCCL's, which is bound to this rank's GPU and connects here, where it can be told.

    NCCL's errors end the process (TORCH_NCCL_ASYNC_ERROR_HANDLING is left as it is): what only gave up the message at work
    would let half of a gradient into an update.
    """
    refuse_lonely(os.environ)
    try:
        store, *_ = next(dist.rendezvous("env://", place.rank, place.num_ranks, timeout=timeout))
        store = dist.PrefixStore("negpool", store)
        is_gpu = place.device.type == "cuda"
        if is_gpu:
            _said_once(place.rank, lambda: refuse_shared(store, place.num_ranks, name_of_gpu(place.device)))
        dist.init_process_group(
            place.backend,
            store=store,
            rank=place.rank,
            world_size=place.num_ranks,
            timeout=timeout,
            device_id=place.device if is_gpu else None,
        )
    except dist.DistError as error:
        hint = "NCCL_DEBUG=INFO shows what it tried" if place.device.type == "cuda" else "GLOO_SOCKET_IFNAME names a network"
        reason = str(error).strip().splitlines()[0]
        raise MachineFailed(f"rank {place.rank} does not reach the others by {place.backend}: {reason}; {hint}") from error


def _said_once(rank: int, find: Callable[[], T]) -> T:
    """Return what is found; where that raises InputError on all ranks, the first says the sentence, and the others leave."""
    try:
        return find()
    except InputError as error:
        if rank == 0:
            raise
        raise SystemExit(exit_code(error)) from None


def stay_alone(device: torch.device) -> World:
    """Return the world of one process that is not ours, as a notebook's: nothing is joined, nothing of the process changed."""
    return World(rank=0, num_ranks=1, device=device, group=None, control=None, is_guest=True)


def keep_freed_memory() -> None:
    """Let the C library reuse what is freed instead of returning it to the system, where it is glibc.

    Activations are freed and taken again with every layer, kept graphs with every step; fetched anew, each page of theirs is
    cleared first. On two cores a step of MiniLM that keeps no graph took a tenth longer without, one that keeps all of
    them 40 percent. The process stays as large as it has been, as under torch's allocator on a GPU.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, -1)  # never
