"""From the files of one source, in any form, to tables of rows: texts, judgements by split, given negatives.

Everything streams: what stays in memory are numbers, some forty bytes for each text and judgement.
"""

import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainer.data.beir import Judgement, read_judgements, read_texts
from trainer.data.files import read_records
from trainer.data.forms import Source
from trainer.data.judged import JUDGED, NO_SCORE, SIDES, Pairs, save_given, save_own, sorted_judgements, write_about
from trainer.data.problems import Problem, Report, place_of
from trainer.data.records import PARSERS, Bad, Example, find_form
from trainer.data.texts import RowLookup, TextWriter, key_of, read_table

BLOCK = 100_000  # judgements looked up at once


def build_source(source: Source, folder: Path, report: Report) -> None:
    """Write the tables of one source into a folder; every problem goes to `report`, and what is sound is written."""
    if source.kind == "beir":
        _build_beir(source, folder, report)
    else:
        _Records(folder, report).build(source)


def _build_beir(source: Source, folder: Path, report: Report) -> None:
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


class _Records:
    """The records of all files of one source, as they are read."""

    def __init__(self, folder: Path, report: Report):
        self._folder, self._report = folder, report
        self._queries, self._passages = TextWriter(folder / "queries.arrow"), TextWriter(folder / "corpus.arrow")
        self._first_scored: tuple[str, Path, int] | None = None  # which columns of scores the first record has, and where

    def build(self, source: Source) -> None:
        """Read everything and write the tables."""
        splits: dict[str, Pairs] = {}
        negatives = Pairs()
        form = None
        for split, files in source.files.items():
            splits[split] = Pairs()
            for file in files:
                form = self._read_file(file, form, splits[split], negatives)
        query_rows = self._queries.settle(self._report, may_repeat=True)
        passage_rows = self._passages.settle(self._report, may_repeat=True)
        save_own(self._folder, self._queries.own_rows(self._passages))
        judged = {split: sorted_judgements(pairs.rows(query_rows, passage_rows)) for split, pairs in splits.items()}
        for split, rows in judged.items():
            np.save(self._folder / f"qrels-{split}.npy", rows, allow_pickle=False)
        num_queries = int(query_rows.max(initial=-1)) + 1
        save_given(self._folder, negatives.rows(query_rows, passage_rows), list(judged.values()), num_queries)
        write_about(self._folder, form or "records")

    def _read_file(self, file: Path, form: str | None, positives: Pairs, negatives: Pairs) -> str | None:
        """Read one file and return its form; problems go to the report."""
        num_read = 0
        for number, record in read_records(file, self._report):
            num_read += 1
            try:
                # The first record of a file decides which columns it has.
                form = find_form(record) if form is None or num_read == 1 else form
                self._add(PARSERS[form](record), file, number, positives, negatives)
            except Bad as bad:
                self._report(Problem(file, number, bad.kind, str(bad)))
                if bad.kind == "unknown columns":
                    return form
        if not num_read:
            self._report(Problem(file, 0, "empty", "this file has no sound record; remove it or fill it"))
        return form

    def _add(self, example: Example, file: Path, number: int, positives: Pairs, negatives: Pairs) -> None:
        if not example.grade > 0:
            raise Bad("no positive", f"score is {example.grade:g}, so the record has no positive; expected a score above 0")
        self._check_scored(example.scored, file, number)
        query = self._queries.add(file, number, *example.query)
        for place, passage in enumerate(example.passages):
            row = self._passages.add(file, number, *passage)
            teacher = NO_SCORE if example.teacher is None else example.teacher[place]
            pairs = positives if place < example.num_positives else negatives
            pairs.add(query, row, example.grade, teacher)

    def _check_scored(self, scored: str, file: Path, number: int) -> None:
        first, earlier_file, earlier = self._first_scored = self._first_scored or (scored, file, number)
        if scored != first:
            kept = f"{first or 'no scores'} as in {place_of(earlier_file, earlier)}"
            sentence = f"found {scored or 'no scores'}, expected {kept}; give every record its scores, or take them from all"
            raise Bad("no teacher score", sentence)
