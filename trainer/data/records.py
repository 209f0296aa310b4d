"""One record of a file as a query, its passages and their scores, in the forms that other trainers read.

pairs        anchor, positive [, negative | negative_1, negative_2 …] [, score: grade of the pair] [, scores: the teacher's,
             of the positive and of each negative]; the names of sentence-transformers
tevatron     query_id, query, positive_passages, negative_passages: lists of {docid, title, text [, score]}
flagembedding  query, pos, neg: lists of texts [, pos_scores, neg_scores] [, prompt: stands before the query]
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from trainer.data.problems import near_names

REQUIRED = {
    "pairs": ("anchor", "positive"),
    "tevatron": ("query", "positive_passages"),
    "flagembedding": ("query", "pos"),
}
OPTIONAL = {
    "pairs": ("negative", "score", "scores"),
    "tevatron": ("query_id", "negative_passages"),
    "flagembedding": ("neg", "pos_scores", "neg_scores", "prompt", "pos_id", "neg_id", "id", "type"),
}
FORMS = (
    "BEIR (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv) or records with the columns anchor, positive, negative … "
    "(sentence-transformers), query, positive_passages, negative_passages (Tevatron) or query, pos, neg (FlagEmbedding)"
)
NUMBERED = re.compile(r"negative_(\d+)$")


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


def find_form(columns: Iterable[str]) -> str:
    """Return the name of the form that has these columns; raises Bad with the columns expected and the nearest names."""
    found = list(columns)
    forms = [form for form, required in REQUIRED.items() if set(required) <= set(found)]
    if not forms:
        # What is nearest to having all it needs was perhaps meant.
        near = {name: difflib.get_close_matches(name, found, n=1, cutoff=0.7) for names in REQUIRED.values() for name in names}
        form = max(REQUIRED, key=lambda form: sum(bool(near[name]) for name in REQUIRED[form]))
        missing = [name for name in REQUIRED[form] if name not in found]
        meant = "".join(near_names(name, set(found) - set(REQUIRED[form])) for name in missing[:1])
        raise Bad("unknown columns", f"found the columns {', '.join(found)}; {missing[0]} is missing{meant}: expected {FORMS}")
    form = forms[0]
    absent = [name for name in (*REQUIRED[form], *OPTIONAL[form]) if name not in found]
    for name in set(found) - set(REQUIRED[form]) - set(OPTIONAL[form]):
        if not NUMBERED.match(name) and (close := difflib.get_close_matches(name, absent, n=1, cutoff=0.85)):
            raise Bad("unknown columns", f"found the column {name}, which is not read; did you mean {close[0]}?")
    return form


def parse_pair(record: dict[str, Any]) -> Example:
    """Return an anchor with its positive and its negatives. Source: the column names of sentence-transformers' losses."""
    names = [name for name in record if name == "negative" or NUMBERED.match(name)]
    names.sort(key=lambda name: int(name.rpartition("_")[2]) if "_" in name else -1)
    # Arrow has a column for every row: null where a row has fewer negatives.
    names = [name for name in names if record[name] is not None]
    passages = [Text(None, _text(record, name)) for name in ("positive", *names)]
    scored = [name for name in ("score", "scores") if record.get(name) is not None]
    grade = _number(record["score"], "score") if "score" in scored else 1.0
    teacher = _numbers(record, "scores", len(passages), "the positive and the negatives") if "scores" in scored else None
    return Example(Text(None, _text(record, "anchor")), passages, 1, grade, teacher, " and ".join(scored))


def parse_tevatron(record: dict[str, Any]) -> Example:
    """Return a query with its positive and negative passages. Source: Tevatron's training data."""
    passages: list[Text] = []
    scores: list[Any] = []
    num_positives = 0
    for column in ("positive_passages", "negative_passages"):
        for passage in _passages(record, column):
            title, text = passage.get("title") or "", _text(passage, "text", may_be_empty=True)
            passages.append(Text(_id(passage, "docid"), _not_empty(f"{title} {text}".strip(), f"a text in {column}")))
            scores.append(passage.get("score"))
        num_positives = num_positives or len(passages)
        if not num_positives:
            raise Bad("no positive", "positive_passages is empty; give the query one or remove it")
    teacher = None
    if any(score is not None for score in scores):
        if None in scores:
            raise Bad("no teacher score", "some passages have a score and others none; give all one, or none")
        teacher = [_number(score, "score") for score in scores]
    query = Text(_id(record, "query_id"), _text(record, "query"))
    return Example(query, passages, num_positives, 1.0, teacher, "score of passages" if teacher else "")


def parse_flagembedding(record: dict[str, Any]) -> Example:
    """Return a query with its positives and negatives. Source: FlagEmbedding's fine-tuning data, prompt + query."""
    sides = {column: _texts(record, column) for column in ("pos", "neg")}
    if not sides["pos"]:
        raise Bad("no positive", "pos is empty; give the query a positive or remove it")
    passages = [Text(None, text) for texts in sides.values() for text in texts]
    scored = [f"{column}_scores" for column in sides if record.get(f"{column}_scores") is not None]
    teacher = None
    if scored:
        counts = {column: len(texts) for column, texts in sides.items() if texts or f"{column}_scores" in scored}
        parts = [_numbers(record, f"{column}_scores", count, column) for column, count in counts.items()]
        teacher = [score for part in parts for score in part]
    prompt = record.get("prompt") or ""
    if not isinstance(prompt, str):
        raise Bad("prompt is no string", f"prompt is {prompt!r}; expected a string")
    query = Text(None, prompt + _text(record, "query"))
    return Example(query, passages, len(sides["pos"]), 1.0, teacher, "pos_scores and neg_scores" if scored else "")


PARSERS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "pairs": parse_pair,
    "tevatron": parse_tevatron,
    "flagembedding": parse_flagembedding,
}


def _text(record: dict[str, Any], column: str, may_be_empty: bool = False) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        found = f"is {value!r}" if value is not None else "is missing"
        raise Bad(f"{column} is no string", f"{column} {found}; expected a string{near_names(column, record.keys() - {column})}")
    return value if may_be_empty else _not_empty(value, column)


def _not_empty(text: str, what: str) -> str:
    if not text.strip():
        raise Bad("empty text", f"{what} is empty; remove the record or fill it")
    return text


def _id(record: dict[str, Any], column: str) -> str | None:
    value = record.get(column)
    if value is None or (isinstance(value, str | int) and str(value)):
        return None if value is None else str(value)
    raise Bad(f"{column} is no string", f"{column} is {value!r}; expected a string")


def _texts(record: dict[str, Any], column: str) -> list[str]:
    values = record.get(column)
    if values is None and column == "neg":
        return []
    if not isinstance(values, list):
        found = "missing" if values is None else f"{values!r}"
        raise Bad(f"{column} is no list", f"{column} is {found}; expected a list of texts")
    return [_text({column: value}, column) for value in values]


def _passages(record: dict[str, Any], column: str) -> list[dict[str, Any]]:
    values = record.get(column)
    if values is None and column == "negative_passages":
        return []
    if isinstance(values, dict) and all(isinstance(column, list) for column in values.values()):
        values = [dict(zip(values, row, strict=False)) for row in zip(*values.values(), strict=False)]  # a list by columns
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        found = "missing" if values is None else f"{values!r:.60}"
        raise Bad(f"{column} is no list", f"{column} is {found}; expected a list of {{docid, title, text}}")
    return values


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Bad("no number", f"{what} holds {value!r}; expected a finite number")
    return float(value)


def _numbers(record: dict[str, Any], column: str, count: int, of_what: str) -> list[float]:
    values = record.get(column)
    if values is None and count == 0:
        return []
    if not isinstance(values, list) or len(values) != count:
        found = "missing" if values is None else f"{len(values)} long" if isinstance(values, list) else f"{values!r}"
        raise Bad(
            "no teacher score", f"{column} is {found}; expected {count} numbers, one for each of {of_what}, or no scores at all"
        )
    return [_number(value, column) for value in values]
