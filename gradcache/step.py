"""One training step at the memory of a chunk: encode without graph, loss on the embeddings, encode again with graph.

The gradient is that of the mean loss over the queries of all ranks, whatever the chunks, the kept graphs and the number of
ranks. Traded for it: a second forward of the chunks whose graph is not kept.
Source: Gao et al. 2021, arXiv 2101.06983.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache.agree import agree
from gradcache.batch import Batch
from gradcache.encode import backpropagate, encode_all
from gradcache.exchange import gather_integers
from gradcache.loss import global_loss
from gradcache.lost import naming_lost_ranks
from gradcache.options import LossOptions
from gradcache.plan import Plan, chunks_of_each_tower, plan_encoding
from gradcache.replay import borrowed_generators
from gradcache.spans import Instant, span
from gradcache.sync import GradientSync
from gradcache.temperature import Temperature
from gradcache.transfers import Arriving, upload
from gradcache.way import Way


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a step leaves on the device until somebody reads it."""

    loss: float
    share_masked: float
    encode_s: float
    loss_s: float
    backward_s: float


class Later:
    """Figures that are found when they are first asked for; a copy of them, as by pickle, holds what was found."""

    def __init__(self, find: Callable[[], Measured]):
        self._find = find
        self._found: Measured | None = None

    def __call__(self) -> Measured:
        """Return the figures; the first call waits for the device."""
        if self._found is None:
            self._found = self._find()
        return self._found

    def __reduce__(self) -> tuple[Callable[..., "Later"], tuple[Measured]]:
        return _found, (self(),)


def _found(measured: Measured) -> Later:
    return Later(lambda: measured)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step found, and what it cost; figures are of this rank unless they say otherwise.

    A GPU has the loss, the masked share and the seconds only when it is done: reading one of them waits for it, so read them
    behind the optimizer's step, or a step later.
    """

    num_queries: int  # of all ranks
    num_passages: int  # of all ranks, those that are columns
    num_chunks: int
    num_halved: int  # chunks and graphs that did not fit into memory, and backwards of the last step; the most on any rank
    num_tokens: int  # encoded, without padding, a second encoding not counted
    num_padded_tokens: int  # the same with padding
    num_squared_tokens: int  # the sum of the texts' squared lengths, which attention's work follows
    share_encoded_twice: float  # of the padded tokens
    way: Way  # what travelled to the other ranks, and why
    spread: float | None  # 1 - the mean cosine among queries or passages of a rank, the most of all; None: no rank has two
    measured: Later

    @property
    def loss(self) -> float:
        """The mean over the queries of all ranks."""
        return self.measured().loss

    @property
    def share_masked(self) -> float:
        """The share of the scores of queries against passages, of all ranks, that are no negatives."""
        return self.measured().share_masked

    @property
    def encode_s(self) -> float:
        """Seconds of the first encoding."""
        return self.measured().encode_s

    @property
    def loss_s(self) -> float:
        """Seconds of the loss, gather and reduce-scatter included."""
        return self.measured().loss_s

    @property
    def backward_s(self) -> float:
        """Seconds of the second encoding, parameter synchronisation included."""
        return self.measured().backward_s


def cached_step(
    batch: Batch,
    *,
    loss: LossOptions,
    temperature: Temperature,
    sync: GradientSync,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    keep_graphs: int | Literal["all"],
    seed: int,
    step: int,
    progress: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
    weight: float = 1.0,
    is_last: bool = True,
) -> StepResult:
    """Add the gradient of the mean loss over the queries of all ranks to the parameters and the temperature.

    group: the ranks that share the loss; None for one process. sync: how the parameters' gradients become global ones.
    chunk_tokens: padded tokens encoded at once. keep_graphs: chunks that are encoded only once, with graph.
    seed, step: decide, with the rank, every draw of dropout; the generators are given back as they were.
    progress: of the training, 0 to 1, for objectives that follow it.
    scaler: of float16 training; gradients come out times its scale, the temperature's too, as behind `scaler.scale(loss)`.
    weight: factor of the gradients, not of the reported loss.
    is_last: False where other parts of the same update follow, such as the batches of other tasks: their gradients add up
    on each rank, and the part that is last synchronises them, once. Give parts different seeds, or they draw equal dropout.
    Mixed precision is the encoder's: let it run under autocast, or this whole call; the loss is computed outside of it.
    The host waits for a GPU twice: for what the ranks tell each other and for what the masks hold; once more where the objective
    wants siblings, and once more under a backend that communicates in forwards. It waits for no chunk and no tile of scores.
    Collective: every rank of group calls it once a step or part, also with zero rows. The number of collectives does not
    depend on the number of chunks. Raises, on every rank alike and before any gradient: ValueError if no rank has a query or the
    towers' widths differ, NotFinite for a broken embedding; LostRank where a rank is gone. If one rank alone raises an error,
    the others raise LostRank with that error as the reason.
    """
    device = temperature.log_scale.device
    rank = 0 if group is None else group.rank()
    moments = [Instant(device)]
    plan = plan_encoding(batch.towers, chunk_tokens, seed, step, rank)
    if sync.communicates_in_forward and group is not None:
        plan = _equalized(plan, batch, chunk_tokens, seed, step, group, device)
    sync.hold()
    with borrowed_generators():
        with naming_lost_ranks(group), span("encode"):  # sharded parameters are gathered within
            encoding = encode_all(plan, keep_graphs, sync)
        chunks, share_encoded_twice = encoding.plan.chunks, encoding.share_encoded_twice
        moments.append(Instant(device))
        num_refused, sync.num_forgotten = encoding.num_refused + sync.num_forgotten, 0
        with span("agree"):
            agreed = agree(batch, encoding, loss.objective, num_refused, group, device)
        scale = weight * _scale_of(scaler, device)
        with torch.autocast(device.type, enabled=False), naming_lost_ranks(group), span("loss"):
            found = global_loss(
                batch, agreed, options=loss, temperature=temperature, group=group, gradient_scale=scale, progress=progress
            )
        moments.append(Instant(device))
        with naming_lost_ranks(group), span("backward"):
            backpropagate(encoding, found.gradient_nD, sync, scale, is_last)
        moments.append(Instant(device))
    numbers = Arriving(torch.stack([found.value, found.share_masked]))
    return StepResult(
        num_queries=found.num_queries,
        num_passages=sum(agreed.counts.passages),
        num_chunks=len(chunks),
        num_halved=agreed.num_halved,
        num_tokens=sum(chunk.num_tokens for chunk in chunks),
        num_padded_tokens=encoding.num_padded_tokens,
        num_squared_tokens=sum(int(chunk.lengths.square().sum()) for chunk in chunks),
        share_encoded_twice=share_encoded_twice,
        way=found.way,
        spread=agreed.spread,
        measured=Later(lambda: _measured(numbers, moments)),
    )


def _equalized(
    plan: Plan, batch: Batch, chunk_tokens: int, seed: int, step: int, group: dist.ProcessGroup, device: torch.device
) -> Plan:
    """Return this rank's plan with as many chunks of each tower as the rank that has most. Collective: one all-gather."""
    counts = torch.tensor(chunks_of_each_tower(plan, batch.towers))
    every = gather_integers(upload(counts, device), group)
    most = [max(counts) for counts in zip(*every, strict=True)]
    return plan_encoding(batch.towers, chunk_tokens, seed, step, group.rank(), most)


def _scale_of(scaler: torch.amp.GradScaler | None, device: torch.device) -> float | Tensor:
    """Return the factor by which float16's gradients are kept from underflow; it stays on the device."""
    if scaler is None or not scaler.is_enabled():
        return 1.0
    return scaler.scale(torch.ones((), dtype=torch.float64, device=device))


def _measured(numbers: Arriving, moments: Sequence[Instant]) -> Measured:
    loss, share_masked = numbers.read()
    encode_s, loss_s, backward_s = (end.since(begin) for begin, end in itertools.pairwise(moments))
    return Measured(loss=loss, share_masked=share_masked, encode_s=encode_s, loss_s=loss_s, backward_s=backward_s)
