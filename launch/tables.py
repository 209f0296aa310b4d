"""What `negpool check` and `negpool bench` found, as tables for people."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text


def check_table(found: dict[str, Any]) -> Group:
    """Return the variants, one a row, the groups of the worst of them, and a sentence."""
    offload = ", offload" if found["offload"] else ""
    title = f"{found['model']}, {found['queries']} queries, {found['ranks']} ranks, {found['backend']}{offload}"
    table = _table(title, ["", "ratio off by", "cosine", "chunks", "GiB", "tokens/s a rank", "padding", "twice"])
    for name, row in found["variants"].items():
        if "groups" not in row:
            table.add_row(name, "", "", "", f"{row['peak_memory_gib']:.2f}", "", "", "")
            continue
        table.add_row(
            name,
            f"{row['max_ratio_error']:.1e}",
            f"{row['min_cosine']:.7f}",
            str(row["chunks"]),
            f"{row['peak_memory_gib']:.2f}",
            f"{row['tokens_per_rank_per_s']:,}",
            f"{row['share_padding']:.1%}",
            f"{row['share_encoded_twice']:.0%}",
        )
    rows = {name: row for name, row in found["variants"].items() if "groups" in row}
    worst = max(rows, key=lambda name: rows[name]["max_ratio_error"])
    groups = _table(f"by group of parameters: {worst}", ["", "ratio", "cosine"])
    for name, row in rows[worst]["groups"].items():
        groups.add_row(name, f"{row['ratio']:.6f}", f"{row['cosine']:.7f}")
    calls = ", ".join(f"{count} {name}" for name, count in found["collectives"].items()) or "none"
    follow = "whatever the number of chunks" if found["collectives_do_not_follow_chunks"] else "more with more chunks"
    verdict = "The gradients are exact." if found["ok"] else "The gradients are NOT those of the reference."
    style = "green" if found["ok"] else "bold red"
    return Group(table, groups, Text(f"Collectives of a step: {calls}; {follow}."), Text(verdict, style))


def step_table(found: dict[str, Any]) -> Group:
    """Return everybody's step, and ours against a plain one."""
    title = (
        f"{found['pairs_per_rank']} pairs a rank, {found['ranks']} ranks, texts up to {found['max_tokens']} tokens, "
        f"{_machine(found)}, medians of {found['rounds']}"
    )
    tables = [_times(title, found["steps"])]
    if "against_plain" in found:
        rows = {name: row for name, row in found["against_plain"].items() if name != "pairs"}
        tables.append(_times(f"against a plain step, {found['against_plain']['pairs']} pairs", rows))
    notes = [f"Matrix products: {found['matmul_gflops']:,.0f} GFLOP/s on this machine."]
    if found.get("gradient_cosine") is not None:
        notes.append(f"Both gradients without dropout: cosine {found['gradient_cosine']:.6f}. Peer at {found['peer_setting']}.")
    return Group(*tables, Text("\n".join(notes)))


def loss_table(found: dict[str, Any]) -> Group:
    """Return the loss stage against bare products and the peer."""
    title = f"{found['rows']:,} x {found['columns']:,}, width {found['width']}, {found['dtype']}, {_machine(found)}"
    table = _table(title, ["", "seconds", "ratio"])
    for name, seconds in found["seconds"].items():
        table.add_row(name, f"{seconds:.2f}", f"{found['ratio']:.2f}" if name == "ours" else "1.00")
    tables: list[Any] = [table, Text(f"{found['peak_gib_beyond_embeddings']:.2f} GiB beyond the embeddings.")]
    if peer := found.get("peer"):
        rows = _table(
            f"{peer['rows']:,} x {peer['rows']:,}, the peer at mini_batch_size {peer['mini_batch_size']}", ["", "seconds"]
        )
        for name, seconds in peer["seconds"].items():
            rows.add_row(name, f"{seconds:.2f}")
        tables.append(rows)
    return Group(*tables)


def _times(title: str, rows: dict[str, dict[str, float]]) -> Table:
    table = _table(title, ["", "seconds", "ratio", "peak GiB", "of matmul rate"])
    for name, row in rows.items():
        share = row.get("share_of_matmul_rate")
        cells = [f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", f"{row['peak_gib']:.2f}", f"{share:.0%}" if share else ""]
        table.add_row(name, *cells)
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _machine(found: dict[str, Any]) -> str:
    return found["device"] + (f", {found['threads']} threads" if "threads" in found else "")
