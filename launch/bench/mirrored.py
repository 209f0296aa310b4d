"""One real rank among many: torch's fake process group, and what the other ranks would send, who are this rank mirrored.

Another rank has this rank's texts under keys of its own, so that nothing is masked by accident, and this rank's embeddings with
some components' signs turned. Signs are Walsh functions: mirrors of mirrors are mirrors, so every rank sees the same world in
another order. What a rank would receive of another then follows from what it would send it: its rows and keys are this rank's
turned, its statistics of these rows are this rank's of its rows, and so are its gradients, turned. Where the number of ranks is a
power of two, this is exact: loss, gradients and masks are those of real ranks that hold such rows; else nearly. Scores must not
change where both sides are turned, as inner products and distances do not.

Every buffer has the size of a real one. Filling them takes time that no real rank spends, which `StepCosts` leaves out.
Of messages outside of the loss every rank has this rank's: gradients of weights come back as they are, as a mean of equals.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import gradcache.exchange
import gradcache.loss
import trainer.backends
from gradcache.exchange import Counts, Keys
from trainer.world import World

KEY_STEP = 0x1E3779B97F4A7C15  # between the keys of two ranks: odd and large, so that sums of keys and steps do not meet
SEED = 20

# W ranks, D width, N rows of all ranks


@contextlib.contextmanager
def fake_world(num_ranks: int, device: torch.device, rank: int = 0) -> Iterator[World]:
    """Yield the world of one rank whose others do not exist; all groups are torch's fake one."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  it registers the backend

    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=num_ranks)
    try:
        with replaced(trainer.backends, "DistributedDataParallel", _ddp_of_fakes):
            yield World(rank=rank, num_ranks=num_ranks, device=device, group=dist.group.WORLD, control=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _ddp_of_fakes(module: torch.nn.Module, **options: Any) -> DistributedDataParallel:
    """Return a module under DDP, whose own reduction a fake group does not answer: buckets come back as they are."""

    def returned(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped = DistributedDataParallel(module, **options)
    wrapped.register_comm_hook(None, returned)
    return wrapped


def signs_of_ranks(num_ranks: int, width: int) -> Tensor:
    """Return what each rank's rows are multiplied by, (W, D) int8 of 1 and -1; rank 0's is 1 throughout.

    The product of the signs of ranks r and s is that of rank r xor s. For two ranks half of the components differ, by a draw.
    """
    generator = torch.Generator().manual_seed(SEED)
    bits_D = torch.randint(1, 1 << max(1, (num_ranks - 1).bit_length()), (width,), generator=generator)
    common_WD = torch.arange(num_ranks)[:, None] & bits_D
    for shift in (16, 8, 4, 2, 1):  # the parity of the bits
        common_WD ^= common_WD >> shift
    return (1 - 2 * (common_WD & 1)).to(torch.int8)


@dataclass
class Mirrors:
    """The messages of the loss as this rank would get them."""

    rank: int
    num_ranks: int
    costs: Any = None  # a StepCosts: what is done here counts as "others"

    def __post_init__(self) -> None:
        self._signs_WD: Tensor | None = None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the loss get them, within the block."""
        exchange, loss = gradcache.exchange, gradcache.loss
        names: list[tuple[Any, str, Callable[..., Any]]] = [
            (loss, "gather_keys", self._gather_keys(loss.gather_keys)),
            (loss, "gather_rows", self._gather_rows(loss.gather_rows)),
            (exchange, "_reduce_scatter", self._others(self._reduce_scatter)),
            (exchange, "_all_gather", self._others(exchange._all_gather)),  # the fake group's: this rank's for all
            (dist, "all_to_all_single", self._others(_all_to_all)),
            (dist, "all_reduce", self._others(self._all_reduce(dist.all_reduce))),
        ]
        with contextlib.ExitStack() as stack:
            for module, name, function in names:
                stack.enter_context(replaced(module, name, function))
            yield

    def _others(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self.costs is None else self.costs.counted("others", function)

    def _gather_keys(self, original: Callable[..., Keys]) -> Callable[..., Keys]:
        def gather_keys(mine: Keys, counts: Counts, group: dist.ProcessGroup | None) -> Keys:
            found = original(mine, counts, group)
            self._others(self._offset)(found, counts)
            return found

        return gather_keys

    def _offset(self, keys: Keys, counts: Counts) -> None:
        """Give the texts of each rank keys of its own."""
        both = [(keys.passage_P, counts.passages), (keys.extra_X, counts.extra), (keys.query_Q, counts.queries)]
        both += [(keys.target_Q, counts.queries), (keys.positives.values_m, counts.positives)]
        both += [(keys.hidden.values_m, counts.hidden)]
        for values, of_ranks in both:
            if len(values):
                other_W1 = torch.arange(self.num_ranks, device=values.device)[:, None] - self.rank
                values.view(self.num_ranks, of_ranks[0]).add_(other_W1 * KEY_STEP)

    def _gather_rows(self, original: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        def gather_rows(*arguments: Any) -> list[Tensor]:
            found = original(*arguments)
            for rows_ND in found:
                self._others(self._turn)(rows_ND)
            return found

        return gather_rows

    def _turn(self, rows_ND: Tensor) -> None:
        """Turn the rows of each rank, which are this rank's."""
        signs_WD = self._signs(rows_ND)
        for block_nD, sign_D in zip(rows_ND.view(self.num_ranks, -1, rows_ND.shape[1]), signs_WD, strict=True):
            block_nD *= sign_D

    def _reduce_scatter(self, mine: Tensor, packed: Tensor, group: Any = None) -> None:
        """Sum what the others would send: the gradients that they get from here, turned as they are."""
        signs_WD = self._signs(None)
        width = signs_WD.shape[1]  # further components, as scores of positives, are not turned
        mine.zero_()
        for block_nD, sign_D in zip(packed.view(self.num_ranks, *mine.shape), signs_WD, strict=True):
            mine[:, :width].addcmul_(block_nD[:, :width], sign_D.to(mine.dtype))
            mine[:, width:] += block_nD[:, width:]

    def _all_reduce(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
            """Sum what all ranks have in equal shares; a largest or mean one is this rank's."""
            if op == dist.ReduceOp.SUM:
                tensor *= self.num_ranks
            return original(tensor, op, group, async_op)

        return all_reduce

    def _signs(self, rows_ND: Tensor | None) -> Tensor:
        """Return the signs of all ranks beside this one's, as wide as rows, or as those that were gathered last."""
        if rows_ND is not None and (self._signs_WD is None or self._signs_WD.shape[1] != rows_ND.shape[1]):
            signs_WD = signs_of_ranks(self.num_ranks, rows_ND.shape[1])
            self._signs_WD = (signs_WD * signs_WD[self.rank]).to(rows_ND.device)
        assert self._signs_WD is not None, "rows are gathered before their gradients return"
        return self._signs_WD


def _all_to_all(received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int], group: Any = None) -> None:
    """Return to each rank what it is sent: another rank's numbers of these rows are this rank's of its rows."""
    assert received_sizes == sent_sizes, "all ranks have as many rows"
    received.copy_(sent)


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Let a name of a module or class mean something else, within the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
