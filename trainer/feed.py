"""How the trainer takes over new negatives: verified in the background, switched at one step on all ranks.

Before a step all ranks exchange one small message. Rank 0 names a version; it comes into force at the first step before which
every rank has said that it verified and mapped the version. So all ranks switch at the same step, and training does not wait
for the miner. There are three exceptions, and all of them wait before a step, never inside one: version 0, the versions of a
fixed schedule, and, with negatives.when_stale="wait", a version that is young enough.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from trainer.errors import InputError, MachineFailed
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
        given: Negatives | None = None,
        is_used: bool = True,
        data_digest: str | None = None,
    ):
        """should_stop: ranks may answer differently; if one says yes, all stop. given: negatives that the data names, used
        until mined ones are there.

        is_used: False: no version is ever looked for.
        data_digest: of the data that versions must have been mined from; None: any.
        """
        self.in_force: Negatives | None = None
        self._given = given
        self._previous: Negatives | None = None  # in force before, and kept until the next swap
        self._taken_back: dict[int, int | None] = {}  # versions that hurt -> what came back for them
        self._warned: set[int] = set()  # versions that were called too old
        self._stale_since_s: float | None = None
        self._world, self._run, self._settings = world, run, settings
        self._fits = num_queries, num_passages, data_digest
        self._should_stop = should_stop
        self._wanted = NONE  # version to fetch, as all agreed
        self._fetched: Negatives | None = None  # the version fetched last
        self._started = time.monotonic()
        self._closed = threading.Event()
        self._is_used = is_used
        self._fetcher = threading.Thread(target=self._fetch, daemon=True)
        if is_used:
            self._fetcher.start()

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
            is_there = self.in_force is not None and self._version() == target and not self._must_be_younger(step)
            if stop or not is_required_by_0 or is_there:
                return bool(stop)
            on_wait()
            time.sleep(POLL_S / 2)

    def of_step(self, step: int) -> Negatives | None:
        """Return the negatives that a step draws from, the same on every rank; None: in-batch ones only."""
        if not self._is_stale(step):
            return self.in_force or self._given
        falls_back = self._settings.when_stale == "fallback"
        if self._version() not in self._warned and self._world.speaks:
            how = "in-batch negatives until there are younger ones" if falls_back else "still used"
            log.warning(
                "step %d: negatives v%d are older than negatives.max_age_steps=%d; %s",
                step, self._version(), self._settings.max_age_steps, how,
            )  # fmt: skip
        self._warned.add(self._version())
        return self._given if falls_back else self.in_force

    def take_back(self, version: int, back_to: int | None) -> None:
        """Never use a version again, and go back to an earlier one, or for None to in-batch negatives. Every rank calls it."""
        self._taken_back[version] = back_to
        if self._version() != version:
            return
        if back_to is None:
            self.in_force = None
        elif self._previous is not None and self._previous.version == back_to:  # at once: every rank has kept it
            self.in_force, self._previous = self._previous, self.in_force

    def close(self) -> None:
        """Stop the background thread and let go of the versions in use."""
        self._closed.set()
        if self._fetcher.is_alive():
            # If the thread outlived this call, it might hold the process group when Python ends, and torch would abort.
            self._fetcher.join()

    def _decide(self, step: int) -> tuple[int, bool]:
        """Return the version that should be in force, and whether the step must wait for it. Rank 0 only."""
        if not self._is_used:
            return NONE, False
        if self._settings.schedule:
            return sum(entry.step <= step for entry in self._settings.schedule), True
        newest = read_latest(negatives_folder(self._run))
        version = NONE if newest is None else int(newest.removeprefix("v"))
        if version in self._taken_back:
            back_to = self._taken_back[version]
            return (NONE if back_to is None else back_to), False
        waited_s = time.monotonic() - self._started
        is_awaited = self.in_force is None and self._given is None
        is_required = (is_awaited and waited_s < self._settings.first_wait_s) or self._waits_for_younger(step)
        if is_awaited and not is_required and newest is None and step == 0:
            log.warning("no negatives after %.0f s; starting with in-batch negatives", waited_s)
        return version, is_required

    def _is_stale(self, step: int) -> bool:
        limit, mined_at = self._settings.max_age_steps, None if self.in_force is None else self.in_force.checkpoint_step
        return limit is not None and mined_at is not None and step - mined_at > limit

    def _must_be_younger(self, step: int) -> bool:
        return self._settings.when_stale == "wait" and self._is_stale(step)

    def _waits_for_younger(self, step: int) -> bool:
        """Tell whether the step still waits for younger negatives. Rank 0 only."""
        if not self._must_be_younger(step):
            self._stale_since_s = None
            return False
        now_s = time.monotonic()
        self._stale_since_s = self._stale_since_s or now_s
        return now_s - self._stale_since_s < self._settings.first_wait_s

    def _put_in_force(self) -> None:
        assert self._fetched is not None
        self._previous, self.in_force, self._stale_since_s = self.in_force, self._fetched, None

    def _version(self) -> int:
        return NONE if self.in_force is None else self.in_force.version

    def _folder(self, version: int) -> Path:
        return negatives_folder(self._run) / version_name(version)

    def _fetch(self) -> None:
        """Until closed, verify and map the version that is wanted, and keep the versions in use pinned. This thread does the
        slow work on files.
        """
        said: set[int] = set()
        awaited: set[int] = set()
        pinned: dict[int, float] = {}  # version -> when
        is_failing = False
        while not self._closed.wait(POLL_S):
            try:
                self._look(said, awaited, pinned)
                is_failing = False
            except OSError as error:  # a file server that is away must not end this thread
                if not is_failing:
                    log.warning("negatives are not looked for while the disk fails: %s", error)
                is_failing = True
        for version in pinned:
            unpin(self._folder(version), "trainer")

    def _look(self, said: set[int], awaited: set[int], pinned: dict[int, float]) -> None:
        """Fetch the version that is wanted, unless it is fetched already. said, awaited: versions about which a message was
        logged, so that it is logged once. pinned: when each version was pinned last.
        """
        wanted = self._wanted
        self._keep_pinned(pinned, wanted)
        if wanted == NONE or (self._fetched is not None and self._fetched.version == wanted):
            return
        if not self._folder(wanted).is_dir():
            if wanted not in awaited:
                log.info("negatives %s are not published yet; waiting for them", version_name(wanted))
            awaited.add(wanted)
            return
        try:
            self._fetched = open_negatives(self._run, version_name(wanted), *self._fits)
        except TornVersion as torn:
            if wanted not in said:
                said.add(wanted)
                log.warning("negatives %s not taken: %s", version_name(wanted), torn)

    def _keep_pinned(self, pinned: dict[int, float], wanted: int) -> None:
        """Pin the versions that are in use or wanted, before their pins expire, and remove all other pins. Only rank 0 pins."""
        if not self._world.speaks:
            return
        in_use = {held.version for held in (self._fetched, self.in_force, self._previous) if held is not None}
        now_s = time.monotonic()
        for version in in_use | ({wanted} - {NONE}):
            if now_s - pinned.get(version, -PIN_S) > PIN_S / 4 and self._folder(version).is_dir():
                try:
                    pin(self._folder(version), "trainer", PIN_S)
                except (InputError, MachineFailed) as error:  # a full disk must not end this thread
                    log.warning("negatives v%d not pinned: %s", version, error)
                pinned[version] = now_s
        for version in pinned.keys() - in_use - {wanted}:
            unpin(self._folder(version), "trainer")
            del pinned[version]
