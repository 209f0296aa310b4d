"""What a run of a plan keeps on disk, reads at a start, and holds in the memory of a node's host."""

import math
from dataclasses import dataclass

from launch.plan.planned_model import PlannedModel
from launch.plan.planned_texts import PlannedTexts
from launch.plan.step_work import Placement
from trainer.job import TrainJob
from trainer.parts import writing_share

MOMENTS = 2
ENCODER_FILES = 12  # configuration, tokenizer, weights, what sentence-transformers reads, the card
OTHER_FILES = 3  # trainer.json, the manifest, LATEST
TOKEN_BYTES, TEXT_BYTES = 4, 25  # of a token in the tables of tokens; of a text, beside its tokens (mining/memory.py)
PROCESS_BYTES = {"cuda": 3 * 2**30, "cpu": 2**29}  # of a rank's libraries and CUDA's context in the host's memory
SAVES = 3  # a save may take so much longer than foreseen: as the trainer's own warning has it


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Of one number of ranks."""

    checkpoint_bytes: int
    checkpoint_files: int
    largest_part_bytes: int  # that one rank writes
    checkpoint_s: float
    save_seconds: int  # that `negpool submit --save-seconds` should have
    start_bytes: int  # read by all ranks before step 1
    host_bytes: dict[str, int]  # of a node, by what takes it


def storage_of(
    job: TrainJob,
    model: PlannedModel,
    texts: PlannedTexts,
    placement: Placement,
    device_type: str,
    disk_bytes_per_s: float,
    step_s: float,
    miner_bytes: int,
) -> Storage:
    """Return what is written, read and held. disk_bytes_per_s: of the disk that all ranks write to, in all.

    miner_bytes: of the miner's ranks on a node that it shares with trainers; 0: it has nodes of its own.
    """
    num_ranks, ranks_per_node = placement.num_ranks, placement.ranks_per_node
    weights = 4 * model.num_parameters
    state = _state_bytes(job, model)
    writers = _writers(state, num_ranks, placement.num_shards)
    part = own_part_bytes(job, model, num_ranks, placement.num_shards)
    seconds = (weights + state) / disk_bytes_per_s
    table = _table_bytes(texts)
    is_sharded = job.parallel.backend == "fsdp2" and num_ranks > 1
    return Storage(
        checkpoint_bytes=weights + state,
        checkpoint_files=len(writers) + ENCODER_FILES + OTHER_FILES,
        largest_part_bytes=part,
        checkpoint_s=seconds,
        save_seconds=math.ceil(SAVES * seconds + step_s),
        start_bytes=weights * (1 if is_sharded else num_ranks) + placement.num_nodes * table,
        host_bytes={
            "processes": PROCESS_BYTES[device_type] * ranks_per_node,
            "tokens of all texts, freed when memory is needed": table,
            "copies for checkpoints": part * len([rank for rank in writers if rank < ranks_per_node]),
            "the published copy": weights if device_type == "cuda" else 0,
            "the miner": miner_bytes,
        },
    )


def own_part_bytes(job: TrainJob, model: PlannedModel, num_ranks: int, num_shards: int) -> int:
    """Return what a rank writes of a checkpoint, and copies before; the largest of them. num_shards: ranks that hold one copy."""
    state = _state_bytes(job, model)
    return math.ceil(state / max(1, len(_writers(state, num_ranks, num_shards))))


def _state_bytes(job: TrainJob, model: PlannedModel) -> int:
    """Return the bytes of trained weights, moments and averages."""
    return 4 * model.num_trained * (1 + MOMENTS + (job.ema.decay is not None))


def _writers(state_bytes: int, num_ranks: int, num_shards: int) -> list[int]:
    """Return the ranks that write a part: as many copies as there are share the work, as trainer/parallel.py has it."""
    num_copies = num_ranks // num_shards
    return [rank for rank in range(num_ranks) if writing_share(rank // num_shards, num_copies, state_bytes // num_shards)]


def _table_bytes(texts: PlannedTexts) -> int:
    """Return the bytes of the tables of tokens, memory-mapped by all ranks of a node."""
    queries, passages = texts.num_queries or 0, texts.num_passages or 0
    tokens = queries * texts.query_tokens + passages * texts.passage_tokens
    return int(TOKEN_BYTES * tokens + TEXT_BYTES * (queries + passages))
