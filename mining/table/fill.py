"""Draws passages from the whole corpus: for queries with too few candidates, and where sample.random_share asks for random ones.

The rules on scores hold for them as for candidates: one that a rule drops is drawn again, and after ROUNDS of draws its place
stays empty. What a query gets is a function of seed, version and query, whatever rank or tile it is in.
"""

import numpy as np

from mining.find.retrieve import Retriever
from mining.ranks import Ranks
from mining.table.draw import Draw, GoOn, Share, hold_to_scores, hold_to_teacher
from mining.table.filters import Kept, drop_known, is_first_of_its_key, is_listed
from mining.table.kept import Table
from mining.table.sampling import random_rows

SPARE = 16  # draws of a round beyond sample.num_negatives, for those that are known to be no negatives
ROUNDS = 8


def add_random(
    draw: Draw, ranks: Ranks, retriever: Retriever, share: Share, table: Table, is_empty_Q: np.ndarray, go_on: GoOn
) -> Table:
    """Return the table with random passages: a share of all negatives, and all negatives of a query of which no candidate
    passed. A random passage is a positive that nobody judged as rarely as one in a batch is. Collective.
    """
    falls_back_Q = is_empty_Q & (draw.filter.when_empty == "random")
    lacking_Q = np.where(falls_back_Q, draw.sample.num_negatives, draw.sample.num_random)
    early = np.nonzero(share.early_QK)
    barred = [(table["query"], table["ids"]), (early[0], share.ids_QK[early])]
    parts, num_wanted, num_redrawn = [table], int(lacking_Q.sum()), 0
    for number in range(ROUNDS):
        if not any(ranks.exchange([bool(lacking_Q.any())] * ranks.num_ranks)):
            break
        found, redrawn = _round(draw, ranks, retriever, share, number, lacking_Q, barred, go_on)
        lacking_Q = lacking_Q - np.bincount(found["query"], minlength=len(lacking_Q))
        barred.append((found["query"], found["ids"]))
        parts.append(found)
        num_redrawn += redrawn
    num_unfilled = int(lacking_Q.sum())
    share.counts |= {"random": num_wanted - num_unfilled, "redrawn": num_redrawn, "unfilled": num_unfilled}
    return {name: np.concatenate([part[name] for part in parts]) for name in table}


def _round(
    draw: Draw,
    ranks: Ranks,
    retriever: Retriever,
    share: Share,
    number: int,
    lacking_Q: np.ndarray,
    barred: list[tuple[np.ndarray, np.ndarray]],
    go_on: GoOn,
) -> tuple[Table, int]:
    """Return what one round of draws finds, and how many passages the rules on scores have dropped. Collective.

    lacking_Q: passages that each query still needs. barred: (query, corpus row) of what it has, and must not get.
    """
    width = draw.sample.num_negatives + SPARE
    draws = range(number * width, (number + 1) * width)
    drawn_QR = random_rows(draw.judgements, draw.seed, draw.version, share.rows, draws)
    ids_QR = np.where(lacking_Q[:, None] > 0, drawn_QR, -1)
    kept = Kept(ids_QR)
    _drop_barred(draw, share, kept, ids_QR, barred)
    drop_known(draw.filter, kept, ids_QR, share.own)
    # The first round scores no more than needed; later rounds score more, because the rules drop many.
    kept.narrow("spare", kept.mask_QK.cumsum(1) <= (number + 1) * lacking_Q[:, None])
    tried_QR = kept.mask_QK
    scores_QR = retriever.score(share.places, np.where(tried_QR, ids_QR, -1))
    hold_to_scores(draw, share, kept, scores_QR)
    teacher_QR = hold_to_teacher(draw, ranks, share, kept, ids_QR, scores_QR, go_on)
    num_dropped = int((tried_QR & ~kept.mask_QK).sum())
    taken_QR = kept.mask_QK & (kept.mask_QK.cumsum(1) <= lacking_Q[:, None])
    found = {"query": np.nonzero(taken_QR)[0], "ids": ids_QR[taken_QR], "scores": scores_QR[taken_QR]}
    # Infinite: the next version draws others.
    found |= {"first_scores": np.full_like(found["scores"], np.inf), "teacher_scores": teacher_QR[taken_QR]}
    return found, num_dropped


def _drop_barred(draw: Draw, share: Share, kept: Kept, ids_QR: np.ndarray, barred: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Drop what a query has already, or must not get, or draws twice; of equal texts too where duplicates are dropped."""
    query_n, ids_n = (np.concatenate(columns) for columns in zip(*barred, strict=True))
    order = np.argsort(query_n, kind="stable")
    indptr, ids_n = np.searchsorted(query_n[order], np.arange(len(ids_QR) + 1)), ids_n[order]
    kept.narrow("barred", ~is_listed(ids_QR, indptr, ids_n))
    kept.narrow("repeated", is_first_of_its_key(ids_QR, kept.mask_QK))
    for keys in share.own.keys if draw.filter.duplicates else ():
        kept.narrow("duplicates", ~is_listed(keys.passage_N[ids_QR], indptr, keys.passage_N[ids_n]))
