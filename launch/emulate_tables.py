"""What `negpool bench emulate` found, as tables: time by phase, memory beside the plan, the plan's items."""

from typing import Any

from launch.counted import counted
from launch.tables import Part, Sheet, machine_words

PHASES = ("encode", "control", "gather", "masks", "statistics", "loss", "reduce_scatter", "encode_again", "optimizer")


def emulate_parts(found: dict[str, Any]) -> list[Part]:
    """Return the tables, and what they do not say."""
    sizes = found["sizes"]
    title = (
        f"own work of one rank among many, {found['model']}, {found['backend']}, {found['precision']}, "
        f"{counted(found['hard_negatives'], 'hard negative')} a query, width {found['width']}, {machine_words(found)}, "
        f"medians of {found['rounds']}"
    )
    times = [(_name(size), f"{size['own_s']:.3f}", f"{size['own_s'] / sizes[0]['own_s']:.2f}") for size in sizes]
    of_phases = [(name.replace("_", " "), *(f"{size['seconds'].get(name, 0.0):.4f}" for size in sizes)) for name in PHASES]
    names = [name for name in sizes[0]["plan_gib"] if any(size["plan_gib"][name] for size in sizes)]
    planned = [(name, *(f"{size['plan_gib'][name]:.3f}" for size in sizes)) for name in names]
    columns = ("", *map(_name, sizes))
    return [
        Sheet(title, ("", "seconds", "ratio"), times),
        Sheet("the same by phase, seconds", columns, of_phases),
        Sheet("the loss of all ranks", ("", "queries", "passages", "travels", "loss", "masked"), [_loss(size) for size in sizes]),
        _memory(sizes),
        Sheet("what a rank is foreseen to hold, GiB", columns, planned),
        "The other ranks are this one mirrored, under keys of their own. Nothing is sent: no figure has communication.",
    ]


def _loss(size: dict[str, Any]) -> tuple[str, ...]:
    passages = size["passages_per_rank"] * size["ranks"]
    return (
        _name(size),
        f"{size['queries']:,}",
        f"{passages:,}",
        size["travels"],
        f"{size['loss']:.3f}",
        f"{size['share_masked']:.2g}",
    )


def _memory(sizes: list[dict[str, Any]]) -> Sheet:
    """Return peaks above what lasts from step to step, beside the plan."""
    rows = [
        (f"{_name(size)}, {words}", f"{part['peak_gib']:.3f}", f"{part['plan_gib']:.3f}", f"{part['ratio']:.2f}")
        for size in sizes
        for name, words in (("loss", "the loss"), ("encode_again", "encoding again"), ("step", "all"))
        for part in [size["memory"][name]]
    ]
    return Sheet("memory of a step above what lasts", ("", "peak GiB", "plan GiB", "plan / peak"), rows)


def _name(size: dict[str, Any]) -> str:
    return f"{size['ranks']:,} ranks x {size['queries_per_rank']:,}"
