"""Judgements and given negatives as rows of numbers, on their way to disk."""

import array
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.texts import prompts_digest

SIDES = ("corpus", "queries")
# score: grade of relevance, above 0 is relevant; teacher: a teacher's score, NaN where there is none
JUDGED = np.dtype([("query", np.int64), ("passage", np.int64), ("score", np.float32), ("teacher", np.float32)])
ABSENT = np.dtype([("query", np.int64), ("score", np.float32)])
NO_SCORE = float("nan")


class Pairs:
    """Queries and passages by the order in which they were added, with grade and teacher's score."""

    def __init__(self) -> None:
        self._columns = {"query": array.array("q"), "passage": array.array("q")} | {
            name: array.array("f") for name in ("score", "teacher")
        }

    def __len__(self) -> int:
        return len(self._columns["query"])

    def add(self, *values: Any) -> None:
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def rows(self, query_rows: np.ndarray, passage_rows: np.ndarray) -> np.ndarray:
        """Return the pairs by row, (n,) JUDGED."""
        found = np.zeros(len(self._columns["query"]), JUDGED)
        for name, column in self._columns.items():
            found[name] = np.array(column)
        found["query"], found["passage"] = query_rows[found["query"]], passage_rows[found["passage"]]
        return found


def sorted_judgements(judged: np.ndarray) -> np.ndarray:
    """Return judgements by query and passage, each pair once, with its highest score, teacher's included."""
    order = np.lexsort((-np.nan_to_num(judged["teacher"]), -judged["score"], judged["passage"], judged["query"]))
    ordered = judged[order]
    is_new = np.ones(len(ordered), bool)
    is_new[1:] = (ordered["query"][1:] != ordered["query"][:-1]) | (ordered["passage"][1:] != ordered["passage"][:-1])
    return ordered[is_new]


def save_absent(folder: Path, split: str, absent: np.ndarray) -> None:
    """Write the judgements of a split, (n,) ABSENT, that name no document of the corpus; none: no file.

    Nothing can find them, and an ideal list has those whose grade is above 0, as trec_eval has it.
    """
    if len(absent):
        np.save(folder / f"absent-{split}.npy", absent, allow_pickle=False)


def save_own(folder: Path, own: np.ndarray) -> None:
    """Write which corpus row has the id of each query, (num_queries,) int64, -1 where none has; only given ids count."""
    np.save(folder / "own.npy", own.astype(np.int64), allow_pickle=False)


def save_given(folder: Path, negatives: np.ndarray, judged: list[np.ndarray], num_queries: int) -> None:
    """Write the given negatives, row q those of query q, without any that is a positive of its query; none: no files."""
    if not len(negatives):
        return
    negatives = sorted_judgements(negatives)
    span = 1 + max(int(rows["passage"].max(initial=0)) for rows in [negatives, *judged])
    positives = np.concatenate([rows["query"][rows["score"] > 0] * span + rows["passage"][rows["score"] > 0] for rows in judged])
    negatives = negatives[~np.isin(negatives["query"] * span + negatives["passage"], positives)]
    indptr = np.searchsorted(negatives["query"], np.arange(num_queries + 1))
    for name, values in (("indptr", indptr), ("ids", negatives["passage"]), ("scores", negatives["teacher"])):
        np.save(folder / f"given-{name}.npy", values, allow_pickle=False)


def write_about(folder: Path, form: str, **fields: Any) -> None:
    """Write what a table's reader must know beside it: its form, and a digest of each side's texts."""
    content, has_prompts = {}, {}
    for side in SIDES:
        digest = hashlib.sha256(np.load(folder / f"{side}-keys.npy")[1].tobytes())
        prompts = prompts_digest(folder / f"{side}.arrow")
        digest.update(prompts)
        content[side], has_prompts[side] = digest.hexdigest(), bool(prompts)
    (folder / "about.json").write_text(json.dumps({"form": form, "content": content, "has_prompts": has_prompts, **fields}))
