"""A model that several ranks train: how gradients are synchronised, how it is updated, what of it this rank holds.

Whatever the backend (see `backends.py`), weights and AdamW's moments are runs of elements (see `parts.py`), so a checkpoint
of one opens under all others.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gradcache import GradientSync
from gradcache.exchange import all_reduce
from trainer.job import OptimSettings
from trainer.optim import build_optimizer, moments_of
from trainer.parts import Fragment, writing_share
from trainer.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
PIECE_NUMEL = 2**24  # of a weight, sent to all ranks at once: 64 MiB of float32


class Update(NamedTuple):
    """What became of a step of the optimizer."""

    norm: float  # of the gradient before clipping; not finite where a gradient is not
    is_made: bool  # False: neither weights nor moments have moved
    watched: list[float]  # what was read beside the norm


class Parallel:
    """A model that is ready for steps: in one process, or whole on every rank under DDP."""

    is_sharded = False  # True: no rank can use the encoder by itself
    takes_weights = False  # True: what is copied into fragments of parameters takes effect on shards

    def __init__(self, encoder: nn.Module, module: nn.Module, sync: GradientSync, optim: OptimSettings, world: World):
        self.encoder = encoder  # the bare encoder, for its names and parameters
        self.module = module  # what is called in steps
        self.sync = sync
        self.optimizer = build_optimizer(encoder.parameters(), optim)
        self._max_norm = optim.max_grad_norm
        self._world = world

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in the bare encoder."""
        return {name: p for name, p in self.encoder.named_parameters() if p.requires_grad}

    def update(self, scaler: torch.amp.GradScaler, watched: Tensor | None = None) -> Update:
        """Clip, step the optimizer, forget the gradients. Collective. Waits for the device once, for all that it reads.

        watched: numbers of one axis that are read with the norm. Where the norm or one of them is not finite, nothing moves, on
        every rank alike: clipping would multiply all gradients by NaN.
        """
        scaler.unscale_(self.optimizer)
        found = self._read(_whole(torch.nn.utils.clip_grad_norm_(self.trained().values(), self._max_norm)), watched)
        if found.is_made:
            scaler.step(self.optimizer)
        self.clear_gradients()
        return found

    def _read(self, norm: Tensor, watched: Tensor | None) -> Update:
        """Return the norm, whether every rank can make a step, and what is watched, in one wait for the device.

        Collective where several ranks hold a gradient: one may have a broken copy.
        """
        numbers = norm.detach().double().view(1)
        if watched is not None:
            numbers = torch.cat([numbers, watched.double()])
        is_broken = numbers.isfinite().all().logical_not().double().view(1)
        group = self._world.group
        if group is not None and self.num_shards != group.size():  # the norm of shards is everyone's
            all_reduce(is_broken, group)
        num_broken, found, *others = torch.cat([is_broken, numbers]).tolist()
        return Update(found, num_broken == 0, others)

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        self.encoder.zero_grad(set_to_none=True)

    def full_gradients(self) -> dict[str, Tensor | None]:
        """Return whole copies of all trained parameters' gradients, on every rank. Collective."""
        return {name: None if p.grad is None else _whole(p.grad).clone() for name, p in self.trained().items()}

    def whole_parameters(self, with_frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield the trained parameters, or all, whole, one after the other, on every rank. Collective if sharded."""
        trained = self.trained()
        for name, parameter in self.encoder.named_parameters():
            if with_frozen or name in trained:
                yield name, _whole(parameter.detach())

    def fragments(self) -> Iterator[Fragment]:
        """Yield what this rank holds of weights and moments, as views: what is copied into them takes effect.

        Under DDP every rank holds all.
        """
        for name, parameter in self.trained().items():
            moments = moments_of(self.optimizer, parameter)
            for kind, tensor in (("parameter", parameter), *((kind, moments[kind]) for kind in MOMENTS)):
                yield self.fragment(f"{kind}.{name}", tensor.detach())

    @property
    def num_shards(self) -> int:
        """How many ranks, one after the other, hold one copy of weights and moments between them."""
        return 1

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds all weights and moments."""
        return self.num_shards == 1

    def kept(self, fragments: Iterable[Fragment], num_shards: int) -> tuple[list[Fragment], set[int]]:
        """Return what this rank is to keep, so that all ranks together keep everything once, and which ranks keep something.

        fragments: what this rank holds. num_shards: ranks that hold a copy of it between them.
        """
        held, world = list(fragments), self._world
        num_bytes = sum(4 * fragment.numel for fragment in held) // num_shards
        shares = [writing_share(rank // num_shards, world.num_ranks // num_shards, num_bytes) for rank in range(world.num_ranks)]
        own = shares[world.rank]
        writers = {rank for rank, share in enumerate(shares) if share is not None}
        return ([] if own is None else [fragment.share(*own) for fragment in held]), writers

    def fragment(self, name: str, tensor: Tensor) -> Fragment:
        """Return what this rank holds of a tensor that is laid out as a parameter is, as a view."""
        return Fragment(name, 0, tensor.numel(), tensor.view(-1))

    @property
    def num_updates(self) -> int:
        """Steps that AdamW has made, fewer than the run's where some were left out."""
        return int(next((state["step"] for state in self._adam_states()), torch.zeros(())).item())

    @num_updates.setter
    def num_updates(self, number: int) -> None:
        list(self.fragments())  # makes the states of an optimizer that has made no step
        for state in self._adam_states():
            state["step"].fill_(number)

    def _adam_states(self) -> Iterator[dict[str, Tensor]]:
        return (state for state in self.optimizer.state.values() if "step" in state)


def copy_weights(parallel: Parallel, encoder: nn.Module | None) -> None:
    """Copy the trained weights into a plain encoder; None: only take part. Collective if sharded."""
    own = {} if encoder is None else dict(encoder.named_parameters())
    with torch.no_grad():
        for name, values in parallel.whole_parameters():
            if name in own:
                own[name].copy_(values)


def fill_copy(parallel: Parallel, encoder: nn.Module) -> None:
    """Copy all weights and buffers into a plain encoder that has its own memory and no values yet. Collective if sharded."""
    own = dict(encoder.named_parameters())
    with torch.no_grad():
        for name, values in parallel.whole_parameters(with_frozen=True):
            own[name].copy_(values)
        for name, buffer in parallel.encoder.named_buffers():
            encoder.get_buffer(name).copy_(buffer)


@torch.no_grad()
def take_weights(parallel: Parallel, plain: nn.Module | None, world: World) -> None:
    """Fill what this rank holds of all weights, and its buffers, from rank 0's plain encoder, a piece at a time. Collective."""
    assert world.group is not None
    parallel.trained()  # all are sharded now
    own = {} if plain is None else {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    places = [parallel.fragment(name, parameter.detach()) for name, parameter in parallel.encoder.named_parameters()]
    places += [Fragment(name, 0, buffer.numel(), buffer.view(-1)) for name, buffer in parallel.encoder.named_buffers()]
    for place in places:
        for start in range(0, place.numel, PIECE_NUMEL):
            count = min(PIECE_NUMEL, place.numel - start)
            piece = place.values.new_empty(count)
            if world.speaks:
                piece.copy_(own[place.name].view(-1)[start : start + count])
            torch.distributed.broadcast(piece, 0, group=world.group)
            first, stop = max(start, place.start), min(start + count, place.start + len(place.values))
            if first < stop:
                place.values[first - place.start : stop - place.start] = piece[first - start : stop - start]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
