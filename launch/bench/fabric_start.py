"""How `negpool bench fabric` begins and ends: ranks of this machine or one rank of many, a file of constants and its picture."""

import os
from pathlib import Path
from typing import Any

from launch.bench.report import OTHERS, OURS, new_figure
from launch.counted import counted
from launch.early import is_launched
from launch.fabric import COLLECTIVES, Fabric, sent_bytes, write_fabric
from launch.ranks import on_ranks
from launch.srun import world_of_trainers
from trainer.errors import InputError

MARKERS = {"all_gather": "o", "reduce_scatter": "s", "all_reduce": "^", "all_to_all": "D"}
LINES = {"all_gather": "-", "reduce_scatter": "--", "all_reduce": "-.", "all_to_all": ":"}  # told apart without colours
GREYS = {"all_gather": "#000000", "reduce_scatter": OURS, "all_reduce": "#6c757d", "all_to_all": OTHERS}


def measure_fabric(ranks: int | None, rounds: int, max_mib: int, out: Path | None) -> dict[str, Any] | None:
    """Return what was measured, and write it to `out` with a picture beside it; None on ranks that do not speak.

    Collective where a launcher has started this process. Raises InputError for ranks that the machine does not have.
    """
    if out is not None:
        _refuse_file(out)
    arguments: dict[str, Any] = {"rounds": rounds, "max_mib": max_mib, "name": out.stem if out else "measured"}
    if is_launched():
        if ranks is not None:
            raise InputError(f"a launcher has started the ranks, and --ranks {ranks} would start others; leave --ranks out")
        from launch.bench.fabric_times import bench_fabric

        os.environ.update(world_of_trainers(os.environ))
        found = bench_fabric(**arguments)
    else:
        num_ranks = ranks or 2
        refuse_crowd(num_ranks)
        found = on_ranks("launch.bench.fabric_times", num_ranks, **arguments)
    if found is not None and out is not None:
        fabric = Fabric(**found["fabric"])
        write_fabric(out, fabric)
        plot_bandwidth(found, fabric, out.with_suffix(".png"))
    return found


def _refuse_file(out: Path) -> None:
    if out.suffix != ".toml" or not out.parent.is_dir():
        what = "does not end in .toml" if out.suffix != ".toml" else f"is in {out.parent}, which is no folder"
        raise InputError(f"--out {out} {what}; set --out to a file such as fabric.toml in a folder that exists")


def refuse_crowd(num_ranks: int) -> None:
    """Raise InputError for more ranks than this machine has GPUs, or cores where it has none."""
    import torch

    num_gpus, num_cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    places, what = (num_gpus, "GPU") if num_gpus else (num_cores, "core")
    if num_ranks > places:
        raise InputError(
            f"{num_ranks} ranks were asked for, and this machine has {counted(places, what)}; set --ranks {places} or less"
        )


def plot_bandwidth(found: dict[str, Any], fabric: Fabric, file: Path) -> None:
    """Draw bus bandwidth by message size: points as measured, hollow where they were held out, and lines as the constants say."""
    parts = list(dict.fromkeys(row["part"] for row in found["rows"]))
    figure = new_figure(4.2 * len(parts))
    for axes, part in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts, strict=True):
        for collective in COLLECTIVES:
            rows = [row for row in found["rows"] if (row["part"], row["collective"]) == (part, collective)]
            _draw(axes, collective, rows)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda num_bytes, _: in_units(num_bytes))
        axes.set_title(f"{part}, {counted(rows[0]['ranks'], 'rank')}: {fabric.hardware}", loc="left", fontsize=10)
        axes.set_xlabel("message; hollow points were held out, lines are the fit")
        axes.set_ylabel("bus bandwidth of a rank, GB/s")
        axes.legend(fontsize=9, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def _draw(axes: Any, collective: str, rows: list[dict[str, Any]]) -> None:
    colour = GREYS[collective]
    for is_held_out in (False, True):
        points = [row for row in rows if row["is_held_out"] == is_held_out]
        places = [row["num_bytes"] for row in points], [row["bytes_per_s"] / 1e9 for row in points]
        face = "white" if is_held_out else colour
        axes.plot(*places, MARKERS[collective], color=colour, markerfacecolor=face, linestyle="none", zorder=3)
    sent = [sent_bytes(collective, row["num_bytes"], row["ranks"]) for row in rows]
    said = [amount / row["fitted_s"] / 1e9 for amount, row in zip(sent, rows, strict=True)]
    axes.plot([row["num_bytes"] for row in rows], said, LINES[collective], color=colour, label=collective)


def in_units(num_bytes: float) -> str:
    """Return a size as people read it: 4 KiB, 64 MiB."""
    for unit, size in ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.3g} B"
