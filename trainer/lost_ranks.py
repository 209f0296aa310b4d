"""A trainer's rank that fails says why to the others, and those end in one sentence: code 1, started again.

Under gloo a broken collective is raised where it was called. Under NCCL it is not: the call has returned long ago, the host waits
for the device, and NCCL's own watchdog ends the process after the time limit, without a word that a person could use. So a thread
looks for the reason of the rank that failed first, and ends this process, if it does not end by itself. A rank that is killed
tells nothing: under NCCL that is left to the launcher, which ends the others, and to the watchdog.

Measured with real ranks under gloo, where the thread is made to find a rank that waits elsewhere; not under NCCL on several GPUs.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from gradcache.lost import LostRank, naming_lost_ranks, told_failure
from trainer.errors import EXIT_FAILED, MachineFailed
from trainer.world import World

LOOK_EVERY_S = 2.0  # 512 ranks ask the store 256 times a second
GRACE_S = 20.0  # for a rank to notice by itself: to say who is lost takes it ten at most


@contextlib.contextmanager
def naming_lost(world: World) -> Iterator[None]:
    """End in MachineFailed where another rank is lost, and tell the others what ends this one. Alone: do nothing."""
    if world.group is None:
        yield
        return
    is_over = threading.Event()
    threading.Thread(target=_watch, args=(is_over,), daemon=True).start()
    try:
        with naming_lost_ranks(world.group):
            yield
    except LostRank as lost:
        raise MachineFailed(str(lost)) from lost
    finally:
        is_over.set()


def _watch(is_over: threading.Event) -> None:
    told = None
    with contextlib.suppress(RuntimeError):  # the store is gone, and with it the launcher or rank 0
        while told is None and not is_over.wait(LOOK_EVERY_S):
            told = told_failure()
    if told is not None and not is_over.wait(GRACE_S):
        print(f"negpool: {told}; start the run again, it goes on from its last checkpoint", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)
