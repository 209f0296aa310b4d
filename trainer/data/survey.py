"""Finds which columns the records of a file get, and what of a data set its form has no place for.

It is found by looking through all records before the first is written, because all records of a file have the same columns.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow.compute as pc

from trainer.data.datasets import RetrievalData
from trainer.data.groups import Group
from trainer.data.record_file import FORMS, PAIRS, Form
from trainer.data.row import Contents

LOST = {  # what a form may have no place for, for people
    "prompts": "prompts",
    "types": "types of queries",
    "titles": "titles apart from their texts",
    "grades": "grades other than 1",
    "not_relevant": "judgements of 0 or less",
    "absent": "judgements of documents that are not there",
    "negatives": "given negatives",
    "scores": "teacher's scores",
    "partial_scores": "teacher's scores, as other pairs have none",
    "queries": "queries without a positive",
    "passages": "passages that no record names",
}


class Survey:
    """What the records of a data set have, as they are looked at."""

    def __init__(self, data: RetrievalData):
        self._data = data
        self._is_named = {"corpus": np.zeros(len(data.corpus), bool), "queries": np.zeros(len(data.queries), bool)}
        self._num_graded = self._num_scored = self._num_pairs = 0

    def look(self, groups: Iterable[list[Group]]) -> Iterator[list[Group]]:
        """Yield groups as they come, and note what they have."""
        for block in groups:
            for group in block:
                self._is_named["queries"][group.query] = True
                self._is_named["corpus"][group.positives] = self._is_named["corpus"][group.negatives] = True
                scores = np.append(group.positive_teacher, group.teacher)
                self._num_scored, self._num_pairs = self._num_scored + np.isfinite(scores).sum(), self._num_pairs + len(scores)
                self._num_graded += (group.grades != 1).sum()
            yield block

    @property
    def _has_teacher(self) -> bool:
        """Whether every pair has a score: trainers cannot do with some."""
        return 0 < self._num_scored == self._num_pairs

    def contents(self, form: Form, num_negatives: int) -> Contents:
        """Return what the records of a file have. num_negatives: of each, where all have as many."""
        prompts, types = self._data.has_prompts["queries"], count_of(self._data, "queries", "type") > 0
        grades = self._num_graded > 0 and self._holds_grades(form, num_negatives)
        return Contents(num_negatives, self._has_teacher, grades, prompts, types)

    def lost(self, form: Form, num_negatives: int) -> dict[str, int]:
        """Return how many there are of what the records of a form have no place for. num_negatives: as for `contents`."""
        data = self._data
        is_pairs, is_flag = form.title == PAIRS, form is FORMS["flagembedding"]
        return _known(
            prompts=count_of(data, "corpus", "prompt") + (count_of(data, "queries", "prompt") if is_pairs else 0),
            types=0 if is_flag else count_of(data, "queries", "type"),
            titles=0 if form is FORMS["tevatron"] else _num_titles(data),
            grades=0 if self._holds_grades(form, num_negatives) else int(self._num_graded),
            partial_scores=0 if self._has_teacher else int(self._num_scored),
        )

    def _holds_grades(self, form: Form, num_negatives: int) -> bool:
        """Tell whether a form has a place for grades; beside negatives, one score is taken for a teacher's margin."""
        is_free = num_negatives == 0 and not self._has_teacher
        return form is FORMS["tevatron"] or (form is FORMS[PAIRS] and is_free)

    def in_no_record(self, splits: list[str]) -> dict[str, int]:
        """Return how many there are of what stands in no record at all."""
        qrels = [self._data.qrels[split] for split in splits]
        return _known(
            not_relevant=sum(int((each.scores <= 0).sum()) for each in qrels),
            absent=sum(len(each.absent_scores) for each in qrels),
            queries=int((~self._is_named["queries"]).sum()),
            passages=int((~self._is_named["corpus"]).sum()),
        )

    def warnings(self, form: Form) -> list[str]:
        """Return sentences on what FlagEmbedding reads otherwise than our tables have it."""
        if form is not FORMS["flagembedding"]:
            return []
        found, queries = [], self._data.queries.data
        has_prompt = queries.column("prompt").is_valid().to_numpy()
        num_filled = int((self._is_named["queries"] & ~has_prompt).sum()) if has_prompt.any() else 0
        if num_filled:
            found.append(f"{num_filled:,} queries without a prompt get an empty one: FlagEmbedding reads a null as the word None")
        types = {kind or "normal" for kind in queries.column("type").unique().to_pylist()}
        if len(types) > 1:
            listed = ", ".join(sorted(types))
            found.append(f"the types are {listed}: FlagEmbedding's same_dataset_within_batch wants a file for each")
        return found


def lost_in_collection(data: RetrievalData) -> dict[str, int]:
    """Return how many there are of what BEIR has no place for.

    Negatives are not written as judgements of 0, because nobody has judged them, and a judgement of 0 is not read as a negative.
    """
    scores = [qrels.teacher for qrels in data.qrels.values()] + ([] if data.given is None else [data.given.scores])
    return _known(
        types=count_of(data, "queries", "type"),
        negatives=0 if data.given is None else len(data.given.ids),
        scores=sum(int(np.isfinite(each).sum()) for each in scores),
    )


def say_lost(lost: dict[str, int], title: str) -> list[str]:
    """Return a sentence on what has no place in a form, if there is any. title: of the form, for people."""
    return [f"{title} has no place for " + ", ".join(f"{n:,} {LOST[name]}" for name, n in lost.items())] if lost else []


def count_of(data: RetrievalData, side: str, column: str) -> int:
    """Return how many texts of a side have something in a column."""
    values = (data.corpus if side == "corpus" else data.queries).data.column(column)
    return len(values) - values.null_count


def _num_titles(data: RetrievalData) -> int:
    """Return how many passages have both a title and a text behind it."""
    corpus = data.corpus.data
    length = corpus.column("title_length")
    is_titled = pc.and_(pc.greater(length, 0), pc.less(length, pc.utf8_length(corpus.column("text"))))
    return pc.sum(is_titled).as_py() or 0


def _known(**counts: int) -> dict[str, int]:
    return {name: int(count) for name, count in counts.items() if count}
