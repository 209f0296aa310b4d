"""A benchmark as files: numbers as JSON, tables as Markdown, times or what is reached of the wanted as a picture.

What an approximate index finds has a picture of its own.
"""

import json
from pathlib import Path
from typing import Any

from launch.tables import Part, Sheet, as_markdown
from trainer.errors import InputError

OURS, OTHERS = "#2a6f97", "#adb5bd"
RECALL = "recall"  # name of the picture of an index
MOST_SHARE = 1.3  # of a bar, however far beyond the wanted figure


def write_report(folder: Path, name: str, found: dict[str, Any], parts: list[Part]) -> None:
    """Write folder/NAME.json, NAME.md and NAME.png; raises InputError if the folder cannot be written."""
    write_tables(folder, name, found, parts, [name, *([RECALL] if found.get("index") else [])])
    try:
        picture = folder / f"{name}.png"
        if "rows" in found:
            plot_reached([row for row in found["rows"] if row["wanted"]], picture)
        else:
            plot_times([part for part in parts if isinstance(part, Sheet) and "seconds" in part.columns], picture)
        if found.get("index"):
            plot_recall(found["index"], folder / f"{RECALL}.png")
    except OSError as error:
        raise _refused(folder, error) from error


def write_tables(folder: Path, name: str, found: dict[str, Any], parts: list[Part], pictures: list[str]) -> None:
    """Write folder/NAME.json and NAME.md, which shows pictures by their names; raises InputError as `write_report`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        shown = "\n\n".join(f"![{each}]({each}.png)" for each in pictures)
        (folder / f"{name}.md").write_text(f"{shown}\n\n{as_markdown(parts)}")
    except OSError as error:
        raise _refused(folder, error) from error


def _refused(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot write the report to {folder}: {error.strerror}; set --out to another folder")


def plot_times(sheets: list[Sheet], file: Path) -> None:
    """Draw a bar for every row of every sheet, with its seconds and its ratio."""
    heights = [1 + 0.4 * len(sheet.rows) for sheet in sheets]
    figure = new_figure(sum(heights))
    for axes, sheet in zip(figure.subplots(len(sheets), height_ratios=heights, squeeze=False)[:, 0], sheets, strict=True):
        names, seconds = [row[0] for row in sheet.rows], sheet.numbers("seconds")
        bars = axes.barh(names, seconds, color=[OURS if name.startswith("ours") else OTHERS for name in names])
        labels = [f"{s:.3g} s  (x {ratio:.2f})" for s, ratio in zip(seconds, sheet.numbers("ratio"), strict=True)]
        axes.bar_label(bars, labels, padding=4, fontsize=9)
        axes.set_title(sheet.title, loc="left", fontsize=10)
        axes.set_xlim(0, 1.3 * max(seconds))
        axes.set_xlabel("seconds")
        _plain(axes)
    figure.savefig(file, dpi=150)


def plot_reached(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw a bar for every figure, as long as its share of the wanted one, which is a line."""
    figure = new_figure(1.5 + 0.35 * len(rows))
    axes, places = figure.subplots(), range(len(rows))
    shares = [min(MOST_SHARE, _share(row)) for row in rows]
    axes.axvline(1, color=OTHERS, linestyle="--", zorder=0)
    bars = axes.barh(places, shares, color=[OURS if share >= 1 else OTHERS for share in shares])
    axes.set_yticks(places, [row["what"] for row in rows])
    axes.bar_label(bars, [_label(row) for row in rows], padding=4, fontsize=9, bbox={"color": "white", "pad": 1})
    axes.set_xlim(0, 2)
    axes.set_xlabel("share of the wanted figure, dark where it is reached")
    _plain(axes)
    figure.savefig(file, dpi=150)


def plot_recall(indexes: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw what an index finds by how much of the corpus a query looks at, one picture for each corpus; exact search at the end.

    Dotted: an index for every block of the corpus.
    """
    figure = new_figure(3.6 * len(indexes))
    for axes, (name, index) in zip(figure.subplots(len(indexes), squeeze=False)[:, 0], indexes.items(), strict=True):
        for key, style, label in (
            ("points", {"color": OURS, "marker": "o", "linestyle": "-"}, f"one index, {index['factory']}"),
            ("points_of_blocks", {"color": "black", "marker": "x", "linestyle": ":"}, "one for every block of 65,536"),
        ):
            points = index[key]
            if points:
                axes.plot([100 * p["share"] for p in points], [p["recall"] for p in points], label=label, **style)
        for point in index["points"]:
            place = 100 * point["share"], point["recall"]
            axes.annotate(f"{point['nprobe']}", place, xytext=(4, -10), textcoords="offset points", fontsize=8)
        axes.plot([100], [1.0], color="black", marker="s", linestyle="none", label="exact search")
        axes.axhline(index["min_recall"], color=OTHERS, linestyle="--", zorder=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda percent, _: f"{percent:g}")
        axes.set_ylim(0, 1.05)
        axes.set_title(f"{name}: {index['passages']:,} passages, width {index['width']}", loc="left", fontsize=10)
        axes.set_xlabel("passages that a query looks at, % of the corpus; at the points: nprobe")
        axes.set_ylabel(f"recall@{index['top_k']}")
        axes.legend(loc="lower right", fontsize=9, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def _share(row: dict[str, Any]) -> float:
    found, wanted = row["found"], row["wanted"]
    if not found:
        return 0.0
    return wanted / found if row["less_is_better"] else found / wanted


def _label(row: dict[str, Any]) -> str:
    bound = f"{'<=' if row['less_is_better'] else '>='} {row['wanted']:.3g}"
    return row["word"] if row["found"] is None else f"{row['found']:.3g} {row['unit']}; {bound}"


def new_figure(height: float) -> Any:
    """Return an empty figure, as wide as a page; height: inches. Raises InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib; run: pip install 'negpool[bench]', or leave out --out") from error
    return Figure(figsize=(9, height), layout="constrained")


def _plain(axes: Any) -> None:
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
