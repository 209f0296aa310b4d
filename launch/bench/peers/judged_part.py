"""A part of a data set that has what it needs: some judged queries of a split with their passages, among others."""

import json
from pathlib import Path

import numpy as np

from trainer.data.datasets import open_dataset
from trainer.errors import InputError


def write_judged_part(path: Path, folder: Path, split: str, num_queries: int, num_passages: int) -> None:
    """Write the first queries of a split, their judged passages, and passages from all over the corpus, as a data set.

    num_passages: from all over the corpus. Raises InputError where nothing is judged.
    """
    data = open_dataset(path, None)
    if split not in data.qrels:
        raise InputError(f"{path} has no judgements of a split {split!r}, which peers are compared on; --data takes another one")
    judged, query_rows = data.qrels[split], data.evaluated_queries(split)[:num_queries]
    is_in = np.isin(judged.query_rows, query_rows) & (judged.scores > 0)
    others = np.linspace(0, len(data.corpus) - 1, min(num_passages, len(data.corpus))).astype(np.int64)
    passage_rows = np.union1d(judged.corpus_rows[is_in], others)
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", data.corpus.select(passage_rows)), ("queries", data.queries.select(query_rows))):
        lines = (json.dumps({"_id": text["_id"], "text": text["text"]}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    ids = data.queries["_id"][:], data.corpus["_id"][:]
    pairs = zip(judged.query_rows[is_in], judged.corpus_rows[is_in], judged.scores[is_in], strict=True)
    rows = (f"{ids[0][query]}\t{ids[1][passage]}\t{score:g}\n" for query, passage, score in pairs)
    (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
