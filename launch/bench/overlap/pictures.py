"""The report of `negpool bench overlap`: its figures, its tables, and three pictures that can be read without colour."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.bench.overlap.dev_scores import MEASURE
from launch.bench.report import OTHERS, OURS, new_figure
from launch.tables import Part, as_markdown
from trainer.errors import InputError

if TYPE_CHECKING:  # whoever has no matplotlib is told so in words
    from matplotlib.axes import Axes

NAME = "overlap"
DASHES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX*"
SHADES = ("#14425f", "#2a6f97", "#6aa5c8", "#a9c9dd")


def check_pictures() -> None:
    """Raise InputError where there is nothing to draw with: sooner than after an hour."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the pictures of this benchmark need matplotlib; run: pip install 'negpool[bench]'")


def write_overlap_report(folder: Path, found: dict[str, Any], parts: list[Part]) -> None:
    """Write overlap.json, overlap.md and the pictures; raises InputError if the folder cannot be written."""
    drawn: dict[str, Callable[[Axes, dict[str, Any]], None]] = {NAME: draw_slow_downs, f"{NAME}-age": draw_ages}
    if any(any(row["courses"]) for row in found["divisions"]):
        drawn[f"{NAME}-course"] = draw_courses
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{NAME}.json").write_text(json.dumps(found, indent=2) + "\n")
        shown = "\n\n".join(f"![{name}]({name}.png)" for name in drawn)
        (folder / f"{NAME}.md").write_text(f"{shown}\n\n{as_markdown(parts)}")
        for name, draw in drawn.items():
            figure = new_figure(1.6 + 0.75 * len(found["divisions"]) if name == NAME else 4.5)
            axes = figure.subplots()
            draw(axes, found)
            axes.spines[["top", "right"]].set_visible(False)
            figure.savefig(folder / f"{name}.png", dpi=150)
    except OSError as error:
        raise InputError(f"cannot write the report to {folder}: {error.strerror}; set --out to another folder") from error


def draw_slow_downs(axes: "Axes", found: dict[str, Any]) -> None:
    """Draw for each division how many times longer a step and a refresh take than alone on the same part of the machine."""
    sides = (("step_slow_down", "a step, beside a miner at work", OURS, ""), ("refresh_slow_down", "a refresh", OTHERS, "//"))
    for number, (key, label, colour, hatch) in enumerate(sides):
        values = [row[key] for row in found["divisions"]]
        places = [place + 0.36 * number for place in range(len(values))]
        bars = axes.barh(
            places, [value or 0 for value in values], 0.34, label=label, color=colour, hatch=hatch, edgecolor="white"
        )
        labels = ["no version in this time" if value is None else f"x {value:.2f}" for value in values]
        axes.bar_label(bars, labels, padding=4, fontsize=9, bbox={"color": "white", "pad": 1})
    axes.axvline(1, color="black", linestyle="--", linewidth=1, zorder=0)
    axes.set_yticks([place + 0.18 for place in range(len(found["divisions"]))], [row["words"] for row in found["divisions"]])
    axes.set_xlim(0, 1.2 * axes.get_xlim()[1])
    axes.set_xlabel("time, in times of that alone on the same cores or GPUs (dashed: as fast)")
    axes.invert_yaxis()
    _legend_above(axes, columns=2)


def draw_ages(axes: "Axes", found: dict[str, Any]) -> None:
    """Draw how old the negatives in force are by the miner's share: the mean of each round, and the largest."""
    rows = [row for row in found["divisions"] if row["mean_age_steps"] is not None and row["miner_share"] is not None]
    rows.sort(key=lambda row: row["miner_share"])
    shares = [100 * row["miner_share"] for row in rows]
    styles: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("max_age_steps", "largest", {"color": OTHERS, "marker": "^", "linestyle": ":"}),
        ("mean_age_steps", "mean", {"color": OURS, "marker": "o", "linestyle": "-"}),
    )
    for key, label, style in styles:
        axes.plot(shares, [row[key] for row in rows], label=label, **style)
    for share, row in zip(shares, rows, strict=True):
        ages = row["mean_ages_of_rounds"]
        axes.plot([share] * len(ages), ages, "_", color="black", markersize=10)
        axes.annotate(row["division"], (share, row["mean_age_steps"]), xytext=(9, -11), textcoords="offset points", fontsize=9)
    if without := [row["division"] for row in found["divisions"] if row["mean_age_steps"] is None]:
        told = f"no mined version came into force: {', '.join(without)}"
        axes.annotate(told, (1, 0), xycoords="axes fraction", xytext=(-4, 6), textcoords="offset points", ha="right", fontsize=9)
    axes.set_ylim(0, 1.15 * max([1, *(row["max_age_steps"] for row in rows)]))
    axes.set_xlim(0, min(100, 1.25 * max([1, *shares])))
    axes.set_xlabel(share_label(found))
    axes.set_ylabel("age of negatives in force, steps")
    _legend_above(axes, columns=2)


def share_label(found: dict[str, Any]) -> str:
    """Return what stands at the axis of the miner's share; at the points is what --shares calls it."""
    if found["unit"] == "core":
        return (
            "time of all cores that the miner took while the trainer trained, % (at the points: --shares; short bars: each round)"
        )
    return f"the miner's share of the GPU{'s' if found['units'] > 1 else chr(39) + 's memory'}, % (at the points: --shares)"


def draw_courses(axes: "Axes", found: dict[str, Any]) -> None:
    """Draw what each division has reached by when, a line for each round, and for the trainer alone with BM25's negatives."""
    lines = [(row["words"], row["courses"]) for row in found["divisions"]]
    lines.append(("trainer alone, negatives of BM25", found["courses_alone"]))
    for number, (words, courses) in enumerate(lines):
        is_alone = number == len(lines) - 1
        style: dict[str, Any] = {
            "color": OTHERS if is_alone else SHADES[number % len(SHADES)],
            "linestyle": DASHES[number % len(DASHES)],
            "marker": MARKERS[number % len(MARKERS)],
        }
        for which, course in enumerate(course for course in courses if course):
            label = {"label": words} if which == 0 else {}
            axes.plot(
                [point["minutes"] for point in course], [point[MEASURE] for point in course], markersize=5, **style, **label
            )
    if found["target"] is not None:
        axes.axhline(found["target"], color="black", linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            f"target {found['target']:.4g}", (0, found["target"]), xytext=(2, 3), textcoords="offset points", fontsize=9
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("minutes since the run was started")
    axes.set_ylabel(f"MRR@10 on {found['split']}, {found['queries']} queries")
    _legend_above(axes, columns=2)


def _legend_above(axes: "Axes", columns: int) -> None:
    """Name the lines or bars where none of them is."""
    axes.figure.legend(loc="outside upper center", ncols=columns, fontsize=9, frameon=False, handlelength=3)
