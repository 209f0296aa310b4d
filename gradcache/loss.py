"""The loss of all ranks from detached embeddings, and the gradient of this rank's: phases 3 to 5 of a step."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache.agree import Agreed
from gradcache.batch import Batch
from gradcache.gather import Pool, all_reduce, gather_rows, scatter_gradients
from gradcache.masks import Masks, add_same_side, mask_passages, mask_queries
from gradcache.objectives import Objective
from gradcache.temperature import Temperature
from gradcache.tiles import TileGradients, evaluate_tiles

# B queries on this rank, n rows on this rank, P passages and Q queries of all ranks


@dataclass(frozen=True)
class Loss:
    """The mean loss over the queries of all ranks."""

    value: float
    num_queries: int  # of all ranks
    gradient_nD: Tensor  # of this rank's rows, queries first
    share_masked: float  # of this rank's scores of queries against passages


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """How scores become a loss."""

    objective: Objective
    symmetric: bool = False  # the mean of both directions, queries -> passages and target passages -> queries
    same_side: bool = False  # the rows of a direction's own side are negatives, too: query-query and passage-passage
    tile_rows: int | None = None  # rows of scores evaluated at once; None: as many as fit a fixed memory
    product_dtype: torch.dtype | None = None  # embeddings are gathered and multiplied in; None: in what the encoder returns


def global_loss(
    batch: Batch,
    agreed: Agreed,
    *,
    options: LossOptions,
    temperature: Temperature,
    group: dist.ProcessGroup | None,
    gradient_scale: float = 1.0,
) -> Loss:
    """Return the mean loss over the queries of all ranks, and its gradient; adds `gradient_scale` times the
    temperature's to its parameter.

    Collective: one all-gather and one reduce-scatter for the passages, symmetric or same_side the same for the queries,
    one small all-reduce.
    """
    device = agreed.embedding_nD.device
    dtype = agreed.embedding_nD.dtype
    embedding_nD = agreed.embedding_nD.to(options.product_dtype or dtype)
    query_BD, passage_nD = embedding_nD.split([batch.num_queries, batch.num_passages])
    query_keys, passage_keys = batch.keys.to(device).split([batch.num_queries, batch.num_passages])
    target_B, positives = batch.target.to(device), batch.positives(agreed.num_positives).to(device)
    scale = float(temperature.scale().detach())
    num_queries = sum(agreed.num_queries)
    weight = (0.5 if options.symmetric else 1.0) / num_queries

    nothing = passage_keys.new_empty(len(passage_keys), 0)
    passages = _Side(gather_rows(passage_nD, passage_keys, nothing, agreed.num_passages, group))
    queries = None
    if options.symmetric or options.same_side:
        queries = _Side(gather_rows(query_BD, query_keys, positives, agreed.num_queries, group))

    masks = mask_passages(target_B + passages.pool.first, positives, passages.pool.keys_N)
    share_masked = masks.num_masked() / max(1, len(query_BD) * len(passages.pool.keys_N))
    if options.same_side and queries is not None:
        # Its own text, and queries that share a positive, are no negatives of a query.
        row_keys = torch.cat([query_keys[:, None], positives], dim=1)
        column_keys = torch.cat([queries.pool.keys_N[:, None], queries.pool.extra_NM], dim=1)
        masks = add_same_side(masks, len(passages.pool.keys_N), row_keys, column_keys, queries.pool.keys_N)
    forth = _direction(query_BD, passages, queries if options.same_side else None, masks, scale, weight, options)
    query_gradient, passage_gradient = forth.row_BD, torch.zeros(passage_nD.shape, dtype=forth.row_BD.dtype, device=device)
    totals = torch.stack([forth.loss_sum * weight, forth.scale])
    if options.symmetric and queries is not None:
        own_query_B = queries.pool.first + torch.arange(len(target_B), device=device)
        masks = mask_queries(own_query_B, passage_keys[target_B], queries.pool.keys_N, queries.pool.extra_NM)
        if options.same_side:  # other positives of its query are no negatives of a passage
            passage_keys_P1 = passages.pool.keys_N[:, None]
            masks = add_same_side(masks, len(queries.pool.keys_N), positives, passage_keys_P1, passages.pool.keys_N)
        other = passages if options.same_side else None
        back = _direction(passage_nD[target_B], queries, other, masks, scale, weight, options)
        passage_gradient.index_add_(0, target_B, back.row_BD)  # several queries may share a target
        totals = totals + torch.stack([back.loss_sum * weight, back.scale])
    passage_gradient += passages.scatter(group)
    if queries is not None:
        query_gradient = query_gradient + queries.scatter(group)
    if group is not None:
        all_reduce(totals, group)
    if temperature.log_scale.requires_grad:
        temperature.scale().backward((totals[1] * gradient_scale).to(temperature.log_scale.dtype))
    return Loss(float(totals[0]), num_queries, torch.cat([query_gradient, passage_gradient]), share_masked)


class _Side:
    """The rows of one side of all ranks, and what the directions add to their gradients."""

    def __init__(self, pool: Pool):
        self.pool = pool
        self.gradient_ND: Tensor | None = None

    def add(self, gradient_ND: Tensor) -> None:
        self.gradient_ND = gradient_ND if self.gradient_ND is None else self.gradient_ND.add_(gradient_ND)

    def scatter(self, group: dist.ProcessGroup | None) -> Tensor:
        """Return the gradient of this rank's rows. Collective: one reduce-scatter."""
        assert self.gradient_ND is not None, "no direction has this side as columns"
        return scatter_gradients(self.gradient_ND, self.pool.counts, group)


def _direction(
    row_BD: Tensor, columns: _Side, same_side: _Side | None, masks: Masks, scale: float, weight: float, options: LossOptions
) -> TileGradients:
    """Return the loss of some rows against the columns; the columns' gradients go to their sides."""
    column_ND = columns.pool.rows_ND
    if same_side is not None:
        column_ND = torch.cat([column_ND, same_side.pool.rows_ND])
    found = evaluate_tiles(row_BD, column_ND, masks, scale, options.objective, weight, options.tile_rows)
    columns.add(found.column_PD[: len(columns.pool.keys_N)])
    if same_side is not None:
        same_side.add(found.column_PD[len(columns.pool.keys_N) :])
    return found
