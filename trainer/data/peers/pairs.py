"""The form of sentence-transformers: anchor, positive [, negative | negative_1, negative_2 …] [, score: grade of the pair]
[, scores: the teacher's, of the positive and of each negative].
"""

import re
from typing import Any

from trainer.data.example import Example, Text, number_of, numbers_of, text_of

NUMBERED = re.compile(r"negative_(\d+)$")


def parse(record: dict[str, Any]) -> Example:
    """Return an anchor with its positive and its negatives. Source: the column names of sentence-transformers' losses."""
    names = [name for name in record if name == "negative" or NUMBERED.match(name)]
    names.sort(key=lambda name: int(name.rpartition("_")[2]) if "_" in name else -1)
    # Arrow has a column for every row: null where a row has fewer negatives.
    names = [name for name in names if record[name] is not None]
    passages = [Text(None, text_of(record, name)) for name in ("positive", *names)]
    scored = [name for name in ("score", "scores") if record.get(name) is not None]
    grade = number_of(record["score"], "score") if "score" in scored else 1.0
    teacher = numbers_of(record, "scores", len(passages), "the positive and the negatives") if "scores" in scored else None
    return Example(Text(None, text_of(record, "anchor")), passages, 1, grade, teacher, " and ".join(scored))
