"""The contents of one record that was read, from files of any form: a query, its passages, their grades and scores.

A passage is a text, or an object with a text and perhaps a title, an id, a label and a teacher's score.
"""

import decimal
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from trainer.data.problems import near_names

IDS = ("docid", "_id", "id", "pid", "passage_id")  # of a passage, under any of these names
LABELS = ("label", "relevance", "grade")
FIELDS = {"text", "title", "score", *IDS, *LABELS}
WORDS = {"true": 1.0, "false": 0.0}


class Bad(Exception):
    """A record that cannot be used: kind and sentence, which opens with the column. A blemish can be lived without."""

    def __init__(self, kind: str, sentence: str, is_blemish: bool = False):
        super().__init__(sentence)
        self.kind, self.is_blemish = kind, is_blemish


class Passage(NamedTuple):
    """A passage of a query; one without text is left out."""

    text: str  # title included
    grade: float  # of relevance; above 0 is a positive, the others are negatives
    id: str | None = None
    title_length: int = 0
    teacher: float | None = None  # a teacher's score
    unread: tuple[str, ...] = ()  # fields that we do not use


class Example(NamedTuple):
    """What one record says."""

    query: str
    passages: list[Passage]
    scored: str  # the columns of scores it has; the same for all records of a source
    id: str | None = None  # of the query
    prompt: str | None = None  # stands before the query when it is encoded, in the place of the prefix of all
    type: str | None = None  # FlagEmbedding's name of the task, kept for its readers


def text_of(record: dict[str, Any], column: str) -> str:
    """Return a text of a record; raises Bad if it is none, and as a blemish if it is empty or null."""
    value = record.get(column)
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        raise Bad("empty text", f"{column} is empty; the record is left out", is_blemish=True)
    if not isinstance(value, str):
        raise Bad(f"{column} is no string", f"{column} is {value!r:.60}; expected a string")
    return value


def passages_of(record: dict[str, Any], column: str, grade: float) -> list[Passage]:
    """Return the passages of a column: one, or a list of them; raises Bad. grade: of those without a label of their own."""
    value = record.get(column)
    if value is None:
        return []
    if isinstance(value, dict) and value and all(isinstance(field, list) for field in value.values()):
        if len({len(field) for field in value.values()}) > 1:
            raise Bad(f"{column} is no list", f"{column} has lists of different lengths; expected one item a passage in each")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]  # a list by columns
    return [_passage(item, column, grade) for item in (value if isinstance(value, list) else [value])]


def positives_of(record: dict[str, Any], column: str) -> list[Passage]:
    """Return the passages of a column that has to have some; raises Bad, as a blemish if it has none."""
    passages = passages_of(record, column, 1.0)
    if not passages:
        raise Bad("no positive", f"{column} is empty; the record is left out", is_blemish=True)
    return passages


def _passage(value: Any, column: str, grade: float) -> Passage:
    if value is None:
        return Passage("", grade)
    if isinstance(value, str):
        if value.startswith(("['", '["')) and value.rstrip().endswith(("']", '"]')):
            sentence = f"{column} holds a list written out as text; save the data as JSON lines or Parquet, which have lists"
            raise Bad("list in a text", sentence)
        return Passage(value, grade)
    if not isinstance(value, dict):
        expected = "expected a text, a list of texts, or a list of {docid, title, text}"
        raise Bad(f"{column} is no text", f"{column} holds {value!r:.60}; {expected}")
    title, text = (value.get(name, "") or "" for name in ("title", "text"))
    if "text" not in value or not isinstance(text, str) or not isinstance(title, str):
        found = f"whose text is {value['text']!r:.60}" if "text" in value else "without text"
        near = near_names("text", value.keys() - FIELDS)
        raise Bad("text is no string", f"{column} has a passage {found}; expected a string as text, and as title{near}")
    label = next((value[name] for name in LABELS if value.get(name) is not None), None)
    own_grade = grade if label is None else number_of(label, f"{column} has a label that")
    if own_grade > 0 >= grade:
        raise Bad("label of a negative", f"{column} has a passage with the label {label}; move it to the positives, or set 0")
    teacher = None if value.get("score") is None else number_of(value["score"], f"{column} has a score that")
    row_id = next((id_of(value, name) for name in IDS if value.get(name) is not None), None)
    unread = tuple(f"{column}.{name}" for name in value.keys() - FIELDS)
    return titled(Passage(text, own_grade, row_id, teacher=teacher, unread=unread), title)


def titled(passage: Passage, title: str) -> Passage:
    """Return a passage with a title before its text."""
    title, text = title.strip(), passage.text.strip()
    return passage._replace(text=f"{title} {text}".strip(), title_length=len(title) if text else 0)


def id_of(record: dict[str, Any], column: str) -> str | None:
    """Return an id, a string or a whole number of any type, as a string; raises Bad."""
    value = record.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes numbers with a fraction of whole ones where one is missing
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Bad(f"{column} is no string", f"{column} is {value!r:.60}; expected a string or a whole number")
    return str(value)


def option_of(record: dict[str, Any], column: str) -> str | None:
    """Return a text that may be empty or absent; raises Bad."""
    value = record.get(column)
    if value is not None and not isinstance(value, str):
        raise Bad(f"{column} is no string", f"{column} is {value!r:.60}; expected a string")
    return value


def graded(passages: list[Passage], record: dict[str, Any], column: str, allowed: str = "any") -> list[Passage]:
    """Return passages with the grades of a column: a number for all, or a list with one for each; raises Bad.

    allowed: "any" number, "whole" numbers, or "0 and 1".
    """
    value = record[column]
    values = value if isinstance(value, list) else [value] * len(passages)
    if len(values) != len(passages):
        expected = f"expected {len(passages)} numbers, one for each positive"
        teachers = f'a teacher\'s scores of all passages are read by data.columns = {{scores = "{column}"}}'
        raise Bad("no label", f"{column} is {len(values)} long; {expected}; {teachers}")
    grades = [_grade(value, column, allowed) for value in values]
    return [passage._replace(grade=grade) for passage, grade in zip(passages, grades, strict=True)]


def _grade(value: Any, column: str, allowed: str) -> float:
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in WORDS):
        value = WORDS[str(value).strip().lower()]
    grade = number_of(value, column)
    if (allowed != "any" and not grade.is_integer()) or (allowed == "0 and 1" and grade not in (0, 1)):
        expected = {"whole": "whole numbers", "0 and 1": "0 and 1 in a pair of equals"}[allowed]
        raise Bad(
            "no label",
            f"{column} holds {value!r}; expected {expected}, for a likeness, a class or a margin is no grade: "
            f'set data.columns = {{label = "{column}"}} to take all above 0 for positives all the same',
        )
    return grade


def number_of(value: Any, what: str) -> float:
    """Return a finite number, also one written as text; raises Bad. what: its name for people."""
    is_one = isinstance(value, int | float | str | decimal.Decimal) and not isinstance(value, bool)
    try:
        number = float(value) if is_one else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Bad("no number", f"{what} holds {value!r:.60}; expected a finite number")
    return number


def numbers_of(record: dict[str, Any], column: str, count: int, of_what: str) -> list[float]:
    """Return a column of `count` finite numbers; raises Bad. of_what: what they belong to, for people."""
    values = record.get(column)
    if values is None and count == 0:
        return []
    if count == 1 and isinstance(values, int | float) and not isinstance(values, bool):
        values = [values]
    if not isinstance(values, list) or len(values) != count:
        found = "missing" if values is None else f"{len(values)} long" if isinstance(values, list) else f"{values!r:.60}"
        raise Bad(
            "no teacher score", f"{column} is {found}; expected {count} numbers, one for each of {of_what}, or no scores at all"
        )
    return [number_of(value, column) for value in values]


def taught(passages: list[Passage], scores: list[float]) -> list[Passage]:
    """Return passages with a teacher's score each."""
    return [passage._replace(teacher=score) for passage, score in zip(passages, scores, strict=True)]


def has_teacher(passages: Iterable[Passage]) -> bool:
    """Return whether passages have scores of their own; raises Bad where only some have."""
    found = {passage.teacher is not None for passage in passages}
    if len(found) > 1:
        raise Bad("no teacher score", "some passages have a score and others none; give all one, or none")
    return found == {True}
