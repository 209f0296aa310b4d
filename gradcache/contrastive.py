"""`contrastive_loss`: embeddings in, a loss with a graph out, over the batches of all ranks and a tile of scores at a time.

The gradient is made together with the value, and a backward only multiplies it; so nothing but it has to be kept.
"""

import copy
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gradcache.agree import agree
from gradcache.batch import Batch, Tower
from gradcache.encode import Encoding
from gradcache.loss import global_loss
from gradcache.lost import naming_lost_ranks
from gradcache.objectives.tile import trained_parameters
from gradcache.options import LossOptions
from gradcache.plan import Plan
from gradcache.ragged import Ragged
from gradcache.temperature import Temperature

# B queries and n passages of this rank, D width

OPTIONS = LossOptions()
ROWS_OF_A_RANK = 1 << 40  # more than any rank has, so that default keys of different ranks differ


def contrastive_loss(
    query_BD: Tensor,
    passage_nD: Tensor,
    *,
    temperature: float | Tensor | Temperature,
    positives: Tensor | None = None,
    keys: tuple[Tensor, Tensor] | None = None,
    options: LossOptions = OPTIONS,
    group: dist.ProcessGroup | Literal["all"] | None = "all",
) -> Tensor:
    """Return the mean loss over the queries of all ranks, a scalar, alike on every rank, whose graph leads to the embeddings.

    Scores are products of the embeddings as they are, divided by the temperature; for cosines, give rows of length 1.
    positives: the numbers of each query's passages among this rank's, int64; (B,), or (B, M) with the query's own first and -1
    where it has fewer. All passages of other queries, of every rank, are its negatives. None: passage i belongs to query i, and
    passages behind are hard negatives.
    keys: of queries (B,) and of passages (n,), int64. Rows of equal keys, on any ranks, are copies of one text: no passage with
    the key of a query's positive is its negative. None: all rows differ.
    group: the ranks whose batches are one; "all" are those of torch's default group if there is one; None is this process alone.

    As with differentiable collectives, embeddings get the gradient of the sum of what all ranks return: number of ranks x that of
    the mean. DistributedDataParallel and its like average over the ranks, and thereby make it exact. A temperature, and the
    parameters of an objective, get the gradient of the mean on each rank.
    Collective, the same number of messages whatever the sizes. Raises as `cached_step`, on every rank alike, for embeddings that
    are not finite, of different widths, or without any query; ValueError or TypeError for arguments that do not fit.
    """
    ranks = ranks_of(group)
    is_trained = torch.is_grad_enabled()
    with naming_lost_ranks(ranks):
        _check_embeddings(query_BD, passage_nD)
        log_scale = _log_scale(temperature)
        every = Tower(
            encode=nn.Identity(),
            lengths=torch.ones(len(query_BD) + len(passage_nD), dtype=torch.int64),
            load=nn.Identity(),
            is_frozen=not is_trained,
        )
        batch = _batch(every, len(query_BD), positives, keys, ranks)
    value, gradients = _evaluate(batch, query_BD, passage_nD, log_scale, options, ranks)
    return _Loss.apply(value, gradients, query_BD, passage_nD, log_scale, *trained_parameters(options.objective))


def ranks_of(group: dist.ProcessGroup | Literal["all"] | None) -> dist.ProcessGroup | None:
    """Return the group that is meant; None for one process."""
    if group == "all":
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return None if group is None or group.size() == 1 else group


def _check_embeddings(query_BD: Tensor, passage_nD: Tensor) -> None:
    for name, rows in (("query_BD", query_BD), ("passage_nD", passage_nD)):
        if not isinstance(rows, Tensor):
            raise TypeError(f"{name} is a {type(rows).__name__}; expected a tensor of embeddings, (rows, width)")
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ValueError(f"{name} is {tuple(rows.shape)} of {rows.dtype}; expected floating point embeddings, (rows, width)")
    if query_BD.device != passage_nD.device:
        raise ValueError(f"query_BD is on {query_BD.device} and passage_nD on {passage_nD.device}; expected one device")


def _log_scale(temperature: float | Tensor | Temperature) -> Tensor:
    """Return the logarithm of the inverse temperature, with a graph that leads to a temperature that is learnt."""
    if isinstance(temperature, Temperature):
        return temperature.log_scale
    value = temperature if isinstance(temperature, Tensor) else torch.tensor(temperature, dtype=torch.float64)
    if value.ndim or not value > 0:
        raise ValueError(f"temperature={temperature} must be one number, more than 0")
    return -value.log()


def _batch(
    every: Tower, num_queries: int, positives: Tensor | None, keys: tuple[Tensor, Tensor] | None, group: dist.ProcessGroup | None
) -> Batch:
    """Return the batch of this rank. Raises ValueError where positives or keys do not fit."""
    num_passages = len(every.lengths) - num_queries
    if keys is None:
        first = 0 if group is None else group.rank() * ROWS_OF_A_RANK
        query_keys, passage_keys = torch.arange(first, first + len(every.lengths)).split([num_queries, num_passages])
    else:
        query_keys, passage_keys = (_integers(of_side, "keys") for of_side in keys)
        if query_keys.shape != (num_queries,) or passage_keys.shape != (num_passages,):
            raise ValueError(
                f"keys are {tuple(query_keys.shape)} and {tuple(passage_keys.shape)}, expected one for each of "
                f"{num_queries} queries and {num_passages} passages"
            )
    if positives is None:
        if num_passages < num_queries:
            raise ValueError(
                f"there are {num_queries} queries and {num_passages} passages; expected a passage for each query, or positives, "
                "which say whose passage is whose"
            )
        table_BM = torch.arange(num_queries)[:, None]
    else:
        table_BM = _integers(positives, "positives")
        table_BM = table_BM[:, None] if table_BM.ndim == 1 else table_BM
        if table_BM.ndim != 2 or len(table_BM) != num_queries or not table_BM.shape[1]:
            raise ValueError(
                f"positives is {tuple(positives.shape)}; expected the passages of each of {num_queries} queries, (B,) or (B, M)"
            )
    if num_queries and not (int(table_BM.max()) < num_passages and int(table_BM.min()) >= -1 and int(table_BM[:, 0].min()) >= 0):
        raise ValueError(f"positives must be passages 0 to {num_passages - 1} of this rank, or -1 behind a query's first")
    is_named = table_BM >= 0
    return Batch(
        towers=[every],
        num_queries=num_queries,
        keys=torch.cat([query_keys, passage_keys]),
        target=table_BM[:, 0],
        positive_keys=Ragged(passage_keys[table_BM[is_named]], is_named.sum(1)),
    )


def _integers(values: Tensor, name: str) -> Tensor:
    if not isinstance(values, Tensor) or values.dtype != torch.int64:
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} are of type {found}; expected tensors of torch.int64")
    return values.cpu()


def _evaluate(
    batch: Batch, query_BD: Tensor, passage_nD: Tensor, log_scale: Tensor, options: LossOptions, group: dist.ProcessGroup | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss, and the gradients of the embeddings, the temperature and the objective's parameters. Collective."""
    device = query_BD.device
    sides = [rows.detach() for rows in (query_BD, passage_nD) if len(rows)]  # one without rows may be of any width
    widths = {rows.shape[1] for rows in sides}
    embedding_nD = torch.cat(sides) if len(widths) == 1 else None
    plan = Plan([], torch.arange(len(batch.keys)), len(batch.keys))
    # Copies, whose gradients are their own: they belong into this graph, not yet into the caller's parameters.
    options = copy.copy(options) if not trained_parameters(options.objective) else copy.deepcopy(options)
    temperature = Temperature(1.0)
    temperature.log_scale = nn.Parameter(log_scale.detach().to(device, copy=True), log_scale.requires_grad)
    with torch.autocast(device.type, enabled=False), torch.enable_grad():
        agreed = agree(batch, Encoding(plan, embedding_nD, {}, widths), options.objective, 0, group, device)
        found = global_loss(batch, agreed, options=options, temperature=temperature, group=group)
    of_rows = found.gradient_nD * (1 if group is None else group.size())
    of_query, of_passage = of_rows.split([len(query_BD), len(passage_nD)])
    learnt = [temperature.log_scale, *trained_parameters(options.objective)]
    others = [torch.zeros_like(p) if p.grad is None else p.grad for p in learnt]
    others[0] = others[0].to(log_scale.device)
    shaped = [part if len(part) else torch.zeros_like(rows) for part, rows in ((of_query, query_BD), (of_passage, passage_nD))]
    dtype = torch.promote_types(agreed.embedding_nD.dtype, torch.float32)
    return found.value.to(dtype), [*shaped, *others]


class _Loss(torch.autograd.Function):
    """A value that is there, and the gradients that belong to it."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *((saved * gradient.to(saved.device)).to(dtype) for saved, dtype in found)
