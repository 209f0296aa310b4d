"""What one record of a file says, whatever its form: a query, its passages and their scores."""

import math
from typing import Any, NamedTuple

from trainer.data.problems import near_names


class Bad(Exception):
    """A record that cannot be used: kind and sentence."""

    def __init__(self, kind: str, sentence: str):
        super().__init__(sentence)
        self.kind = kind


class Text(NamedTuple):
    """A text with the id that it has, None if it has none."""

    id: str | None
    text: str


class Example(NamedTuple):
    """What one record says."""

    query: Text
    passages: list[Text]  # positives, then negatives
    num_positives: int
    grade: float  # of the positives
    teacher: list[float] | None  # a score for each passage
    scored: str  # the columns of scores it has; the same for all records of a source
    prompt: str | None = None  # stands before the query when it is encoded, in the place of the prefix of all
    type: str | None = None  # FlagEmbedding's name of the task, kept for its readers


def text_of(record: dict[str, Any], column: str, may_be_empty: bool = False) -> str:
    """Return a text of a record; raises Bad if it is none, or empty where that is not allowed."""
    value = record.get(column)
    if not isinstance(value, str):
        found = f"is {value!r}" if value is not None else "is missing"
        raise Bad(f"{column} is no string", f"{column} {found}; expected a string{near_names(column, record.keys() - {column})}")
    return value if may_be_empty else not_empty(value, column)


def not_empty(text: str, what: str) -> str:
    """Return a text that is not empty; raises Bad. what: its name for people."""
    if not text.strip():
        raise Bad("empty text", f"{what} is empty; remove the record or fill it")
    return text


def number_of(value: Any, what: str) -> float:
    """Return a finite number; raises Bad. what: its name for people."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Bad("no number", f"{what} holds {value!r}; expected a finite number")
    return float(value)


def numbers_of(record: dict[str, Any], column: str, count: int, of_what: str) -> list[float]:
    """Return a column of `count` finite numbers; raises Bad. of_what: what they belong to, for people."""
    values = record.get(column)
    if values is None and count == 0:
        return []
    if not isinstance(values, list) or len(values) != count:
        found = "missing" if values is None else f"{len(values)} long" if isinstance(values, list) else f"{values!r}"
        raise Bad(
            "no teacher score", f"{column} is {found}; expected {count} numbers, one for each of {of_what}, or no scores at all"
        )
    return [number_of(value, column) for value in values]
