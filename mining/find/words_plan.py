"""What a search by words will take, in minutes and in memory, measured on a sample before anything of it is begun."""

import itertools
import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from mining.find.bm25 import count_words, number_words, read_texts
from mining.find.postings import Search
from mining.find.words import part_of
from mining.memory import GIB, held_now, memory_limit
from mining.work import Work
from trainer.data.datasets import RetrievalData
from trainer.errors import InputError
from trainer.handoff.manifest import versions
from trainer.handoff.weights import checkpoints_folder

log = logging.getLogger(__name__)

SAMPLE_ROWS, SAMPLE_QUERIES = 8192, 1024  # a second or two
RUN = 64
SMALL = 8  # as small a part of the sample is searched, too: what of a search does not grow with the corpus
PAIR_BYTES = 16  # of a word in a document while they are sorted; 8 afterwards


@dataclass(frozen=True)
class WordsPlan:
    """What the rank that has most to do will take."""

    index_s: float
    search_s: float
    num_bytes: int
    free_bytes: int  # that a rank may take beside what it holds

    def as_text(self) -> str:
        index, search = _minutes(self.index_s), _minutes(self.search_s)
        return f"BM25 takes about {index} minutes to index and {search} to search, and {self.num_bytes / GIB:.2f} GiB of a rank"

    def beyond(self, limit_minutes: float) -> str | None:
        """Return which limit the plan exceeds, and what raises it, or None."""
        seconds = self.index_s + self.search_s
        if seconds > 60 * limit_minutes:
            return (
                f"BM25 would take about {_minutes(seconds)} minutes, more than mine.bm25_minutes={limit_minutes:g}; "
                "set that higher, or take more ranks"
            )
        if self.num_bytes > self.free_bytes:
            return (
                f"BM25 would take {self.num_bytes / GIB:.2f} GiB of a rank, more than the {self.free_bytes / GIB:.2f} GiB it has "
                "left; set mine.memory_gib higher, or take more ranks"
            )
        return None


def foresee_words(work: Work, makes_first: bool, is_only: bool) -> None:
    """Plan the search by words where it is asked for, and say so; beyond the limits leave version 0 out, or refuse the job.

    makes_first: version 0 is yet to be made. is_only: a single refresh.
    Collective; raises InputError where there is nothing that may take BM25's place.
    """
    job = work.job
    top_k = max(job.search.bm25_top_k, job.mine.bm25_top_k if makes_first else 0)
    if top_k:
        plan = agreed_plan(work, top_k)
        work.ranks.decide(lambda: judge(work, plan, is_only))


def judge(work: Work, plan: WordsPlan, is_only: bool) -> None:
    """Record the plan, and hold it to the limits. Rank 0 only."""
    job, reason = work.job, plan.beyond(work.job.mine.bm25_minutes)
    work.metrics.record(0, {"event": "bm25 plan", **{name: round(value, 3) for name, value in vars(plan).items()}})
    log.info("%s", plan.as_text())
    if reason is None:
        return
    if job.search.bm25_top_k:
        raise InputError(f"search.bm25_top_k={job.search.bm25_top_k} asks for candidates, but {reason}, or search.bm25_top_k=0")
    if job.negatives.schedule:
        raise InputError(f"negatives.schedule begins with version 0 from BM25, but {reason}")
    if is_only and not versions(checkpoints_folder(job.run.folder)):
        raise InputError(f"BM25 is all that can be mined here, but {reason}")
    work.without_words = True
    work.warnings.tell("bm25_left_out", f"version 0 is left out: {reason}; the first checkpoint gives the first negatives", None)


def agreed_plan(work: Work, top_k: int) -> WordsPlan:
    """Return the plan of the rank that takes longest and has least memory left. Collective."""
    ranks, data, query_rows = work.ranks, work.data, work.judgements.query_rows
    free_bytes = memory_limit(ranks, work.job.mine.memory_gib) - held_now()
    own = part_of(len(data.corpus), ranks.rank, ranks.num_ranks)
    plan = ranks.together(lambda: measure(data, own, query_rows, top_k, free_bytes))
    plans = ranks.exchange([plan] * ranks.num_ranks)
    return WordsPlan(
        index_s=max(each.index_s for each in plans),
        search_s=max(each.search_s for each in plans),
        num_bytes=max(each.num_bytes for each in plans),
        free_bytes=min(each.free_bytes for each in plans),
    )


def measure(data: RetrievalData, own: range, query_rows: np.ndarray, top_k: int, free_bytes: int) -> WordsPlan:
    """Return the plan for some rows of the corpus and all queries.

    All words of the sample count, those of no query too: the plan is on the careful side.
    """
    rows, asked = spread(np.asarray(own), SAMPLE_ROWS), spread(query_rows, SAMPLE_QUERIES)
    queries = number_words(itertools.chain(read_texts(data.queries, asked), read_texts(data.corpus, rows)))
    times = []
    for sample in (rows[::SMALL], rows):
        began = time.perf_counter()
        counts = count_words(data.corpus, sample, queries.number_of)
        weighed, indexed_s = counts.weigh(counts.statistics), time.perf_counter() - began
        # As rare among these documents as the k best are among all: so much the search leaves out.
        search = Search(weighed, max(1, round(top_k * len(sample) / max(1, len(own)))))
        began = time.perf_counter()
        search.all(queries.of, range(len(asked)))
        times.append((len(sample), indexed_s, time.perf_counter() - began))
    (few, _, few_s), (many, index_s, search_s) = times
    grows = max(0.0, search_s - few_s) / max(1, many - few)  # with every further document
    share, num_pairs = len(own) / max(1, many), len(search.postings.docs)
    query_bytes = 8 * (1 + int(queries.indptr[len(asked)]) / max(1, len(asked)))
    doc_bytes = 4 * (1 + torch.get_num_threads())
    return WordsPlan(
        index_s=index_s * share,
        search_s=(search_s + grows * (len(own) - many)) * len(query_rows) / max(1, len(asked)),
        num_bytes=int(PAIR_BYTES * num_pairs * share + doc_bytes * len(own) + query_bytes * len(query_rows)),
        free_bytes=free_bytes,
    )


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Return at most so many of some rows, in runs of RUN that stand evenly from first to last: a disk reads few places."""
    if len(rows) <= most:
        return rows
    starts = np.arange(most // RUN) * (len(rows) - RUN) // (most // RUN)
    return rows[(starts[:, None] + np.arange(RUN)).ravel()]


def _minutes(seconds: float) -> str:
    minutes = max(0.1, seconds / 60)
    return f"{minutes:.1f}" if minutes < 10 else f"{minutes:,.0f}"
