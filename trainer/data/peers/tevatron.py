"""The form of Tevatron: query_id, query, positive_passages, negative_passages, lists of {docid, title, text [, score]}."""

from typing import Any

from trainer.data.example import Bad, Example, Text, not_empty, number_of, text_of


def parse(record: dict[str, Any]) -> Example:
    """Return a query with its positive and negative passages. Source: Tevatron's training data."""
    passages: list[Text] = []
    scores: list[Any] = []
    num_positives = 0
    for column in ("positive_passages", "negative_passages"):
        for passage in _passages(record, column):
            title, text = passage.get("title") or "", text_of(passage, "text", may_be_empty=True)
            passages.append(Text(_id(passage, "docid"), not_empty(f"{title} {text}".strip(), f"a text in {column}")))
            scores.append(passage.get("score"))
        num_positives = num_positives or len(passages)
        if not num_positives:
            raise Bad("no positive", "positive_passages is empty; give the query one or remove it")
    teacher = None
    if any(score is not None for score in scores):
        if None in scores:
            raise Bad("no teacher score", "some passages have a score and others none; give all one, or none")
        teacher = [number_of(score, "score") for score in scores]
    query = Text(_id(record, "query_id"), text_of(record, "query"))
    return Example(query, passages, num_positives, 1.0, teacher, "score of passages" if teacher else "")


def _id(record: dict[str, Any], column: str) -> str | None:
    value = record.get(column)
    if value is None or (isinstance(value, str | int) and str(value)):
        return None if value is None else str(value)
    raise Bad(f"{column} is no string", f"{column} is {value!r}; expected a string")


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
