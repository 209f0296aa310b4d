"""BEIR's files line by line: texts with ids, and judgements."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.data.files import read_lines, read_objects
from trainer.data.problems import Problem, Report, near_names


class Judgement(NamedTuple):
    """One line of a qrels file."""

    line: int
    query: str
    passage: str
    score: float


def read_texts(path: Path, report: Report) -> Iterator[tuple[int, str, str]]:
    """Yield (line, id, text) of the sound lines of corpus.jsonl or queries.jsonl; text is title and text, joined."""
    for number, row in read_objects(path, report):
        wrong = [key for key in ("_id", "text") if not isinstance(row.get(key), str)]
        if wrong or not isinstance(row.get("title", "") or "", str):
            name = wrong[0] if wrong else "title"
            found = f"is {row[name]!r}" if name in row else "is missing"
            sentence = f"{name} {found}; expected a string{near_names(name, row.keys() - {'_id', 'text', 'title'})}"
            report(Problem(path, number, f"{name} is no string", sentence))
            continue
        text = f"{row.get('title') or ''} {row['text']}".strip()
        if not row["_id"]:
            report(Problem(path, number, "empty id", "_id is empty; every line needs its own"))
        elif not text:
            report(Problem(path, number, "empty text", f"the text of {row['_id']!r} is empty; remove the line or fill it"))
        else:
            yield number, row["_id"], text


def read_judgements(path: Path, report: Report) -> Iterator[Judgement]:
    """Yield the sound lines of qrels/SPLIT.tsv; a header line may stand first."""
    for number, line in read_lines(path, report):
        cells = line.split("\t")
        if len(cells) != 3:
            expected = "expected query-id, corpus-id and score, separated by tabs"
            report(Problem(path, number, "wrong columns", f"found {len(cells)} columns; {expected}"))
            continue
        try:
            score = float(cells[2])
        except ValueError:
            if number > 1 or cells[0] != "query-id":
                report(Problem(path, number, "no number", f"the score {cells[2]!r} is not a number"))
            continue
        if math.isfinite(score):
            yield Judgement(number, cells[0], cells[1], score)
        else:
            report(Problem(path, number, "no number", f"the score {cells[2]!r} is not a finite number"))
