"""What `negpool bench loss` found, as tables."""

from typing import Any

from launch.counted import counted
from launch.tables import Part, Sheet, machine_words, rate_words


def loss_parts(found: dict[str, Any]) -> list[Part]:
    """Return each size against bare products, and the loss stage of the peer."""
    parts: list[Part] = []
    for size in found["sizes"]:
        title = (
            f"loss and gradients, {size['rows']:,} x {size['columns']:,}, width {found['width']}, {found['precision']}, "
            f"{machine_words(found)}, medians of {found['rounds']}"
        )
        parts.append(_against_bare(title, size["sides"], size["flops"], found["matmul_gflops"]))
    parts.append(_rate(found))
    if peer := found.get("peer"):
        title = f"{peer['rows']:,} x {peer['rows']:,}, the peer at mini_batch_size {peer['mini_batch_size']}"
        times = [
            (name, f"{seconds:.3f}", f"{peer['ratio']:.2f}" if name == "ours" else "1.00")
            for name, seconds in peer["seconds"].items()
        ]
        parts.append(Sheet(title, ("", "seconds", "ratio"), times))
    elif "peer" in found:
        parts.append("sentence-transformers is left out: none of its tiles fits into memory.")
    return parts


def loss_rank_parts(found: dict[str, Any]) -> list[Part]:
    """Return both ways of gathering against bare products, and memory and traffic by hard negatives."""
    title = (
        f"loss and gradients on {counted(found['ranks'], 'rank')}, each {found['rows']:,} x {found['columns']:,} scores, "
        f"width {found['width']}, {found['precision']}, {machine_words(found)}, medians of {found['rounds']}"
    )
    flops = 6 * found["rows"] * found["columns"] * found["width"]
    parts: list[Part] = [
        _against_bare(title, found["sides"], flops, found["matmul_gflops"]),
        "Queries or passages travel. Where queries do, scores are computed once for the loss and once for its gradient, or kept: "
        f"{found['kept_gib']:.3g} GiB of a rank. {_rate(found)}",
    ]
    memory = found["memory"]
    title = f"memory and traffic, {memory['queries_per_rank']:,} queries a rank, no scores kept"
    rows = [
        (
            f"{travels} travel, {row['hard_negatives']} hard negatives",
            f"{row[travels]['peak_gib']:.3f}",
            f"{row[travels]['moved_bytes'] / 2**20:.1f}",
            f"{row[travels]['foreseen_bytes'] / 2**20:.1f}",
        )
        for travels in ("queries", "passages")
        for row in memory["by_negatives"]
    ]
    return [*parts, Sheet(title, ("", "GiB", "MiB moved", "foreseen"), rows)]


def objective_parts(found: dict[str, Any]) -> list[Part]:
    """Return the time of each objective against InfoNCE's."""
    title = (
        f"loss and gradients, {found['num_rows']:,} x {found['num_columns']:,}, width {found['width']}, {found['precision']}, "
        f"{machine_words(found)}, medians of {found['rounds']}"
    )
    rows = [
        (name, f"{row['seconds']:.3f}", f"{row['ratio']:.2f}", "" if row["wanted"] is None else f"{row['wanted']:.2f}")
        for name, row in found["objectives"].items()
    ]
    return [Sheet(title, ("", "seconds", "ratio", "wanted"), rows)]


def _against_bare(title: str, sides: dict[str, dict[str, Any]], flops: float, gflops: float) -> Sheet:
    rows = []
    for name, row in sides.items():
        rows.append(
            (
                name,
                f"{row['seconds']:.4g}",
                f"{row['ratio']:.2f}",
                "" if row["wanted"] is None else f"{row['wanted']:.2f}",
                f"{row['peak_gib']:.2f}" if name.startswith("ours") else "",
                f"{flops / row['seconds'] / gflops / 1e9:.0%}",
            )
        )
    return Sheet(title, ("", "seconds", "ratio", "wanted", "GiB", "of matmul rate"), rows)


def _rate(found: dict[str, Any]) -> str:
    return f"GiB are beyond the embeddings. {rate_words(found['products'], found['matmul_gflops'])}"
