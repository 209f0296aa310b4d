"""The contents of one record, for files of any form: a query with its positives, its negatives and their scores."""

from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

TEXTS, NUMBERS = pa.list_(pa.string()), pa.list_(pa.float32())


class Entry(NamedTuple):
    """A text of a table, with the columns of SCHEMA (texts.py)."""

    id: str
    text: str  # title included
    prompt: str | None = None
    type: str | None = None
    title_length: int = 0

    def title_and_rest(self) -> tuple[str, str]:
        """Return the title, empty where there is none, and the text without it."""
        return self.text[: self.title_length], self.text[self.title_length + (self.title_length > 0) :]


@dataclass(frozen=True)
class Row:
    """A query with passages that may stand together, and their scores."""

    query: Entry
    positives: list[Entry]
    negatives: list[Entry]
    grades: list[float]  # of the positives
    positive_teacher: list[float]  # a teacher's scores, NaN where there are none
    teacher: list[float]  # of the negatives
    scores: list[float]  # the miner's, of the negatives; empty where nothing was mined
    positive_scores: list[float]  # the miner's, of the positives; empty where there are none, as of BM25


@dataclass(frozen=True)
class Contents:
    """What every record of a file has beside its texts and ids."""

    num_negatives: int  # of every record, where a form has a column for each
    teacher: bool  # a teacher's scores
    grades: bool = False  # of which one is not 1
    prompts: bool = False
    types: bool = False
