"""How ranks wait for others that work for as long as it takes: they look at the group's store every now and then.

A collective gives up after parallel.timeout_s, since whoever does not come may have died. Here whoever works says so, and the
others wait for as long as anybody does. Costs a message of a few bytes to the store, once a second for each rank.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

from torch.distributed import distributed_c10d

from trainer.errors import MachineFailed
from trainer.handoff.heartbeat import beating
from trainer.world import World

ARRIVED, BEATS, STOPS = "negpool/arrived", "negpool/beats", "negpool/stops"  # counters in the store
NAP_S, LONGEST_NAP_S = 0.005, 1.0
BEAT_S = 1.0


class Patience:
    """What the ranks of a world tell each other while they do not work in step."""

    def __init__(self, world: World):
        self._num_ranks, self._timeout_s = world.num_ranks, world.timeout_s
        self._store = None if world.control is None else distributed_c10d._get_default_store()
        self._beat_at = 0.0

    def is_stopping(self, is_asked: bool) -> bool:
        """Tell whether this rank or another was asked to stop, and that this one is at work; to be called often."""
        if self._store is None or (not is_asked and time.monotonic() - self._beat_at < BEAT_S):
            return is_asked
        self._beat_at = time.monotonic()
        self._beat()
        return self._store.add(STOPS, int(is_asked)) > 0

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Say every second that this rank is at work, while one long call keeps its thread."""
        with beating(self._beat, BEAT_S):
            yield

    def _beat(self) -> None:
        if self._store is not None:
            self._store.add(BEATS, 1)

    def wait(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Return when every rank has come here; raises MachineFailed if they do not, and none of them is at work any more.

        Collective, but none of torch's: a rank may come as late as it likes.
        """
        if self._store is None:
            return
        wanted = -(-self._store.add(ARRIVED, 1) // self._num_ranks) * self._num_ranks
        beats, last_sign, nap_s = -1, time.monotonic(), NAP_S
        while (arrived := self._store.add(ARRIVED, 0)) < wanted:
            if (found := self._store.add(BEATS, 0) + arrived) != beats:
                beats, last_sign = found, time.monotonic()
            if time.monotonic() - last_sign > self._timeout_s:
                raise MachineFailed(
                    f"{wanted - arrived} of {self._num_ranks} ranks gave no sign of life for {self._timeout_s:g} s while the "
                    "others waited for them; if they were at work all the same, set parallel.timeout_s higher"
                )
            on_wait()
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, LONGEST_NAP_S)
