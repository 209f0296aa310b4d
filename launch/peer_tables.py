"""What `negpool bench peers` found, as tables and a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.bench.report import OTHERS, OURS, new_figure
from launch.counted import counted
from launch.tables import Part, Sheet, machine_words

WIDTH_INCHES = 13.0  # of the picture
EXACT = 1e-3  # how far a ratio or a cosine may be from 1 to be called exact in a picture; bfloat16 reaches it


def peer_parts(found: dict[str, Any]) -> list[Part]:
    """Return everybody's step on each number of ranks, the searches, mining, encoding, and who is left out."""
    parts: list[Part] = []
    for of_ranks in found["ranks"].values():
        parts += [_steps(found, of_ranks), *_remarks(found, of_ranks)]
    parts += [_searches(of_ranks) for of_ranks in found["ranks"].values()]
    if mined := found.get("mining"):
        parts += _mining(mined)
    if encoded := found.get("encoding"):
        parts += _encoding(encoded)
    parts += [f"Left out: {name}, {reason}." for name, reason in found["left_out"].items()]
    return parts


def _steps(found: dict[str, Any], of_ranks: dict[str, Any]) -> Sheet:
    options = found["options"]
    machine = machine_words(found | {"threads": of_ranks["threads"]})
    title = (
        f"a step on {counted(of_ranks['ranks'], 'rank')}: {options['queries']} pairs of up to {options['max_tokens']} tokens, "
        f"{options['precision']}, {machine} a rank, medians of {counted(options['rounds'], 'turn')}"
    )
    columns = ("", "seconds", "from", "to", "times ours", "peak GiB", "gradient ratio", "cosine", "MRR@10")
    rows = []
    for name, row in of_ranks["rows"].items():
        seconds = (f"{row[key]:.2f}" if key in row else "" for key in ("seconds", "least_s", "most_s", "times_ours", "peak_gib"))
        gradient = (f"{row['gradient_ratio']:.4f}", f"{row['gradient_cosine']:.6f}") if "gradient_ratio" in row else ("", "")
        rows.append((name, *seconds, *gradient, f"{row['mrr@10']:.4f}" if "mrr@10" in row else ""))
    return Sheet(title, columns, rows)


def _remarks(found: dict[str, Any], of_ranks: dict[str, Any]) -> Iterator[str]:
    options, ranks = found["options"], of_ranks["ranks"]
    if not found["has_gpu"] and ranks > found["cores"]:
        shared = f"{ranks} ranks share {counted(found['cores'], 'core')} here"
        yield f"{shared}: their times say who does less work, not how ranks scale."
    yield from (f"{name} is not in the table: {words}." for name, words in of_ranks["too_large"].items())
    if found["trains"]:
        yield f"MRR@10 after {options['steps']} steps of {options['trained_queries']} pairs without dropout."
        yield "AdamW takes no notice of a gradient that is off by one factor, unless it is clipped; SGD does."
    elif found["is_made"]:
        yield "Made texts teach nothing, so nobody is trained; MRR@10 needs a data set."


def _searches(of_ranks: dict[str, Any]) -> Sheet:
    rows = []
    for name, trials in of_ranks["trials"].items():
        best = of_ranks["rows"].get(name, {}).get("setting")
        chosen = ", ".join(f"{key}={value}" for key, value in best.items()) if best is not None else ""
        if not trials:
            rows.append((name, "one setting", "", "taken"))
        for setting, seconds in trials.items():
            took = "out of memory" if seconds is None else f"{seconds:.2f}"
            rows.append((name, setting, took, "taken" if setting == chosen else ""))
    title = f"settings searched on {counted(of_ranks['ranks'], 'rank')}, a step of a part of the batch"
    return Sheet(title, ("", "settings", "seconds of it", "found"), rows)


def _mining(mined: dict[str, Any]) -> list[Part]:
    title = f"{mined['negatives']} hard negatives for each of {mined['queries']:,} queries among {mined['passages']:,} passages"
    rows = [(name, f"{row['seconds']:.2f}", f"{row['ratio']:.2f}") for name, row in mined["sides"].items()]
    return [Sheet(title, ("", "seconds", "times ours"), rows), f"Of the negatives {mined['same_negatives']:.1%} are the same."]


def _encoding(encoded: dict[str, Any]) -> list[Part]:
    title = f"{encoded['texts']} texts of up to {encoded['max_tokens']} tokens encoded"
    rows = [(name, f"{row['seconds']:.2f}", f"{row['ratio']:.2f}") for name, row in encoded["sides"].items()]
    return [Sheet(title, ("", "seconds", "times ours"), rows)]


def plot_peers(found: dict[str, Any], file: Path) -> None:
    """Draw everybody's seconds and memory, one row of pictures for each number of ranks; hatched: the gradient is another one."""
    of_ranks = list(found["ranks"].values())
    figure = new_figure(sum(1.2 + 0.34 * len(each["rows"]) for each in of_ranks))
    figure.set_figwidth(WIDTH_INCHES)
    axes = figure.subplots(len(of_ranks), 2, squeeze=False, sharey="row", height_ratios=[1 + len(e["rows"]) for e in of_ranks])
    for (left, right), each in zip(axes, of_ranks, strict=True):
        timed = {name: row for name, row in each["rows"].items() if "seconds" in row}
        for place, key, unit in ((left, "seconds", "s"), (right, "peak_gib", "GiB")):
            values = [row[key] for row in timed.values()]
            colors = [OURS if name.startswith("ours") else OTHERS for name in timed]
            bars = place.barh(list(timed), values, color=colors, edgecolor="black", linewidth=0.4)
            for bar, row in zip(bars, timed.values(), strict=True):
                bar.set_hatch("" if is_exact(row) else "////")
            place.bar_label(bars, [_bar_words(row[key], unit, row) for row in timed.values()], padding=4)
            place.set_xlim(0, 1.6 * max(values))
            place.spines[["top", "right"]].set_visible(False)
        left.invert_yaxis()
        left.set_title(f"a step on {counted(each['ranks'], 'rank')}", loc="left", fontsize=10)
        left.set_xlabel("seconds")
        right.set_xlabel("peak memory of a rank, GiB; hatched: not the exact gradient")
    figure.savefig(file, dpi=150)


def is_exact(row: dict[str, Any]) -> bool:
    """Tell whether a gradient is the exact one, as far as the precision goes."""
    return max(abs(row["gradient_ratio"] - 1), abs(row["gradient_cosine"] - 1)) <= EXACT


def _bar_words(value: float, unit: str, row: dict[str, Any]) -> str:
    if is_exact(row) or unit != "s":
        return f"{value:.3g} {unit}"
    return f"{value:.3g} {unit}  gradient x {row['gradient_ratio']:.3g}, cosine {row['gradient_cosine']:.3f}"
