"""What `negpool bench fabric` found, as tables: the constants, and each size as measured and as they say it."""

from typing import Any

from launch.counted import counted
from launch.tables import Part, Sheet, machine_words

PLACES = {"inside": "inside a node", "between": "between nodes, a rank of each", "together": "all ranks together"}


def fabric_parts(found: dict[str, Any]) -> list[Part]:
    """Return the constants, the sizes of each part, and the largest error of what was held out."""
    fabric = found["fabric"]
    title = f"fabric {fabric['name']}: {counted(found['ranks'], 'rank')}, {found['backend']}, {machine_words(found)}"
    constants = [
        (f"{collective}, {PLACES[part]}", f"{1e6 * wire['latency_s']:,.1f}", f"{wire['bytes_per_s'] / 1e9:.3g}")
        for part in ("inside", "between")
        for collective, wire in fabric[part].items()
    ]
    parts: list[Part] = [Sheet(title, ("", "latency of a hop, us", "GB/s of a rank"), constants)]
    for part, place in PLACES.items():
        rows = [row for row in found["rows"] if row["part"] == part]
        if rows:
            title = f"{place}, {counted(rows[0]['ranks'], 'rank')}, medians of {found['rounds']} or more"
            columns = ("", "bytes", "ms", "fitted ms", "error", "about")
            parts.append(Sheet(title, columns, [_row(row) for row in rows]))
    error = found["largest_held_out_error"]
    parts.append(
        f"The largest error of a size that was held out is {error:.0%}." if error is not None else "No size was held out."
    )
    return parts


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["collective"],
        f"{row['num_bytes']:,}",
        f"{1e3 * row['median_s']:.3f}",
        f"{1e3 * row['fitted_s']:.3f}",
        f"{row['error']:+.0%}",
        "held out" if row["is_held_out"] else "",
    )
