"""A collection on its way to tables: texts of both sides with ids, and judgements, in files of their own."""

import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainer.data.beir import Judgement, read_judgements, read_texts
from trainer.data.forms import Source
from trainer.data.judged import JUDGED, NO_SCORE, SIDES, save_own, sorted_judgements, write_about
from trainer.data.problems import Problem, Report
from trainer.data.texts import RowLookup, TextWriter, key_of, read_table

BLOCK = 100_000  # judgements looked up at once


def build_collection(source: Source, folder: Path, report: Report) -> None:
    """Write the tables of a collection into a folder; every problem goes to `report`, and what is sound is written."""
    lookups, writers = {}, {}
    for side in SIDES:
        (file,) = source.files[side]
        writer = writers[side] = TextWriter(folder / f"{side}.arrow")
        for number, row_id, text in read_texts(file, report):
            writer.add(file, number, row_id, text)
        writer.settle(report, may_repeat=False)
        if not writer.id_keys:
            report(Problem(file, 0, "empty", "this file has no sound line; expected at least one text"))
        lookups[side] = RowLookup(np.load(folder / f"{side}-keys.npy")[0])
    save_own(folder, writers["queries"].own_rows(writers["corpus"]))
    for name, files in source.files.items():
        if name not in SIDES:
            judged = _judged_rows(files[0], lookups, folder, report)
            np.save(folder / f"{name}.npy", sorted_judgements(judged), allow_pickle=False)
    write_about(folder, "BEIR")


def _judged_rows(file: Path, lookups: dict[str, RowLookup], folder: Path, report: Report) -> np.ndarray:
    """Return the judgements of a file that name what is there, as rows."""
    parts = []
    lines = array.array("q")
    for block in _blocks(read_judgements(file, report)):
        rows = np.zeros(len(block), JUDGED)
        rows["query"] = _find(lookups["queries"], [j.query for j in block])
        rows["passage"] = _find(lookups["corpus"], [j.passage for j in block])
        rows["score"], rows["teacher"] = [j.score for j in block], NO_SCORE
        for i in np.flatnonzero((rows["query"] < 0) | (rows["passage"] < 0)):
            for what, side, name in (("query", "queries", block[i].query), ("document", "corpus", block[i].passage)):
                if rows["query" if side == "queries" else "passage"][i] < 0:
                    sentence = f"{what} {name!r} is not in {side}.jsonl; add it there or remove this line"
                    report(Problem(file, block[i].line, f"unknown {what}", sentence))
        known = (rows["query"] >= 0) & (rows["passage"] >= 0)
        parts.append(rows[known])
        lines.extend(j.line for j, is_known in zip(block, known, strict=True) if is_known)
    judged = np.concatenate([np.zeros(0, JUDGED), *parts])
    if not parts:
        report(Problem(file, 0, "empty", "this file has no judgement; remove it or fill it"))
    _report_without_positive(file, judged, lines, folder, report)
    return judged


def _report_without_positive(file: Path, judged: np.ndarray, lines: array.array, folder: Path, report: Report) -> None:
    queries, first = np.unique(judged["query"], return_index=True)
    is_without = ~np.isin(queries, judged["query"][judged["score"] > 0])
    for query, line in sorted(zip(queries[is_without], first[is_without], strict=True), key=lambda pair: pair[1]):
        name = read_table(folder / "queries.arrow")[int(query)]["_id"]
        sentence = f"query {name!r} has no document with a score above 0; give it one or remove its lines"
        report(Problem(file, lines[line], "no positive", sentence))


def _find(lookup: RowLookup, names: list[str]) -> np.ndarray:
    return lookup.find(np.array([key_of(name) for name in names], np.uint64))


def _blocks(judgements: Iterator[Judgement]) -> Iterator[list[Judgement]]:
    block: list[Judgement] = []
    for judgement in judgements:
        block.append(judgement)
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block
