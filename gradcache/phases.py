"""The terms of a loss: those of one sweep one by one, the others through two phases with one exchange between them for all."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache.exchange import Counts, all_reduce, exchange, gather_values, starts
from gradcache.terms import Term

# R rows of a term, B rows of this rank, S statistics, W ranks, S2 numbers of the whole batch


def evaluate_terms(terms: Sequence[Term], counts: Counts, group: dist.ProcessGroup | None, keep_bytes: int) -> None:
    """Evaluate all terms and the gradients of their sources, but for `Term.finish`.

    keep_bytes: of scores that are kept from one phase to the next.
    Collective: one all-to-all each way if any term is spread over the ranks; one gather and one reduction, both small, if the loss
    of a row depends on those of all.
    """
    for term in terms:
        if term.is_one_sweep:
            term.sweep()
    others = [term for term in terms if not term.is_one_sweep]
    spread = [term for term in others if term.direction.is_spread]
    statistics, siblings = [], []
    for term in others:
        statistics_RS, kept_bytes = term.statistics(keep_bytes)
        keep_bytes -= kept_bytes
        statistics.append(statistics_RS)
        siblings.append(term.sibling_scores())
    found = dict(zip(map(id, others), zip([s[None] for s in statistics], siblings, strict=True), strict=True))
    if spread:
        sent = [pair for term, pair in zip(others, zip(statistics, siblings, strict=True), strict=True) if term in spread]
        found |= dict(zip(map(id, spread), _to_owners(spread, sent, counts, group), strict=True))
    derivatives = dict(zip(map(id, others), _derivatives(others, [found[id(term)] for term in others], group), strict=True))
    back = {id(t): (derivatives[id(t)][0], t.sibling_derivatives()) for t in others if not t.direction.is_spread}
    if spread:
        back |= dict(zip(map(id, spread), _from_owners(spread, [derivatives[id(t)] for t in spread], counts, group), strict=True))
    for term in others:
        term.gradients(*back[id(term)])


def _derivatives(terms: Sequence[Term], parts: Sequence[tuple[Tensor, Tensor]], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Return the derivative of each term's loss to the statistics of each tile, (W, B, S), and keep its loss."""
    found: dict[int, Tensor] = {}
    of_batch: list[tuple[Term, Tensor]] = []
    for term, (parts_WBS, sibling_scores) in zip(terms, parts, strict=True):
        term.begin_loss(sibling_scores)
        if term.objective.batch_merges:
            of_batch.append((term, term.loss.begin_batch(parts_WBS)))
        else:
            found[id(term)] = term.loss.evaluate(slice(0, parts_WBS.shape[1]), parts_WBS)
    if of_batch:
        sizes = [len(local) for _, local in of_batch]
        every_WS = gather_values(torch.cat([local for _, local in of_batch]), group)
        losses = [
            term.loss.evaluate_batch(batch_WS) for (term, _), batch_WS in zip(of_batch, every_WS.split(sizes, 1), strict=True)
        ]
        total_WS = all_reduce(torch.cat(losses, 1), group)
        own_S = total_WS[0 if group is None else group.rank()]
        for (term, _), derivative_S in zip(of_batch, own_S.split(sizes), strict=True):
            found[id(term)] = term.loss.finish_batch(derivative_S)
    return [found[id(term)] for term in terms]


def _to_owners(
    terms: Sequence[Term], parts: Sequence[tuple[Tensor, Tensor]], counts: Counts, group: dist.ProcessGroup | None
) -> list[tuple[Tensor, Tensor]]:
    """Return of each term the statistics of this rank's rows from every rank, (W, B, S), and their siblings' scores."""
    edges = starts(counts.queries)
    to_ranks: list[list[Tensor]] = [[] for _ in counts.queries]
    for term, (statistics_RS, scores_s) in zip(terms, parts, strict=True):
        pieces = scores_s.split(list(term.direction.siblings.sent))
        for rank, piece in enumerate(pieces):
            to_ranks[rank] += [statistics_RS[edges[rank] : edges[rank + 1]].flatten(), piece]
    num_rows = counts.queries[0 if group is None else group.rank()]
    widths = [statistics_RS.shape[1] for statistics_RS, _ in parts]
    sizes = [
        [n for term, width in zip(terms, widths, strict=True) for n in (num_rows * width, term.direction.siblings.received[rank])]
        for rank in range(len(edges) - 1)
    ]
    blocks = exchange([torch.cat(pieces) for pieces in to_ranks], [sum(size) for size in sizes], group)
    by_rank = [block.split(size) for block, size in zip(blocks, sizes, strict=True)]
    return [
        (
            torch.stack([pieces[2 * i].view(num_rows, width) for pieces in by_rank]),
            torch.cat([pieces[2 * i + 1] for pieces in by_rank]),
        )
        for i, width in enumerate(widths)
    ]


def _from_owners(
    terms: Sequence[Term], derivatives: Sequence[Tensor], counts: Counts, group: dist.ProcessGroup | None
) -> list[tuple[Tensor, Tensor]]:
    """Return of each term the derivative to this rank's statistics of all rows, (R, S), and to its siblings' scores."""
    to_ranks: list[list[Tensor]] = [[] for _ in counts.queries]
    for term, derivative_WBS in zip(terms, derivatives, strict=True):
        pieces = term.sibling_derivatives().split(list(term.direction.siblings.received))
        for rank, piece in enumerate(pieces):
            to_ranks[rank] += [derivative_WBS[rank].flatten(), piece]
    widths = [derivative_WBS.shape[2] for derivative_WBS in derivatives]
    sizes = [
        [n for term, width in zip(terms, widths, strict=True) for n in (rows * width, term.direction.siblings.sent[rank])]
        for rank, rows in enumerate(counts.queries)
    ]
    blocks = exchange([torch.cat(pieces) for pieces in to_ranks], [sum(size) for size in sizes], group)
    by_rank = [block.split(size) for block, size in zip(blocks, sizes, strict=True)]
    return [
        (
            torch.cat([pieces[2 * i].view(-1, width) for pieces in by_rank]),
            torch.cat([pieces[2 * i + 1] for pieces in by_rank]),
        )
        for i, width in enumerate(widths)
    ]
