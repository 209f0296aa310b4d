"""Finds what is mined next. Only rank 0 looks into the run folder, and tells the others.

Without a schedule that is the newest whole checkpoint, unless it was mined already; with one, version i + 1 comes from
entry i, and is waited for, so that a run can be repeated to the bit.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from mining.job import MineJob
from mining.state import Refresh
from trainer.errors import InputError
from trainer.handoff.manifest import MANIFEST, TornVersion, pin, read_latest, versions
from trainer.handoff.retry import patiently
from trainer.handoff.weights import (
    ENCODER,
    Checkpoint,
    checkpoint_name,
    checkpoints_folder,
    newest_checkpoint,
    open_checkpoint,
)

log = logging.getLogger(__name__)

PIN_S = 3600.0  # how long a pin lasts: longer than what cannot renew it, such as tokenising a large corpus
HOLDER = "miner"


@dataclass(frozen=True)
class Task:
    """A version to make."""

    version: int
    checkpoint: Checkpoint | None  # None: BM25
    is_given: bool = False  # the person named the checkpoint; no newer one takes its place
    is_only: bool = False  # a single refresh, which nothing follows


class Watch:
    """Rank 0's view of the checkpoints; it remembers which ones it has read, so that waiting reads no files."""

    def __init__(self, job: MineJob):
        self._job = job
        self._run = job.run.folder
        self._seen: object = None
        self._said: set[str] = set()
        self._not_newer: str | None = None  # looked at last, to supersede what is at work

    def look(self, version: int, done_digest: str | None, begun: Refresh | None, takes_final: bool) -> Checkpoint | None:
        """Return the checkpoint to mine a version from, pinned, or None if it is not there yet.

        done_digest: weights that need no mining: those of the last version, or those just refused.
        begun: what a killed service was making; it is finished first.
        takes_final: whether the checkpoint of the last step is mined too, although no training follows.
        """
        if begun is not None and begun.version == version:
            found = self._open(checkpoints_folder(self._run) / begun.checkpoint)
            if found is not None and found.manifest["weights_digest"] == begun.weights_digest:
                return self._pinned(found)
        if schedule := self._job.negatives.schedule:
            if version > len(schedule):
                return None
            return self._pinned(self._open(checkpoints_folder(self._run) / checkpoint_name(schedule[version - 1].checkpoint)))
        if (seen := self._on_disk()) == self._seen:
            return None
        self._seen = seen
        newest = newest_checkpoint(self._run, self._say, ENCODER)
        if newest is None or newest.manifest["weights_digest"] == done_digest:
            return None
        if newest.manifest.get("is_final") and not takes_final:
            return None
        return self._pinned(newest)

    def take(self, name: str) -> Checkpoint:
        """Return the checkpoint of a name, pinned; raises InputError if it is not there or not whole."""
        folder = checkpoints_folder(self._run) / name
        try:
            found = self._pinned(open_checkpoint(folder, ENCODER))
        except TornVersion as torn:
            raise InputError(f"--checkpoint {name} cannot be mined: {torn}; {self._there()}") from torn
        if found is None:
            raise InputError(f"--checkpoint {name} was deleted just now; {self._there()}")
        return found

    def is_superseded(self, checkpoint: Checkpoint | None) -> bool:
        """Tell whether a newer whole checkpoint is there that somebody will train on; each is verified once. None: BM25."""
        latest = read_latest(checkpoints_folder(self._run))
        if self._job.negatives.schedule or latest in (None, checkpoint and checkpoint.folder.name, self._not_newer):
            return False
        self._not_newer = latest
        newer = self._open(checkpoints_folder(self._run) / str(latest))
        if newer is None or newer.manifest.get("is_final"):
            return False
        return checkpoint is None or newer.manifest["weights_digest"] != checkpoint.manifest["weights_digest"]

    def look_again(self) -> None:
        """Forget which checkpoints were read: they may have been deleted or written again with the same names and times."""
        self._seen = None

    def _there(self) -> str:
        names = [folder.name for folder in versions(checkpoints_folder(self._run))]
        return f"there {'is' if len(names) == 1 else 'are'} {', '.join(names) or 'none'} in {checkpoints_folder(self._run)}"

    def _open(self, folder: Path) -> Checkpoint | None:
        if not (folder / MANIFEST).is_file():
            return None
        try:
            return open_checkpoint(folder, ENCODER)
        except TornVersion as torn:
            self._say(torn)
            return None

    def _pinned(self, found: Checkpoint | None) -> Checkpoint | None:
        if found is None:
            return None
        patiently(lambda: pin(found.folder, HOLDER, PIN_S), f"the pin on {found.folder}")
        if (found.folder / MANIFEST).is_file():
            return found
        self.look_again()  # it was deleted between the look and the pin
        return None

    def _on_disk(self) -> object:
        parent = checkpoints_folder(self._run)
        try:
            return read_latest(parent), [(f.name, (f / MANIFEST).stat().st_mtime_ns) for f in versions(parent)]
        except OSError:  # one was deleted just now
            return object()

    def _say(self, torn: TornVersion) -> None:
        if str(torn) not in self._said:
            self._said.add(str(torn))
            log.warning("checkpoint passed over: %s", torn)
