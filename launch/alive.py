"""Whether a side of a run that has not said how it ended is still alive: by its lock, by its supervisor's, and by its silence."""

import socket
import time
from pathlib import Path
from typing import Any

from trainer.errors import ENDED, FAILED
from trainer.handoff.claim import is_claimed
from trainer.metrics import heartbeat_age_s

GONE_AFTER_S = 3.0  # without a sign of life, of a side of this machine whose lock is free
GONE_ELSEWHERE_AFTER_S = 600.0  # of another machine's, whose locks a shared disk may not show
NO_REASON = "it left no word; it was killed, or its machine went down"


def gone(run: Path, side: str, said: dict[str, Any]) -> dict[str, Any] | None:
    """Return `since`, in seconds since 1970, and `reason` of a side that is not alive and will not be started again by itself.

    None for one that lives, has said how it ended, or was never started. said: what its status file holds.
    """
    phase, age_s = said.get("phase"), heartbeat_age_s(run, side)
    if phase is None or age_s is None or (phase in ENDED and phase != FAILED):
        return None
    is_here = said.get("host") in (None, socket.gethostname())
    if age_s < (GONE_AFTER_S if is_here else GONE_ELSEWHERE_AFTER_S):
        return None
    if is_claimed(run, side) or is_claimed(run, "launch"):
        return None
    return {"since": round(time.time() - age_s, 1), "reason": said.get("error") or NO_REASON}
