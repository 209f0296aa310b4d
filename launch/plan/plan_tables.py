"""What `negpool plan` found, as tables: a column for each number of ranks."""

import math
from typing import Any

from launch.step_phases import PHASES
from launch.tables import Part, Sheet

MEMORY = {
    "process": "libraries",
    "weights": "weights",
    "optimizer": "moments",
    "gradients": "gradients",
    "average": "average of the weights",
    "backend": "copies of the backend",
    "gathered_layers": "layers gathered",
    "published": "published copy",
    "saved": "copy for a checkpoint",
    "embeddings": "embeddings, gathered and own, and gradients",
    "kept_scores": "scores kept",
    "tile": "a tile of scores",
    "chunk": "graph of a chunk",
    "kept_graphs": "graphs kept",
}
HOURS, GIB = 3600, 2**30


def plan_parts(found: dict[str, Any]) -> list[Part]:
    """Return the plan as tables and sentences."""
    rows, model, texts = found["sizes"], found["model"], found["texts"]
    fabric = "" if found["fabric"] is None else f", {found['fabric']['name']}"
    title = f"{model['name']} on {found['device']['name']}{fabric}, {found['backend']}, {found['precision']['encode']}"
    return [
        f"{model['name']}: {model['parameters'] / 1e6:,.0f} million parameters, {model['trained'] / 1e6:,.0f} trained, "
        f"{model['shape']}. Texts of {texts['query_tokens']:.0f} and {texts['passage_tokens']:.0f} tokens, {texts['source']}.",
        Sheet(f"{title}: a step", _columns(rows), [*_steps(rows)]),
        Sheet("ms of a step, by phase", _columns(rows), _phases(rows)),
        Sheet("GiB of a rank", _columns(rows), _memory(rows)),
        Sheet("operations and messages of a rank in a step", _columns(rows), _work(rows)),
        Sheet("the run", _columns(rows), _run(rows)),
        *_verdict(found),
        f"Rates: {found['device']['source'].rstrip('.')}.",
        *([] if found["fabric"] is None else [f"Network: {found['fabric']['source'].rstrip('.')}."]),
    ]


def _columns(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    return ("ranks", *(f"{row['ranks']:,}" for row in rows))


def _line(name: str, cells: Any) -> tuple[str, ...]:
    return (name, *cells)


def _steps(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        _line("nodes", (f"{row['nodes']:,}" for row in rows)),
        _line("queries of all ranks", (f"{row['queries']:,}" for row in rows)),
        _line("queries of a rank", (f"{row['queries_per_rank']:,}" for row in rows)),
        _line("tokens of a rank", (f"{row['tokens']:,.0f}" for row in rows)),
        _line("what travels", (row["travels"] for row in rows)),
        _line("chunks, graphs kept", (f"{row['chunks']:,}, {row['graphs_kept']:,}" for row in rows)),
        _line("tokens of a chunk", (f"{row['chunk_tokens']:,}" for row in rows)),
        _line("seconds", (_number(row["step_s"]) for row in rows)),
        _line("seconds without overlap", (_number(row["step_without_overlap_s"]) for row in rows)),
        _line("tokens/s of all ranks", (f"{row['tokens_per_s']:,.0f}" for row in rows)),
        _line("efficiency", (f"{row['efficiency']:.2f}" for row in rows)),
        _line("of the matrix rate", (f"{row['share_of_matmul_rate']:.0%}" for row in rows)),
        _line("bottleneck", (row["bottleneck"] for row in rows)),
        _line("GiB of a rank", (f"{row['memory_total_gib']:.1f} of {row['memory_limit_gib']:.1f}" for row in rows)),
        _line("can run", ("no" if row["problems"] else "yes" for row in rows)),
    ]


def _phases(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    names = [phase for phase in PHASES if any(row["phases"][phase] for row in rows)]
    found = [_line(name, (_number(1000 * row["phases"][name]) for row in rows)) for name in names]
    return [*found, _line("parameters, hidden", (_number(1000 * row["parameters_hidden_s"]) for row in rows))]


def _memory(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        _line(title, (f"{row['memory_gib'][name]:.2f}" for row in rows))
        for name, title in MEMORY.items()
        if any(row["memory_gib"][name] >= 0.005 for row in rows)
    ]


def _work(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    of_flops = [name for name in PHASES if any(row["flops"].get(name) for row in rows)]
    of_bytes = [name for name in PHASES if any(row["bytes"].get(name) for row in rows)]
    return [
        *(_line(f"TFLOP, {name}", (_number(row["flops"][name] / 1e12) for row in rows)) for name in of_flops),
        *(_line(f"MiB sent, {name}", (_number(row["bytes"].get(name, 0) / 2**20) for row in rows)) for name in of_bytes),
    ]


def _run(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    kept = [row["storage"] for row in rows]
    lines = [
        _line("checkpoint, GiB", (f"{each['checkpoint_bytes'] / GIB:.2f}" for each in kept)),
        _line("its files", (f"{each['checkpoint_files']:,}" for each in kept)),
        _line("its seconds", (_number(each["checkpoint_s"]) for each in kept)),
        _line("--save-seconds needed", (f"{each['save_seconds']:,}" for each in kept)),
        _line("GiB read at a start, all ranks", (f"{each['start_bytes'] / GIB:,.1f}" for each in kept)),
        _line("GiB of a node's host", (f"{sum(each['host_bytes'].values()) / GIB:,.1f}" for each in kept)),
    ]
    if "evaluation_s" in rows[0]:
        lines.append(_line("evaluation, seconds", (_number(row["evaluation_s"]) for row in rows)))
        lines.append(_line("evaluation, steps", (f"{row['evaluation_s'] / row['step_s']:,.1f}" for row in rows)))
    if "refresh" in rows[0]:
        refreshes = [row["refresh"] for row in rows]
        lines.append(_line("refresh, seconds (ranks)", (f"{_number(r['seconds'])} ({r['ranks']})" for r in refreshes)))
        lines.append(_line("age of negatives, steps", map(_age, rows)))
        if "ranks_for_age" in refreshes[0]:
            wanted = ("never" if r["ranks_for_age"] is None else f"{r['ranks_for_age']:,}" for r in refreshes)
            lines.append(_line("miner ranks for --age", wanted))
    if "steps" in rows[0]:
        lines.append(_line("steps", (f"{row['steps']:,}" for row in rows)))
        lines.append(_line("hours", (_number(row["run_s"] / HOURS) for row in rows)))
        lines.append(_line("hours x ranks", (_number(row["rank_hours"]) for row in rows)))
    if "energy_kwh" in rows[0]:
        lines.append(_line("kWh", (_number(row["energy_kwh"]) for row in rows)))
    return lines


def _age(row: dict[str, Any]) -> str:
    refresh = row["refresh"]
    if refresh["youngest_age"] >= row.get("steps", math.inf):
        return "none before the end"
    return f"{refresh['youngest_age']:,} to {refresh['oldest_age']:,}"


def _verdict(found: dict[str, Any]) -> list[str]:
    first = found["first_that_cannot_run"]
    if first is None:
        return ["All of these can run."]
    return [f"{first['ranks']:,} ranks cannot run: {problem}." for problem in first["problems"]]


def _number(value: float) -> str:
    """Return three digits, or a whole number."""
    return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
