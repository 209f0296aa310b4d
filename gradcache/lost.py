"""Ranks that are gone: what those say that waited for them, and how a rank that fails tells them why.

A rank that fails writes its reason into the store through which the ranks met at the start, and ends. The next collective of
the others then breaks, or reaches its time limit, and they read the reason in the store; no further collective is needed. A
rank that was killed writes nothing; it is the one that has not reported the failure of the collective. Under NCCL a collective
returns before it is done, and its error is never raised where it was called; so a trainer that uses NCCL calls `told_failure`
from a thread.
"""

import contextlib
import time
from collections.abc import Iterator

import torch.distributed as dist

PATIENCE_S = 10  # to find out who is missing, after a collective has failed
FAILED, NOTICED, NUM_NOTICED = "negpool/failed", "negpool/noticed", "negpool/num_noticed"  # keys of the store
# How backends begin what they say of a broken collective; gloo's errors are plain RuntimeErrors.
WORDS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


class LostRank(RuntimeError):
    """A rank failed, died, or did not answer within the process group's time limit."""


@contextlib.contextmanager
def naming_lost_ranks(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Turn a backend's error about a broken collective into LostRank; write any other error into the store, and raise it as it
    is.
    """
    try:
        yield
    except LostRank:
        raise
    except Exception as error:
        if group is None:
            raise
        if not is_of_collective(error):
            tell_failure(error)
            raise
        raise LostRank(f"{_who_is_lost(group, error)}; start the run again, it goes on from its last checkpoint") from error


def is_of_collective(error: BaseException) -> bool:
    """Tell whether an error came from a collective, by itself or within a backward, and not from this rank's own work."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in WORDS))


def tell_failure(error: BaseException) -> None:
    """Write into the store why this rank fails; only the first rank that fails is kept there."""
    words = str(error).strip().splitlines()[:1]
    reason = f"rank {dist.get_rank()} failed: {': '.join([type(error).__name__, *words])}"
    with contextlib.suppress(RuntimeError):  # the store lived on a rank that is gone
        _store().compare_set(FAILED, "", reason)


def told_failure(store: dist.Store | None = None) -> str | None:
    """Return which rank failed first, and why, if one has told; raises RuntimeError where the store is gone."""
    store = store or _store()
    return store.get(FAILED).decode() if store.check([FAILED]) else None


def _who_is_lost(group: dist.ProcessGroup, error: Exception) -> str:
    """Return the reason that a rank has written, or which ranks have not reported the failure: those are dead, or hang elsewhere.

    The ranks use the store for this, because the group itself is broken now, whatever its backend.
    """
    ranks, words = dist.get_process_group_ranks(group), str(error).strip().splitlines()[0]
    with contextlib.suppress(RuntimeError):  # the store lived on a rank that is gone
        store, nap_s = _store(), 0.05
        store.set(f"{NOTICED}/{dist.get_rank()}", "1")
        store.add(NUM_NOTICED, 1)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and store.add(NUM_NOTICED, 0) < len(ranks):
            if (told := told_failure()) is not None:
                return told
            time.sleep(nap_s)
            nap_s = min(1.0, 1.5 * nap_s)  # the store serves all ranks
        missing = [rank for rank in ranks if not store.check([f"{NOTICED}/{rank}"])]
        if missing:
            return f"rank {', '.join(map(str, missing))} died or did not answer in time ({words})"
    return f"a rank died or did not answer in time ({words})"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
