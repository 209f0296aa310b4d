"""The compilation of a run's layers before its first step, and the proof that they may be used: a seed replays their dropout."""

import logging
import time

import torch

from gradcache import Batch, GradientSync
from gradcache.plan import Chunk, encode_chunk, plan_encoding
from gradcache.replay import borrowed_generators
from trainer.compiling import products
from trainer.encoder.compiled import FAILURES, in_short
from trainer.encoder.towers import Encoder
from trainer.prepare import Training

log = logging.getLogger(__name__)

# How far apart, of their length, embeddings with and without graph may be: both are fused, and so rounded, differently. MiniLM's
# are 0.37 apart by the draws of all its dropouts, 0.07 to 0.12 by those of one in a layer, and 0.005 by bfloat16.
ROUNDING = {"bf16": 0.03, "fp16": 0.01, "tf32": 0.01, "fp32": 1e-4}


def compile_layers(run: Training, batch: Batch) -> None:
    """Compile the layers if that is due, by chunks of the first batch; where they do not compile or replay, none stays compiled.

    Leaves generators and gradients as they are. Collective.
    """
    if not run.compiling.is_due:
        return
    run.compiling.is_due, started = False, time.perf_counter()
    run.status.update(phase="compiling")
    encoder, state = run.state.parallel.encoder, run.state
    assert isinstance(encoder, Encoder) and state.budget is not None
    encoder.compile_layers(batch.towers[0].is_packed)
    state.parallel.sync.hold()
    for chunk in _tried_chunks(batch, state.budget.chunk_tokens, state.parallel.sync):
        reason = try_chunk(chunk, encoder, state.parallel.sync, ROUNDING[products(run.job)])
        if reason is not None:
            encoder.leave_compiled(reason)
    if run.world.all_max([int(not encoder.is_compiled)])[0]:
        encoder.leave_compiled("they do not on another rank")
    run.compiling.compiles, run.compiling.seconds = encoder.is_compiled, time.perf_counter() - started
    values = {"event": "layers compiled", "compiled": encoder.is_compiled, "time/compile_s": round(run.compiling.seconds, 3)}
    run.metrics.record(state.step, values)
    run.status.update(phase="training", compiled=encoder.is_compiled)
    if encoder.is_compiled:
        log.info("layers compiled in %.0f s", run.compiling.seconds)


def _tried_chunks(batch: Batch, chunk_tokens: int, sync: GradientSync) -> list[Chunk]:
    """Return a chunk of each tower, and one of a single row where the batch has such, which is a kind of input for itself.

    Where forwards communicate every rank has as many.
    """
    found = []
    for tower in batch.towers:
        chunks = plan_encoding([tower], chunk_tokens, 0, 0, 0, num_chunks=[1]).chunks
        several = max(chunks, key=lambda chunk: len(chunk.rows))
        found.append(several.halves()[0] if len(several.rows) > 3 else several)  # one that fits into memory for sure
        if len(several.rows) > 1 and not sync.communicates_in_forward:
            found += [chunk for chunk in chunks if len(chunk.rows) == 1][:1]
    return found


def try_chunk(chunk: Chunk, encoder: Encoder, sync: GradientSync, rounding: float) -> str | None:
    """Encode a chunk in both kinds of graph; return why compiled layers cannot be used for it, or None.

    One seed has to draw the same dropout with and without graph. rounding: by how much, of their length, embeddings may differ.
    """
    with borrowed_generators():
        without_mD = encode_chunk(chunk, with_graph=False)
        with_mD = encode_chunk(chunk, with_graph=True)
    if not encoder.is_compiled:
        return None  # that was said
    if with_mD.requires_grad and not sync.communicates_in_forward:
        # Of one weight, and not through `backward`: no gradient is touched, and none is sent to other ranks.
        weight = next(p for layer in encoder.layers() for p in layer.parameters() if p.requires_grad)
        try:
            torch.autograd.grad(with_mD.sum(), weight, allow_unused=True)
        except FAILURES as error:
            return in_short(error)
    difference = float((with_mD.detach() - without_mD).norm() / without_mD.norm())
    if difference > rounding:
        return (
            f"a seed does not replay their dropout: embeddings with and without graph differ by {difference:.2g} of their "
            f"length, where rounding explains {rounding:g}"
        )
    return None
