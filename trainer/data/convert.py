"""Writes a data set of any form in another form; what that form has no place for is left out, counted and reported.

Everything streams from the tables, and what is written is whole or absent.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.datasets import RetrievalData
from trainer.data.groups import BATCH, entries, judged_groups, numbers
from trainer.data.judged import SIDES
from trainer.data.peers.beir import write_judgements, write_texts
from trainer.data.record_file import FORMS, SUFFIXES, Form, plan_negatives, refuse_file, say_counts, write_records
from trainer.data.row import Entry
from trainer.data.survey import Survey, lost_in_collection, say_lost
from trainer.errors import InputError
from trainer.handoff.beside import made_whole, refuse_full

BEIR = "beir"


def refuse_out(out: Path, form: str) -> None:
    """Raise InputError if something would be overwritten, or a form cannot be written there."""
    if form == BEIR and out.name.endswith(SUFFIXES):
        raise InputError(f"{out} names a file, and {BEIR} is a folder; give OUT a name without {out.suffix}")
    if form != BEIR and out.suffix:
        refuse_file(out, "OUT")
    else:
        refuse_full(out, "OUT")


def convert_data(
    data: RetrievalData, out: Path, form: str, split: str | None = None, num_negatives: int | None = None
) -> dict[str, Any]:
    """Write a data set as "beir" or one of FORMS and return what was written and what has no place there.

    out: for beir a folder, else a file for one split, or a folder of files named by split. split: only this one.
    num_negatives: of every record, for a form whose records are equal, and at least, for others; None: as plan_negatives has it.
    Raises InputError if something would be overwritten.
    """
    refuse_out(out, form)
    if form == BEIR and num_negatives is not None:
        raise InputError(f"--negatives is for records, and {BEIR} has none; leave it out")
    splits = _splits(data, out, form, split)
    with made_whole(out) as beside:
        if form == BEIR:
            places = {name: np.arange(len(data.qrels[name].scores)) for name in splits}
            lost = lost_in_collection(data)
            return {"files": write_collection(beside, data, places), "lost": lost, "said": say_lost(lost, "BEIR")}
        paths = {name: beside if out.suffix else beside / f"{name}.jsonl" for name in splits}
        return _write_files(data, FORMS[form], paths, num_negatives)


def told(found: dict[str, Any], out: Path) -> list[str]:
    """Return lines for people on what was written, and what was left out."""
    counts = {name: count if isinstance(count, int) else count["records"] for name, count in found["files"].items()}
    return [f"{out}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()), *found["said"]]


def write_collection(folder: Path, data: RetrievalData, places: dict[str, np.ndarray]) -> dict[str, int]:
    """Write BEIR's files into a new folder and return how many lines they have. places: by split, the judgements to write."""
    (folder / "qrels").mkdir(parents=True)
    written = {side: write_texts(folder / f"{side}.jsonl", _all_entries(data, side)) for side in SIDES}
    for split, at in places.items():
        written[f"qrels/{split}"] = write_judgements(folder / "qrels" / f"{split}.tsv", _judged(data, split, at))
    return written


def _splits(data: RetrievalData, out: Path, form: str, split: str | None) -> list[str]:
    known = ", ".join(sorted(data.qrels))
    if split is not None and split not in data.qrels:
        raise InputError(f"{data.path} has no split {split}, only {known}; choose one of these as --split")
    if split is None and form != BEIR and out.suffix and len(data.qrels) > 1:
        raise InputError(f"{out} is one file, and {data.path} has the splits {known}; give --split one, or OUT a folder")
    return sorted(data.qrels) if split is None else [split]


def _write_files(data: RetrievalData, form: Form, paths: dict[str, Path], wanted: int | None) -> dict[str, Any]:
    """Write a file for each split and return what was written. paths: by split."""
    survey = Survey(data)
    plans = {split: plan_negatives(survey.look(judged_groups(data, split)), form) for split in paths}
    plans = plans if wanted is None else dict.fromkeys(paths, wanted)
    lost = survey.lost(form, max(plans.values())) | survey.in_no_record(list(paths))
    files, said = {}, [*say_lost(lost, form.title), *survey.warnings(form)]
    for split, path in paths.items():
        path.parent.mkdir(exist_ok=True)
        contents = survey.contents(form, plans[split])
        counts = write_records(path, form, contents, data, judged_groups(data, split))
        if not counts.records:
            raise InputError(f"the split {split} has no record to write; give --split or --negatives another value")
        files[split] = asdict(counts)
        said += [f"{split}: {sentence}" for sentence in say_counts(counts, form)]
    return {"files": files, "lost": lost, "said": said}


def _judged(data: RetrievalData, split: str, at: np.ndarray) -> Iterator[tuple[str, str, float]]:
    qrels, queries, corpus = data.qrels[split], data.queries.select_columns("_id"), data.corpus.select_columns("_id")
    for start in range(0, len(at), BATCH):
        block = at[start : start + BATCH]
        ids = queries[qrels.query_rows[block]]["_id"], corpus[qrels.corpus_rows[block]]["_id"]
        yield from zip(*ids, numbers(qrels.scores[block]), strict=True)
    # Documents that are not there stay so, under names of ours: ideal lists and recall count them.
    absent = queries[qrels.absent_query_rows]["_id"], (f"absent-{split}-{n}" for n in range(len(qrels.absent_scores)))
    yield from zip(*absent, numbers(qrels.absent_scores), strict=True)


def _all_entries(data: RetrievalData, side: str) -> Iterator[Entry]:
    num_texts = len(data.corpus if side == "corpus" else data.queries)
    for start in range(0, num_texts, BATCH):
        yield from entries(data, side, np.arange(start, min(start + BATCH, num_texts)))
