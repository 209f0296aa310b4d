"""The loss of all ranks from detached embeddings, and the gradient of this rank's: phases 3 to 5 of a step."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache.batch import Batch
from gradcache.gather import Pool, gather_counts, gather_rows, scatter_gradients
from gradcache.masks import mask_passages, mask_queries
from gradcache.objectives import Objective
from gradcache.temperature import Temperature
from gradcache.tiles import TileGradients, evaluate_tiles

_DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@dataclass(frozen=True)
class Loss:
    """The mean loss over the queries of all ranks."""

    value: float
    num_queries: int  # of all ranks
    gradient_nD: Tensor  # of this rank's rows, queries first
    share_masked: float  # of this rank's scores of queries against passages


def global_loss(
    batch: Batch,
    embedding_nD: Tensor | None,
    *,
    objective: Objective,
    temperature: Temperature,
    group: dist.ProcessGroup | None,
    symmetric: bool,
    tile_rows: int | None,
) -> Loss:
    """Return the mean loss over the queries of all ranks, and its gradient; adds the temperature's to its parameter.

    embedding_nD: detached embeddings of this rank's rows; None if it has none.
    Collective: one small all-gather, one all-gather and one reduce-scatter for the passages, symmetric the same for the
    queries, one small all-reduce. Raises ValueError, on every rank, if no rank has a query.
    """
    device = temperature.log_scale.device
    mine = [batch.num_queries, batch.num_passages, batch.positive_keys.shape[1], *_shape_code(embedding_nD)]
    num_queries, num_passages, widths, dims, dtypes = map(list, zip(*gather_counts(mine, group, device), strict=True))
    if sum(num_queries) == 0:
        raise ValueError("the batch has no query on any rank; expected at least one")
    if embedding_nD is None:
        embedding_nD = torch.empty(0, max(dims), dtype=_DTYPES[max(dtypes)], device=device)
    query_BD, passage_nD = embedding_nD.split([batch.num_queries, batch.num_passages])
    query_keys, passage_keys = batch.keys.to(device).split([batch.num_queries, batch.num_passages])
    target_B, positives = batch.target.to(device), batch.positives(max(widths)).to(device)
    scale = float(temperature.scale().detach())
    weight = (0.5 if symmetric else 1.0) / sum(num_queries)

    passages = gather_rows(passage_nD, passage_keys, passage_keys.new_empty(len(passage_keys), 0), num_passages, group)
    masks = mask_passages(target_B + passages.first, positives, passages.keys_N)
    forth = evaluate_tiles(query_BD, passages.rows_ND, masks, scale, objective, weight, tile_rows)
    passage_gradient = scatter_gradients(forth.column_PD, num_passages, group)
    query_gradient, totals = forth.row_BD, torch.stack([forth.loss_sum * weight, forth.scale])
    if symmetric:
        queries = gather_rows(query_BD, query_keys, positives, num_queries, group)
        back = _other_direction(queries, passage_nD, passage_keys, target_B, scale, objective, weight, tile_rows)
        query_gradient = query_gradient + scatter_gradients(back.column_PD, num_queries, group)
        # Several queries may share a target.
        passage_gradient = passage_gradient.index_add(0, target_B, back.row_BD)
        totals = totals + torch.stack([back.loss_sum * weight, back.scale])
    if group is not None:
        dist.all_reduce(totals, group=group)
    if temperature.log_scale.requires_grad:
        temperature.scale().backward(totals[1].to(temperature.log_scale.dtype))
    share_masked = masks.num_masked() / max(1, len(query_BD) * len(passages.keys_N))
    return Loss(float(totals[0]), sum(num_queries), torch.cat([query_gradient, passage_gradient]), share_masked)


def _other_direction(
    queries: Pool,
    passage_nD: Tensor,
    passage_keys: Tensor,
    target_B: Tensor,
    scale: float,
    objective: Objective,
    weight: float,
    tile_rows: int | None,
) -> TileGradients:
    """Return the loss of each local query's target passage against the queries of all ranks."""
    own_query_B = queries.first + torch.arange(len(target_B), device=target_B.device)
    masks = mask_queries(own_query_B, passage_keys[target_B], queries.keys_N, queries.extra_NM)
    return evaluate_tiles(passage_nD[target_B], queries.rows_ND, masks, scale, objective, weight, tile_rows)


def _shape_code(embedding_nD: Tensor | None) -> tuple[int, int]:
    """Return the width and the type, as numbers of which the largest over the ranks is that of a rank with rows."""
    return (0, 0) if embedding_nD is None else (embedding_nD.shape[1], _DTYPES.index(embedding_nD.dtype))
