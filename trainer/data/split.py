"""Sets training queries of a data set aside as test and dev queries, by a draw that a seed repeats.

All judgements of a query go one way, and so do all queries with one text; the corpus stays whole.
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.convert import BEIR, convert_data, refuse_out
from trainer.data.datasets import Qrels, RetrievalData
from trainer.errors import InputError

MOST = {"test": 2000, "dev": 1000}  # queries that a share takes: more make no figure much surer
LEAST_TRAINING = 20  # queries that have to stay
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")  # what is written is a folder
LOST_IN_BEIR = {"negatives", "scores"}  # that --form flagembedding has a place for


def refuse_split_out(out: Path, form: str) -> None:
    """Raise InputError if something would be overwritten, or OUT names a file."""
    if out.suffix and (form != BEIR or out.suffix in SUFFIXES):
        raise InputError(f"OUT {out} names a file, and a data set with splits is a folder; give OUT a name without {out.suffix}")
    refuse_out(out, form)


def split_data(data: RetrievalData, wanted: Mapping[str, float], seed: int, train_split: str = "train") -> RetrievalData:
    """Return a data set with some training queries as splits of their own; splits that are there stay as they are.

    wanted: by "test" and "dev", how many; below 1 a share of the training queries, at most MOST. A draw takes no query whose text
    another split has. Raises InputError where nothing is to be drawn, or too little would be left.
    """
    kept = kept_splits(data, train_split)
    drawn = {name: number for name, number in wanted.items() if number and name not in kept}
    if not drawn:
        reason = f"{data.path} has {' and '.join(kept)} queries already" if kept else "--test and --dev are 0"
        raise InputError(f"nothing is to be set aside: {reason}; set --test or --dev for a split that is not there")
    rest_name = "train" if train_split in MOST else train_split
    others = {name: each for name, each in data.qrels.items() if name != train_split}
    if rest_name in others:
        raise InputError(f"{data.path} has the split train beside data.train_split={train_split}; leave data.train_split out")
    rows, keys = data.training_queries(train_split), data.text_keys["queries"]
    elsewhere = [np.concatenate([each.query_rows, each.absent_query_rows]) for each in others.values()]
    known = keys[np.concatenate([np.zeros(0, np.int64), *elsewhere])]
    texts = np.setdiff1d(keys[rows], known)
    counts = {name: _count(name, number, len(rows)) for name, number in drawn.items()}
    shuffled, found, start = np.random.default_rng(seed).permutation(texts), {}, 0
    is_left = np.ones(len(keys), bool)
    for name, count in counts.items():
        is_taken = np.isin(keys, shuffled[start : start + count])
        found[name] = _of_queries(data.qrels[train_split], is_taken)
        is_left, start = is_left & ~is_taken, start + count
    if is_left[rows].sum() < LEAST_TRAINING or start > len(texts):
        asked = " and ".join(f"{count:,} for {name}" for name, count in counts.items())
        raise InputError(
            f"{data.path} has {len(rows):,} training queries with {len(texts):,} texts to draw from, and {asked} are asked for; "
            f"at least {LEAST_TRAINING} have to stay: set --test and --dev lower, or bring more queries"
        )
    return replace(data, qrels={rest_name: _of_queries(data.qrels[train_split], is_left), **others, **found})


def write_split(data: RetrievalData, parts: RetrievalData, out: Path, form: str, train_split: str = "train") -> dict[str, Any]:
    """Write `parts`, which are `data` after `split_data`, in a form of convert.py, and return counts and what is to be said."""
    refuse_split_out(out, form)
    found = convert_data(parts, out, form)
    queries = {name: len(parts.evaluated_queries(name)) for name in parts.qrels}
    said = [f"the {name} queries stay as they are" for name in kept_splits(data, train_split)]
    said += found["said"]
    if form == BEIR and LOST_IN_BEIR & found["lost"].keys():
        said.append("--form flagembedding keeps negatives and teacher's scores")
    return {"queries": queries, "passages": len(parts.corpus), "lost": found["lost"], "said": said}


def kept_splits(data: RetrievalData, train_split: str) -> list[str]:
    """Return which of test and dev a data set has already, other than what it is trained on."""
    return [name for name in MOST if name in data.qrels and name != train_split]


def split_command(path: Path | None, columns: Mapping[str, str]) -> str:
    """Return the command that sets queries of a data set aside; path: None where it has no single one."""
    if path is None:
        return "negpool data split DATA OUT"
    stem = path.name.partition(".")[0].partition(":")[0] or "mine"
    out = Path("data") / (stem if not Path("data", stem).exists() else f"{stem}-split")
    pairs = ",".join(f"{name}={column}" for name, column in columns.items())
    return shlex.join(["negpool", "data", "split", str(path), str(out), *(["--columns", pairs] if pairs else [])])


def say_missing(splits: set[str], path: Path, columns: Mapping[str, str], train_split: str = "train") -> list[str]:
    """Return a sentence on which of test and dev a data set lacks beside its training queries, if it lacks any."""
    missing = [name for name in MOST if name not in splits or name == train_split]
    if train_split not in splits or not missing:
        return []
    effect = "nothing will tell whether the model is better" if "test" in missing else "no checkpoint can be chosen as the best"
    return [f"no {' and no '.join(missing)} queries: {effect}; {split_command(path, columns)} sets some aside"]


def _count(name: str, number: float, num_queries: int) -> int:
    """Return how many queries a number means."""
    if not math.isfinite(number) or number < 0 or (number > 1 and number != int(number)):
        raise InputError(f"--{name} {number} cannot be used; expected a share below 1, or a whole number of queries")
    return int(number) if number >= 1 else min(MOST[name], max(1, round(number * num_queries)))


def _of_queries(qrels: Qrels, is_wanted: np.ndarray) -> Qrels:
    """Return the judgements of some queries; is_wanted: (num_queries,) bool."""
    here, absent = is_wanted[qrels.query_rows], is_wanted[qrels.absent_query_rows]
    return Qrels(
        *(each[here] for each in (qrels.query_rows, qrels.corpus_rows, qrels.scores, qrels.teacher)),
        *(each[absent] for each in (qrels.absent_query_rows, qrels.absent_scores)),
    )
