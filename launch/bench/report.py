"""A benchmark as files: numbers as JSON, tables as Markdown, times as a picture."""

import json
from pathlib import Path
from typing import Any

from launch.tables import Part, Sheet, as_markdown
from trainer.errors import InputError

OURS, OTHERS = "#2a6f97", "#adb5bd"


def write_report(folder: Path, name: str, found: dict[str, Any], parts: list[Part]) -> None:
    """Write folder/NAME.json, NAME.md and NAME.png; raises InputError if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        (folder / f"{name}.md").write_text(f"![times]({name}.png)\n\n{as_markdown(parts)}")
        plot_times([part for part in parts if isinstance(part, Sheet) and "seconds" in part.columns], folder / f"{name}.png")
    except OSError as error:
        raise InputError(f"cannot write the report to {folder}: {error.strerror}; set --out to another folder") from error


def plot_times(sheets: list[Sheet], file: Path) -> None:
    """Draw a bar for every row of every sheet, with its seconds and its ratio."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib; run: pip install 'negpool[bench]', or leave out --out") from error
    heights = [1 + 0.4 * len(sheet.rows) for sheet in sheets]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    for axes, sheet in zip(figure.subplots(len(sheets), height_ratios=heights, squeeze=False)[:, 0], sheets, strict=True):
        names, seconds = [row[0] for row in sheet.rows], sheet.numbers("seconds")
        bars = axes.barh(names, seconds, color=[OURS if name.startswith("ours") else OTHERS for name in names])
        labels = [f"{s:.2f} s  (x {ratio:.2f})" for s, ratio in zip(seconds, sheet.numbers("ratio"), strict=True)]
        axes.bar_label(bars, labels, padding=4, fontsize=9)
        axes.set_title(sheet.title, loc="left", fontsize=10)
        axes.set_xlim(0, 1.3 * max(seconds))
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
