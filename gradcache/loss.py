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
from gradcache.tiles import evaluate_tiles
from gradcache.widths import Cut, add_first, cut_rows, plan_cuts

# B queries on this rank, n rows on this rank, P passages and Q queries of all ranks, N rows of one side of all ranks


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
    widths: tuple[int, ...] | None = None  # falling: the mean over embeddings cut to so many components; None: as they are
    width_weights: tuple[float, ...] | None = None  # of that mean; None: equal ones


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
    one small all-reduce; whatever the number of widths. Raises ValueError for widths that do not fit the embeddings.
    """
    cuts = plan_cuts(options.widths, options.width_weights, agreed.embedding_nD.shape[1])
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
    forth = _direction(query_BD, passages, queries if options.same_side else None, masks, scale, weight, options, cuts)
    query_gradient, passage_gradient = forth.row_BD, torch.zeros(passage_nD.shape, dtype=forth.row_BD.dtype, device=device)
    totals = forth.totals
    if options.symmetric and queries is not None:
        own_query_B = queries.pool.first + torch.arange(len(target_B), device=device)
        masks = mask_queries(own_query_B, passage_keys[target_B], queries.pool.keys_N, queries.pool.extra_NM)
        if options.same_side:  # other positives of its query are no negatives of a passage
            passage_keys_P1 = passages.pool.keys_N[:, None]
            masks = add_same_side(masks, len(queries.pool.keys_N), positives, passage_keys_P1, passages.pool.keys_N)
        other = passages if options.same_side else None
        back = _direction(passage_nD[target_B], queries, other, masks, scale, weight, options, cuts)
        passage_gradient.index_add_(0, target_B, back.row_BD)  # several queries may share a target
        totals += back.totals
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

    def add(self, gradient_Nw: Tensor) -> None:
        """Add the gradient of the first w components."""
        self.gradient_ND = add_first(self.gradient_ND, gradient_Nw, self.pool.rows_ND.shape[1])

    def scatter(self, group: dist.ProcessGroup | None) -> Tensor:
        """Return the gradient of this rank's rows. Collective: one reduce-scatter."""
        assert self.gradient_ND is not None, "no direction has this side as columns"
        return scatter_gradients(self.gradient_ND, self.pool.counts, group)


@dataclass(frozen=True)
class _Direction:
    """What the rows of one direction add to the loss, and its gradients."""

    totals: Tensor  # float64: the loss, the gradient of the scale
    row_BD: Tensor


def _direction(
    row_BD: Tensor,
    columns: _Side,
    same_side: _Side | None,
    masks: Masks,
    scale: float,
    weight: float,
    options: LossOptions,
    cuts: list[Cut],
) -> _Direction:
    """Return the loss of some rows against the columns, cut by cut; the columns' gradients go to their sides.

    Holds one cut of the columns, and its gradient, at a time.
    """
    sides = [columns] if same_side is None else [columns, same_side]
    counts = [len(side.pool.keys_N) for side in sides]
    totals = torch.zeros(2, dtype=torch.float64, device=row_BD.device)  # of the loss, of the gradient of the scale
    row_gradient_BD: Tensor | None = None
    for cut in cuts:
        rows, cut_columns = cut_rows([row_BD], cut.width), cut_rows([side.pool.rows_ND for side in sides], cut.width)
        share = weight * cut.share
        found = evaluate_tiles(rows.unit_nw, cut_columns.unit_nw, masks, scale, options.objective, share, options.tile_rows)
        for side, gradient_Nw in zip(sides, cut_columns.whole(found.column_PD).split(counts), strict=True):
            side.add(gradient_Nw)
        row_gradient_BD = add_first(row_gradient_BD, rows.whole(found.row_BD), row_BD.shape[1])
        totals += torch.stack([found.loss_sum * share, found.scale])
        del rows, cut_columns, found  # before the next ones are made
    assert row_gradient_BD is not None, "there is at least one cut"
    return _Direction(totals, row_gradient_BD)
