"""What a person sees of a run: live lines in a terminal or a notebook, plain ones elsewhere; every event is a line that stays."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.output import redraws
from launch.phases import clock, miner_line, next_swap, trainer_line, warnings_of

PLAIN_EVERY_S = 15.0  # where there is no terminal to redraw
BAR_FROM, BAR = 90, 20  # columns of a terminal from which there is room for bars, and theirs
BESIDE = 10  # columns of a line that its side and the spaces take


class View:
    """Shows the statuses of both sides; `say` prints a line that stays."""

    def __init__(self, console: Console, sides: tuple[str, ...] = ("trainer", "miner")):
        self._console, self._sides = console, sides
        self._started = time.monotonic()
        self._status: dict[str, Mapping[str, Any]] = {"trainer": {}, "miner": {}}
        self._heard: dict[str, tuple[Any, float]] = {side: (None, self._started) for side in self._status}
        self._said: set[tuple[str, str]] = set()  # warnings, by side
        self._swaps_said: set[tuple[int, ...]] = set()
        self._start_of_trainer: Any = None
        self._plain_said = 0.0
        self._live = Live(console=console, transient=True, refresh_per_second=2, get_renderable=self._lines)

    def __enter__(self) -> "View":
        if redraws(self._console):
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Print one line that stays, with the time since the start."""
        elapsed = f"{clock(time.monotonic() - self._started):>6}"
        if not redraws(self._console):
            self._console.print(f"[dim]{elapsed}[/dim]  {text}", highlight=False, soft_wrap=True)
            return
        line = Table.grid(padding=(0, 2, 0, 0))  # wrapped below itself, not below the time
        line.add_row(Text(elapsed, style="dim"), Text.from_markup(text))
        self._console.print(line, soft_wrap=False)

    def knows(self, swaps: list[list[int]]) -> None:
        """Take swaps for said: a run that goes on has told them before."""
        self._swaps_said |= {tuple(swap) for swap in swaps}

    def show(self, trainer: Mapping[str, Any], miner: Mapping[str, Any]) -> None:
        """Redraw from what the two sides last said."""
        now = time.monotonic()
        for side, status in (("trainer", trainer), ("miner", miner)):
            if status.get("heartbeat") != self._heard[side][0] or not status:
                self._heard[side] = (status.get("heartbeat"), self._heard[side][1] if not status else now)
            self._status[side] = status
        self._say_start(trainer)
        self._say_swaps(trainer.get("swaps") or [])
        self._say_warnings()
        if not redraws(self._console) and now - self._plain_said > PLAIN_EVERY_S:
            self._plain_said = now
            for side, line in self._both().items():
                self.say(escape(f"{side:<8}{line.fitted(1000)}"))

    def _both(self) -> dict[str, Any]:
        now = time.monotonic()
        ago = {side: now - heard for side, (_, heard) in self._heard.items()}
        trainer, miner = self._status["trainer"], self._status["miner"]
        lines = {"trainer": trainer_line(trainer, ago["trainer"]), "miner": miner_line(miner, trainer, ago["miner"])}
        return {side: lines[side] for side in self._sides}

    def _lines(self) -> RenderableType:
        """Return a line for each side, and one with the time and what comes next; none is wider than the terminal."""
        has_bars = self._console.width >= BAR_FROM
        table = Table.grid(padding=(0, 2, 0, 0), expand=False)
        table.add_column(width=7, no_wrap=True)
        if has_bars:
            table.add_column(width=BAR)
        table.add_column(no_wrap=True, overflow="ellipsis")
        room = self._console.width - BESIDE - (BAR + 2 if has_bars else 0)
        for side, line in self._both().items():
            bar = [ProgressBar(total=line.total or 100, completed=line.done, width=BAR, pulse=False)] if has_bars else []
            table.add_row(Text(side, style="bold"), *bar, Text(line.fitted(room)))
        last = f"{clock(time.monotonic() - self._started):>7}  {next_swap(self._status['trainer'], self._status['miner'])}"
        return Group(table, Text(last, style="dim", no_wrap=True, overflow="ellipsis"))

    def _say_start(self, trainer: Mapping[str, Any]) -> None:
        """Say from where a resumed trainer goes on; what it had swapped in before is old."""
        start, step = trainer.get("pid"), trainer.get("resumed_step")
        if step is None or start == self._start_of_trainer:
            return
        self._start_of_trainer = start
        swaps = (trainer.get("swaps") or [])[: trainer.get("swaps_before", 0)]
        self.knows(swaps)
        if step:
            self.say(f"going on from step {step}" + (f", with negatives v{swaps[-1][1]}" if swaps else ""))

    def _say_swaps(self, swaps: list[list[int]]) -> None:
        for step, version in (swap for swap in swaps if tuple(swap) not in self._swaps_said):
            origin = "from BM25" if version == 0 else "from the miner"
            self.say(f"[green]step {step}: negatives v{version} {origin} swapped in[/green]")
        self.knows(swaps)

    def _say_warnings(self) -> None:
        for side, status in self._status.items():
            for sentence in warnings_of(status):
                if (side, sentence) not in self._said:
                    self._said.add((side, sentence))
                    self.say(f"[yellow]{side}: {escape(sentence)}[/yellow]")
