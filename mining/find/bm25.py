"""BM25 over the corpus: hard negatives before there is a checkpoint, and the baseline of the results.

Words as code has them: `parseHTTPHeader` and `parse_http_header` are the words parse, http and header. Documents that
share no word with the query are not results. Ties go to the lower row, so the result is a function of the texts.
"""

import logging
import re

import bm25s
import numpy as np

from trainer.data.datasets import RetrievalData

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[^\W_]+")


def bm25_top_k(
    data: RetrievalData, query_rows: np.ndarray, k: int, allowed_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores float32, ids int64), each (Q, k), of the best documents; score -inf and id -1 fill up.

    allowed_N: documents that may be returned; None: all.
    """
    return search_bm25(index_bm25(data), data, query_rows, k, allowed_N)


def index_bm25(data: RetrievalData) -> bm25s.BM25:
    """Return the index of the corpus, held in memory."""
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
    index = bm25s.BM25(backend="numpy")
    index.index([split_words(text) for text in data.corpus["text"]], show_progress=False)
    return index


def search_bm25(
    index: bm25s.BM25, data: RetrievalData, query_rows: np.ndarray, k: int, allowed_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `bm25_top_k` returns, from an index that is there already."""
    num_found = min(k, len(data.corpus))
    scores_Qk = np.full((len(query_rows), k), -np.inf, np.float32)
    ids_Qk = np.full((len(query_rows), k), -1, np.int64)
    for place, text in enumerate(data.queries.select(query_rows)["text"]):
        known = index.get_tokens_ids(split_words(text))
        if len(known) == 0:
            continue
        score_N = index.get_scores_from_ids(known)
        if allowed_N is not None:
            score_N = np.where(allowed_N, score_N, np.float32(0))
        scores_Qk[place, :num_found], ids_Qk[place, :num_found] = _best(score_N, num_found)
    return scores_Qk, ids_Qk


def score_bm25(index: bm25s.BM25, data: RetrievalData, query_rows: np.ndarray, ids_QR: np.ndarray) -> np.ndarray:
    """Return the scores of any documents, (Q, R) float32: 0 for no common word, -inf where the id is -1."""
    scores_QR = np.where(ids_QR < 0, -np.inf, 0).astype(np.float32)
    asked = np.flatnonzero((ids_QR >= 0).any(1))
    for place, text in zip(asked, data.queries.select(query_rows[asked])["text"], strict=True):
        known = index.get_tokens_ids(split_words(text))
        if len(known):
            score_N = index.get_scores_from_ids(known)
            scores_QR[place] = np.where(ids_QR[place] < 0, -np.inf, score_N[ids_QR[place]])
    return scores_QR


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, identifiers split at underscores and changes of case."""
    return _WORD.findall(_CAMEL.sub(" ", text).lower())


def _best(score_N: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k highest scores and their rows, ties by row ascending; -inf and -1 for scores of 0."""
    # Bits of a float that is not negative rise with its value, so score and row make one sortable number.
    sortable = (score_N.view(np.int32).astype(np.int64) << 32) - np.arange(len(score_N))
    ids = np.argpartition(sortable, -k)[-k:]
    ids = ids[np.argsort(-sortable[ids])]
    found = score_N[ids] > 0
    return np.where(found, score_N[ids], -np.inf), np.where(found, ids, -1)
