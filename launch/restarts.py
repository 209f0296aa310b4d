"""Whether a side that ended is started again, and what is said when it is not: one rule, `verdict`, for all who start sides.

A side may start any number of times as long as it leaves newer checkpoints: time limits and preemption may come every day of a
month. Counted are starts in a row that leave none. Two starts that crash at one step are two proofs of one fault.

The status file speaks first, the launcher's code second: torchrun and srun hide codes, and srun has a 2 of its own.
"""

import contextlib
import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.errors import (
    EXIT_FAILED,
    EXIT_MUST_NOT_GO_ON,
    EXIT_REFUSED,
    EXIT_STOPPED,
    FAILED,
    FINISHED,
    MUST_NOT_GO_ON,
    REFUSED,
    STOPPED,
)
from trainer.handoff.manifest import read_latest
from trainer.handoff.negatives import negatives_folder
from trainer.handoff.weights import checkpoint_name, checkpoints_folder
from trainer.metrics import read_status

SideName = Literal["trainer", "miner"]
CODES = {FINISHED: 0, REFUSED: EXIT_REFUSED, MUST_NOT_GO_ON: EXIT_MUST_NOT_GO_ON}  # of phases that nothing follows
CUT = None  # code of a start whose end Slurm decided
DEAF = 128 + signal.SIGUSR1  # which came before anybody listened
TAIL_BYTES = 65_536  # of the metrics, more than their last line has


@dataclass(frozen=True)
class Ended:
    """How a start ended."""

    phase: str | None  # in its status file, which speaks first; None: it wrote none
    code: int | None  # of its launcher, which may hide the ranks'; CUT: Slurm ended it, and starts it again
    step: int | None = None  # that it could not pass; None: it did not come to training, or is no trainer
    gained: bool = False  # whether it left a newer checkpoint than it found; of a miner: newer negatives
    error: str = ""  # the sentence in its status file
    checkpoint: str | None = None  # the newest


@dataclass(frozen=True)
class Past:
    """What is remembered of the starts before."""

    fruitless: int = 0  # in a row, up to the last one
    met_limit: bool = False  # the last one, of time, without a new checkpoint
    was_mute: bool = False  # the last one, with code 2: srun's code for a program that it cannot start
    crashed_at: int | None = None  # the step that the last crash was at, and no start has passed since


@dataclass(frozen=True)
class Verdict:
    """What follows."""

    code: int  # with which it ends, where it is not started again
    sentence: str = ""
    past: Past | None = None  # to be handed in when the next start has ended; None: it is not started again


def verdict(past: Past, ended: Ended, *, side: str, limit: int, setting: str, log: str) -> Verdict:
    """Return what follows the end of a start.

    limit: of starts in a row, after the first of them, without a new checkpoint; setting: its name. log: where last words are.
    """
    if ended.phase in CODES:
        return Verdict(CODES[ended.phase], ended.error)
    is_mute = ended.phase is None and ended.code == EXIT_REFUSED
    is_open = ended.phase in (STOPPED, FAILED) or (is_mute and not past.was_mute)
    if ended.code is not CUT and ended.code in CODES.values() and not is_open:
        return Verdict(ended.code, f"the {side} ended with code {ended.code}; its last words are in {log}" if ended.code else "")
    is_limit = ended.code is not CUT and (ended.phase == STOPPED or ended.code in (EXIT_STOPPED, DEAF))
    is_crash = ended.step is not None and ended.code is not CUT and not is_limit
    is_passed = past.crashed_at is not None and ended.step is not None and ended.step > past.crashed_at
    now = Past(
        fruitless=0 if ended.gained else past.fruitless + 1,
        met_limit=is_limit and not ended.gained,
        was_mute=is_mute,
        crashed_at=ended.step if is_crash else None if is_passed else past.crashed_at,
    )
    good = f"; the last checkpoint is {ended.checkpoint}" if ended.checkpoint else ""
    why = f" ({ended.error.rstrip('.')})" if ended.error else ""
    if is_crash and ended.step == past.crashed_at:
        sentence = f"crashed twice at step {ended.step}{why}, and is not started again: its last words are in {log}{good}"
        return Verdict(EXIT_MUST_NOT_GO_ON, f"the {side} {sentence}")
    if now.met_limit and past.met_limit:
        return Verdict(
            EXIT_MUST_NOT_GO_ON, f"the time limit came before the first step; not started again: set --time higher{good}"
        )
    if now.fruitless > limit:
        fruit = "new negatives" if side == "miner" else "a new checkpoint"
        n = now.fruitless
        sentence = f"was started {n} times in a row without {fruit} ({setting}={limit}){why}, and is not started again"
        return Verdict(EXIT_FAILED, f"the {side} {sentence}: its last words are in {log}{good}")
    return Verdict(EXIT_STOPPED if is_limit else EXIT_FAILED, past=now)


@dataclass(frozen=True)
class Start:
    """What a side found in its run folder when it started, to tell afterwards what it did."""

    newest: str | None  # name of the newest checkpoint, or of a miner's newest negatives
    status: int  # when its status file was written last: it may be an earlier start's
    heartbeat: float | None  # in it
    metrics: int  # bytes of the trainer's metrics

    @classmethod
    def of(cls, run: Path, side: SideName) -> "Start":
        """Look at the run folder."""
        file, heartbeat = status_file(run, side), read_status(run, side).get("heartbeat")
        return cls(_newest(run, side), _written(file), heartbeat, size_of(_metrics(run)))

    def ended(self, run: Path, side: SideName, code: int | None) -> Ended:
        """Return how a side ended that had started like this."""
        has_told = _written(status_file(run, side)) != self.status
        status: dict[str, Any] = read_status(run, side) if has_told else {}
        newest, phase, error = _newest(run, side), status.get("phase"), status.get("error", "")
        if side == "miner":  # which has nothing to show for it while it waits for checkpoints
            is_stopped = phase == "stopped" or code == EXIT_STOPPED
            return Ended(phase, code, gained=newest != self.newest or is_stopped, error=error)
        # A checkpoint of step 0 is no work done.
        gained = newest not in (self.newest, None, checkpoint_name(0))
        return Ended(phase, code, self._step(run, status), gained, error, newest)

    def _step(self, run: Path, status: dict[str, Any]) -> int | None:
        """Return the step at which training ended; None where it had not begun."""
        # Each step has a line, while the status is written twice a second at most. But a trainer that failed knows best: what it
        # could not pass may be an earlier step's checkpoint.
        is_own = status.get("heartbeat") != self.heartbeat  # a refusal is added to what an earlier start left
        told = status.get("step") if is_own and "num_steps" in status else None  # which comes when all is prepared
        return told if told is not None and status.get("phase") == FAILED else _last_step(_metrics(run), self.metrics, told)


def last_words(log: Path, begin: int) -> str:
    """Return why a side ended that wrote no status: our own last sentence in its log, or else mpiexec's; "" where there is none.

    begin: bytes of the log before this start. mpiexec puts what it says between lines of dashes.
    """
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        tail = file.read().decode(errors="replace")
        if own := re.findall(r"^negpool: (.+)$", tail, re.MULTILINE):
            return own[-1]
        *framed, _ = re.split(r"^ ?-{70,}$", tail, flags=re.MULTILINE)
        blocks = [block for block in framed if block.strip()]
        return " ".join(blocks[-1].strip().split("\n\n")[0].split()).rstrip(":") if blocks else ""
    return ""


def status_file(run: Path, side: SideName) -> Path:
    """Return where a side tells how it is."""
    return run / "status" / f"{side}.json"


def _metrics(run: Path) -> Path:
    return run / "logs" / "metrics.jsonl"


def _newest(run: Path, side: SideName) -> str | None:
    return read_latest(checkpoints_folder(run) if side == "trainer" else negatives_folder(run))


def _written(path: Path) -> int:
    try:
        with open(path, "rb") as file:  # opened, a file of NFS is as the server has it
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def size_of(path: Path) -> int:
    """Return the bytes of a file, none if it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _last_step(path: Path, start: int, default: int | None) -> int | None:
    """Return the step of the last line after the first `start` bytes of a file of metrics."""
    try:
        with open(path, "rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return default
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # a line that a power cut left half written
            return json.loads(line)["step"]
    return default
