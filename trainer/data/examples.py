"""Records on their way to tables: each is a query with its positives and its negatives."""

import array
import re
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.columns import Columns, check_mapping, find_columns
from trainer.data.example import Bad, Example
from trainer.data.files import read_records
from trainer.data.forms import Source
from trainer.data.judged import NO_SCORE, Pairs
from trainer.data.problems import Problem, Report, place_of
from trainer.data.records import PARSERS
from trainer.data.texts import TextWriter, Written

Place = tuple[Path, int]  # a file, and the number of a record in it


class Examples:
    """The records of all files of one source, as they are read."""

    def __init__(self, queries: TextWriter, passages: TextWriter, report: Report):
        self._queries, self._passages, self._report = queries, passages, report
        self.positives: dict[str, Pairs] = {}  # by split
        self.negatives = Pairs()
        self._without_positive = array.array("q")  # queries of records that have no positive; others may give them one
        self._first_scored: tuple[str, Place] | None = None  # which columns of scores the first record has, and where
        self._layouts: dict[tuple[str, ...], Columns] = {}  # by the columns of a record
        self._unread: dict[str, Place] = {}  # what we do not use, by its name, and where it stood first

    @property
    def form(self) -> str:
        """The forms that the records have, for people; nothing if there are none."""
        return " + ".join(dict.fromkeys(layout.form for layout in self._layouts.values()))

    def read(self, source: Source) -> None:
        """Read everything."""
        try:
            if source.kind == "records":  # a collection has other names, too
                check_mapping(source.columns)
        except Bad as bad:
            self._report(Problem(source.path, 0, bad.kind, str(bad)))
        for split, files in source.records.items():
            self.positives[split] = Pairs()
            is_sound = [self._read_file(file, source, self.positives[split]) for file in files]
            if all(is_sound) and not len(self.positives[split]):
                sentence = "no record here has a query with a positive; give some, or remove the file"
                self._report(Problem(files[0], 0, "empty", sentence))
        self._report_columns(source)

    def report_without_positive(self, query_rows: np.ndarray, judged: list[np.ndarray]) -> None:
        """Report the queries of records that have no positive in any split.

        query_rows: the row of every query that was added. judged: the judgements of all splits by row.
        """
        places = np.array(self._without_positive, np.int64)
        _, first = np.unique(query_rows[places], return_index=True)
        places = places[np.sort(first)]
        with_positive = np.concatenate([np.zeros(0, np.int64), *(rows["query"][rows["score"] > 0] for rows in judged)])
        for place in places[~np.isin(query_rows[places], with_positive)].tolist():
            sentence = "this query has no passage with a label above 0 anywhere; it is neither trained on nor evaluated"
            self._report(Problem(*self._queries.place(place), "no positive", sentence, True))

    def _read_file(self, file: Path, source: Source, positives: Pairs) -> bool:
        """Read one file and tell whether it is sound; problems go to the report."""
        num_read, is_sound = 0, True
        for number, record in read_records(file, self._report, [column for column in source.columns.values() if column]):
            num_read += 1
            layout = None
            try:
                layout = self._layout(record, source, (file, number))
                named = {name: record[column] for column, name in layout.names.items()}
                self._add(PARSERS[layout.form](named), layout, (file, number), positives)
            except Bad as bad:
                self._report(Problem(file, number, bad.kind, _as_in_file(str(bad), layout), bad.is_blemish))
                is_sound &= bad.is_blemish
                if bad.kind == "unknown columns":  # all further records would have them
                    return False
        if not num_read:
            self._report(Problem(file, 0, "empty", "this file has no sound record; remove it or fill it"))
        return is_sound and num_read > 0

    def _layout(self, record: dict[str, Any], source: Source, place: Place) -> Columns:
        """Return how a record is read; raises Bad."""
        found = tuple(record)
        if found not in self._layouts:
            self._layouts[found] = find_columns(found, source.columns)
            for column in self._layouts[found].unread:
                self._unread.setdefault(column, place)
        return self._layouts[found]

    def _add(self, example: Example, layout: Columns, place: Place, positives: Pairs) -> None:
        passages = [passage for passage in example.passages if passage.text.strip()]
        had_positive, has_positive = (any(each.grade > 0 for each in found) for found in (example.passages, passages))
        if not passages or (had_positive and not has_positive):
            raise Bad("empty text", "every positive of this record is empty; it is left out", is_blemish=True)
        self._check_scored(example.scored, place)
        for passage in example.passages:
            if not passage.text.strip():
                what = "positive" if passage.grade > 0 else "negative"
                self._report(Problem(*place, "empty text", f"a {what} is empty; it is left out", True))
        written = Written(example.query, example.prompt, example.type)
        query = self._queries.add(*place, example.id, written)
        if not has_positive:
            self._without_positive.append(query)
        for passage in passages:
            row = self._passages.add(*place, passage.id, Written(passage.text, title_length=passage.title_length))
            teacher = NO_SCORE if passage.teacher is None else passage.teacher
            (positives if passage.grade > 0 else self.negatives).add(query, row, max(passage.grade, 0.0), teacher)
            for name in passage.unread:
                self._unread.setdefault(_as_in_file(name, layout), place)

    def _check_scored(self, scored: str, place: Place) -> None:
        first, earlier = self._first_scored = self._first_scored or (scored, place)
        if scored != first:
            kept = f"{first or 'no scores'} as in {place_of(*earlier)}"
            sentence = f"found {scored or 'no scores'}, expected {kept}; give every record its scores, or take them from all"
            raise Bad("no teacher score", sentence)

    def _report_columns(self, source: Source) -> None:
        """Report what data.columns names and no file has, and all that is not used, once."""
        found = {column for layout in self._layouts for column in layout}
        absent = [column for column in source.columns.values() if column and column not in found]
        if absent and found and source.kind == "records":
            names = ", ".join(map(repr, absent))
            sentence = f"data.columns names {names}, and no record has that; found {', '.join(sorted(found))}"
            self._report(Problem(source.path, 0, "unknown columns", sentence))
        if self._unread:
            names = ", ".join(name or "(without a name)" for name in self._unread)
            sentence = f"what these columns hold is not used: {names}; data.columns can give them a meaning"
            self._report(Problem(*next(iter(self._unread.values())), "column not used", sentence, True))


def _as_in_file(words: str, layout: Columns | None) -> str:
    """Return words that open with a column under the name that the file has for it."""
    ours = re.match(r"\w*", words)[0]  # type: ignore[index]
    column = next((column for column, name in layout.names.items() if name == ours), ours) if layout else ours
    return column + words.removeprefix(ours).replace(f'"{ours}"', f'"{column}"')
