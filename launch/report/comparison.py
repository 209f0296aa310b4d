"""The page of `negpool compare`: the tables, and pictures in which every run is a line."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from launch.compare import Run, shared_measure
from launch.compare_tables import compare_parts
from launch.output import MEASURE_TITLES
from launch.report.drawing import APART, COLOURS, LINES, Pictures, picture, running_median, whole_steps
from launch.report.page import inlined, render, write_page
from launch.tables import Sheet
from trainer.errors import InputError

REFERENCES = {"bm25": (COLOURS[-1], "--"), "untrained": (COLOURS[-1], ":")}

MOST_LETTERS = 24  # of a name in a legend


def write_comparison(runs: list[Run], found: dict[str, Any], out: Path) -> Path:
    """Write the page and its pictures into a folder; return the page's path. Raises InputError."""
    try:
        pictures = draw_comparison(runs)
    except (KeyError, TypeError, ValueError) as error:
        names = ", ".join(run.name for run in runs)
        raise InputError(f"the logs of {names} hold something that no run writes ({type(error).__name__}: {error})") from error
    page = render(
        "compare.html",
        title=" and ".join(run.name for run in runs) if len(runs) == 2 else f"{len(runs)} runs",
        found=found,
        parts=[part for part in compare_parts(found) if isinstance(part, Sheet)],
        figures=inlined(pictures),
    )
    return write_page(out, page, pictures)


def draw_comparison(runs: list[Run]) -> Pictures:
    """Return title and picture of everything that the runs have figures for, by name."""
    measure = shared_measure(runs)
    title = MEASURE_TITLES[measure]
    found: Pictures = {}
    if any(run.history.of_measures(f"dev/{measure}")[0] or run.rows for run in runs):
        for name, over, label in (("quality", "steps", "step"), ("quality_time", "time", "minutes spent in steps")):
            with picture(f"Quality over {over}: {title}\n{APART}", label, f"{title} (0 to 1)") as (
                figure,
                axes,
            ):
                _quality(axes, runs, measure, over == "time")
            found[name] = f"Quality over {over}", figure
    if any(run.history.steps for run in runs):
        with picture("Loss, running median", "step", "loss, mean over queries (nats)") as (figure, axes):
            for run, (colour, style) in zip(runs, _looks(runs), strict=True):
                course = running_median(run.history.of_steps("loss"))
                axes.plot(*course, color=colour, linestyle=style, linewidth=2, label=label_of(run))
            whole_steps(axes)
        found["loss"] = "Loss, running median", figure
    return found


def _quality(axes: Axes, runs: list[Run], measure: str, over_time: bool) -> None:
    """Draw dev as a line and the trained model on the test queries as a diamond, and what all runs have alike to compare with."""
    for run, (colour, style) in zip(runs, _looks(runs), strict=True):
        at = minutes_at(run) if over_time else {step: step for step in (0, *run.history.steps)}
        course = [
            (at[int(step)], value) for step, value in zip(*run.history.of_measures(f"dev/{measure}"), strict=True) if step in at
        ]
        if course:
            axes.plot(*zip(*course, strict=True), f"o{style}", color=colour, markersize=4, label=f"{label_of(run)}, dev")
        if (row := run.row("trained")) is not None:
            place = at.get(row.step if row.step is not None else max(at), 0)
            test = f"{label_of(run)}, trained, test"
            axes.plot([place], [row.values[measure]], "D", color=colour, markersize=7, markeredgecolor="black", label=test)
    for name, (colour, style) in REFERENCES.items():
        rows = [run.row(name) for run in runs]
        known = {(row.title, round(row.values[measure], 3)) for row in rows if row is not None}
        if len(known) == 1 and None not in rows:
            title, value = known.pop()
            axes.axhline(value, color=colour, linestyle=style, label=f"{title}, test")
    axes.set_xlim(left=0)
    if not over_time:
        whole_steps(axes)


def minutes_at(run: Run) -> dict[int, float]:
    """Return how many minutes a run had spent in steps when each was done, without evaluations and waiting."""
    found, seconds = {0: 0.0}, 0.0
    for step, line in run.history.steps.items():
        seconds += line.get("time/step_s", 0.0)
        found[step] = seconds / 60
    return found


def label_of(run: Run) -> str:
    """Return a name for a legend: short, and without an underscore in front, for what begins so is left out there."""
    name = run.name if len(run.name) <= MOST_LETTERS else f"{run.name[: MOST_LETTERS // 2]}…{run.name[-MOST_LETTERS // 2 + 1 :]}"
    return f" {name}" if name.startswith("_") else name


def _looks(runs: list[Run]) -> list[tuple[str, str]]:
    """Return a colour and a style of line for each run; the last colour is for what they have alike."""
    colours = COLOURS[:-1]
    return [(colours[i % len(colours)], LINES[i % len(LINES)]) for i in range(len(runs))]
