"""Where a run stands, from the files that both sides keep in its folder."""

import json
from pathlib import Path
from typing import Any

from rich.markup import escape

from launch.view import clock, miner_line, trainer_line
from mining.figures import ages
from trainer.errors import InputError
from trainer.handoff.manifest import read_latest
from trainer.metrics import heartbeat_age_s, read_status

SILENT_AFTER_S = 60.0  # a side that has not written for so long is said to be silent


def run_status(run: Path) -> dict[str, Any]:
    """Return both sides' last words, the newest checkpoint and negatives, and the results if there are any."""
    if not (run / "job.toml").exists():
        raise InputError(f"{run} is not a run folder: it has no job.toml; expected a folder such as runs/quickstart")
    results = run / "results.json"
    said = {side: read_status(run, side) for side in ("trainer", "miner")}
    for side, status in said.items():
        if status:
            status["heartbeat_age_s"] = heartbeat_age_s(run, side)
    return {
        "run": str(run),
        "trainer": said["trainer"],
        "miner": said["miner"] | ages(run, said["miner"]),
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
        silent_s = said["heartbeat_age_s"] or 0.0
        ended = said.get("phase") in ("finished", "stopped", "refused")
        note = f"   [red]silent for {clock(silent_s)}[/red]" if silent_s > SILENT_AFTER_S and not ended else ""
        lines.append(f"{side:<8} {text}   {counts}{note}")
    lines += [f"{'':<8} {line}" for line in miner_figures(status["miner"])]
    if results := status["results"]:
        rows = (name for name in ("bm25", "untrained", "trained") if name in results)
        lines.append("MRR@10   " + "   ".join(f"{name} {results[name]['mrr@10']:.3f}" for name in rows))
    return "\n".join(lines)


def miner_figures(miner: dict[str, Any]) -> list[str]:
    """Return the miner's figures as lines for a person, none before there are any."""
    rates = [
        f"{miner[name]:,.0f} {unit}/s"
        for name, unit in (("tokens_per_s", "tokens"), ("queries_per_s", "queries"))
        if name in miner
    ]
    if miner.get("recall") is not None:
        rates.append(f"recall {miner['recall']:.3f}")
    steps = (("negatives_age_steps", "newest negatives"), ("checkpoint_age_steps", "checkpoint"))
    old = [f"{what} {miner[name]} steps old" for name, what in steps if name in miner]
    dropped = [f"{name} {count:,}" for name, count in miner.get("dropped", {}).items() if count]
    lines = ["   ".join(rates), "   ".join(old), "dropped: " + ", ".join(dropped) if dropped else ""]
    refused = f"[red]given up: {escape(miner['refused'])}[/red]" if miner.get("refused") else ""
    return [line for line in (*lines, refused) if line]
