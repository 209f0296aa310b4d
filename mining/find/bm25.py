"""BM25 over a corpus or a part of it: hard negatives before there is a checkpoint, and the baseline of the results.

Words as code has them: `parseHTTPHeader` and `parse_http_header` are the words parse, http and header. Only words of the queries
are kept, numbered alike on all ranks. The formula is Lucene's; its weights come from whole numbers that all parts agree on, so a
score has the same bits however the corpus is divided.
"""

import itertools
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import datasets
import numpy as np
import scipy.sparse

from mining.find.postings import Postings, Query, Search
from trainer.data.datasets import RetrievalData

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[^\W_]+")
K1, B = 1.5, 0.75  # how soon a repeated word counts no more, and how much less a long document is worth
Rows = range | np.ndarray  # of a table
READ_ROWS = 1024  # texts in memory at once
WEIGH_PAIRS = 1 << 20  # weighed at once, in float64


@dataclass(frozen=True)
class WordLists:
    """Queries as numbers of words, in CSR form: each word once, where it first stands in the query."""

    number_of: dict[str, int]  # of all words of all queries
    indptr: np.ndarray  # (Q + 1,) int64
    words: np.ndarray  # (n,) int32
    times: np.ndarray  # (n,) float32: how often the query has the word

    def of(self, place: int) -> Query:
        """Return the words of a query, and how often it has each."""
        at = slice(self.indptr[place], self.indptr[place + 1])
        return self.words[at], self.times[at]


@dataclass(frozen=True)
class WordCounts:
    """How often the documents of a part of the corpus have each of V words."""

    statistics: np.ndarray  # (2 + V,) int64: documents, words in all of them, documents that have each word
    length_N: np.ndarray  # (N,) int32 words of each document, with words of no query
    counts: Postings  # their "weights" are the counts

    def weigh(self, statistics: np.ndarray) -> Postings:
        """Return what each word is worth in each document, in the place of the counts; the statistics are sums over all parts."""
        (num_docs, num_words), df_V = statistics[:2], statistics[2:]
        idf_V = np.log1p((num_docs - df_V + 0.5) / (df_V + 0.5))
        norm_N = K1 * (1 - B + B * self.length_N / max(1, num_words) * num_docs)
        word_n = np.repeat(np.arange(len(df_V), dtype=np.int32), np.diff(self.counts.indptr))
        for start in range(0, len(word_n), WEIGH_PAIRS):
            at = slice(start, start + WEIGH_PAIRS)
            count_n = self.counts.weights[at].astype(np.float64)
            self.counts.weights[at] = idf_V[word_n[at]] * count_n / (count_n + norm_N[self.counts.docs[at]])
        return self.counts


def bm25_top_k(
    data: RetrievalData, query_rows: np.ndarray, k: int, allowed_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores float32, ids int64), each (Q, k), of the best documents; score -inf and id -1 fill up.

    allowed_N: documents that may be returned; None: all.
    Documents that share no word with the query are not results. Ties go to the lower row.
    """
    queries = number_words(read_texts(data.queries, query_rows))
    found = count_words(data.corpus, range(len(data.corpus)), queries.number_of, allowed_N)
    return Search(found.weigh(found.statistics), k).all(queries.of, range(len(query_rows)))


def number_words(batches: Iterable[list[str]]) -> WordLists:
    """Return texts as numbers of words; a word's number is how many came before it."""
    number_of: dict[str, int] = {}
    indptr, words, times = array("q", [0]), array("i"), array("f")
    for text in itertools.chain.from_iterable(batches):
        counted = Counter(split_words(text))  # in the order in which they come
        words.extend([number_of.setdefault(word, len(number_of)) for word in counted])
        times.extend(counted.values())
        indptr.append(len(words))
    return WordLists(number_of, *(np.array(column) for column in (indptr, words, times)))


def read_texts(table: datasets.Dataset, rows: Rows) -> Iterator[list[str]]:
    """Yield the texts of some rows, READ_ROWS at once."""
    for batch in table.select(rows).with_format("arrow").iter(READ_ROWS):
        yield batch.column("text").to_pylist()


def count_words(
    table: datasets.Dataset,
    rows: Rows,
    number_of: dict[str, int],
    allowed_N: np.ndarray | None = None,
    go_on: Callable[[int], None] = lambda done: None,
) -> WordCounts:
    """Return the counts of some rows of the corpus.

    allowed_N: documents of the corpus that may be found; others only count in the statistics. None: all are.
    go_on: told how many documents are counted. Memory: 16 bytes for each word of each document, 8 of them in the end.
    """
    may_be_found_N = np.ones(len(rows), bool)
    if allowed_N is not None:
        may_be_found_N = allowed_N[rows.start : rows.stop] if isinstance(rows, range) else allowed_N[rows]
    df_V, docs = np.zeros(max(1, len(number_of)), np.int64), 0
    lengths = [np.zeros(0, np.int32)]
    columns = [(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))]
    for texts in read_texts(table, rows):
        length_n, doc_n, word_n, count_n = _count(texts, number_of)
        df_V += np.bincount(word_n, minlength=len(df_V))
        is_kept = may_be_found_N[docs + doc_n]
        kept_n = np.bincount(doc_n[is_kept], minlength=len(texts))
        columns.append((kept_n, word_n[is_kept].astype(np.int32), count_n[is_kept].astype(np.float32)))
        lengths.append(length_n)
        docs += len(texts)
        go_on(docs)
    length_N = np.concatenate(lengths)
    return WordCounts(np.concatenate([[docs, length_N.sum()], df_V]), length_N, _by_word(columns, len(df_V)))


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, identifiers split at underscores and changes of case."""
    return _WORD.findall(_CAMEL.sub(" ", text).lower())


def _count(texts: list[str], number_of: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the number of words of each text, and (text, known word, how often it is there), by text and word."""
    numbers, lengths = array("i"), []
    for text in texts:
        words = split_words(text)
        numbers.extend([number_of.get(word, -1) for word in words])
        lengths.append(len(words))
    number_n, length_n = np.array(numbers, np.int64), np.array(lengths, np.int32)
    key_n = (np.repeat(np.arange(len(texts)), length_n) * len(number_of) + number_n)[number_n >= 0]
    key_n, count_n = np.unique(key_n, return_counts=True)
    return length_n, *np.divmod(key_n, max(1, len(number_of))), count_n


def _by_word(columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]], num_words: int) -> Postings:
    """Return what stands by document by word: of each batch, how many words its documents have, the words, their counts."""
    kept_N, word_n, count_n = (np.concatenate(column) for column in zip(*columns, strict=True))
    columns.clear()
    indptr = np.concatenate([[0], np.cumsum(kept_N)])
    small = np.int32 if indptr[-1] < 1 << 31 else np.int64  # of which scipy makes both arrays of places
    by_doc = scipy.sparse.csr_array((count_n, word_n.astype(small, copy=False), indptr.astype(small)), (len(kept_N), num_words))
    by_word = by_doc.tocsc()  # documents ascend
    return Postings(len(kept_N), by_word.indptr, by_word.indices.astype(np.int32, copy=False), by_word.data)
