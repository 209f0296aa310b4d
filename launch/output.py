"""What commands print: one JSON object on standard output with --json, else text and tables; messages go to standard error."""

import contextlib
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from trainer.measures import MEASURE_TITLES

SAY_EVERY_S = 15.0  # of work that goes on, where there is no terminal to redraw
ROW_TITLES = {"bm25": "BM25", "untrained": "untrained model", "trained": "trained model", "last": "trained model, last step"}
BEST_TITLE = "trained model, best on dev"  # of the row "trained" where there is a row "last"
FEW_QUERIES = 2000  # of which an interval of a measure is wider than what a table's third digit tells
VERDICT_STYLES = {"better": "bold green", "unclear": "bold yellow", "worse": "bold red", "collapsed": "bold red"}


def start_logging(rank: int = 0) -> None:
    """Send our own messages to standard error: all from rank 0, warnings from the others."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_path=False, markup=False)
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its caches and fonts concern nobody
    for package in ("launch", "trainer", "mining", "gradcache"):
        logging.getLogger(package).setLevel(logging.INFO if rank == 0 else logging.WARNING)


def keep_output_clean() -> None:
    """Keep what libraries log to standard output away from the one object that we print there, and what concerns nobody."""
    logging.getLogger("DeepSpeed").addFilter(_hand_to_root)
    # That a kernel of the hub's is missing, which 4-bit layers do not take (trainer/encoder/backbone.py).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _hand_to_root(record: logging.LogRecord) -> bool:
    """Hand on what DeepSpeed says, which transformers imports when it saves a model."""
    if record.funcName != "get_accelerator":  # warns of every machine without a GPU
        logging.getLogger().handle(record)
    return False


def messages() -> Console:
    """Return the console for people: standard error."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def results() -> Console:
    """Return the console for what was asked for: standard output."""
    return Console(soft_wrap=True, highlight=False)


@contextlib.contextmanager
def told_progress(what: str, speaks: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yield what takes texts done and to do: a live line in a terminal or a notebook, else a line every now and then."""
    console, said_at = messages(), time.monotonic()
    if not speaks or not redraws(console):

        def tell(done: int, total: int) -> None:
            nonlocal said_at
            if speaks and total and time.monotonic() - said_at > SAY_EVERY_S:
                said_at = time.monotonic()
                console.print(f"{what}  {done:,}/{total:,}", markup=False)

        yield tell
        return
    with console.status(what) as line:
        yield lambda done, total: line.update(f"{what}  {done:,}/{total:,}" if total else what)


def redraws(console: Console) -> bool:
    """Tell whether a console can draw over what it has drawn: a terminal, or a notebook with the widgets that rich draws in."""
    return console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    print(json.dumps(value))


def measures_table(
    rows: dict[str, dict[str, float]],
    title: str,
    intervals: dict[str, dict[str, list[float]]] | None = None,
    steps: dict[str, int] | None = None,
) -> Table:
    """Return a table with one row for each evaluated model.

    intervals: of rows and measures, shown below the figures. steps: of the rows that are checkpoints of one run, if several are.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for measure in MEASURE_TITLES.values():
        table.add_column(measure, justify="right")
    for name, values in rows.items():
        of_row = (intervals or {}).get(name, {})
        step = f"\n[dim]of step {steps[name]}[/dim]" if steps and name in steps else ""
        cells = (f"{values[key]:.3f}{_in_brackets(of_row.get(key))}" for key in MEASURE_TITLES)
        table.add_row(f"{title_of(name, 'last' in rows)}{step}", *cells)
    return table


def title_of(name: str, has_last: bool) -> str:
    """Return what a row is called; has_last: the best checkpoint and the last one are two rows."""
    return BEST_TITLE if has_last and name == "trained" else ROW_TITLES.get(name, name)


def _in_brackets(interval: list[float] | None) -> str:
    return "" if interval is None else f"\n[dim]{in_figures(interval)}[/dim]"


def in_figures(interval: Sequence[float], is_difference: bool = False) -> str:
    """Return an interval as every table has it; a difference may be below zero, so its ends have signs."""
    low, high = interval
    return f"{low:+.3f} to {high:+.3f}" if is_difference else f"{low:.2f}-{high:.2f}"
