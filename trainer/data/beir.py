"""BEIR files line by line, with every problem as (file, line, sentence).

One set of rules for two readers: `open_dataset` stops at the first problem, `check_dataset` collects all.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Problem(NamedTuple):
    """Something in a data set that a person must mend; line 0: the file as a whole."""

    file: Path
    line: int
    kind: str  # problems of one kind are counted together
    sentence: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else str(self.file)
        return f"{where}: {self.sentence}"


class Judgement(NamedTuple):
    """One line of a qrels file."""

    line: int
    query: str
    passage: str
    score: float


Report = Callable[[Problem], None]


def read_texts(path: Path, report: Report) -> Iterator[tuple[int, str, str]]:
    """Yield (line, id, text) of the sound lines of corpus.jsonl or queries.jsonl; text is title and text, joined."""
    for number, line in _lines(path, report):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            report(Problem(path, number, "does not parse", f"this line is not JSON: {error.msg} at column {error.colno}"))
            continue
        if not isinstance(row, dict):
            report(Problem(path, number, "not an object", 'expected an object such as {"_id": "1", "text": "…"}'))
            continue
        wrong = [key for key in ("_id", "text") if not isinstance(row.get(key), str)]
        if wrong or not isinstance(row.get("title", "") or "", str):
            name = wrong[0] if wrong else "title"
            found = f"is {row[name]!r}" if name in row else "is missing"
            report(Problem(path, number, f"{name} is no string", f"{name} {found}; expected a string"))
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
    for number, line in _lines(path, report):
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
        yield Judgement(number, cells[0], cells[1], score)


def _lines(path: Path, report: Report) -> Iterator[tuple[int, str]]:
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, after the last line was taken
    except OSError as error:
        report(Problem(path, 0, "missing", f"this file cannot be read ({error.strerror}); a data set needs it"))
        return
    with file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                report(Problem(path, number, "not UTF-8", f"byte {error.start + 1} of this line is not UTF-8"))
                continue
            if line.strip():
                yield number, line
