"""What each rank loads of a model: all of it, or, where FSDP2 shards it, only its shape.

Rank 0 then reads the files, in its host's memory, where what is published lies anyway; all others build the model without
weights, and so does rank 0 for its own shard. Weights come from rank 0 a piece at a time (`take_weights` in parallel.py), so no
rank but 0 ever holds more than its shard, one piece and one parameter, and all start from the same values, new ones included.
"""

import copy
import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.backends import is_sharded
from trainer.encoder.model import Encoder, Traits, load_encoder
from trainer.errors import InputError
from trainer.job import TrainJob
from trainer.world import World


@dataclass(frozen=True)
class Loaded:
    """A model before it is shared out."""

    encoder: Encoder  # to be shared out; on the meta device where weights are still to come from rank 0
    plain: Encoder | None  # a whole copy that no backend holds; on the meta device where this rank has none
    tokenizer: PreTrainedTokenizerBase
    traits: Traits


def load(job: TrainJob, world: World) -> Loaded:
    """Return the job's model. Collective. Raises InputError for one that cannot be loaded, or is too large to be evaluated."""
    # 4-bit weights have no shape of their own to build from.
    if job.parallel.backend != "fsdp2" or world.group is None or job.model.quantize is not None:
        encoder, tokenizer, traits = load_encoder(job.model)
        sharded = is_sharded(job.parallel, world)
        if sharded:
            refuse_too_large(job.model.name, num_parameters(encoder), memory_bytes(world), world.num_ranks)
        return Loaded(encoder, copy.deepcopy(encoder) if world.speaks or sharded else None, tokenizer, traits)
    read: list[Encoder] = []

    def read_files() -> None:
        whole, *_ = load_encoder(job.model)
        read.append(whole)

    encoder, tokenizer, traits = load_encoder(job.model, is_empty=True)
    num_shards = world.ranks_per_node if job.parallel.shard_group == "node" else world.num_ranks
    refuse_too_large(job.model.name, num_parameters(encoder), memory_bytes(world), num_shards)
    world.decide(read_files)
    return Loaded(encoder, read[0] if read else copy.deepcopy(encoder), tokenizer, traits)


def refuse_too_large(name: str, num_parameters: int, memory_bytes: int, num_shards: int) -> None:
    """Raise InputError where a whole copy, which evaluation and mining make, does not fit beside a rank's weights and moments."""
    whole, shard, memory = (n / 2**30 for n in (4 * num_parameters, 3 * 4 * num_parameters / num_shards, memory_bytes))
    if whole + shard > memory:
        raise InputError(
            f"model.name={name!r} takes {whole:.1f} GiB whole, as evaluation and mining hold it, beside {shard:.1f} GiB of a "
            f"rank's weights and moments, and a rank's device has {memory:.1f} GiB; set model.name to a smaller model, "
            "or take devices with more memory"
        )


def memory_bytes(world: World) -> int:
    """Return the memory of this rank's GPU, or its share of the host's."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // world.ranks_per_node


def is_empty(module: nn.Module) -> bool:
    """Return whether weights are still to come."""
    return any(parameter.is_meta for parameter in module.parameters())


def num_parameters(module: nn.Module) -> int:
    """Return how many numbers all parameters hold."""
    return sum(parameter.numel() for parameter in module.parameters())
