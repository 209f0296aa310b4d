"""Which form the records of a file have, found by their columns: those that other trainers read (peers/)."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from trainer.data.example import Bad, Example
from trainer.data.peers import flagembedding, pairs, tevatron
from trainer.data.peers.pairs import NUMBERED
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
PARSERS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "pairs": pairs.parse,
    "tevatron": tevatron.parse,
    "flagembedding": flagembedding.parse,
}


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
