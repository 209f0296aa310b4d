"""Whether a run compiles its layers.

`model.compile = "auto"` compiles on a GPU where the time saved repays the warm-up. What is saved is estimated from the job, its
data and its model, never measured: the same job decides alike on every rank and at every start, so that a run that goes on
from a checkpoint rounds as an undisturbed one does. On GPUs slower than the measured one a run takes longer than estimated, and
some that would gain a little are not compiled.
"""

import logging
from dataclasses import dataclass
from typing import Literal

from trainer.data.collate import TrainingSet
from trainer.encoder.towers import Encoder
from trainer.job import TrainJob
from trainer.world import World

log = logging.getLogger(__name__)

# Measured on one H200 with BERT-base under bfloat16, chunks of 65,536 tokens: 0.38 of the rate of its matrix products without
# compiled layers and 0.46 with them; under a mask 0.31 and 0.38.
SAVED_SHARE = 0.18  # of the time of encoding
WARM_UP_S = 60.0  # until all kinds of graph of a layer are compiled, where inductor's cache has none of them
MARGIN = 2.0  # warm-ups that must be saved: the estimate may be wrong by as much
# A second of encoding with gradients: in 16 bits 0.38 of 772 TFLOP/s, measured there; the others by the ratios of its data sheet.
FLOP_PER_S = {"bf16": 2.9e14, "fp16": 2.9e14, "tf32": 1.45e14, "fp32": 2.5e13}
FORWARD_FLOP, BACKWARD_FLOP = 2, 4  # of a token and a parameter of the layers


@dataclass
class Compiling:
    """What was decided for a run, and what is left to do of it."""

    compiles: bool
    reason: str
    is_due: bool = False  # before the next step
    seconds: float = 0.0  # that the last step spent on it


def decide(
    setting: bool | Literal["auto"],
    device_type: str,
    hindrance: str | None,
    num_steps: int,
    tokens_a_step: float,
    num_parameters: int,
    flop_per_s: float,
    keeps_graphs: bool,
) -> Compiling:
    """Return whether a run compiles its layers, and why, with the numbers.

    hindrance: what of the job keeps "auto" from it. tokens_a_step: that a rank encodes. num_parameters: of the layers.
    flop_per_s: of encoding, in what the job multiplies in. keeps_graphs: nothing is encoded twice.
    """
    if setting != "auto":
        return Compiling(setting, f"model.compile={str(setting).lower()}", is_due=setting)
    if device_type != "cuda":
        return Compiling(False, 'model.compile="auto" compiles on GPUs alone')
    if hindrance is not None:
        return Compiling(False, f'model.compile="auto", and {hindrance}')
    flop = FORWARD_FLOP + BACKWARD_FLOP + (0 if keeps_graphs else FORWARD_FLOP)
    encode_s = num_steps * tokens_a_step * num_parameters * flop / flop_per_s
    saved_s, wanted_s = SAVED_SHARE * encode_s, MARGIN * WARM_UP_S
    compiles = saved_s >= wanted_s
    reason = (
        f'model.compile="auto": {num_steps:,} steps of {tokens_a_step:,.0f} tokens a rank encode for about {encode_s:,.0f} s; '
        f"compiled layers would save about {saved_s:,.0f} s, and have to save {wanted_s:,.0f} s"
    )
    return Compiling(compiles, reason, is_due=compiles)


def choose(job: TrainJob, world: World, dataset: TrainingSet, encoder: Encoder, num_steps: int) -> Compiling:
    """Return what `decide` makes of a run, and log it. encoder: as it was loaded. num_steps: of the whole run."""
    per_query = 1 if job.negatives.per_query == "all" else job.negatives.per_query
    of_query, of_passage = (float(table.lengths.mean()) for table in (dataset.queries, dataset.passages))
    tokens_a_step = job.batch.queries * (of_query + (1 + per_query) * of_passage) / world.num_ranks
    found = decide(
        job.model.compile,
        world.device.type,
        _hindrance(job),
        num_steps,
        tokens_a_step,
        sum(parameter.numel() for layer in encoder.side("query").layers() for parameter in layer.parameters()),
        FLOP_PER_S[products(job)],
        job.chunk.keep_graphs == "all",
    )
    log.info("layers %s compiled; %s", "are" if found.compiles else "are not", found.reason)
    return found


def products(job: TrainJob) -> str:
    """Return what the layers multiply in."""
    return "tf32" if job.precision.encode == "fp32" and job.precision.tf32 else job.precision.encode


def _hindrance(job: TrainJob) -> str | None:
    """Return what of a job has not been proven with compiled layers on a GPU, and needs model.compile=true."""
    if job.model.quantize is not None:
        return f'model.quantize="{job.model.quantize}" keeps the layers plain'
    if job.model.checkpoint_activations:
        return "model.checkpoint_activations=true keeps the layers plain"
    if job.parallel.backend in ("fsdp2", "zero3"):  # a rank that fails in its layers would leave the others in a forward
        return f'parallel.backend="{job.parallel.backend}", which communicates in forwards, keeps the layers plain'
    return None
