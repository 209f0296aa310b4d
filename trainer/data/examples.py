"""Records on their way to tables: each is a query with its positives and its negatives."""

from pathlib import Path

from trainer.data.example import Bad, Example
from trainer.data.files import read_records
from trainer.data.forms import Source
from trainer.data.judged import NO_SCORE, Pairs
from trainer.data.problems import Problem, Report, place_of
from trainer.data.records import PARSERS, find_form
from trainer.data.texts import TextWriter


class Examples:
    """The records of all files of one source, as they are read."""

    def __init__(self, queries: TextWriter, passages: TextWriter, report: Report):
        self._queries, self._passages, self._report = queries, passages, report
        self.positives: dict[str, Pairs] = {}  # by split
        self.negatives = Pairs()
        self.form: str | None = None
        self._first_scored: tuple[str, Path, int] | None = None  # which columns of scores the first record has, and where

    def read(self, source: Source) -> None:
        """Read everything."""
        for split, files in source.records.items():
            self.positives[split] = Pairs()
            for file in files:
                self.form = self._read_file(file, self.form, self.positives[split], self.negatives)

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
