"""What `negpool run --dry-run` found, in sentences."""

from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from launch.counted import counted
from launch.phases import clock


def foreseen_text(found: dict[str, Any]) -> Group:
    """Return the plan as a table of two columns, then what in it defeats itself."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, said in _rows(found):
        table.add_row(name, Text(said))
    warned = [Text.from_markup(f"[yellow]warning: {escape(sentence)}[/yellow]") for sentence in found.get("warnings", [])]
    return Group(table, *warned, Text("Nothing was started."))


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    steps, times, memory = found["steps"], found["time"], found["memory"]
    data = f"{counted(steps['queries'], 'training query')}, {counted(found['data']['passages'], 'passage')}"
    about = "" if steps["is_exact"] else ", about: sources make batches of their own"
    epochs = f"{steps['epochs']:g} epoch{'s' * (steps['epochs'] != 1)} of {counted(steps['per_epoch'], 'step')}"
    parts = ", ".join(f"{name} {size:.2f}" for name, size in memory["trainer"].items() if size >= 0.01)
    miner = memory["miner"]
    swaps = times["swaps"]
    evaluations = f"{counted(times['evaluations'], 'evaluation')} of {_spent(times['evaluation_s'])} each"
    refreshes = f"{counted(len(swaps), 'version')} of mined negatives" if swaps else "no version of mined negatives"
    when = f", swapped in at about step {', '.join(map(str, swaps[:6]))}{' …' * (len(swaps) > 6)}" if swaps else ""
    return [
        ("run", found["run"]),
        ("data", f"{data} from {found['data']['path']}"),
        ("shares", found["shares"]),
        ("steps", f"{counted(steps['steps'], 'step')}: {epochs}{about}"),
        (
            "a step",
            f"{counted(steps['queries_a_step'], 'query')} against {counted(steps['passages_a_step'], 'passage')}, "
            f"some {counted(steps['tokens_a_step_and_rank'], 'token')} a rank, {_spent(times['step_s'])}",
        ),
        ("memory", f"of a trainer rank about {sum(memory['trainer'].values()):.2f} GiB: {parts}"),
        ("", f"of a miner rank about {miner['total_gib']:.2f} GiB of {miner['limit_gib']:.2f} that it may take"),
        ("time", f"about {_spent(times['total_s'])}, without the start, with {evaluations}"),
        ("", f"told from {times['texts']} texts that went through the model here; side by side both sides are slower"),
        ("negatives", f"{refreshes}{when}; a refresh takes about {_spent(times['refresh_s'])}"),
        ("disk", f"up to {found['disk_gib']:.2f} GiB in {found['run']}"),
    ]


def _spent(seconds: float) -> str:
    return clock(seconds) if seconds >= 60 else f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"
