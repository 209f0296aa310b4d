"""The forms that records have: those that other trainers read (peers/)."""

from collections.abc import Callable
from typing import Any

from trainer.data.example import Example
from trainer.data.peers import flagembedding, pairs, tevatron

FORMS = (
    "BEIR (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv) or records with the columns anchor, positive, negative … "
    "(sentence-transformers), query, positive_passages, negative_passages (Tevatron) or query, pos, neg (FlagEmbedding)"
)
PARSERS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "pairs": pairs.parse,
    "tevatron": tevatron.parse,
    "flagembedding": flagembedding.parse,
}
