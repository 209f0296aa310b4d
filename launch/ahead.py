"""What a run would make at its start, made ahead of it: tables of texts, judgements and tokens.

Ranks that are rented do not wait for one of them to tokenise, and where a shared folder has no locks nothing is made twice.
"""

from typing import Any

from launch.jobfile import Jobs
from trainer.data.cache import Table, clear_stale, tables_asked_for
from trainer.data.collate import training_set
from trainer.data.datasets import open_data
from trainer.encoder.model import load_text_rules
from trainer.encoder.tokens import tokenize_side
from trainer.errors import InputError
from trainer.handoff.manifest import TornVersion, open_version

SIDES = ("queries", "corpus")


def make_tables(jobs: Jobs, verify: bool = False) -> dict[str, Any]:
    """Make the tables that training, evaluating and mining of a job read, but for those that are there.

    Every split is in them: tokens are those of all queries and of the whole corpus, and both sides share them.
    verify: also compare the hash of every file with what it was when it was made. Raises InputError.
    """
    job = jobs.train
    with tables_asked_for() as tables:
        data = open_data(job.data, job.sources)
        tokenizer, traits = load_text_rules(job.model)
        queries, passages = (tokenize_side(data, side, tokenizer, traits) for side in SIDES)
        split = job.data.train_split
        training_set(data, split, queries.select(data.training_queries(split)), passages)  # keys, where sources need some
    clear_stale(data.cache)
    if verify:
        _verify(tables)
    described = [
        {"what": table.what, "folder": str(table.folder), "bytes": table.num_bytes, "made": table.made} for table in tables
    ]
    return {"cache": str(data.cache), "num_made": sum(table.made for table in tables), "tables": described}


def describe(found: dict[str, Any]) -> str:
    """Return what was made and what was there, one line a table."""
    lines = [
        f"{'made' if table['made'] else 'there':<6}{table['bytes'] / 2**20:>11,.1f} MiB  {table['what']}: {table['folder']}"
        for table in found["tables"]
    ]
    total_gib = sum(table["bytes"] for table in found["tables"]) / 2**30
    return "\n".join([*lines, f"{found['num_made']} of {len(lines)} tables made, {total_gib:,.2f} GiB in {found['cache']}"])


def _verify(tables: list[Table]) -> None:
    for table in tables:
        try:
            open_version(table.folder)
        except TornVersion as error:
            raise InputError(f"{error}; delete {table.folder}, and the same command makes it again") from error
