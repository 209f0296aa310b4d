"""A file of records in the form of another trainer, JSON lines or Parquet: what its records have, and which of them fit.

Other trainers crash where records differ: sentence-transformers if one has fewer negatives than the others of its batch,
Tevatron and FlagEmbedding if one has none. So all records of a file are alike; those that do not fit are left out and counted.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.datasets import RetrievalData
from trainer.data.groups import BATCH, Group, read_rows
from trainer.data.peers import flagembedding, pairs, tevatron
from trainer.data.row import Contents, Row
from trainer.errors import InputError

SUFFIXES = (".jsonl", ".parquet")

Groups = Iterable[list[Group]]
Record = dict[str, Any]


class Form(NamedTuple):
    """How records are written: the columns are the same for all of a file."""

    title: str  # for people
    write: Callable[[Row, Contents], Iterator[Record]]
    columns: Callable[[Contents], dict[str, pa.DataType]]
    negatives: str  # "equal": as many in every record; "some": in every record or in none; "any": as they come
    is_for_each_positive: bool = False  # whether a query has a record for each of its positives


PAIRS = "sentence-transformers"  # the form of its tuples, and the title of all its forms
FORMS = {
    PAIRS: Form(PAIRS, pairs.write, pairs.columns, "equal", True),
    "triplet": Form(PAIRS, pairs.write_triplets, pairs.triplet_columns, "some", True),
    "labeled-pair": Form(PAIRS, pairs.write_labeled_pairs, pairs.labeled_pair_columns, "any"),
    "labeled-list": Form(PAIRS, pairs.write_labeled_lists, pairs.labeled_list_columns, "some", True),
    "tevatron": Form("Tevatron", tevatron.write, tevatron.columns, "some"),
    "flagembedding": Form("FlagEmbedding", flagembedding.write, flagembedding.columns, "some"),
}


@dataclass
class Counts:
    """What became of the records of one file."""

    records: int = 0
    num_negatives: int = 0  # what every record has, or has at least
    left_out: int = 0  # records, since they have fewer
    cut: int = 0  # records that have more, of which the first stay


def refuse_file(out: Path, argument: str = "--out") -> None:
    """Raise InputError if no new file of records can be made there. argument: what the command line calls it."""
    if not out.name.endswith(SUFFIXES):
        raise InputError(f"{argument} {out} is no {' or '.join(SUFFIXES)}; end the file's name with one of them")
    if out.exists():
        raise InputError(f"{out} is there already; give {argument} a new file, or delete that one")


def plan_negatives(groups: Groups, form: Form) -> int:
    """Return how many negatives every record has, or has at least; records with fewer are left out.

    Where all are equal, it is the number that keeps most passages: of records with more the first so many stay. It is 0 where
    no record has any.
    """
    each = [(len(g.negatives), len(g.positives) if form.is_for_each_positive else 1) for block in groups for g in block]
    count, times = np.array(each, np.int64).reshape(-1, 2).T
    if form.negatives == "any" or not count.any():
        return 0
    if form.negatives == "some":
        return 1
    sizes = np.unique(count[count > 0])
    num_kept = [(1 + size) * times[count >= size].sum() for size in sizes]
    return int(sizes[::-1][np.argmax(num_kept[::-1])])


def write_records(path: Path, form: Form, has: Contents, data: RetrievalData, groups: Groups) -> Counts:
    """Write what fits of the groups to a new file and return the counts; has.num_negatives: as planned."""
    counts = Counts(num_negatives=has.num_negatives)
    kept = (_fitting(block, form, counts) for block in groups)
    records = (record for block in kept for row in read_rows(data, block) for record in form.write(row, has))
    if path.suffix == ".parquet":
        counts.records = _write_parquet(path, records, pa.schema(form.columns(has).items()))
    else:
        counts.records = _write_json_lines(path, records)
    return counts


def say_counts(counts: Counts, form: Form) -> list[str]:
    """Return a sentence on the records that are left out, and one on those that are cut, where there are any."""
    said = []
    if counts.left_out:
        few = f"fewer than {counts.num_negatives} negatives" if counts.num_negatives > 1 else "no negatives"
        among = f"{counts.left_out:,} of {counts.records + counts.left_out:,} records"
        said.append(f"{among} have {few} and are left out, as {form.title} cannot train on them beside the others")
    if counts.cut and counts.num_negatives:
        said.append(f"{counts.cut:,} records have more than {counts.num_negatives} negatives, of which the first stay")
    elif counts.cut:
        said.append(f"the negatives of {counts.cut:,} records are left out")
    return said


def _fitting(block: list[Group], form: Form, counts: Counts) -> list[Group]:
    """Return the groups that fit, cut to what is planned, and count the others."""
    if form.negatives == "any":
        return block
    kept, least = [], counts.num_negatives
    for group in block:
        num_records = len(group.positives) if form.is_for_each_positive else 1
        if len(group.negatives) < least:
            counts.left_out += num_records
        elif len(group.negatives) > least and (form.negatives == "equal" or least == 0):
            counts.cut += num_records
            scores = None if group.scores is None else group.scores[:least]
            kept.append(replace(group, negatives=group.negatives[:least], teacher=group.teacher[:least], scores=scores))
        else:
            kept.append(group)
    return kept


def _write_json_lines(path: Path, records: Iterator[Record]) -> int:
    num_records = 0
    with open(path, "w", encoding="utf-8") as file:
        for num_records, record in enumerate(records, 1):  # noqa: B007
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return num_records


def _write_parquet(path: Path, records: Iterator[Record], schema: pa.Schema) -> int:
    num_records = 0
    with pq.ParquetWriter(path, schema) as writer:
        batch: list[Record] = []
        for num_records, record in enumerate(records, 1):  # noqa: B007
            batch.append(record)
            if len(batch) == BATCH:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        writer.write_table(pa.Table.from_pylist(batch, schema))
    return num_records
