"""What a person sees of a run: two live bars in a terminal, plain lines elsewhere, and every event as a line."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_EVERY_S = 15.0  # where there is no terminal to redraw


class View:
    """Shows the statuses of both sides; `say` prints a line that stays."""

    def __init__(self, console: Console):
        self._console = console
        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]{task.fields[side]:<8}"),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[counts]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bars = {
            side: self._progress.add_task("starting", side=side, counts="", total=None) for side in ("trainer", "miner")
        }
        self._swaps_said: int | None = None
        self._versions_said: set[int] = set()
        self._plain_said = 0.0

    def __enter__(self) -> "View":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print one line that stays, with the time since the start."""
        self._progress.console.print(f"[dim]{clock(time.monotonic() - self._started):>6}[/dim]  {text}", highlight=False)

    def show(self, trainer: dict[str, Any], miner: dict[str, Any]) -> None:
        """Redraw from what the two sides last said."""
        self._say_swaps(trainer.get("swaps", []), miner)
        lines = {"trainer": trainer_line(trainer), "miner": miner_line(miner)}
        for side, (text, done, total, counts) in lines.items():
            self._progress.update(self._bars[side], description=text, completed=done, total=total, counts=counts)
        due = time.monotonic() - self._plain_said > PLAIN_EVERY_S
        if not self._console.is_terminal and due:
            self._plain_said = time.monotonic()
            for side, (text, _, _, counts) in lines.items():
                self.say(f"{side:<8}{text}  {counts}".rstrip())

    def _say_swaps(self, swaps: list[list[int]], miner: dict[str, Any]) -> None:
        if self._swaps_said is None:  # a resumed run has said the old ones
            self._swaps_said = 0
        for step, version in swaps[self._swaps_said :]:
            origin = "from BM25" if version == 0 else "from the miner"
            self.say(f"[green]step {step}: negatives v{version} {origin} swapped in[/green]")
        self._swaps_said = max(self._swaps_said, len(swaps))


def trainer_line(status: dict[str, Any]) -> tuple[str, int, int | None, str]:
    """Return (text, done, total, counts) of the trainer."""
    phase = status.get("phase", "starting")
    if phase == "training" and "loss" in status:  # a full disk keeps the least
        text = f"training   loss {status['loss']:.3f}   negatives {_version(status)}"
        left = f"{status['step']}/{status['num_steps']} steps, about {clock(status['eta_s'])} left"
        return text, status["step"], status["num_steps"], left
    total = status.get("total") if phase.startswith("evaluating") else None
    done = status.get("done", 0) if total else 0
    return phase, done, total, f"{done}/{total} texts a rank" if total else ""


def miner_line(status: dict[str, Any]) -> tuple[str, int, int | None, str]:
    """Return (text, done, total, counts) of the miner."""
    phase = status.get("phase", "starting")
    step = status.get("checkpoint_step")
    text = phase if step is None or phase.startswith("watch") else f"{phase}, checkpoint of step {step}"
    total, done = status.get("total"), status.get("done") or 0
    return text, done, total, f"{done}/{total}" if total else ""


def clock(seconds: float) -> str:
    """Return seconds as 1:05 or 2:03:09."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _version(status: dict[str, Any]) -> str:
    swaps = status.get("swaps") or []
    return f"v{swaps[-1][1]}" if swaps else "in-batch only"
