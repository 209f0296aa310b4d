"""Records on their way to tables: each is a query with its positives and its negatives."""

from pathlib import Path

import numpy as np

from trainer.data.example import Bad, Example
from trainer.data.files import read_records
from trainer.data.forms import Source
from trainer.data.judged import NO_SCORE, Pairs, save_given, save_own, sorted_judgements, write_about
from trainer.data.problems import Problem, Report, place_of
from trainer.data.records import PARSERS, find_form
from trainer.data.texts import TextWriter


class Examples:
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
