"""The form of FlagEmbedding: query, pos, neg, lists of texts [, pos_scores, neg_scores] [, prompt: stands before the query]."""

from typing import Any

from trainer.data.example import Bad, Example, Text, numbers_of, text_of


def parse(record: dict[str, Any]) -> Example:
    """Return a query with its positives and negatives. Source: FlagEmbedding's fine-tuning data, prompt + query."""
    sides = {column: _texts(record, column) for column in ("pos", "neg")}
    if not sides["pos"]:
        raise Bad("no positive", "pos is empty; give the query a positive or remove it")
    passages = [Text(None, text) for texts in sides.values() for text in texts]
    scored = [f"{column}_scores" for column in sides if record.get(f"{column}_scores") is not None]
    teacher = None
    if scored:
        counts = {column: len(texts) for column, texts in sides.items() if texts or f"{column}_scores" in scored}
        parts = [numbers_of(record, f"{column}_scores", count, column) for column, count in counts.items()]
        teacher = [score for part in parts for score in part]
    prompt = record.get("prompt") or ""
    if not isinstance(prompt, str):
        raise Bad("prompt is no string", f"prompt is {prompt!r}; expected a string")
    query = Text(None, prompt + text_of(record, "query"))
    return Example(query, passages, len(sides["pos"]), 1.0, teacher, "pos_scores and neg_scores" if scored else "")


def _texts(record: dict[str, Any], column: str) -> list[str]:
    values = record.get(column)
    if values is None and column == "neg":
        return []
    if not isinstance(values, list):
        found = "missing" if values is None else f"{values!r}"
        raise Bad(f"{column} is no list", f"{column} is {found}; expected a list of texts")
    return [text_of({column: value}, column) for value in values]
