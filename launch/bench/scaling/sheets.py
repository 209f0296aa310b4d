"""What `negpool bench scaling` found, as tables: sizes, phases, bytes, and the bandwidth of each collective."""

from typing import Any

from launch.bench.scaling.summary import MESSAGES
from launch.counted import counted
from launch.step_phases import HIDDEN, PHASES
from launch.tables import Part, Sheet, machine_words

WORDS = {  # phases as people read them
    "reduce_scatter": "reduce-scatter",
    "encode_again": "encode again",
    "parameters": "parameters, exposed",
    "parameters_hidden": "parameters, hidden",
    "control": "control messages",
    "idle": "idle, waiting for a slower rank",
}
SIZES = ("", "nodes", "queries a rank", "step, ms", "rounds, ms", "tokens/s", "efficiency", "bare product's", "MFU")
LEAST_BYTES = 16 * 1024  # of a message that has a row


def scaling_parts(found: dict[str, Any]) -> list[Part]:
    """Return the tables of each mode, and sentences on what was measured how."""
    parts: list[Part] = [_about(found)]
    for mode, rows in found["sizes"].items():
        if rows:
            parts += [
                _sizes(mode, rows),
                _phases(mode, rows),
                _machines(mode, rows),
                _bytes(mode, rows),
                _bus(mode, rows, found["fabric"]),
            ]
    return [part for part in parts if isinstance(part, str) or part.rows] + [*_remarks(found), *_failures(found)]


def phase_words(name: str) -> str:
    """Return a phase as people read it."""
    return WORDS.get(name, name.replace("_", " "))


def _about(found: dict[str, Any]) -> str:
    commit = f"commit {found['commit'][:12]}" + (" with changes" if found["is_modified"] else "")
    texts = "the job's texts" if found["data"] == "job" else f"made texts {found['data']}"
    return (
        f"{machine_words(found)} a rank, torch {found['torch']}, {commit}; {found['backend']}, {found['precision']}, {texts}, "
        f"{found['passages_per_query']:g} passages a query, negatives {found['negatives']}, {found['travels']} travel; "
        f"{found['warm_up']} warm-up and {found['steps']} measured steps in each of {counted(found['rounds'], 'round')}."
    )


def _sizes(mode: str, rows: list[dict[str, Any]]) -> Sheet:
    what = {
        "strong": f"strong scaling: {rows[0]['queries']:,} queries a step",
        "weak": f"weak scaling: {rows[0]['queries_per_rank']:,} queries a rank",
    }
    cells = [
        (
            counted(row["ranks"], "rank"),
            f"{row['nodes']:,}",
            f"{row['queries_per_rank']:,}",
            f"{1000 * row['step_s']:.4g}",
            _ms_between(row["step_s_of_rounds"]),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['efficiency']:.3f}",
            f"{row['matmul_efficiency']:.3f}",
            f"{row['share_of_matmul_rate']:.1%}",
        )
        for row in rows
    ]
    return Sheet(f"{what[mode]}; efficiency against {counted(rows[0]['ranks'], 'rank')}", SIZES, cells)


def _machines(mode: str, rows: list[dict[str, Any]]) -> Sheet:
    cells = []
    for row in rows:
        slower = f"{row['slowest_over_fastest'] - 1:+.1%}"
        half = _ms_between(row["step_s_quartiles"])
        cells.append((counted(row["ranks"], "rank"), half, f"{row['peak_gib']:.2f}", row["slowest_host"], slower))
    columns = ("", "half of the steps, ms", "peak GiB of a rank", "slowest host", "slowest over fastest rank")
    return Sheet(f"{mode} scaling: spread of the steps, memory, ranks against each other", columns, cells)


def _phases(mode: str, rows: list[dict[str, Any]]) -> Sheet:
    """Return a row for each phase that takes time anywhere; the sums of what is waited for and of what is not at the end."""
    names = [name for name in (*PHASES, HIDDEN) if any(name in row["phases"] and row["phases"][name]["max_s"] for row in rows)]
    cells = [(phase_words(name), *(_phase(row, [name]) for row in rows)) for name in names]
    cells.append(("all messages, exposed", *(_phase(row, MESSAGES) for row in rows)))
    columns = ("", *(counted(row["ranks"], "rank") for row in rows))
    return Sheet(f"{mode} scaling: milliseconds of a step, mean of the ranks (share of the step)", columns, cells)


def _phase(row: dict[str, Any], names: tuple[str, ...] | list[str]) -> str:
    phases = [row["phases"][name] for name in names if name in row["phases"]]
    if len(phases) < len(names):
        return "not known"
    return f"{1000 * sum(p['mean_s'] for p in phases):.4g} ({sum(p['share'] for p in phases):.1%})"


def _bytes(mode: str, rows: list[dict[str, Any]]) -> Sheet:
    cells = []
    for row in rows:
        sent, formula = row["bytes"], row["bytes"]["formula"]
        interface = sent["interface"]
        seen = (
            ("", "", "") if interface is None else (_mib(interface["sent"]), _off(interface["sent"], formula), interface["name"])
        )
        cells.append((counted(row["ranks"], "rank"), _mib(formula), _mib(sent["counted"]), _off(sent["counted"], formula), *seen))
    columns = ("", "formula", "calls", "off by", "interface", "off by", "name")
    return Sheet(f"{mode} scaling: MiB that a rank sends in a step", columns, cells)


def _bus(mode: str, rows: list[dict[str, Any]], fabric: str | None) -> Sheet:
    cells = []
    for row in rows:
        for call in (each for each in row["bus"] if each["num_bytes"] >= LEAST_BYTES):
            peak = call["peak_bytes_per_s"]
            of_peak = (f"{peak / 1e9:.3g}", f"{call['bytes_per_s'] / peak:.0%}") if peak else ("", "")
            times = bytes_in_words(call["num_bytes"]), f"{1000 * call['median_s']:.4g}", f"{call['bytes_per_s'] / 1e9:.3g}"
            cells.append((f"{counted(row['ranks'], 'rank')}, {call['collective'].replace('_', '-')}", *times, *of_peak))
    against = f", against {fabric}" if fabric else ""
    columns = ("", "size", "ms", "bus GB/s", "peak GB/s", "of the peak")
    return Sheet(f"{mode} scaling: bus bandwidth of the messages of a step{against}", columns, cells)


def _remarks(found: dict[str, Any]) -> list[str]:
    return [
        "A step's time is that of the slowest rank: the median of the rounds' medians, and beside it the fastest and the slowest "
        "round, and the middle half of all steps. Efficiency: queries of a rank and second against those of the smallest size in "
        "the same round, median of the rounds. Bare product's: the same for the rate of a large matrix product, every rank "
        "multiplying at once, which is what the machine itself loses. MFU: the share of that rate. Hidden messages travel beside "
        "the backward and are in no sum. Messages below 16 KiB are in scaling.json alone.",
    ]


def _failures(found: dict[str, Any]) -> list[str]:
    return [
        f"Not measured: {counted(each['ranks'], 'rank')}, {counted(each['queries'], 'query')}: {each['why'].splitlines()[-1]}"
        for each in found["failed"]
    ]


def bytes_in_words(num_bytes: float) -> str:
    """Return a number of bytes with the largest unit that it fills."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes:g} B"


def _ms_between(ends: list[float]) -> str:
    return f"{1000 * ends[0]:.4g}-{1000 * ends[1]:.4g}"


def _mib(num_bytes: float | None) -> str:
    return "not known" if num_bytes is None else f"{num_bytes / 2**20:.4g}"


def _off(num_bytes: float, formula: float | None) -> str:
    return f"{num_bytes / formula - 1:+.1%}" if formula else ""
