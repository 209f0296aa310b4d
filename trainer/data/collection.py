"""A collection on its way to tables: texts of both sides with ids, and judgements by id, in files of their own.

Judgements of documents that the corpus lacks still count in ideal lists and in recall, as in trec_eval. Judgements of queries
that are missing are dropped, and so is a split without any relevant document in the corpus; all of it is reported.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np

from trainer.data.forms import Source
from trainer.data.headings import Headings
from trainer.data.judged import ABSENT, JUDGED, NO_SCORE, SIDES
from trainer.data.problems import Problem, Report
from trainer.data.qrel_files import Judgement, read_judgements, read_triples
from trainer.data.text_files import read_texts
from trainer.data.texts import PLACE_BITS, RowLookup, TextWriter, key_of, read_table

BLOCK = 100_000  # judgements looked up at once
# passage: -1 where the document is not there; key: of its id; place: the line, above it which file.
READ = np.dtype([*((name, np.int64) for name in ("query", "passage", "key", "place")), ("score", np.float32), ("is_given", bool)])


class SplitRows(NamedTuple):
    """What the files say of one split, as rows."""

    known: np.ndarray  # (n,) JUDGED
    given: np.ndarray  # (m,) JUDGED, negatives that are named and not judged
    absent: np.ndarray  # (a,) ABSENT


class Collection:
    """The files of texts and of judgements of one source; none where the source is records alone."""

    def __init__(self, source: Source, folder: Path, report: Report):
        self._source, self._folder, self._report = source, folder, report
        self._headings = Headings(source.columns, report)
        self._files = source.files if source.kind == "beir" else {}
        for file in source.unread:
            sentence = "this file is not read: its name says neither corpus, queries, nor judgements of a split"
            report(Problem(file, 0, "not read", sentence, is_blemish=True))

    def add_texts(self, side: str, writer: TextWriter) -> None:
        """Give the texts of "corpus" or "queries" to a writer."""
        judged = [file for name, files in self._files.items() if name not in SIDES for file in files]
        for file in self._files.get(side, []):
            before = len(writer.id_keys)
            for number, row_id, text in read_texts(file, side, self._headings, self._report, file in judged):
                writer.add(file, number, row_id, text)
            if len(writer.id_keys) == before:
                self._report(Problem(file, 0, "empty", "this file has no sound line; expected at least one text"))

    def judgements(self) -> Iterator[tuple[str, SplitRows]]:
        """Yield the judgements of each split that has a relevant document; the texts are settled."""
        lookups = {side: RowLookup(np.load(self._folder / f"{side}-keys.npy")[0]) for side in SIDES}
        splits: dict[str, list[Path]] = {}
        for name, files in self._files.items():
            if name.startswith(("qrels-", "triples-")):
                splits.setdefault(name.partition("-")[2], []).extend(files)
        num_kept = 0
        for split, files in splits.items():
            read = np.concatenate([np.zeros(0, READ), *self._read(files, lookups)])
            read = read[read["query"] >= 0]
            judged = read[~read["is_given"]]
            self._tell_repeated(files, judged)
            self._tell_without_positive(files, judged)
            rows = _by_row(read)
            if (rows.known["score"] > 0).any():
                num_kept += 1
                yield split, rows
            else:
                found = "no line names a query and a document that are there with a score above 0"
                self._report(
                    Problem(files[0], 0, "split left out", f"{found}, so the split {split} is left out", is_blemish=True)
                )
        if splits and not num_kept and not self._source.records:
            found = "no judgement above 0 names a query and a document that are there"
            remedy = "let the ids of corpus, queries and judgements be the same, or give a query something relevant"
            self._report(Problem(self._source.path, 0, "no judgement", f"{found}; {remedy}"))
        if self._files and not self._source.records:
            self._headings.tell_unknown(self._source.path)

    def _read(self, files: list[Path], lookups: dict[str, RowLookup]) -> Iterator[np.ndarray]:
        """Yield all that the files of a split say, (n,) READ."""
        for which, file in enumerate(files):
            is_empty = True
            judgements = iter(self._judgements_of(file))
            while block := list(islice(judgements, BLOCK)):
                is_empty = False
                yield self._looked_up(file, which << PLACE_BITS, block, lookups)
            if is_empty:
                self._report(Problem(file, 0, "empty", "this file has no judgement; remove it or fill it"))

    def _judgements_of(self, file: Path) -> Iterator[Judgement]:
        return read_triples(file, self._report) if self._is_triples(file) else read_judgements(file, self._headings, self._report)

    def _is_triples(self, file: Path) -> bool:
        return any(file in files for name, files in self._files.items() if name.startswith("triples-"))

    def _looked_up(self, file: Path, place: int, block: list[Judgement], lookups: dict[str, RowLookup]) -> np.ndarray:
        """Return a block of judgements as rows, and report what is not there."""
        rows = np.zeros(len(block), READ)
        keys = np.array([key_of(j.passage) for j in block], np.uint64)
        rows["query"] = lookups["queries"].find(np.array([key_of(j.query) for j in block], np.uint64))
        rows["passage"], rows["key"] = lookups["corpus"].find(keys), keys.view(np.int64)
        rows["score"], rows["is_given"] = [j.score for j in block], [j.is_given for j in block]
        rows["place"] = [place | j.line for j in block]
        names = {side: self._files[side][0].name for side in SIDES}
        for i in np.flatnonzero(rows["query"] < 0):
            sentence = f"query {block[i].query!r} is not in {names['queries']}, or has no text there, so this is left out"
            self._report(Problem(file, block[i].line, "unknown query", sentence, is_blemish=True))
        for i in np.flatnonzero(rows["passage"] < 0):
            what = "this negative is left out" if block[i].is_given else "nothing finds it; if relevant, recall counts it"
            sentence = f"document {block[i].passage!r} is not in {names['corpus']}, or has no text there, so {what}"
            self._report(Problem(file, block[i].line, "unknown document", sentence, is_blemish=True))
        return rows

    def _tell_repeated(self, files: list[Path], judged: np.ndarray) -> None:
        """Report pairs that are judged again, but in triples, which name a positive once for each negative."""
        order = np.lexsort((judged["place"], judged["key"], judged["query"]))
        pairs = judged[order]
        is_again = (pairs["query"][1:] == pairs["query"][:-1]) & (pairs["key"][1:] == pairs["key"][:-1])
        for at in sorted(np.flatnonzero(is_again) + 1, key=lambda at: pairs["place"][at]):
            file, line = self._place(files, pairs["place"][at])
            if not self._is_triples(file):
                is_equal = pairs["score"][at] == pairs["score"][at - 1]
                kind, kept = ("judged twice", "equally") if is_equal else ("judged unequally", "with another score")
                sentence = f"the document of this line has been judged for its query before, {kept}; the highest score counts"
                self._report(Problem(file, line, kind, sentence, is_blemish=True))

    def _tell_without_positive(self, files: list[Path], judged: np.ndarray) -> None:
        queries, first = np.unique(judged["query"], return_index=True)
        without = first[~np.isin(queries, judged["query"][judged["score"] > 0])]
        names: datasets.Dataset | None = None
        for at in np.sort(without):
            names = names or read_table(self._folder / "queries.arrow")
            name = names[int(judged["query"][at])]["_id"]
            sentence = f"query {name!r} has no document with a score above 0, so it is neither trained on nor evaluated"
            self._report(Problem(*self._place(files, judged["place"][at]), "no positive", sentence, is_blemish=True))

    @staticmethod
    def _place(files: list[Path], place: int) -> tuple[Path, int]:
        return files[int(place) >> PLACE_BITS], int(place) & ((1 << PLACE_BITS) - 1)


def _by_row(read: np.ndarray) -> SplitRows:
    """Return what is read of queries that are there, (n,) READ, by what becomes of it."""
    rows = np.zeros(len(read), JUDGED)
    for name in ("query", "passage", "score"):
        rows[name] = read[name]
    rows["teacher"] = NO_SCORE
    is_there = read["passage"] >= 0
    missing = read[~is_there & ~read["is_given"]]
    order = np.lexsort((-missing["score"], missing["key"], missing["query"]))  # each once, with its highest score
    _, first = np.unique(np.stack([missing["query"], missing["key"]])[:, order], axis=1, return_index=True)
    absent = np.zeros(len(first), ABSENT)
    for name in ("query", "score"):
        absent[name] = missing[order][first][name]
    return SplitRows(rows[is_there & ~read["is_given"]], rows[is_there & read["is_given"]], absent)
