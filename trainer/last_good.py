"""Which checkpoint a run can go on from: the newest that is whole and finite."""

import logging
from pathlib import Path

from trainer.errors import InputError
from trainer.handoff.manifest import TornVersion, write_latest
from trainer.handoff.retention import delete_version
from trainer.handoff.weights import (
    Checkpoint,
    NotFiniteVersion,
    checkpoint_name,
    checkpoints_folder,
    newest_checkpoint,
    steps_on_disk,
)

log = logging.getLogger(__name__)


def last_good(run: Path, up_to: int | None = None) -> str:
    """Return the words that name a run's newest checkpoint, or its newest up to a step: whatever is published is finite."""
    steps = steps_on_disk(run)
    found = [step for step in steps if up_to is None or step <= up_to]
    if found:
        return f"the last good checkpoint is {checkpoints_folder(run) / checkpoint_name(found[-1])}"
    return "none of its checkpoints is from before that" if steps else "nothing was saved"


def newest_to_resume(run: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is whole and finite, None in a new run. Rank 0 only.

    Those that are not finite are deleted, or the run would not publish its own of those steps. Raises InputError where there are
    no others: to begin anew is for a person to decide.
    """
    broken: list[NotFiniteVersion] = []

    def pass_over(torn: TornVersion) -> None:
        log.warning("checkpoint passed over: %s", torn)
        if isinstance(torn, NotFiniteVersion):
            broken.append(torn)

    found = newest_checkpoint(run, pass_over)
    if found is None and broken:
        raise InputError(f"{broken[0]}, and {run} has no checkpoint that is; set run.folder to a new folder to begin anew")
    if found is not None and broken:
        write_latest(found.folder.parent, found.folder.name)
    for torn in broken:
        delete_version(torn.folder)
    return found
