"""A benchmark as files: numbers as JSON, tables as Markdown, times or what is reached of the wanted as a picture."""

import json
from pathlib import Path
from typing import Any

from launch.tables import Part, Sheet, as_markdown
from trainer.errors import InputError

OURS, OTHERS = "#2a6f97", "#adb5bd"
MOST_SHARE = 1.3  # of a bar, however far beyond the wanted figure


def write_report(folder: Path, name: str, found: dict[str, Any], parts: list[Part]) -> None:
    """Write folder/NAME.json, NAME.md and NAME.png; raises InputError if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        (folder / f"{name}.md").write_text(f"![{name}]({name}.png)\n\n{as_markdown(parts)}")
        picture = folder / f"{name}.png"
        if "rows" in found:
            plot_reached([row for row in found["rows"] if row["wanted"]], picture)
        else:
            plot_times([part for part in parts if isinstance(part, Sheet) and "seconds" in part.columns], picture)
    except OSError as error:
        raise InputError(f"cannot write the report to {folder}: {error.strerror}; set --out to another folder") from error


def plot_times(sheets: list[Sheet], file: Path) -> None:
    """Draw a bar for every row of every sheet, with its seconds and its ratio."""
    heights = [1 + 0.4 * len(sheet.rows) for sheet in sheets]
    figure = _figure(sum(heights))
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
    figure = _figure(1.5 + 0.35 * len(rows))
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


def _share(row: dict[str, Any]) -> float:
    found, wanted = row["found"], row["wanted"]
    if not found:
        return 0.0
    return wanted / found if row["less_is_better"] else found / wanted


def _label(row: dict[str, Any]) -> str:
    bound = f"{'<=' if row['less_is_better'] else '>='} {row['wanted']:.3g}"
    return row["word"] if row["found"] is None else f"{row['found']:.3g} {row['unit']}; {bound}"


def _figure(height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib; run: pip install 'negpool[bench]', or leave out --out") from error
    return Figure(figsize=(9, height), layout="constrained")


def _plain(axes: Any) -> None:
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
