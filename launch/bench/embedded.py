"""The embeddings of a data set by a model, made once and kept in the user's cache folder: to be searched, not to be timed."""

from pathlib import Path

import numpy as np

from launch.output import messages
from trainer.data.cache import cache_folder
from trainer.data.datasets import open_dataset
from trainer.encoder.missing import Texts, encode_missing
from trainer.encoder.model import ModelSettings, load_encoder, weights_digest
from trainer.encoder.shards import open_shards
from trainer.encoder.tokens import TokenTable, tokenize_side
from trainer.encoder.towers import Side


def embed_data(path: Path, model: str, max_tokens: int, num_queries: int, num_passages: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the embeddings of some training queries (Q, D) and of some passages (N, D), float32; fewer where there are fewer."""
    data = open_dataset(path, None)
    settings = ModelSettings(name=model, max_query_tokens=max_tokens, max_passage_tokens=max_tokens)
    encoder, tokenizer, traits = load_encoder(settings)
    encoder.eval()
    queries, digest = np.unique(data.qrels["train"].query_rows), weights_digest(encoder)
    wanted: dict[Side, TokenTable] = {
        "query": tokenize_side(data, "queries", tokenizer, traits).select(_spread(queries, num_queries)),
        "passage": tokenize_side(data, "corpus", tokenizer, traits).select(_spread(np.arange(len(data.corpus)), num_passages)),
    }
    texts = []
    for side, tokens in wanted.items():
        shards = open_shards(cache_folder(None) / "bench-embeddings", digest, traits.pooling, tokens, encoder, side)
        texts.append(Texts(shards, encoder.side(side), tokens))
    if missing := sum(len(each.tokens.lengths) for each in texts if len(each.shards.missing())):
        messages().print(f"[dim]{missing:,} texts of {path} are encoded once[/dim]")
    encode_missing(texts)
    query_QD, passage_ND = (each.shards.read_rows(np.arange(each.shards.num_rows)) for each in texts)
    return query_QD, passage_ND


def _spread(rows: np.ndarray, num: int) -> np.ndarray:
    """Return at most so many of some rows, evenly spread over them."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(num, len(rows))).astype(np.int64))]
