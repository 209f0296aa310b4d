"""What `index.factory = "auto"` means: the cheaper of exact search and an IVF index, by rates measured with what would run.

Below tens of millions of passages exact search is often cheaper, because an index has to be filled anew for every checkpoint, and
only many queries make up for that. The choice is kept in the run folder, because it depends on measured times, and the versions
of a run must not depend on these.
"""

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from mining.find.index import POINTS_PER_LIST
from mining.find.rates import MEASURED_LISTS, Rates, measure_rates
from mining.settings import EXACT
from mining.state import read_state, write_state

log = logging.getLogger(__name__)

CHOSEN = "index"  # entry of the state
FEWEST_LISTS = 64
ITERATIONS = 10  # of FAISS's k-means, for an index


@dataclass(frozen=True)
class Load:
    """The amount of search in a refresh."""

    num_queries: int
    num_passages: int
    width: int
    top_k: int
    nprobe: int  # that an audit begins with
    num_audited: int  # queries that an index other than exact is audited with
    num_ranks: int = 1
    min_recall: float = 0.9


def choose_index(run: Path, load: Load, device: torch.device, sample_nD: np.ndarray | None = None) -> str:
    """Return "exact" or a factory string, and say what both would cost. Rank 0 only.

    sample_nD: embeddings of passages, if some are there; None: random ones in clusters are measured.
    """
    kept, about = read_state(run, CHOSEN), asdict(load)
    if isinstance(kept, dict) and kept.get("about") == about and isinstance(kept.get("factory"), str):
        return kept["factory"]
    costs = estimate_costs(load, measure_rates(load.width, load.top_k, load.num_passages, load.min_recall, device, sample_nD))
    factory = min(costs, key=lambda name: costs[name])
    log.info(
        "index.factory=auto takes %s: %s for %d queries and %d passages, on %d ranks like this one",
        factory,
        ", ".join(f"{name} {seconds:.3g} s" for name, seconds in costs.items()),
        load.num_queries,
        load.num_passages,
        load.num_ranks,
    )
    write_state(run, CHOSEN, {"about": about, "factory": factory, "costs_s": costs})
    return factory


def estimate_costs(load: Load, rates: Rates) -> dict[str, float]:
    """Return the seconds of a refresh by factory string: of exact search, and of the cheapest number of lists.

    With lists: training on one rank, filling, the audit, and the search, in which every rank chooses lists for all queries.
    """
    costs = {EXACT: load.num_queries * load.num_passages * rates.exact_score_s / load.num_ranks}
    of_lists = {f"IVF{lists},Flat": _cost_of_lists(load, rates, lists) for lists in numbers_of_lists(load)}
    if of_lists:
        cheapest = min(of_lists, key=lambda name: of_lists[name])
        costs[cheapest] = of_lists[cheapest]
    return costs


def numbers_of_lists(load: Load) -> list[int]:
    """Return the powers of two up to 4 times the root of the passages of which each list has passages enough to be trained; none
    where a query would look everywhere.
    """
    most = min(4 * math.isqrt(load.num_passages), load.num_passages // POINTS_PER_LIST)
    powers = (1 << bits for bits in range(most.bit_length()))
    return [lists for lists in powers if lists >= FEWEST_LISTS and lists > load.nprobe and lists <= most]


def _cost_of_lists(load: Load, rates: Rates, lists: int) -> float:
    # Smaller lists, and more of them: what a query looks at shrinks with the root of their number.
    nprobe = min(lists, max(load.nprobe, rates.nprobe * math.sqrt(lists / MEASURED_LISTS)))
    train_s = POINTS_PER_LIST * lists * lists * ITERATIONS * rates.train_s
    fill_s = load.num_passages * lists * rates.assign_s / load.num_ranks
    audit_s = load.num_audited * load.num_passages * rates.exact_score_s / load.num_ranks
    visited = load.num_passages / load.num_ranks * nprobe / lists
    return train_s + fill_s + audit_s + load.num_queries * (lists * rates.assign_s + visited * rates.visit_s)
