"""How a side of a run ended, and whether its end is one that another start would only repeat.

torchrun, mpiexec and srun change or hide exit codes, so what a side left in its status file comes first, the code second.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import (
    ENDED,
    EXIT_MUST_NOT_GO_ON,
    EXIT_REFUSED,
    EXIT_STOPPED,
    FAILED,
    FINISHED,
    MUST_NOT_GO_ON,
    REFUSED,
    STOPPED,
    InputError,
    MustNotGoOn,
)
from trainer.handoff.weights import checkpoint_name, checkpoints_folder, steps_on_disk

PHASE_OF_CODE = {0: FINISHED, EXIT_REFUSED: REFUSED, EXIT_MUST_NOT_GO_ON: MUST_NOT_GO_ON, EXIT_STOPPED: STOPPED}


@dataclass(frozen=True)
class Ending:
    """What is known of one end of one side."""

    phase: str  # one of ENDED
    reason: str  # a sentence of its own, or where its last words are
    step: int | None  # at which it ended; None: before its first
    checkpoint: int | None  # step of the newest one

    def raise_refusal(self) -> None:
        """Raise InputError or MustNotGoOn for an end that no other start can mend."""
        if self.phase == REFUSED:
            raise InputError(self.reason)
        if self.phase == MUST_NOT_GO_ON:
            raise MustNotGoOn(self.reason)

    def repeats(self, before: "Ending | None") -> bool:
        """Tell whether the start before ended at the same step, and nothing was saved in between."""
        is_same = before is not None and (self.step, self.checkpoint) == (before.step, before.checkpoint)
        return self.step is not None and is_same


def ending_of(said: dict[str, Any], code: int, log: Path, checkpoint: int | None) -> Ending:
    """Return how a side ended; said: its status file, written by no earlier start. code: of its launcher."""
    phase = said.get("phase")
    if phase not in ENDED:
        phase = PHASE_OF_CODE.get(code, FAILED)
    reason = said.get("error") or f"its last words are in {log}"
    return Ending(phase, str(reason), said.get("step") if "num_steps" in said else None, checkpoint)


def newest_step(run: Path) -> int | None:
    """Return the step of the newest checkpoint; None: there is none, or the file server does not say."""
    with contextlib.suppress(OSError):
        return max(steps_on_disk(run), default=None)
    return None


def repeated(run: Path, end: Ending, log: Path) -> MustNotGoOn:
    """Return the sentence for a run that ended twice at one step."""
    good = "there is no checkpoint yet"
    if end.checkpoint is not None:
        good = f"the last good checkpoint is {checkpoints_folder(run) / checkpoint_name(end.checkpoint)}"
    why = "" if str(log) in end.reason else f" ({end.reason.rstrip('.')})"
    return MustNotGoOn(
        f"the trainer ended at step {end.step} twice in a row{why}, and would end there again; its last words are in {log}, "
        f"{good}; mend the cause, and the same command goes on"
    )
