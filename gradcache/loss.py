"""The loss of all ranks from detached embeddings, and the gradient of this rank's: phases 3 to 5 of a step.

Either the passages travel, and every rank contrasts its own queries with all of them; or the queries travel, every rank contrasts
all queries with its own passages, and a few numbers a query travel back and forth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache.agree import Agreed
from gradcache.batch import Batch
from gradcache.cells import own_scores
from gradcache.directions import count_masked, directions
from gradcache.exchange import Keys, all_reduce, gather_keys, gather_rows, scatter_gradients
from gradcache.field import Field, Pools
from gradcache.objectives.tile import Objective, trained_parameters
from gradcache.options import LossOptions
from gradcache.phases import evaluate_terms
from gradcache.spans import span
from gradcache.temperature import Temperature
from gradcache.terms import Source, Term
from gradcache.texts import text_terms
from gradcache.transfers import upload
from gradcache.way import Way, choose_way, keep_bytes, targets_travel
from gradcache.widths import View, plan_views, view_rows

# B queries on this rank, n rows on this rank, D width of all outputs


@dataclass(frozen=True)
class Loss:
    """The mean loss over the queries of all ranks; nobody has waited for its numbers yet."""

    value: Tensor  # scalar float64
    num_queries: int  # of all ranks
    gradient_nD: Tensor  # of the rows that this rank encodes
    share_masked: Tensor  # scalar float64: of the scores of queries against passages, of all ranks
    way: Way  # what travelled


def global_loss(
    batch: Batch,
    agreed: Agreed,
    *,
    options: LossOptions,
    temperature: Temperature,
    group: dist.ProcessGroup | None,
    gradient_scale: float | Tensor = 1.0,
    progress: float = 0.0,
) -> Loss:
    """Return the mean loss over the queries of all ranks, and its gradient; adds `gradient_scale` times the
    temperature's, and those of the objective's parameters, to these.

    Collective: one gather of keys and one of rows, one reduce-scatter, one small all-reduce; where queries travel, one all-to-all
    each way; where the loss of a row depends on those of all, one small gather and reduction; whatever the number of widths and
    directions. Waits for the device once, for what the masks hold, and once more where the objective wants siblings; whatever the
    numbers of rows, directions, widths and tiles. Raises ValueError, on every rank alike, for widths or outputs that do not fit
    the embeddings.
    """
    encoded_nD = agreed.embedding_nD
    if batch.derive is not None:
        encoded_nD = encoded_nD.detach().requires_grad_()
        with torch.enable_grad():
            rows_nD = batch.derive(encoded_nD)
    else:
        rows_nD = encoded_nD
    outputs = batch.outputs if batch.outputs is not None else {"embedding": rows_nD.shape[1]}
    views = plan_views(options.widths, options.width_weights, outputs, options.outputs)
    local = _local_pools(batch, rows_nD.detach().to(options.product_dtype or rows_nD.dtype))
    way = choose_way(options, agreed.counts, views, local.passage.rows_ND, None if group is None else group.size())
    dtype = torch.promote_types(local.query.rows_ND.dtype, torch.float32)
    positive_VB = [_own_positives(local, view, options.objective) for view in views]
    with span("gather"):
        field = _gather(batch, agreed, options, local, positive_VB, outputs, way, group)
    scale = temperature.scale().detach().to(dtype)
    num_values, pools = len(batch.query_values), field.pools
    with span("masks"):
        found = directions(field)
    terms = [
        Term(
            direction=direction,
            view=view,
            objective=options.objective,
            scale=scale,
            positive_R=field.keys.values_QV[:, num_values + i].to(dtype) if direction.is_spread else positive_VB[i],
            own_positive_B=positive_VB[i],
            progress=progress,
            tile_rows=options.tile_rows,
            false_negatives=options.false_negatives,
        )
        for direction in found
        for i, view in enumerate(views)
    ]
    if options.partition == "joint":
        for forth, back in zip(terms[: len(views)], terms[len(views) :], strict=True):
            forth.joined, back.is_joined = back, True
    evaluate_terms(terms, agreed.counts, group, keep_bytes(options, local.query.rows_ND.device))
    _bring_back(terms, pools, agreed, group)
    gradient_nD = _own_gradient(batch, pools, rows_nD)
    text_loss = text_terms(options, batch, rows_nD, gradient_nD, sum(agreed.num_rows))
    if batch.derive is not None:
        (gradient_nD,) = torch.autograd.grad(rows_nD, encoded_nD, gradient_nD.to(rows_nD.dtype))
    num_masked = count_masked(field, found[0]) + terms[0].num_dropped
    value, num_masked = _totals(terms, text_loss, num_masked, options, temperature, group, gradient_scale)
    num_scores = sum(agreed.counts.queries) * max(1, sum(agreed.counts.passages))
    return Loss(value, sum(agreed.counts.queries), gradient_nD, num_masked / num_scores, way)


def _local_pools(batch: Batch, rows_nD: Tensor) -> Pools:
    """Return this rank's rows."""
    query_BD, passage_nD = rows_nD.split([batch.num_queries, batch.num_passages])
    trains_queries, trains_passages = batch.is_trained
    every = Source(passage_nD, trains_passages)
    extra = None
    if batch.extra is not None:
        extra = Source(upload(batch.extra.embedding_xD.detach(), rows_nD.device).to(rows_nD.dtype), is_trained=False)
    return Pools(
        query=Source(query_BD, trains_queries),
        target=Source(passage_nD[upload(batch.target, rows_nD.device)], trains_passages),
        passage=every if batch.own_only is None else Source(passage_nD[upload(batch.shared, rows_nD.device)], trains_passages),
        every_passage=every,
        extra=extra,
    )


def _own_positives(local: Pools, view: View, objective: Objective) -> Tensor:
    """Return the raw score of each query of this rank with its own positive, (B,)."""
    rows, positives = (view_rows([source.rows_ND], view).rows_nw for source in (local.query, local.target))
    return own_scores(objective, rows, positives)


def _gather(
    batch: Batch,
    agreed: Agreed,
    options: LossOptions,
    local: Pools,
    positive_VB: list[Tensor],
    outputs: Mapping[str, int],
    way: Way,
    group: dist.ProcessGroup | None,
) -> Field:
    """Return what all ranks know. Collective: two all-gathers."""
    device, counts = local.query.rows_ND.device, agreed.counts
    query_keys, passage_keys = upload(batch.keys, device).split([batch.num_queries, batch.num_passages])
    values = [upload(batch.query_values[name], device).double() for name in sorted(batch.query_values)]
    mine = Keys(
        passage_P=passage_keys[upload(batch.shared, device)],
        extra_X=passage_keys[:0] if batch.extra is None else upload(batch.extra.keys, device),
        query_Q=query_keys,
        target_Q=passage_keys[upload(batch.target, device)],
        positives=batch.judged.to(device),
        hidden=batch.hidden.to(device),
        values_QV=torch.stack([*values, *(positive_B.double() for positive_B in positive_VB)], dim=1),
    )
    keys = gather_keys(mine, counts, group)
    travelling = _travelling(options, way)
    names = {"queries": local.query, "targets": local.target, "passages": local.passage}
    sources = {name: names[name] for name in travelling}
    of_ranks = [counts.passages if name == "passages" else counts.queries for name in travelling]
    rows = gather_rows([source.rows_ND for source in sources.values()], of_ranks, group)
    travelled = {name: Source(found, sources[name].is_trained) for name, found in zip(travelling, rows, strict=True)}
    second = options.objective.second
    second_view = None
    if second is not None and second != "positive":
        (second_view,) = plan_views(None, None, outputs, {second: 1.0})
    return Field(
        batch=batch,
        options=options,
        pools=replace(local, travelled=travelled),
        keys=keys,
        counts=counts,
        rank=0 if group is None else group.rank(),
        queries_travel=way.travels == "queries",
        second_view=second_view,
    )


def _travelling(options: LossOptions, way: Way) -> list[str]:
    """Return the names of the rows that travel."""
    if way.travels == "queries":
        return ["queries", "targets"] if targets_travel(options) else ["queries"]
    return ["passages", "queries"] if options.symmetric or options.same_side else ["passages"]


def _bring_back(terms: Sequence[Term], pools: Pools, agreed: Agreed, group: dist.ProcessGroup | None) -> None:
    """Add the gradients of what has travelled, and of the rows' own positives, to this rank's rows. Collective."""
    own_sources = {"queries": pools.query, "targets": pools.target, "passages": pools.passage}
    returned = {t: t.of_positive_R for t in terms if t.direction.is_spread and t.of_positive_R is not None}
    there = {name: s for name, s in pools.travelled.items() if s.is_trained or (returned and name == "queries")}
    parts = [source.gradient() for source in there.values()]
    if returned:  # scores of positives that the tiles of other ranks have used come back as further components of the queries
        further = torch.stack(list(returned.values()), dim=1)
        others = [further.new_zeros(len(part), len(returned)) for part in parts[1:]]
        parts = [torch.cat([part, more], dim=1) for part, more in zip(parts, [further, *others], strict=True)]
    counts = agreed.counts
    with span("reduce_scatter"):
        of_ranks = [counts.passages if name == "passages" else counts.queries for name in there]
        scattered = scatter_gradients(parts, of_ranks, group)
    for (name, _), gradient in zip(there.items(), scattered, strict=True):
        own = own_sources[name].gradient()
        own += gradient[:, : own.shape[1]]
    if returned:
        returned = dict(zip(returned, scattered[0][:, -len(returned) :].unbind(1), strict=True))
    for term in terms:
        term.finish(returned.get(term, None if term.direction.is_spread else term.of_positive_R))


def _own_gradient(batch: Batch, pools: Pools, rows_nD: Tensor) -> Tensor:
    """Return the gradient of this rank's queries and passages, one behind the other."""
    every = pools.every_passage.gradient()
    every.index_add_(0, upload(batch.target, every.device), pools.target.gradient())  # several queries may share a target
    if pools.passage is not pools.every_passage:
        every.index_add_(0, upload(batch.shared, every.device), pools.passage.gradient())
    assert len(rows_nD) == batch.num_queries + len(every), "all rows have a gradient"
    return torch.cat([pools.query.gradient(), every])


def _totals(
    terms: Sequence[Term],
    text_loss: Tensor,
    num_masked: Tensor,
    options: LossOptions,
    temperature: Temperature,
    group: dist.ProcessGroup | None,
    gradient_scale: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the masked cells of all ranks, and give the temperature and the objective's parameters their gradients.

    Collective: one all-reduce.
    """
    parameters = trained_parameters(options.objective)
    parts = [term.totals() for term in terms]
    loss, scale = text_loss + sum(loss for loss, _, _ in parts), torch.stack([scale for _, scale, _ in parts]).sum()
    of_parameters = [torch.stack([found[i] for _, _, found in parts]).sum(0).double().flatten() for i in range(len(parameters))]
    totals = torch.cat([loss[None], num_masked.double()[None], scale[None], *of_parameters])
    all_reduce(totals, group)
    if temperature.log_scale.requires_grad:
        temperature.scale().backward((totals[2] * gradient_scale).to(temperature.log_scale.dtype))
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, gradient in zip(parameters, totals[3:].split(sizes) if sizes else (), strict=True):
        gradient = (gradient * gradient_scale).view_as(parameter).to(parameter.dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return totals[0], totals[1]
