"""A trainer's rank that fails says why to the others, and those end in one sentence: code 1, started again.

Under gloo a broken collective is raised where it was called. Under NCCL it is not: the call has returned long ago, the host waits
for the device, and NCCL's own watchdog ends the process after the time limit, without a word that a person could use. So a thread
of each rank says every two seconds that it lives, looks whether the rank before it does, and looks for the reason of the one that
failed first, all in the store through which the ranks met. It ends this process, if that does not end by itself. So a rank that
was killed, or whose machine is gone, ends the others within minutes, whatever they wait for.

Measured with real ranks under gloo, where the thread is made to find a rank that waits elsewhere; not under NCCL on several GPUs.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import torch.distributed as dist

from gradcache.lost import FAILED, LostRank, naming_lost_ranks, told_failure
from trainer.errors import EXIT_FAILED, MachineFailed
from trainer.world import World

LOOK_EVERY_S = 2.0  # 512 ranks ask the store 1,024 times a second
SILENT_S = 120.0  # without a sign of life: longer than any call holds Python's lock
GRACE_S = 20.0  # for a rank to notice by itself: to say who is lost takes it ten at most
BEAT = "negpool/beat"  # key of the store: how often a rank has looked


@contextlib.contextmanager
def naming_lost(world: World) -> Iterator[None]:
    """End in MachineFailed where another rank is lost, and tell the others what ends this one. Alone: do nothing.

    Collective at its end: the ranks leave together, because the store may be rank 0's, and goes with it.
    """
    if world.group is None:
        yield
        return
    is_over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(is_over, world), daemon=True)
    watcher.start()
    try:
        with naming_lost_ranks(world.group):
            yield
            world.barrier()
    except LostRank as lost:
        raise MachineFailed(str(lost)) from lost
    finally:
        is_over.set()
        # It holds the world's groups: were it the last one to let go of them, at the end of Python, the process would abort.
        watcher.join(LOOK_EVERY_S)


def _watch(is_over: threading.Event, world: World) -> None:
    told = None
    try:
        # A connection of its own: whoever waits in the other one keeps it to himself.
        pulse = Pulse(dist.distributed_c10d._get_default_store().clone(), world)  # type: ignore[attr-defined]
        while told is None and not is_over.wait(LOOK_EVERY_S):
            pulse.beat()
            told = told_failure(pulse.store)
    except RuntimeError:
        told = "rank 0 is gone, or the launcher by which the ranks met"
    if told is not None and not is_over.wait(GRACE_S):
        print(f"negpool: {told}; start the run again, it goes on from its last checkpoint", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)


class Pulse:
    """The signs of life of this rank, and of the one before it in a ring, which it looks after."""

    def __init__(self, store: dist.Store, world: World):
        self.store, self._rank, self._before = store, world.rank, (world.rank - 1) % world.num_ranks
        self._seen, self._looks_since = 0, 0
        self._patience = max(1, min(SILENT_S, world.timeout_s / 2) / LOOK_EVERY_S)

    def beat(self) -> None:
        """Say that this rank lives, and write into the store that the one before it does not, if it was silent for too long.

        Looks are counted, and no time, so that nobody is missed who was suspended together with this rank.
        """
        self.store.add(f"{BEAT}/{self._rank}", 1)
        found = self.store.add(f"{BEAT}/{self._before}", 0)
        self._looks_since = 0 if found != self._seen else self._looks_since + 1
        self._seen = found
        if self._looks_since >= self._patience:
            silent_s = self._looks_since * LOOK_EVERY_S
            self.store.compare_set(FAILED, "", f"rank {self._before} gave no sign of life for {silent_s:.0f} s")
