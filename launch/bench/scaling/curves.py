"""The pictures of `negpool bench scaling`: efficiency and throughput, phases, bandwidth. All can be read in grey."""

from collections.abc import Sequence
from typing import Any

from launch.bench.report import new_figure
from launch.bench.scaling.sheets import bytes_in_words, phase_words
from launch.counted import counted
from launch.step_phases import HIDDEN, PHASES

STYLES = {
    "strong": {"color": "#2a6f97", "marker": "o", "linestyle": "-"},
    "weak": {"color": "black", "marker": "s", "linestyle": "--"},
}
MARKERS = {"all_gather": "o", "reduce_scatter": "s", "all_reduce": "^", "all_to_all": "D"}
SHADES = ("#4a7f9e", "#b5d3e3", "white", "#8a8a8a", "#dcdcdc")  # darker and lighter in turn, so that neighbours differ
HATCHES = ("", "///", "...")  # of the first five phases, of the next five, and of the last
LEAST_SHARE = 0.005  # of a step, in every size: a phase below it is drawn with the rest


def pictures(found: dict[str, Any]) -> dict[str, Any]:
    """Return a figure for everything that there are figures for, by the name of its file."""
    modes = {mode: rows for mode, rows in found["sizes"].items() if rows}
    drawn = {"efficiency": draw_efficiency(modes), "phases": draw_phases(modes)}
    return drawn | ({"bandwidth": draw_bandwidth(modes)} if any(row["bus"] for rows in modes.values() for row in rows) else {})


def draw_efficiency(modes: dict[str, list[dict[str, Any]]]) -> Any:
    """Return efficiency and throughput against the ranks, with the ideal line and the span of the rounds."""
    figure = new_figure(4.2)
    left, right = figure.subplots(1, 2)
    for mode, rows in modes.items():
        ranks, share, rate = ([row[key] for row in rows] for key in ("ranks", "efficiency", "tokens_per_s"))
        style = {"label": f"{mode} scaling", "markerfacecolor": "white", **STYLES[mode]}
        low, high = zip(*(row["efficiency_of_rounds"] for row in rows), strict=True)
        ends = [[a - b for a, b in zip(share, low, strict=True)], [b - a for a, b in zip(share, high, strict=True)]]
        left.errorbar(ranks, share, ends, capsize=3, **style)
        right.plot(ranks, rate, **style)
    every = [row for rows in modes.values() for row in rows]
    base = min(every, key=lambda row: row["ranks"])
    ranks = sorted({row["ranks"] for row in every})
    ideal = [base["tokens_per_s"] * each / base["ranks"] for each in ranks]
    left.axhline(1, color="grey", linestyle=":", label="ideal")
    left.set_ylim(0, max(1.1, 1.05 * max(row["efficiency_of_rounds"][1] for row in every)))
    left.set_ylabel("efficiency, share of the ideal")
    right.plot(ranks, ideal, color="grey", linestyle=":", label="ideal")
    right.set_yscale("log", base=2)
    right.set_yticks(ideal, [f"{each:,.0f}" for each in ideal])
    right.set_ylabel("throughput of all ranks, tokens/s")
    for axes, place in ((left, "lower left"), (right, "upper left")):
        _ranks_below(axes, ranks)
        axes.legend(fontsize=9, frameon=False, loc=place)
    figure.suptitle(_efficiency_title(modes), x=0.01, ha="left", fontsize=11)
    return figure


def _efficiency_title(modes: dict[str, list[dict[str, Any]]]) -> str:
    last = {mode: rows[-1] for mode, rows in modes.items()}
    said = [f"{row['efficiency']:.0%} ({mode} scaling, {counted(row['ranks'], 'rank')})" for mode, row in last.items()]
    return f"The largest sizes reach {' and '.join(said)} of the ideal rate"


def draw_phases(modes: dict[str, list[dict[str, Any]]]) -> Any:
    """Return the phases of a step, one on the other, for each size.

    By query of a rank: in both modes the bars would be equally high in an ideal world.
    """
    names = _phases_drawn([row for rows in modes.values() for row in rows])
    figure = new_figure(4.8)
    for axes, (mode, rows) in zip(figure.subplots(1, len(modes), squeeze=False, sharey=True)[0], modes.items(), strict=True):
        places, floor = range(len(rows)), [0.0] * len(rows)
        for name in [*names, "rest"]:
            heights = [1000 * _seconds(row, name, names) / row["queries_per_rank"] for row in rows]
            axes.bar(
                places, heights, 0.62, bottom=floor, label=phase_words(name), edgecolor="black", linewidth=0.6, **_look(name)
            )
            floor = [a + b for a, b in zip(floor, heights, strict=True)]
        axes.set_xticks(places, [f"{row['ranks']:,}" for row in rows])
        axes.set_xlabel("ranks")
        axes.set_ylabel("time of a rank for each of its queries, ms")
        axes.set_title(_phase_title(mode, rows[-1]), loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=9, frameon=False)
    return figure


def _look(name: str) -> dict[str, str]:
    """Return what a phase looks like, the same in every picture."""
    number = PHASES.index(name)
    return {"color": SHADES[number % len(SHADES)], "hatch": HATCHES[number // len(SHADES)]}


def _phase_title(mode: str, row: dict[str, Any]) -> str:
    shares = {name: phase["share"] for name, phase in row["phases"].items() if name != HIDDEN}
    largest = max(shares, key=lambda name: shares[name])
    return (
        f"{mode} scaling: on {counted(row['ranks'], 'rank')}\n{phase_words(largest)} takes most, {shares[largest]:.0%} of a step"
    )


def _phases_drawn(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the phases that are large enough to be seen anywhere."""
    return [
        name for name in PHASES[:-1] if any(name in row["phases"] and row["phases"][name]["share"] >= LEAST_SHARE for row in rows)
    ]


def _seconds(row: dict[str, Any], name: str, drawn: Sequence[str]) -> float:
    """Return the seconds of a phase; the rest has those of all that is not drawn by itself."""
    if name != "rest":
        return float(row["phases"][name]["mean_s"]) if name in row["phases"] else 0.0
    return sum(phase["mean_s"] for key, phase in row["phases"].items() if key not in (*drawn, HIDDEN))


def draw_bandwidth(modes: dict[str, list[dict[str, Any]]]) -> Any:
    """Return the bus bandwidth against the size of a message, with the calibrated peaks where they are known."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = new_figure(4.2)
    axes = figure.subplots()
    calls = [call | {"ranks": row["ranks"]} for rows in modes.values() for row in rows for call in row["bus"]]
    sizes = sorted({call["ranks"] for call in calls})
    for collective, marker in MARKERS.items():
        for number, ranks in enumerate(sizes):
            own = [call for call in calls if (call["collective"], call["ranks"]) == (collective, ranks)]
            own.sort(key=lambda call: call["num_bytes"])
            shade = str(0.75 * (1 - (number + 1) / len(sizes)))  # the more ranks, the darker
            label = f"{collective.replace('_', '-')}, {counted(ranks, 'rank')}"
            points = [call["num_bytes"] for call in own], [call["bytes_per_s"] / 1e9 for call in own]
            if own:
                axes.plot(*points, color=shade, marker=marker, linestyle="none", markersize=7, label=label)
    peaks = {call["peak_bytes_per_s"]: call["collective"] for call in calls if call["peak_bytes_per_s"]}
    for peak, collective in peaks.items():
        axes.axhline(peak / 1e9, color="grey", linestyle=":")
        words = f"calibrated peak of {collective.replace('_', '-')}"
        axes.annotate(
            words, (0.01, peak / 1e9), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", fontsize=8
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: bytes_in_words(value))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("size of a message, all ranks together")
    axes.set_ylabel("bus bandwidth, GB/s")
    best = max(calls, key=lambda call: call["bytes_per_s"])
    of_peak = f", {best['bytes_per_s'] / best['peak_bytes_per_s']:.0%} of the calibrated peak" if best["peak_bytes_per_s"] else ""
    title = f"Messages of a step reach up to {best['bytes_per_s'] / 1e9:.3g} GB/s{of_peak}"
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _ranks_below(axes: Any, ranks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [f"{each:,}" for each in ranks])
    axes.minorticks_off()
    axes.set_xlabel("ranks")
    axes.spines[["top", "right"]].set_visible(False)
