"""Where a run stands, from the files that both sides keep in its folder."""

import json
import time
from pathlib import Path
from typing import Any

from launch.view import clock, miner_line, trainer_line
from trainer.errors import InputError
from trainer.handoff.manifest import read_latest
from trainer.metrics import read_status

SILENT_AFTER_S = 60.0  # a side that has not written for so long is said to be silent


def run_status(run: Path) -> dict[str, Any]:
    """Return both sides' last words, the newest checkpoint and negatives, and the results if there are any."""
    if not (run / "job.toml").exists():
        raise InputError(f"{run} is not a run folder: it has no job.toml; expected a folder such as runs/quickstart")
    results = run / "results.json"
    return {
        "run": str(run),
        "trainer": read_status(run, "trainer"),
        "miner": read_status(run, "miner"),
        "checkpoint": read_latest(run / "checkpoints"),
        "negatives": read_latest(run / "negatives"),
        "results": json.loads(results.read_text()) if results.exists() else None,
    }


def describe_run(status: dict[str, Any]) -> str:
    """Return the status as a few lines for a person."""
    lines = [
        f"[bold]{status['run']}[/bold]   checkpoint {status['checkpoint'] or 'none'}   negatives {status['negatives'] or 'none'}"
    ]
    for side, line in (("trainer", trainer_line), ("miner", miner_line)):
        said = status[side]
        if not said:
            lines.append(f"{side:<8} not started")
            continue
        text, _, _, counts = line(said)
        silent_s = time.time() - said["heartbeat"]
        ended = said.get("phase") in ("finished", "stopped", "refused")
        note = f"   [red]silent for {clock(silent_s)}[/red]" if silent_s > SILENT_AFTER_S and not ended else ""
        lines.append(f"{side:<8} {text}   {counts}{note}")
    if results := status["results"]:
        rows = (name for name in ("bm25", "untrained", "trained") if name in results)
        lines.append("MRR@10   " + "   ".join(f"{name} {results[name]['mrr@10']:.3f}" for name in rows))
    return "\n".join(lines)
