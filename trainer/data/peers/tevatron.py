"""The form of Tevatron: query_id, query, positive_passages, negative_passages, lists of {docid, title, text [, score]}."""

from typing import Any

from trainer.data.example import Example, has_teacher, id_of, option_of, passages_of, positives_of, text_of


def parse(record: dict[str, Any]) -> Example:
    """Return a query with its positive and negative passages. Source: Tevatron's training data."""
    query = text_of(record, "query")
    passages = positives_of(record, "positive_passages") + passages_of(record, "negative_passages", 0.0)
    scored = "score of passages" if has_teacher(passages) else ""
    return Example(query, passages, scored, id_of(record, "query_id"), option_of(record, "prompt"))
