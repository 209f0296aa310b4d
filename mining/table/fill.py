"""Draws passages from the whole corpus: for queries with too few candidates, and where sample.random_share asks for random ones.

The rules on scores hold for them as for candidates: one that a rule drops is drawn again, and after ROUNDS of draws its place
stays empty. What a query gets is a function of seed, version and query, whatever rank or tile it is in.
"""

import numpy as np
import torch
from torch import Tensor

from mining.find.retrieve import Retriever
from mining.ranks import Ranks
from mining.table.filters import Kept, drop_known, is_first_of_its_key, is_listed
from mining.table.kept import Table
from mining.table.sampling import random_rows
from mining.table.share import Asking, Draw, GoOn, Share, hold_to_scores, hold_to_teacher, rows_and_places

SPARE = 16  # draws of a round beyond sample.num_negatives, for those that are known to be no negatives
ROUNDS = 8
Pairs = tuple[np.ndarray, np.ndarray]  # (query of a share, corpus row)


def add_random(
    draw: Draw, ranks: Ranks, retriever: Retriever, share: Share, table: Table, is_empty_Q: np.ndarray, go_on: GoOn
) -> Table:
    """Return the table with random passages: a share of all negatives, and all negatives of a query of which no candidate
    passed. A random passage is a positive that nobody judged as rarely as one in a batch is. Collective.
    """
    falls_back_Q = is_empty_Q & (draw.filter.when_empty == "random")
    lacking_Q = np.where(falls_back_Q, draw.sample.num_negatives, draw.sample.num_random)
    parts, num_wanted, num_redrawn = [table], int(lacking_Q.sum()), 0
    for number in range(ROUNDS):
        if not any(ranks.exchange([bool(lacking_Q.any())] * ranks.num_ranks)):
            break
        barred = [share.early, *((part["query"], part["ids"]) for part in parts)]
        found, redrawn = _round(draw, ranks, retriever, share, number, lacking_Q, barred, go_on)
        lacking_Q = lacking_Q - np.bincount(found["query"], minlength=len(lacking_Q))
        parts.append(found)
        num_redrawn += redrawn
    num_unfilled = int(lacking_Q.sum())
    share.counts |= {"random": num_wanted - num_unfilled, "redrawn": num_redrawn, "unfilled": num_unfilled}
    return _in_order({name: np.concatenate([part[name] for part in parts]) for name in table}, len(table["query"]))


def _round(
    draw: Draw,
    ranks: Ranks,
    retriever: Retriever,
    share: Share,
    number: int,
    lacking_Q: np.ndarray,
    barred: list[Pairs],
    go_on: GoOn,
) -> tuple[Table, int]:
    """Return what one round of draws finds, and how many passages the rules on scores have dropped. Collective.

    lacking_Q: passages that each query still needs; below, n of the Q queries lack any.
    barred: what queries have already, or must not get.
    """
    at_n = np.flatnonzero(lacking_Q)
    asking, lacking_n1 = share.asking.some(at_n), torch.from_numpy(lacking_Q[at_n, None]).to(draw.device)
    width = draw.sample.num_negatives + SPARE
    draws = range(number * width, (number + 1) * width)
    drawn_nR = random_rows(draw.judgements, draw.seed, draw.version, asking.rows, draws)
    ids_nR = torch.from_numpy(drawn_nR).to(draw.device)
    kept = Kept(ids_nR)
    _drop_barred(draw, asking, kept, ids_nR, _among(barred, at_n, len(lacking_Q)))
    drop_known(draw.filter, kept, ids_nR, asking.own)
    # The first round scores no more than needed; later rounds score more, because the rules drop many.
    kept.narrow("spare", kept.mask_QK.cumsum(1) <= (number + 1) * lacking_n1)
    num_tried = kept.num_left
    scores_nR = _scores(retriever, share, at_n, torch.where(kept.mask_QK, ids_nR, -1))
    hold_to_scores(draw, asking, kept, scores_nR)
    teacher_nR = hold_to_teacher(draw, ranks, asking, kept, ids_nR, scores_nR, go_on)
    query_m, place_m = rows_and_places(kept.mask_QK & (kept.mask_QK.cumsum(1) <= lacking_n1))
    columns = {"ids": ids_nR, "scores": scores_nR}
    if draw.sample.replace == "easy":
        columns["first_scores"] = torch.full_like(scores_nR, torch.inf)  # the next version draws others
    if teacher_nR is not None:
        columns["teacher_scores"] = teacher_nR
    found = {name: found_nR.flatten()[place_m].cpu().numpy() for name, found_nR in columns.items()}
    return {"query": at_n[query_m]} | found, num_tried - kept.num_left


def _among(barred: list[Pairs], at_n: np.ndarray, num_queries: int) -> Pairs:
    """Return the pairs of some queries, by place among these."""
    query_p, ids_p = (np.concatenate(columns) for columns in zip(*barred, strict=True))
    place_Q = np.full(num_queries, -1)
    place_Q[at_n] = np.arange(len(at_n))
    is_of_them = place_Q[query_p] >= 0
    return place_Q[query_p[is_of_them]], ids_p[is_of_them]


def _drop_barred(draw: Draw, asking: Asking, kept: Kept, ids_nR: Tensor, barred: Pairs) -> None:
    """Drop what a query has already, or must not get, or draws twice; of equal texts too where duplicates are dropped."""
    order = np.argsort(barred[0], kind="stable")
    query_p, ids_p = (torch.from_numpy(column[order]).to(ids_nR.device) for column in barred)
    indptr = torch.searchsorted(query_p, torch.arange(len(ids_nR) + 1, device=ids_nR.device))
    kept.narrow("barred", ~is_listed(ids_nR, indptr, ids_p))
    kept.narrow("repeated", is_first_of_its_key(ids_nR, kept.mask_QK))
    for keys in asking.own.keys if draw.filter.duplicates else ():
        kept.narrow("duplicates", ~is_listed(keys.of_passages(ids_nR), indptr, keys.of_passages(ids_p)))


def _scores(retriever: Retriever, share: Share, at_n: np.ndarray, ids_nR: Tensor) -> Tensor:
    """Return the scores of passages for some queries of a share, (n, R); the retriever is asked for the whole share."""
    ids_QR = np.full((len(share.asking.rows), ids_nR.shape[1]), -1)
    ids_QR[at_n] = ids_nR.cpu().numpy()
    return torch.as_tensor(retriever.score(share.places, ids_QR)[at_n], device=ids_nR.device)


def _in_order(table: Table, num_before: int) -> Table:
    """Return a table by query, the best first; its first rows stand in this order already, the others in none."""
    order = np.argsort(table["query"], kind="stable")
    has_more = np.zeros(1 + table["query"].max(initial=0), bool)
    has_more[table["query"][num_before:]] = True
    at = np.flatnonzero(has_more[table["query"][order]])
    moved = order[at]
    order[at] = moved[np.lexsort((table["ids"][moved], -table["scores"][moved], table["query"][moved]))]
    return {name: column[order] for name, column in table.items()}
