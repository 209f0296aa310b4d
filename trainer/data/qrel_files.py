"""The judgements of a collection, from any file: qrels of BEIR, TREC and MS MARCO, triples of ids, lists of ids in records."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.cells import read_cells, unquoted
from trainer.data.example import Bad
from trainer.data.files import read_records
from trainer.data.headings import Headings, is_heading
from trainer.data.problems import Problem, Report
from trainer.data.text_files import is_table_of_text, name_of

# Of tables without a line of names, by how many columns they have. Source: BEIR's qrels, and trec_eval's.
WITHOUT_NAMES = {3: ("query-id", "corpus-id", "score"), 4: ("query-id", "iteration", "corpus-id", "score")}
OF_TREC = ("iteration", "iter", "Q0")  # its column that says nothing


class Judgement(NamedTuple):
    """What a file says of one document for one query."""

    line: int
    query: str
    passage: str
    score: float
    is_given: bool = False  # named as a negative, and not judged


def read_judgements(file: Path, headings: Headings, report: Report) -> Iterator[Judgement]:
    """Yield the sound judgements of a file of any kind."""
    if is_table_of_text(file):
        yield from _judged_lines(file, headings, report)
        return
    is_scored = None
    for number, record in read_records(file, report):
        try:
            has_score = "score" in headings.find(record, "judged")
            is_scored = has_score if is_scored is None else is_scored
            if has_score != is_scored:
                raise Bad("no number", "some judgements of this file have a score and others none; give all one, or none")
            yield from _judged_record(file, number, record, headings)
        except Bad as bad:
            report(Problem(file, number, bad.kind, str(bad)))
            if bad.kind == "unknown columns":
                return


def read_triples(file: Path, report: Report) -> Iterator[Judgement]:
    """Yield a positive and a given negative for each line of query id, positive id and negative id. Source: MS MARCO."""
    for number, cells in read_cells(file, report):
        if len(cells) != 3:
            sentence = f"found {len(cells)} columns; expected the ids of a query, a positive and a negative, separated by tabs"
            report(Problem(file, number, "wrong columns", sentence))
        elif number > 1 or not is_heading(cells, {}, "judged"):
            query, positive, negative = cells
            yield Judgement(number, query, positive, 1.0)
            yield Judgement(number, query, negative, 0.0, is_given=True)


def is_judged(cells: list[str], headings: Headings) -> bool:
    """Return whether the first line of a table of text is one of judgements, or names their columns."""
    try:
        is_named = {"query-id", "corpus-id"} <= headings.find(cells, "judged").keys()
        return is_named or (len(cells) in WITHOUT_NAMES and math.isfinite(float(cells[-1])))
    except (Bad, ValueError):
        return False


def listed_ids(record: dict[str, Any], columns: dict[str, str], name: str) -> list[str] | None:
    """Return the ids that a record lists: texts or numbers, objects with an id, or lists of them by name; None if it does not."""
    values = record.get(columns.get(name, ""))
    if isinstance(values, dict):
        values = [value for listed in values.values() if isinstance(listed, list) for value in listed]
    if not isinstance(values, list):
        return None
    ids = [name_of(value.get("docid") if isinstance(value, dict) else value) for value in values]
    return None if None in ids else [row_id for row_id in ids if row_id is not None]


def _judged_lines(file: Path, headings: Headings, report: Report) -> Iterator[Judgement]:
    names: tuple[str, ...] | None = None
    for number, cells in read_cells(file, report):
        if len(cells) not in ([len(names)] if names else WITHOUT_NAMES):  # tabs and spaces may be mixed
            spaced = " ".join(cells).split()
            cells = spaced if len(spaced) in ([len(names)] if names else WITHOUT_NAMES) else cells
        while len(cells) > len(names or WITHOUT_NAMES[3]) and not cells[-1]:
            cells.pop()
        cells = [unquoted(cell) if cell[:1] == '"' else cell for cell in cells]
        try:
            if names is None:
                is_named = is_heading(cells, headings.mapped, "judged")
                names = tuple(cells) if is_named else WITHOUT_NAMES.get(len(cells), WITHOUT_NAMES[3])
                columns = headings.find(names, "judged")
                headings.need(["query-id", "corpus-id"], columns, names)
                query, passage = (names.index(columns[name]) for name in ("query-id", "corpus-id"))
                score = names.index(columns["score"]) if "score" in columns else None
                unused = [name for name in names if name not in (*columns.values(), *OF_TREC)]
                if is_named:
                    continue
            if len(cells) != len(names):
                what = "; that is a list of results, not judgements" if len(cells) == 6 else ""
                expected = f"expected {', '.join(names)}, separated by tabs"
                raise Bad("wrong columns", f"found {len(cells)} columns{what}; {expected}")
            if unused:
                headings.tell_unused(file, number, dict(zip(names, cells, strict=True)), columns.values())
            if not (cells[query] and cells[passage]):
                raise Bad("no id", "the id of a query or a document is empty; expected both")
            yield Judgement(number, cells[query], cells[passage], 1.0 if score is None else _number(cells[score]))
        except Bad as bad:
            is_first = number == 1 and bad.kind == "no number"
            names_it = "; a first line that names the columns has query-id, corpus-id and score" if is_first else ""
            report(Problem(file, number, bad.kind, f"{bad}{names_it}"))
            if bad.kind == "unknown columns":
                return


def _judged_record(file: Path, number: int, record: dict[str, Any], headings: Headings) -> Iterator[Judgement]:
    """Yield what a record judges; raises Bad."""
    columns = headings.find(record, "judged")
    if "corpus-id" not in columns:
        yield from _listed_record(file, number, record, headings)
        return
    headings.need(["query-id"], columns, record)
    headings.tell_unused(file, number, record, (*columns.values(), *OF_TREC))
    query, passage = (_id_of(record, columns[name]) for name in ("query-id", "corpus-id"))
    # A file of pairs without grades names what is relevant.
    score = _number(record[columns["score"]]) if "score" in columns else 1.0
    yield Judgement(number, query, passage, score)


def _listed_record(file: Path, number: int, record: dict[str, Any], headings: Headings) -> Iterator[Judgement]:
    columns = headings.find(record, "listed")
    headings.tell_unused(file, number, record, (*columns.values(), *headings.find(record, "queries").values()))
    headings.need(["query-id"], columns, record)
    if (positives := listed_ids(record, columns, "positive_ids")) is None:
        raise Bad("unknown columns", f"found the columns {', '.join(record)}; expected query-id, corpus-id and score")
    query = _id_of(record, columns["query-id"])
    for passage in positives:
        yield Judgement(number, query, passage, 1.0)
    for passage in listed_ids(record, columns, "negative_ids") or []:
        yield Judgement(number, query, passage, 0.0, is_given=True)


def _id_of(record: dict[str, Any], column: str) -> str:
    value = name_of(record[column])
    if not value:
        raise Bad("no id", f"{column} is {record[column]!r}; expected an id")
    return value


def _number(value: Any) -> float:
    """Return a grade that may be written as text; raises Bad."""
    try:
        score = float(value)
    except (TypeError, ValueError):
        raise Bad("no number", f"the score {value!r} is not a number") from None
    if not math.isfinite(score):
        raise Bad("no number", f"the score {value!r} is not a finite number")
    return score
