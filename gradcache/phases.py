"""The terms of a loss: those of one sweep one by one, the others through two phases with one exchange between them for all."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache.exchange import Counts, all_reduce, exchange, gather_values
from gradcache.spans import span
from gradcache.terms import Term

# R rows of a term, B rows of this rank, S statistics, W ranks, S2 numbers of the whole batch


def evaluate_terms(terms: Sequence[Term], counts: Counts, group: dist.ProcessGroup | None, keep_bytes: int) -> None:
    """Evaluate all terms and the gradients of their sources, but for `Term.finish`.

    keep_bytes: of scores that are kept from one phase to the next.
    Collective: one all-to-all each way if any term is spread over the ranks; one gather and one reduction, both small, if the
    loss of a row depends on those of all.
    """
    for term in terms:
        if term.is_one_sweep:
            term.sweep()
    others = [term for term in terms if not term.is_one_sweep]
    spread = [term for term in others if term.direction.is_spread]
    begun: dict[Term, tuple[Tensor, Tensor]] = {}
    with span("statistics"):
        for term in others:
            statistics_RS, sibling_scores, kept_bytes = term.statistics(keep_bytes)
            begun[term] = statistics_RS, sibling_scores
            keep_bytes -= kept_bytes
        known = {term: (statistics_RS[None], scores) for term, (statistics_RS, scores) in begun.items()}
        if spread:
            known |= _to_owners({term: begun[term] for term in spread}, counts, group)
    derivatives = _derivatives(known, counts, group)
    back = {term: (derivative_WBS[0], term.sibling_derivatives()) for term, derivative_WBS in derivatives.items()}
    if spread:
        with span("statistics"):
            back |= _from_owners({term: derivatives[term] for term in spread}, counts, group)
    for term in others:
        term.gradients(*back[term])


def _derivatives(
    known: Mapping[Term, tuple[Tensor, Tensor]], counts: Counts, group: dist.ProcessGroup | None
) -> dict[Term, Tensor]:
    """Return the derivative of each term's loss to the statistics of each tile, (W, B, S), and keep its loss."""
    found: dict[Term, Tensor] = {}
    of_batch: dict[Term, Tensor] = {}
    for term, (parts_WBS, sibling_scores) in known.items():
        term.begin_loss(sibling_scores)
        if term.is_joined:
            continue
        if term.joined is not None:
            parts_WBS = torch.cat([parts_WBS, known[term.joined][0]])
        if term.objective.has_batch_numbers:
            of_batch[term] = term.loss.begin_batch(parts_WBS, counts.queries)
        else:
            found[term] = term.loss.evaluate(slice(0, parts_WBS.shape[1]), parts_WBS)
    if of_batch:
        sizes = [len(local) for local in of_batch.values()]
        every_WS = gather_values(torch.cat(list(of_batch.values())), group).split(sizes, 1)
        of_losses = [term.loss.evaluate_batch(batch_WS) for term, batch_WS in zip(of_batch, every_WS, strict=True)]
        total_WS = all_reduce(torch.cat(of_losses, 1), group)
        own_S = total_WS[0 if group is None else group.rank()]
        for term, derivative_S in zip(of_batch, own_S.split(sizes), strict=True):
            found[term] = term.loss.finish_batch(derivative_S)
    for term, back in [(term, term.joined) for term in found]:
        if back is not None:
            found[term], found[back] = found[term].split([len(known[term][0]), len(known[back][0])])
    return found


def _to_owners(
    begun: Mapping[Term, tuple[Tensor, Tensor]], counts: Counts, group: dist.ProcessGroup | None
) -> dict[Term, tuple[Tensor, Tensor]]:
    """Return of each term the statistics of this rank's rows from every rank, (W, B, S), and their siblings' scores."""
    num_ranks, num_rows = len(counts.queries), counts.queries[0 if group is None else group.rank()]
    parts, sent, received = [], [], []
    for term, (statistics_RS, scores_s) in begun.items():
        width, siblings = statistics_RS.shape[1], term.direction.siblings
        parts += [statistics_RS.flatten(), scores_s]
        sent += [[n * width for n in counts.queries], list(siblings.sent)]
        received += [[num_rows * width] * num_ranks, list(siblings.received)]
    found = _exchanged(parts, sent, received, group)
    return {
        term: (found[2 * i].view(num_ranks, num_rows, statistics_RS.shape[1]), found[2 * i + 1])
        for i, (term, (statistics_RS, _)) in enumerate(begun.items())
    }


def _from_owners(
    derivatives: Mapping[Term, Tensor], counts: Counts, group: dist.ProcessGroup | None
) -> dict[Term, tuple[Tensor, Tensor]]:
    """Return of each term the derivative to this rank's statistics of all rows, (R, S), and to its siblings' scores."""
    parts, sent, received = [], [], []
    for term, derivative_WBS in derivatives.items():
        (num_ranks, num_rows, width), siblings = derivative_WBS.shape, term.direction.siblings
        parts += [derivative_WBS.flatten(), term.sibling_derivatives()]
        sent += [[num_rows * width] * num_ranks, list(siblings.received)]
        received += [[n * width for n in counts.queries], list(siblings.sent)]
    found = _exchanged(parts, sent, received, group)
    return {
        term: (found[2 * i].view(sum(counts.queries), derivative_WBS.shape[2]), found[2 * i + 1])
        for i, (term, derivative_WBS) in enumerate(derivatives.items())
    }


def _exchanged(
    parts: Sequence[Tensor], sent: Sequence[list[int]], received: Sequence[list[int]], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Do what `exchange` does, without further parts of which this rank sends and gets nothing: most want no siblings."""
    used = [i for i, counts in enumerate(zip(sent, received, strict=True)) if i == 0 or any(map(any, counts))]
    found = exchange([parts[i] for i in used], [sent[i] for i in used], [received[i] for i in used], group)
    by_number = dict(zip(used, found, strict=True))
    return [by_number.get(i, part[:0]) for i, part in enumerate(parts)]
