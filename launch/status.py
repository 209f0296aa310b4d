"""Where a run stands, from the files that both sides keep in its folder."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from launch.alive import gone
from launch.counted import counted
from launch.output import MEASURE_TITLES
from launch.phases import clock, miner_line, next_swap, trainer_line, warnings_of
from mining.figures import ages
from trainer.errors import ENDED, FAILED, InputError
from trainer.handoff.manifest import read_latest
from trainer.handoff.rights import unreadable
from trainer.metrics import heartbeat_age_s, read_status

SILENT_AFTER_S = 60.0  # a side that has not written for so long is said to be silent
LOOK_EVERY_S = 1.0


@contextlib.contextmanager
def reading(run: Path) -> Iterator[None]:
    """Turn what comes of files that no run writes into an InputError that names the run."""
    if (told := unreadable(run / "job.toml")) is not None:
        raise InputError(told)
    try:
        yield
    except InputError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{run} holds something that no run writes ({type(error).__name__}: {error}); name the folder of a run as it was left"
        ) from error


def run_status(run: Path) -> dict[str, Any]:
    """Return both sides' last words, the newest checkpoint and negatives, and the results if there are any; raises InputError."""
    with reading(run):
        return _run_status(run)


def _run_status(run: Path) -> dict[str, Any]:
    if not (run / "job.toml").exists():
        raise InputError(f"{run} is not a run folder: it has no job.toml; expected a folder such as runs/quickstart")
    results = run / "results.json"
    said = {side: read_status(run, side) for side in ("trainer", "miner")}
    for side, status in said.items():
        if status:
            status["heartbeat_age_s"] = heartbeat_age_s(run, side)
            status |= {} if (end := gone(run, side, status)) is None else {"not_alive": end}
    return {
        "run": str(run),
        "trainer": said["trainer"],
        "miner": said["miner"] | ages(run, said["miner"]),
        "checkpoint": read_latest(run / "checkpoints"),
        "negatives": read_latest(run / "negatives"),
        "results": json.loads(results.read_text()) if results.exists() else None,
    }


def describe_run(status: dict[str, Any]) -> str:
    """Return the status as a few lines for a person; raises InputError."""
    with reading(Path(status["run"])):
        return _describe(status)


def _describe(status: dict[str, Any]) -> str:
    lines = [
        f"[bold]{status['run']}[/bold]   checkpoint {status['checkpoint'] or 'none'}   negatives {status['negatives'] or 'none'}"
    ]
    for side in ("trainer", "miner"):
        said = status[side]
        if not said:
            lines.append(f"{side:<8} not started")
            continue
        silent_s = said["heartbeat_age_s"] or 0.0
        line = trainer_line(said, silent_s) if side == "trainer" else miner_line(said, status["trainer"], silent_s)
        figures = [figure for figure in line.figures if not figure.split(" a rank")[0].endswith("/s")]  # rates stand below
        note = f"   [red]silent for {clock(silent_s)}[/red]" if silent_s > SILENT_AFTER_S and not has_ended(said) else ""
        if end := said.get("not_alive"):
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end["since"]))
            note = f"   [red]not alive since {since}: {escape(end['reason'])}[/red]"
        lines.append(f"{side:<8} {escape('   '.join((line.text, *figures)))}{note}")
        why = [f"[red]{escape(said['error'])}[/red]"] if has_ended(said) and said.get("error") else []
        told = [f"[yellow]{escape(sentence)}[/yellow]" for sentence in warnings_of(said)]
        lines += [f"{'':<8} {line}" for line in (*why, *told, *FIGURES[side](said))]
    if follows := next_swap(status["trainer"], status["miner"]):
        lines.append(f"{'':<8} {follows}")
    return "\n".join([*lines, *_results_lines(status["results"] or {})])


def _results_lines(results: dict[str, Any]) -> list[str]:
    """Return the last evaluation of all models, and the verdict on the run."""
    rows = [name for name in ("bm25", "untrained", "trained", "last") if name in results]
    measured = ["MRR@10   " + "   ".join(f"{name} {results[name]['mrr@10']:.3f}" for name in rows)] if rows else []
    verdict = results.get("verdict") or {}
    colour = {"better": "green", "unclear": "yellow"}.get(verdict.get("level", ""), "red")
    return [*measured, *([f"[{colour}]{escape(verdict['sentence'])}[/{colour}]"] if verdict.get("sentence") else [])]


def watch_run(run: Path, console: Console) -> dict[str, Any]:
    """Show the status anew every second until both sides that were started have ended or Ctrl-C; return the last one."""
    found = run_status(run)
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(describe_run(found), refresh=True)
            if all(has_ended(found[side]) for side in ("trainer", "miner") if found[side]) and found["trainer"]:
                break
            time.sleep(LOOK_EVERY_S)
            found = run_status(run)
    return found


def has_ended(said: dict[str, Any]) -> bool:
    """Tell whether a side has said that it is over."""
    return said.get("phase") in ENDED and said["phase"] != FAILED  # that is started again


def trainer_figures(trainer: dict[str, Any]) -> list[str]:
    """Return the trainer's figures as lines for a person, none before there are any."""
    now = []
    if trainer.get("tokens_per_rank_per_s") is not None:
        now.append(f"{trainer['tokens_per_rank_per_s']:,.0f} tokens/s a rank")
    if trainer.get("negatives_age_steps") is not None:
        now.append(f"negatives in force {counted(trainer['negatives_age_steps'], 'step')} old")
    if trainer.get("skipped"):
        now.append(f"[red]{counted(trainer['skipped'], 'update')} left out: gradients were not finite[/red]")
    if trainer.get("temperature_at_bound"):
        now.append("the temperature is at loss.min_temperature")
    last = trainer.get("last_evaluation")
    evaluated = [f"{title} {last[key]:.3f}" for key, title in MEASURE_TITLES.items()] if last else []
    evaluation = f"{last['split']} at step {last['step']}: {'  '.join(evaluated)}" if last else ""
    return [line for line in ("   ".join(now), evaluation) if line]


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
    old = [f"{what} {counted(miner[name], 'step')} old" for name, what in steps if name in miner]
    dropped = [f"{name} {count:,}" for name, count in miner.get("dropped", {}).items() if count]
    lines = ["   ".join(rates), "   ".join(old), "dropped: " + ", ".join(dropped) if dropped else ""]
    refused = f"[red]given up: {escape(miner['refused'])}[/red]" if miner.get("refused") else ""
    return [line for line in (*lines, refused) if line]


FIGURES = {"trainer": trainer_figures, "miner": miner_figures}
