"""What Slurm's batch scripts ask: `python -m launch.requeue begun RUN SIDE` before srun, `… ended RUN SIDE CODE` after it.

launch/restarts.py has the rule. What it must remember lies in the run folder, for each start is a new script, maybe on another
node. Slurm starts a job again by itself when it preempts it or loses a node, and no script sees that end: the next `begun` does.
A disk that refuses to remember ends no run: there is no answer then, and scripts count by SLURM_RESTART_COUNT.
"""

import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from launch.restarts import CUT, Past, SideName, Start, Verdict, status_file, verdict
from trainer.errors import EXIT_FAILED, EXIT_MUST_NOT_GO_ON, InputError, MachineFailed
from trainer.handoff.manifest import write_atomically
from trainer.metrics import read_status

DISK = (InputError, MachineFailed, OSError)  # what a disk that refuses is told as


def begun(run: Path, side: SideName, how: dict[str, Any]) -> str:
    """Remember that a start begins; return "begun", or "over" and the code with which its job ends, for the starts before."""
    kept, past = _read(run, side), Past()
    if "start" in kept:  # Slurm ended that one, and no script was there to see it
        found = verdict(Past(**kept["past"]), Start(**kept["start"]).ended(run, side, CUT), side=side, **how)
        if found.past is None and found.code:
            return f"over {_end(run, side, found)}"
        past = found.past or past
    elif kept:
        past = Past(**kept["past"])
    _keep(run, side, {"past": asdict(past), "start": asdict(Start.of(run, side))})
    return "begun"


def ended(run: Path, side: SideName, code: int | None, how: dict[str, Any]) -> str:
    """Return "again" for a side whose start has ended, or "over" and the code with which its job ends."""
    kept = _read(run, side)
    past, start = (Past(**kept["past"]), Start(**kept["start"])) if "start" in kept else (Past(), Start.of(run, side))
    found = verdict(past, start.ended(run, side, code), side=side, **how)
    if found.past is None and not (code is CUT and found.code == EXIT_FAILED):
        return f"over {_end(run, side, found)}"
    if code is not CUT:  # of what Slurm cuts short the next `begun` sees the very end
        _keep(run, side, {"past": asdict(found.past or past)})
    return "again"


def _end(run: Path, side: SideName, found: Verdict) -> int:
    """Say why it ends, forget what was remembered, so that a person may start it anew, and return the code."""
    with contextlib.suppress(*DISK):
        _kept(run, side).unlink(missing_ok=True)
        if found.sentence and found.sentence != read_status(run, side).get("error"):  # which is in the log already
            print(f"negpool: {found.sentence}", file=sys.stderr)
            if found.code == EXIT_MUST_NOT_GO_ON:
                told = {**read_status(run, side), "phase": "must not go on", "error": found.sentence}
                write_atomically(status_file(run, side), json.dumps(told))
    return found.code


def _keep(run: Path, side: SideName, values: dict[str, Any]) -> None:
    write_atomically(_kept(run, side), json.dumps({"job": os.environ.get("SLURM_JOB_ID"), **values}))


def _read(run: Path, side: SideName) -> dict[str, Any]:
    """Return what was kept; nothing where it is another job's: a person has submitted this one since."""
    try:
        kept = json.loads(_kept(run, side).read_text())
    except (OSError, ValueError):
        return {}
    return kept if kept["job"] == os.environ.get("SLURM_JOB_ID") else {}


def _kept(run: Path, side: SideName) -> Path:
    return run / "status" / f"{side}.starts.json"


def main() -> int:
    """Answer one of the batch scripts."""
    what, run, side = sys.argv[1], Path(sys.argv[2]), cast(SideName, sys.argv[3])
    logs = sorted((run / "logs").glob(f"slurm-*-{os.environ.get('SLURM_JOB_ID')}.out"))
    limit = int(os.environ.get("NEGPOOL_MAX_RESTARTS", "10"))
    how = {"limit": limit, "setting": "--max-restarts", "log": str(logs[0]) if logs else "the job's log"}
    try:
        if what == "begun":
            print(begun(run, side, how))
        else:
            print(ended(run, side, CUT if sys.argv[4] == "cut" else int(sys.argv[4]), how))
    except DISK as error:
        print(f"negpool: starts are not counted: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
