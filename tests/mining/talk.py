"""What ranks say to each other in every way that they have, and what each must hear; the same over threads and over MPI."""

from typing import Any

import numpy as np

from mining.ranks import Ranks


def talk(ranks: Ranks) -> Any:
    """Use every way in which ranks speak to each other; return what this one heard."""
    told = ranks.decide(lambda: ranks.rank + 7), ranks.together(lambda: ranks.rank), ranks.on_first(lambda: "first")
    gathered = ranks.gather(ranks.rank)
    swapped = ranks.exchange([(ranks.rank, other) for other in range(ranks.num_ranks)])
    # Rank s has s + 2 r rows of three numbers for rank r.
    arrays = [np.full((ranks.rank + 2 * other, 3), 10 * ranks.rank + other, np.float32) for other in range(ranks.num_ranks)]
    return told, gathered, swapped, ranks.exchange_arrays(arrays)


def check_heard(rank: int, num_ranks: int, found: Any) -> None:
    """Check what one rank heard."""
    told, gathered, swapped, arrays = found
    assert told == (7, rank, "first" if rank == 0 else None)
    assert gathered == (list(range(num_ranks)) if rank == 0 else [])
    assert swapped == [(other, rank) for other in range(num_ranks)]
    assert [array.shape for array in arrays] == [(other + 2 * rank, 3) for other in range(num_ranks)]
    assert all(array.dtype == np.float32 and (array == 10 * s + rank).all() for s, array in enumerate(arrays))
