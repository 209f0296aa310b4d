"""The form of BEIR, a folder: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv. How it is read: collection.py."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from trainer.data.row import Entry
from trainer.errors import InputError

BREAKS = re.compile("[\t\n\r]")  # what ends a cell or a line of a qrels file


def write_texts(path: Path, texts: Iterable[Entry]) -> int:
    """Write corpus.jsonl or queries.jsonl, titles and prompts apart, and return the number of texts."""
    num_texts = 0
    with open(path, "w", encoding="utf-8") as file:
        for num_texts, entry in enumerate(texts, 1):  # noqa: B007
            title, text = entry.title_and_rest()
            record = {"_id": entry.id, "title": title, "text": text}
            record |= {} if entry.prompt is None else {"prompt": entry.prompt}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return num_texts


def write_judgements(path: Path, judged: Iterable[tuple[str, str, float]]) -> int:
    """Write qrels/SPLIT.tsv of (query's id, document's id, score) and return the number of judgements."""
    num_judged = 0
    with open(path, "w", encoding="utf-8") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for num_judged, (query, passage, score) in enumerate(judged, 1):  # noqa: B007
            for row_id in (query, passage):
                if not row_id.isprintable() and BREAKS.search(row_id):
                    raise InputError(f"the id {row_id!r} holds a tab or a line break, which no qrels file can; give another id")
            file.write(f"{query}\t{passage}\t{int(score) if score == int(score) else score}\n")
    return num_judged
