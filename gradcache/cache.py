"""`cached_encode`: embeddings of any number of rows, with a graph that takes the memory of one chunk.

The rows are encoded without a graph. The backward of the embeddings encodes them again, chunk by chunk with a graph and the same
dropout, and puts the gradients into the model's parameters. Source: Gao et al. 2021, arXiv 2101.06983.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from gradcache.batch import Tower
from gradcache.contrastive import ranks_of
from gradcache.encode import Encoding, backpropagate, encode_all
from gradcache.lost import naming_lost_ranks
from gradcache.plan import plan_encoding
from gradcache.replay import borrowed_generators
from gradcache.sync import DDPSync, GradientSync, NoSync

# n rows of all inputs, D width

Encode = Callable[[Any], Tensor]


def cached_encode(
    encode: Encode | tuple[Encode, ...],
    *inputs: Any,
    chunk_rows: int,
    keep_graphs: int | Literal["all"] = 1,
    models: Sequence[nn.Module] | None = None,
) -> tuple[Tensor, ...]:
    """Return the embeddings of each of the inputs, (rows, D), whose backward puts gradients into the parameters of the model.

    encode: takes a chunk of an input and returns its embeddings, (rows, D); or a tuple with one for each input.
    inputs: a tensor, a list, or a mapping of such, of one entry a row; a chunk is of the same kind, with some of the rows.
    Strings and numbers in a mapping go to every chunk.
    chunk_rows: rows encoded at once. keep_graphs: chunks that keep their graph, and are encoded once instead of twice.
    models: what `encode` calls where it is a function and no module, so that DistributedDataParallel can be told when to reduce:
    once, in the last backward, and not at all under its `no_sync`.
    Call `backward` on a loss of the embeddings; `torch.autograd.grad` finds no parameters. Without grad mode there is no graph.
    Dropout follows torch's seed. A layer that mixes the rows of a batch, such as a BatchNorm, sees a chunk.
    A rank may have no rows, and then returns embeddings of width 0. Collective where a model is under DistributedDataParallel.
    Raises ValueError or TypeError for inputs, models or embeddings that do not fit.
    """
    world = ranks_of("all")
    with naming_lost_ranks(world):
        encodes = encode if isinstance(encode, tuple) else (encode,) * len(inputs)
        if len(encodes) != len(inputs) or not inputs:
            raise ValueError(f"encode has {len(encodes)} functions for {len(inputs)} inputs; expected one, or one for each input")
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows={chunk_rows} must be at least 1")
        towers = [_tower(e, rows, f"input {i}") for i, (e, rows) in enumerate(zip(encodes, inputs, strict=True))]
        sync = _Reducer(encodes, models, world)
        is_trained = torch.is_grad_enabled()
        seed = int(torch.randint(2**62, ()))
        plan = plan_encoding(towers, chunk_rows, seed, 0, 0 if world is None else world.rank())
        with sync.held(is_trained), borrowed_generators(), _saying_rows():
            encoding = encode_all(plan, keep_graphs if is_trained else 0, sync.sync)
        if len(encoding.widths) > 1:
            raise ValueError(f"encode returned embeddings of widths {sorted(encoding.widths)}; expected one width")
    sizes = [len(tower.lengths) for tower in towers]
    anchor = torch.zeros((), requires_grad=is_trained)  # what makes the embeddings have a graph
    return _Encoded.apply(encoding, sync, sizes, anchor)


def _tower(encode: Encode, rows: Any, name: str) -> Tower:
    def encode_checked(chunk: Any) -> Tensor:
        found = encode(chunk)
        if not isinstance(found, Tensor):
            raise TypeError(f"encode returned a {type(found).__name__}; expected a tensor of embeddings, (rows, width)")
        return found

    count = _count(rows, name)
    return Tower(encode=encode_checked, lengths=torch.ones(count, dtype=torch.int64), load=lambda chosen: _pick(rows, chosen))


def _count(rows: Any, name: str) -> int:
    """Return how many rows an input has. Raises TypeError, or ValueError where its parts have different numbers."""
    if isinstance(rows, Mapping):
        counts = {key: _count(part, f"{name}[{key!r}]") for key, part in rows.items() if not _is_of_all_rows(part)}
        if len(set(counts.values())) != 1:
            found = ", ".join(f"{count} of {key!r}" for key, count in counts.items()) or "no rows"
            raise ValueError(f"{name} holds {found}; expected the same number of rows of each")
        return next(iter(counts.values()))
    if isinstance(rows, list) or (isinstance(rows, Tensor) and rows.ndim):
        return len(rows)
    raise TypeError(f"{name} is a {type(rows).__name__} without rows; expected a tensor, a list, or a mapping of these")


def _is_of_all_rows(part: Any) -> bool:
    """Return whether a part of a mapping says one thing of all rows, such as the name of a task, and goes to every chunk."""
    return part is None or isinstance(part, str | int | float) or (isinstance(part, Tensor) and not part.ndim)


def _pick(rows: Any, chosen: Tensor) -> Any:
    if isinstance(rows, Mapping):
        return {key: part if _is_of_all_rows(part) else _pick(part, chosen) for key, part in rows.items()}
    return rows[chosen.to(rows.device)] if isinstance(rows, Tensor) else [rows[i] for i in chosen.tolist()]


class _Reducer:
    """How the gradients of several ranks become one, and when: DistributedDataParallel is asked once, at the last chunk."""

    def __init__(self, encodes: Sequence[Encode], models: Sequence[nn.Module] | None, world: dist.ProcessGroup | None):
        if models is None:
            models = [encode for encode in encodes if isinstance(encode, nn.Module)]
            if world is not None and len(models) < len(encodes):
                raise ValueError(
                    f"encode is a function on {world.size()} ranks; set models=[...] to the modules that it calls, as they are "
                    "wrapped, so that their gradients are reduced once"
                )
        if not isinstance(models, list | tuple) or not all(isinstance(model, nn.Module) for model in models):
            raise TypeError(f"models is {type(models).__name__}; expected a list of the modules that encode calls")
        parts = dict.fromkeys(part for model in models for part in model.modules())
        if any(isinstance(part, FSDPModule) for part in parts):
            raise ValueError("a model is under fully_shard, which cached_encode does not know; use cached_step with FSDP2Sync")
        self.wrapped = [part for part in parts if isinstance(part, DistributedDataParallel)]
        self.sync: GradientSync = DDPSync(*self.wrapped) if self.wrapped else NoSync(*dict.fromkeys(models))
        self.device = next((parameter.device for model in models for parameter in model.parameters()), None)
        self.is_last = all(module.require_backward_grad_sync for module in self.wrapped)  # not under `no_sync`

    @contextlib.contextmanager
    def held(self, is_trained: bool = True) -> Iterator[None]:
        """Let no forward in the block make DistributedDataParallel expect a backward; leave it as it was found."""
        if is_trained:
            self.sync.hold()
        try:
            yield
        finally:
            for module in self.wrapped:
                module.require_backward_grad_sync = self.is_last


@dataclass(frozen=True)
class _Autocast:
    """The mixed precision of a moment, for another one."""

    device_type: str
    is_enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device_type: str) -> "_Autocast":
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Encode with graph as in that moment; a backward has neither its precision nor grad mode."""
        with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.is_enabled), torch.enable_grad():
            yield


@contextlib.contextmanager
def _saying_rows() -> Iterator[None]:
    """Name the setting of this module where a chunk does not fit into memory, halved or not."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError("a chunk of rows does not fit into memory; set chunk_rows lower") from error


class _Encoded(torch.autograd.Function):
    """Embeddings that are there, and what their backward runs."""

    @staticmethod
    def forward(ctx, encoding: Encoding, sync: _Reducer, sizes: list[int], anchor: Tensor) -> tuple[Tensor, ...]:
        embedding_nD = torch.empty(0, 0, device=sync.device) if encoding.embedding_nD is None else encoding.embedding_nD
        encoding.embedding_nD = None  # the caller's from here on
        ctx.encoding, ctx.sync, ctx.autocast = encoding, sync, _Autocast.now(embedding_nD.device.type)
        return tuple(part.clone() for part in embedding_nD.split(sizes))  # as views they could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[None, ...]:
        sync, encoding = ctx.sync, ctx.encoding
        if encoding is None:
            raise RuntimeError("the backward of these embeddings ran already; encode them again for another one")
        ctx.encoding = None
        gradient_nD = torch.cat(gradients)
        # The gradients that arrive are such that their average over the ranks is meant.
        scale = 1 / sync.sync.gradient_scale()
        with naming_lost_ranks(ranks_of("all")), sync.held(), borrowed_generators(), _saying_rows(), ctx.autocast.again():
            backpropagate(encoding, gradient_nD, sync.sync, scale, sync.is_last)
        return None, None, None, None
