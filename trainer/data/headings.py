"""Which column of a file is which: the names that people give to ids, texts, titles and grades.

A column is found by our own name for it, by what data.columns says, or by one of the usual names if one alone fits.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.data.example import Bad
from trainer.data.problems import Problem, Report, near_names

Names = Mapping[str, tuple[str, ...]]  # our name of a column, and usual ones as `_plain` writes them: the surest first

QUERY_IDS = "qid queryid questionid topicid"
DOCUMENT_IDS = "docid docno documentid did pid passageid corpusid"
TEXTS: dict[str, Names] = {
    "corpus": {
        "_id": ("id", DOCUMENT_IDS),
        "text": ("contents content body passage document passagetext documenttext doctext",),
        "title": (),
        "prompt": (),
    },
    "queries": {
        "_id": ("id", QUERY_IDS),
        "text": ("query querytext question contents content",),
        "title": (),
        "prompt": (),
    },
}
JUDGED: Names = {
    "query-id": (QUERY_IDS, "query topic q"),
    "corpus-id": (DOCUMENT_IDS, "doc document passage corpus"),
    "score": ("relevance rel label grade relevancy relevancescore judgement judgment gain",),
}
# Lists of ids, as Tevatron, `negpool mine --out` and others write them beside a collection.
LISTED: Names = {
    "query-id": ("id", QUERY_IDS),
    "positive_ids": ("positivedocumentids positiveids positivepids posids pos positivepassages",),
    "negative_ids": ("negativedocumentids negativeids negativepids negids neg negativepassages",),
}
KINDS: dict[str, Names] = {**TEXTS, "judged": JUDGED, "listed": LISTED}
PROMPTS = ("instruction", "instruct", "task_instruction", "query_instruction")  # prompts under other names
NOTHING: tuple[Any, ...] = (None, "", [], {})  # what says nothing where it stands in a column that is not used


class Headings:
    """The columns of the files of one source, by our names."""

    def __init__(self, mapped: Mapping[str, str], report: Report):
        self.mapped, self._report = mapped, report
        self._found: set[str] = set()  # our names that data.columns gives and a file has
        self._said: set[tuple[Path, str]] = set()
        self._find = lru_cache(1000)(self._find_once)  # records of one file have few sets of columns

    def find(self, columns: Iterable[str], kind: str) -> dict[str, str]:
        """Return the file's column for each of our names that is there; raises Bad where several may be meant.

        kind: "corpus", "queries", "judged" or "listed".
        """
        return self._find(tuple(columns), kind)

    def _find_once(self, columns: tuple[str, ...], kind: str) -> dict[str, str]:
        found = {}
        for name, usual in KINDS[kind].items():
            column = self._column_of(name, usual, columns)
            if column is not None:
                found[name] = column
        return found

    def _column_of(self, name: str, usual: tuple[str, ...], columns: tuple[str, ...]) -> str | None:
        if self.mapped.get(name) == "":  # the files have none, whatever the names of their columns
            return None
        if self.mapped.get(name) in columns:
            self._found.add(name)
            return self.mapped[name]
        if name in columns:
            return name
        for names in ((_plain(name),), *(tier.split() for tier in usual)):
            near = [column for column in columns if _plain(column) in names]
            if len(near) > 1:
                choice = f'say which by data.columns = {{{name} = "{near[0]}"}}'
                raise Bad("unknown columns", f"found {' and '.join(near)}, and each may be the {name}: {choice}")
            if near:
                return near[0]
        return None

    def need(self, names: Iterable[str], found: Mapping[str, str], columns: Iterable[str]) -> None:
        """Raise Bad if one of our names has no column."""
        for name in names:
            if name not in found:
                meant = near_names(name, set(columns) - set(found.values()))
                known = ", ".join(f"{column:.40}" for column in islice(columns, 20))
                choice = f'expected {name}{meant}: say which one it is by data.columns = {{{name} = "…"}}'
                raise Bad("unknown columns", f"found the columns {known}; {choice}")

    def tell_unused(self, file: Path, number: int, record: Mapping[str, Any], used: Iterable[str]) -> None:
        """Report the columns of a record that are not used and say something, each once for a file; raises Bad for prompts."""
        for name in record.keys() - set(used):
            if record[name] in NOTHING or (file, name) in self._said:
                continue
            self._said.add((file, name))
            if name.lower() in PROMPTS and "prompt" not in self.mapped:
                choice = f'set data.columns = {{prompt = "{name}"}} to read it, or {{prompt = ""}} to leave it out'
                raise Bad("unknown columns", f"found the column {name}, which is not read and looks like a prompt: {choice}")
            self._report(Problem(file, number, "column not used", f"the column {name!r} is not used", is_blemish=True))

    def tell_unknown(self, path: Path) -> None:
        """Report what data.columns names and no file has."""
        for name, column in self.mapped.items():
            if column and name not in self._found:
                known = ", ".join(dict.fromkeys(name for names in KINDS.values() for name in names))
                found = f"data.columns names {column!r} for {name}, and no file of this collection has that"
                self._report(Problem(path, 0, "unknown columns", f"{found}; expected a column there is, for one of {known}"))


def is_heading(cells: Iterable[str], mapped: Mapping[str, str], kind: str) -> bool:
    """Return whether the first line of a table of text names its columns: one of them has the name of an id."""
    ids = {"judged": ("query-id", "corpus-id")}.get(kind, ("_id",))
    usual = {plain for name in ids for plain in (_plain(name), *" ".join(KINDS[kind][name]).split())}
    return any(cell in mapped.values() or _plain(cell) in usual for cell in cells)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
