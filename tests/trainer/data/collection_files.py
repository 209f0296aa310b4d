"""One small collection, and ways to write it that people have."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq

# Ids are numbers, so that files may have them as such.
CORPUS = {
    "1": ("Sorting", "sort a list in order"),
    "2": ("", "open the file and read each line"),
    "3": ("Dates", 'parse a "date" from json'),
    "4": ("", "a socket to write to"),
    "5": ("", "cache the key of a hash"),
    "6": ("Trees", "a tree of one path"),
}
QUERIES = {"11": "how to sort a list", "12": "read a file line by line", "13": "parse a date", "14": "the key of a cache"}
JUDGED = {"11": {"1": 2, "6": 1, "4": 0}, "12": {"2": 1, "1": 0}, "13": {"3": 1, "5": 2}}


def put(folder, name, content):
    """Write text, or records as JSON lines or Parquet, compressed as the name says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(content), path)
        return
    if not isinstance(content, str | bytes):
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
    content = content.encode() if isinstance(content, str) else content
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": lambda raw: pa.compress(raw, "zstd", True)}
    path.write_bytes(pack.get(path.suffix, bytes)(content))


def corpus(id="_id", text="text", title="title", as_id=str, **more):
    return [{id: as_id(name), title: head, text: body, **more} for name, (head, body) in CORPUS.items()]


def queries(id="_id", text="text", as_id=str):
    return [{id: as_id(name), text: words} for name, words in QUERIES.items()]


def judged(query="query-id", passage="corpus-id", score="score", as_id=str, as_score=int):
    return [
        {query: as_id(q), passage: as_id(p), **({score: as_score(grade)} if score else {})}
        for q, grades in JUDGED.items()
        for p, grade in grades.items()
    ]


def lines(head="query-id\tcorpus-id\tscore", row="{q}\t{p}\t{s}", end="\n"):
    rows = [row.format(q=q, p=p, s=s) for q, grades in JUDGED.items() for p, s in grades.items()]
    return "".join(line + end for line in ([head] if head else []) + rows)


def beir(folder, qrels="qrels/test.tsv", content=None, packed=""):
    put(folder, f"corpus.jsonl{packed}", corpus())
    put(folder, f"queries.jsonl{packed}", queries())
    put(folder, qrels + packed, lines() if content is None else content)


def texts_of(data, side):
    return dict(zip(getattr(data, side)["_id"], getattr(data, side)["text"], strict=True))


def judgements_of(data, split="test"):
    found: dict[str, dict[str, float]] = {}
    names, documents, qrels = data.queries["_id"], data.corpus["_id"], data.qrels[split]
    for query, passage, score in zip(qrels.query_rows, qrels.corpus_rows, qrels.scores, strict=True):
        found.setdefault(names[int(query)], {})[documents[int(passage)]] = score
    return found
