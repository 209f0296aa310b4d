"""How the trainer takes over new negatives: verified in the background, switched at one step on all ranks.

Before a step all ranks exchange one small message. Rank 0 names a version; it comes into force at the first step before
which every rank said that it had verified and mapped it. So all switch together, and nobody waits for the miner. Only
version 0, and the versions of a fixed schedule, are waited for, before a step and never inside one.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from trainer.handoff.manifest import TornVersion, pin, read_latest, unpin
from trainer.handoff.negatives import Negatives, negatives_folder, open_negatives, version_name
from trainer.handoff.settings import NegativesSettings
from trainer.world import World

log = logging.getLogger(__name__)

POLL_S = 0.5  # how often the folder is looked at
PIN_S = 600.0  # how long a pin lasts; renewed at a quarter of it
NONE = -1  # "no version" in a message


class NegativesFeed:
    """The negatives in force, and the next version on its way."""

    def __init__(
        self,
        world: World,
        run: Path,
        settings: NegativesSettings,
        num_queries: int,
        num_passages: int,
        should_stop: Callable[[], bool],
    ):
        """should_stop: may differ between ranks; one rank's yes stops all."""
        self.in_force: Negatives | None = None
        self._world, self._run, self._settings = world, run, settings
        self._num_queries, self._num_passages = num_queries, num_passages
        self._should_stop = should_stop
        self._wanted = NONE  # version to fetch, as all agreed
        self._fetched: Negatives | None = None  # the version fetched last
        self._started = time.monotonic()
        self._closed = threading.Event()
        if settings.per_query:
            threading.Thread(target=self._fetch, daemon=True).start()

    def before_step(self, step: int, on_wait: Callable[[], None] = lambda: None) -> bool:
        """Bring the negatives of a step into force and return whether to stop before it.

        on_wait: called every now and then while waiting for a version that must be there.
        Collective: every rank calls it before every step.
        """
        while True:
            target, is_required = self._decide(step) if self._world.speaks else (NONE, False)
            fetched = NONE if self._fetched is None else self._fetched.version
            message = [int(self._should_stop()), target, int(is_required), -fetched]
            stop, target, is_required_by_0, minus_oldest_fetched = self._world.all_max(message)
            self._wanted = target
            if target != NONE and -minus_oldest_fetched == target != self._version():
                self._put_in_force()
            if stop or not is_required_by_0 or (self.in_force is not None and self._version() == target):
                return bool(stop)
            on_wait()
            time.sleep(POLL_S / 2)

    def close(self) -> None:
        """Stop the background thread and let go of the version in force."""
        self._closed.set()
        if self._world.speaks and self.in_force is not None:
            unpin(self._folder(self.in_force), "trainer")

    def _decide(self, step: int) -> tuple[int, bool]:
        """Return the version that should be in force, and whether the step must wait for it. Rank 0 only."""
        if self._settings.per_query == 0:
            return NONE, False
        if self._settings.schedule:
            return sum(entry.step <= step for entry in self._settings.schedule), True
        newest = read_latest(negatives_folder(self._run))
        waited_s = time.monotonic() - self._started
        is_required = self.in_force is None and waited_s < self._settings.first_wait_s
        if self.in_force is None and not is_required and newest is None and step == 0:
            log.warning("no negatives after %.0f s; starting with in-batch negatives", waited_s)
        return (NONE if newest is None else int(newest.removeprefix("v"))), is_required

    def _put_in_force(self) -> None:
        assert self._fetched is not None
        if self._world.speaks:
            pin(self._folder(self._fetched), "trainer", PIN_S)
            if self.in_force is not None:
                unpin(self._folder(self.in_force), "trainer")
        self.in_force = self._fetched

    def _version(self) -> int:
        return NONE if self.in_force is None else self.in_force.version

    def _folder(self, negatives: Negatives) -> Path:
        return negatives_folder(self._run) / version_name(negatives.version)

    def _fetch(self) -> None:
        """Verify and map the wanted version, and keep the pin of the one in force alive, until closed."""
        said, pinned_at = set(), time.monotonic()
        while not self._closed.wait(POLL_S):
            wanted = self._wanted
            if wanted != NONE and (self._fetched is None or self._fetched.version != wanted):
                try:
                    self._fetched = open_negatives(self._run, version_name(wanted), self._num_queries, self._num_passages)
                except TornVersion as torn:
                    if wanted not in said:
                        said.add(wanted)
                        log.info("negatives %s not taken: %s", version_name(wanted), torn)
            if self._world.speaks and self.in_force is not None and time.monotonic() - pinned_at > PIN_S / 4:
                pinned_at = time.monotonic()
                pin(self._folder(self.in_force), "trainer", PIN_S)
