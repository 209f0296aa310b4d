"""The same step in one process and one graph: the oracle for `cached_step`.

Written to be obviously right, not to be fast or small: all ranks' batches, the full score matrix, masks by comparing keys one by
one, autograd for everything. Shares with the step only the plan of chunks and their seeds, so that both draw the same
dropout, and the objective, which has its own tests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gradcache.batch import Batch
from gradcache.objectives import Objective, Tile
from gradcache.plan import Plan, chunks_of_each_tower, encode_chunk, plan_encoding
from gradcache.replay import borrowed_generators
from gradcache.temperature import Temperature


def reference_step(
    batches: Sequence[Batch],
    *,
    objective: Objective,
    temperature: Temperature,
    chunk_tokens: int,
    seed: int,
    step: int,
    symmetric: bool = False,
    same_side: bool = False,
    equal_chunks: bool = False,
    widths: tuple[int, ...] | None = None,
    width_weights: tuple[float, ...] | None = None,
) -> float:
    """Return the mean loss over the queries of all ranks and add its gradient to the parameters and the temperature.

    batches: one for each rank, in order, with towers that encode in this process. Does not communicate.
    equal_chunks: plan as a step does whose backend communicates in forwards, which needs as many chunks on every rank.
    widths, width_weights: the mean of the loss over embeddings cut to so many components, each of unit length.
    """
    plans = [plan_encoding(batch.towers, chunk_tokens, seed, step, rank) for rank, batch in enumerate(batches)]
    if equal_chunks:
        counts = [chunks_of_each_tower(plan, batch.towers) for plan, batch in zip(plans, batches, strict=True)]
        most = [max(count) for count in zip(*counts, strict=True)]
        plans = [plan_encoding(batch.towers, chunk_tokens, seed, step, rank, most) for rank, batch in enumerate(batches)]
    with borrowed_generators():
        embedded = [_encode(plan) for plan in plans]
    query_BD = torch.cat([rows[: batch.num_queries] for rows, batch in zip(embedded, batches, strict=True) if len(rows)])
    passage_PD = torch.cat([rows[batch.num_queries :] for rows, batch in zip(embedded, batches, strict=True) if len(rows)])
    if widths is None:
        loss = _loss(query_BD, passage_PD, batches, objective, temperature, symmetric, same_side)
    else:
        weights = width_weights or (1.0,) * len(widths)
        loss = torch.zeros(())
        for width, weight in zip(widths, weights, strict=True):
            query_Bw, passage_Pw = (normalize(embedding[:, :width], dim=1) for embedding in (query_BD, passage_PD))
            term = _loss(query_Bw, passage_Pw, batches, objective, temperature, symmetric, same_side)
            loss = loss + weight / sum(weights) * term
    loss.backward()
    return loss.item()


def _loss(
    query_BD: Tensor,
    passage_PD: Tensor,
    batches: Sequence[Batch],
    objective: Objective,
    temperature: Temperature,
    symmetric: bool,
    same_side: bool,
) -> Tensor:
    """Return the mean loss over the queries of all ranks, with its graph."""
    query_keys = [key for batch in batches for key in batch.keys[: batch.num_queries].tolist()]
    passage_keys = [key for batch in batches for key in batch.keys[batch.num_queries :].tolist()]
    positives = [set(keys) for batch in batches for keys in batch.positive_keys.tolist()]
    targets, first = [], 0
    for batch in batches:
        targets += [first + target for target in batch.target.tolist()]
        first += batch.num_passages

    score_BP = query_BD @ passage_PD.T * temperature.scale()
    is_positive = [[key in positives[row] for key in passage_keys] for row in range(len(query_keys))]
    own_side = None
    if same_side:
        # Queries of one text, or with a positive in common, are no negatives of each other.
        known = [{key, *keys} for key, keys in zip(query_keys, positives, strict=True)]
        own_side = query_BD @ query_BD.T * temperature.scale(), [[bool(a & b) for b in known] for a in known], query_keys
    loss = objective(_tile(score_BP, targets, is_positive, passage_keys, own_side)).mean()
    if symmetric:
        # A query text is a positive of a passage if one of the queries of that text has it.
        of_text: dict[int, set[int]] = {}
        for key, keys in zip(query_keys, positives, strict=True):
            of_text[key] = of_text.get(key, set()) | keys
        rows = [[passage_keys[target] in of_text[key] for key in query_keys] for target in targets]
        if same_side:
            own_side = passage_PD[targets] @ passage_PD.T * temperature.scale(), is_positive, passage_keys
        back = objective(_tile(score_BP.T[targets], list(range(len(query_keys))), rows, query_keys, own_side)).mean()
        loss = (loss + back) / 2
    return loss


def _encode(plan: Plan) -> Tensor:
    """Return the embeddings of one rank's rows in one graph, with the draws of that rank's chunks."""
    row_of_place: dict[int, Tensor] = {}
    for chunk in plan.chunks:
        if len(chunk.rows):
            row_of_place |= dict(zip(chunk.places.tolist(), encode_chunk(chunk, with_graph=True), strict=True))
    return torch.stack([row_of_place[place] for place in plan.place_n.tolist()]) if row_of_place else torch.empty(0, 0)


def _tile(
    score_BP: Tensor,
    targets: list[int],
    is_positive: list[list[bool]],
    column_keys: list[int],
    own_side: tuple[Tensor, list[list[bool]], list[int]] | None = None,
) -> Tile:
    """Return all rows as one tile. own_side: scores, cells that are no negatives, and keys of further columns."""
    is_masked = torch.zeros(score_BP.shape, dtype=torch.bool)
    sibling_rows, sibling_columns = [], []
    for row, target in enumerate(targets):
        for column, key in enumerate(column_keys):
            if column == target:
                continue
            is_repeated = key in column_keys[:column]
            is_masked[row, column] = is_repeated or is_positive[row][column]
            if is_positive[row][column] and not is_repeated and key != column_keys[target]:
                sibling_rows.append(row)
                sibling_columns.append(column)
    logits_BP = score_BP.masked_fill(is_masked.to(score_BP.device), -torch.inf)
    if own_side is not None:
        scores, is_related, keys = own_side
        is_copy = [key in keys[:column] for column, key in enumerate(keys)]
        is_left_out = torch.tensor(is_related) | torch.tensor(is_copy)
        logits_BP = torch.cat([logits_BP, scores.masked_fill(is_left_out.to(scores.device), -torch.inf)], dim=1)
    return Tile(
        logits_tP=logits_BP,
        target_t=torch.tensor(targets, device=score_BP.device),
        sibling_rows=torch.tensor(sibling_rows, dtype=torch.int64, device=score_BP.device),
        sibling_logits=score_BP[sibling_rows, sibling_columns],
    )
