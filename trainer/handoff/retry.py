"""Writes that are tried again: a disk that is full or a file server that is away for a moment costs a run nothing but that.

A minute in all: as long as a file server needs to come back from a failover, and a person or a prune to free some space; and
well below what a cluster gives a run to save in before its time limit.
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from trainer.errors import MachineFailed
from trainer.handoff.manifest import disk_error, is_disk_full

log = logging.getLogger(__name__)

T = TypeVar("T")

DELAYS_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)


def patiently(write: Callable[[], T], what: str) -> T:
    """Return what `write` returns, which is called again while the disk refuses; raises MachineFailed when patience is over.

    write: may be called several times, and leaves nothing behind when it fails. what: names it in messages.
    A right that was there when the run began and is gone now is the file server's failure, too: another start asks it anew.
    """
    for delay_s in (*DELAYS_S, None):
        try:
            return write()
        except Exception as error:
            cause = error if error.__cause__ is None else error.__cause__  # of a sentence made of what the disk said
            if not isinstance(cause, OSError) and not is_disk_full(cause):
                raise
            failed = error if isinstance(error, MachineFailed) else MachineFailed(str(disk_error(cause, what)))
            if delay_s is None:
                raise failed from cause
        log.warning("%s (tried again in %.0f s)", failed, delay_s)
        time.sleep(delay_s)
    raise AssertionError("the last try returns or raises")
