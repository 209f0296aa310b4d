"""Collections as people have them hold the same texts and judgements, whatever their files are called and look like."""

import codecs
import json

import datasets
import numpy as np
import pytest

from tests.trainer.data.collection_files import (
    CORPUS,
    JUDGED,
    QUERIES,
    beir,
    corpus,
    judged,
    judgements_of,
    lines,
    put,
    queries,
    texts_of,
)
from trainer.data.check import check_dataset
from trainer.data.datasets import open_dataset


def with_texts(corpus_records, query_records):
    def write(folder):
        beir(folder)
        put(folder, "corpus.jsonl", corpus_records)
        put(folder, "queries.jsonl", query_records)

    return write


def with_qrels(name, content):
    return lambda folder: beir(folder, name, content)


def byte_marks(folder):
    beir(folder)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        content = (folder / name).read_bytes().replace(b"\n", b"\r\n")
        (folder / name).write_bytes(codecs.BOM_UTF8 + content)


def hub(*names):
    def write(folder):
        for name, records in zip(names, (corpus(), queries(), judged()), strict=True):
            put(folder, name, records)

    return write


def tables_of_text(folder):
    put(folder, "corpus.tsv", "id\ttitle\ttext\n" + "".join(f"{n}\t{t}\t{body}\n" for n, (t, body) in CORPUS.items()))
    quoted = "".join('{},"{}","{}"\n'.format(n, *(each.replace('"', '""') for each in texts)) for n, texts in CORPUS.items())
    put(folder, "corpus.csv", "docid,title,contents\n" + quoted)
    (folder / "corpus.tsv").unlink()
    put(folder, "queries.csv", "qid,query\n" + "".join(f"{n},{text}\n" for n, text in QUERIES.items()))
    put(folder, "qrels/test.csv", lines("qid,docid,label", "{q},{p},{s}"))


def quoted_tsv(folder):
    """As pandas writes it: quotes around what holds some."""
    table = "".join(
        "{}\t{}\t{}\n".format(n, t, '"' + b.replace('"', '""') + '"' if '"' in b else b) for n, (t, b) in CORPUS.items()
    )
    beir(folder)
    (folder / "corpus.jsonl").unlink()
    put(folder, "corpus.tsv", "_id\ttitle\ttext\n" + table)


def saved_parts(folder):
    tables = {"corpus": corpus(), "queries": queries(), "test": judged()}
    datasets.DatasetDict({name: datasets.Dataset.from_list(records) for name, records in tables.items()}).save_to_disk(folder)


def saved_folders(folder):
    datasets.Dataset.from_list(corpus()).save_to_disk(folder / "corpus")
    datasets.DatasetDict({"queries": datasets.Dataset.from_list(queries())}).save_to_disk(folder / "queries")
    datasets.DatasetDict({"test": datasets.Dataset.from_list(judged())}).save_to_disk(folder / "qrels")


def msmarco_documents(folder):
    rows = "".join(f"{n}\thttps://x.test/{n}\t{title}\t{body}\n" for n, (title, body) in CORPUS.items())
    put(folder, "msmarco-docs.tsv.gz", rows)
    put(folder, "msmarco-test-queries.tsv.gz", "".join(f"{n}\t{text}\n" for n, text in QUERIES.items()))
    put(folder, "msmarco-test-qrels.tsv.gz", lines(None, "{q} 0 {p} {s}"))


JOINED = {name: f"{title} {text}".strip() for name, (title, text) in CORPUS.items()}
PART = "-00000-of-00001.parquet"
SAME = {
    "BEIR": beir,
    **{f"BEIR, all {end}": lambda folder, end=end: beir(folder, packed=end) for end in (".gz", ".bz2", ".xz", ".zst")},
    "byte order marks and CRLF": byte_marks,
    "no header": with_qrels("qrels/test.tsv", lines(None)),
    "query_id doc_id relevance": with_qrels("qrels/test.tsv", lines("query_id\tdoc_id\trelevance")),
    "qid pid label": with_qrels("qrels/test.tsv", lines("qid\tpid\tlabel")),
    "another order of columns": with_qrels("qrels/test.tsv", lines("score\tcorpus-id\tquery-id", "{s}\t{p}\t{q}")),
    "quoted names and ids": with_qrels("qrels/test.tsv", lines('"query-id"\t"corpus-id"\t"score"', '"{q}"\t"{p}"\t{s}')),
    "an index, as pandas writes it": with_qrels("qrels/test.csv", lines(",query_id,doc_id,score", "7,{q},{p},{s}")),
    "TREC, tabs": with_qrels("qrels/test.tsv", lines(None, "{q}\t0\t{p}\t{s}")),
    "TREC, spaces": with_qrels("qrels/test.txt", lines(None, "{q} 0 {p} {s}")),
    "TREC, named columns": with_qrels("qrels/test.tsv", lines("qid\titer\tdocno\trel", "{q}\tQ0\t{p}\t{s}")),
    "TREC, many spaces, .qrels": with_qrels("test.qrels", lines(None, "{q}   0  {p}   {s} ")),
    "TREC, .trec": with_qrels("qrels/test.trec", lines(None, "{q} 0 {p} {s}")),
    "TREC, packed": with_qrels("qrels.test.txt.gz", lines(None, "{q} 0 {p} {s}")),
    "three columns and spaces": with_qrels("qrels/test.tsv", lines(None, "{q} {p} {s}")),
    "tabs and spaces": with_qrels("qrels/test.tsv", lines(row="{q} {p} {s}")),
    "tabs and spaces in a line": with_qrels("qrels/test.tsv", lines(None, "{q} 0\t{p} {s}")),
    "floats": with_qrels("qrels/test.tsv", lines(row="{q}\t{p}\t{s}.0")),
    "trailing tabs and blank lines": with_qrels("qrels/test.tsv", lines(row="{q}\t{p}\t{s}\t\n\n\t")),
    "qrels.test.tsv": with_qrels("qrels.test.tsv", lines()),
    "qrels-test.tsv": with_qrels("qrels-test.tsv", lines()),
    "test.tsv at the top": with_qrels("test.tsv", lines()),
    "test.jsonl at the top": with_qrels("test.jsonl", judged()),
    "JSON lines": with_qrels("qrels/test.jsonl", judged()),
    "JSON, numbers for ids, text for scores": with_qrels("qrels/test.jsonl", judged("qid", "docid", "rel", int, str)),
    "JSON array": with_qrels("qrels/test.json", json.dumps(judged(as_score=float))),
    "Parquet": with_qrels("qrels/test.parquet", judged(as_id=int)),
    "Parquet, numbers of pandas": with_qrels("qrels/test.parquet", judged(as_id=float, as_score=float)),
    "numbers for ids": with_texts(corpus(as_id=int), queries(as_id=int)),
    "id, contents": with_texts(corpus("id", "contents"), queries("id", "query")),
    "docid, body": with_texts(corpus("docid", "body"), queries("qid", "question")),
    "doc_id, document": with_texts(corpus("doc_id", "document"), queries("query_id", "query_text")),
    "pid, passage": with_texts(corpus("pid", "passage", "Title"), queries("Query ID", "Text")),
    "empty metadata": with_texts(corpus(metadata={}), queries()),
    "tables of text": tables_of_text,
    "TSV of pandas": quoted_tsv,
    "hub": hub(f"corpus/corpus{PART}", f"queries/queries{PART}", f"data/test{PART}"),
    "hub, default": hub(f"corpus/train{PART}", f"queries/train{PART}", f"default/test{PART}"),
    "hub, qrels": hub("corpus/corpus.parquet", "queries/queries.parquet", f"qrels/test{PART}"),
    "hub, converted": hub("corpus/corpus/0000.parquet", "queries/queries/0000.parquet", "default/test/0000.parquet"),
    "hub, JSON": hub("corpus.jsonl", "queries.jsonl", "qrels/test.jsonl"),
    "hub, splits of one table": hub(f"data/corpus{PART}", f"data/queries{PART}", f"data/test{PART}"),
    "Parquet side by side": hub("corpus.parquet", "queries.parquet", "qrels.test.parquet"),
    "saved, one dictionary": saved_parts,
    "saved, folders": saved_folders,
    "documents of MS MARCO": msmarco_documents,
}


@pytest.mark.parametrize("case", SAME)
def test_a_convention_gives_the_same_texts_judgements_and_titles(tmp_path, case):
    SAME[case](tmp_path / "data")
    has_more = case in ("documents of MS MARCO", "an index, as pandas writes it")  # columns that are not used
    data = open_dataset(tmp_path / "data", tmp_path / "cache", strict=not has_more)
    assert texts_of(data, "corpus") == JOINED and texts_of(data, "queries") == QUERIES
    assert list(data.qrels) == ["test"] and judgements_of(data) == JUDGED
    assert dict(zip(data.corpus["_id"], data.corpus["title_length"], strict=True)) == {n: len(t) for n, (t, _) in CORPUS.items()}
    assert {blemish.kind for blemish in check_dataset(tmp_path / "data").blemishes} == (
        {"column not used"} if has_more else set()
    )


def msmarco(folder, end=""):
    """Write MS MARCO's passages: queries of dev stand in its small part, too."""
    train, dev = {"11": {"1": 1}, "12": {"2": 1}}, {"13": {"3": 1}, "14": {"5": 1}}
    put(folder, f"collection.tsv{end}", "".join(f"{n}\t{text}\n" for n, (_, text) in CORPUS.items()))
    for split, names in {"train": train, "dev": dev, "dev.small": ["13"], "eval": ["12"]}.items():
        put(folder, f"queries.{split}.tsv{end}", "".join(f"{n}\t{QUERIES[n]}\n" for n in names))
    for split, between in {"train": "\t", "dev": " ", "dev.small": "\t"}.items():
        grades = {"13": dev["13"]} if split == "dev.small" else {"train": train, "dev": dev}[split]
        rows = [between.join([q, "0", p, "1"]) for q, passages in grades.items() for p in passages]
        put(folder, f"qrels.{split}.tsv{end}", "\n".join(rows) + "\n")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_msmarcos_passages_are_read_with_each_of_their_splits(tmp_path, end):
    msmarco(tmp_path / "data", end)
    data = open_dataset(tmp_path / "data", tmp_path / "cache", strict=True)
    assert texts_of(data, "corpus") == {n: text for n, (_, text) in CORPUS.items()} and texts_of(data, "queries") == QUERIES
    assert {split: judgements_of(data, split) for split in data.qrels} == {
        "train": {"11": {"1": 1}, "12": {"2": 1}},
        "dev": {"13": {"3": 1}, "14": {"5": 1}},
        "dev-small": {"13": {"3": 1}},
    }


def given_of(data):
    names = data.corpus["_id"]
    rows = np.split(data.given.ids, data.given.indptr[1:-1])
    return {q: {names[int(row)] for row in ids} for q, ids in zip(data.queries["_id"], rows, strict=True) if len(ids)}


TRIPLES = "11\t1\t2\n11\t1\t4\n12\t2\t6\n"
LISTED = [
    {"query_id": 11, "query_text": QUERIES["11"], "positive_document_ids": ["1"], "negative_document_ids": ["2", "4"]},
    {"query_id": 12, "query_text": QUERIES["12"], "positive_document_ids": ["2"], "negative_document_ids": ["6"]},
]
SYSTEMS = [
    {"qid": 11, "pos": [1], "neg": {"bm25": [2, 4], "another": [4]}},
    {"qid": 12, "pos": [2], "neg": {"bm25": [6]}},
]
NAMED_NEGATIVES = {
    "qidpidtriples.train.tsv": TRIPLES,
    "triples.train.ids.tsv.gz": "qid\tpos_pid\tneg_pid\n" + TRIPLES,
    "train.jsonl": LISTED,
    "train.parquet": LISTED,
    "train-negatives.jsonl.gz": SYSTEMS,
}


@pytest.mark.parametrize("name", NAMED_NEGATIVES)
def test_ids_beside_a_collection_are_positives_and_given_negatives(tmp_path, name):
    put(tmp_path / "data", "corpus.jsonl", corpus())
    if NAMED_NEGATIVES[name] is not LISTED:  # those bring their queries
        put(tmp_path / "data", "queries.jsonl", queries())
    put(tmp_path / "data", name, NAMED_NEGATIVES[name])
    data = open_dataset(tmp_path / "data", tmp_path / "cache", strict=True)
    assert texts_of(data, "queries").items() <= QUERIES.items()
    assert judgements_of(data, "train") == {"11": {"1": 1}, "12": {"2": 1}}
    assert given_of(data) == {"11": {"2", "4"}, "12": {"6"}}


def test_records_beside_a_corpus_share_its_documents(tmp_path):
    def passage(name):
        return {"docid": name, "title": CORPUS[name][0], "text": CORPUS[name][1]}

    record = {"query_id": "11", "query": QUERIES["11"], "positive_passages": [passage("1")], "negative_passages": [passage("6")]}
    other = {"query_id": "12", "query": QUERIES["12"], "positive_passages": [{"docid": "x", "title": "", "text": "elsewhere"}]}
    put(tmp_path / "data", "corpus.jsonl.gz", corpus("docid"))
    put(tmp_path / "data", "train.jsonl", [record, other | {"negative_passages": []}])
    data = open_dataset(tmp_path / "data", tmp_path / "cache", strict=True)
    assert texts_of(data, "corpus") == JOINED | {"x": "elsewhere"} and texts_of(data, "queries").keys() == {"11", "12"}
    assert judgements_of(data, "train") == {"11": {"1": 1}, "12": {"x": 1}} and given_of(data) == {"11": {"6"}}
    beir(tmp_path / "data", packed=".gz")
    put(tmp_path / "folders", "corpus/corpus.jsonl", corpus("docid"))
    put(tmp_path / "folders", "train/train.jsonl", [record])
    assert judgements_of(open_dataset(tmp_path / "folders", tmp_path / "cache"), "train") == {"11": {"1": 1}}
    both = open_dataset(tmp_path / "data", tmp_path / "cache", strict=True)
    assert judgements_of(both, "train") == judgements_of(data, "train") and judgements_of(both) == JUDGED


def test_a_file_whose_name_says_no_split_is_train(tmp_path):
    beir(tmp_path / "one", "qrels.tsv")
    assert list(open_dataset(tmp_path / "one", tmp_path / "cache").qrels) == ["train"]
    beir(tmp_path / "more", "qrels.dl19-passage.txt", lines(None, "{q} 0 {p} {s}"))
    put(tmp_path / "more", "2019qrels-docs.txt", lines(None, "{q} 0 {p} {s}"))
    assert list(open_dataset(tmp_path / "more", tmp_path / "cache").qrels) == ["2019", "dl19"]


def test_parts_of_a_file_are_one(tmp_path):
    records, half = corpus(), len(CORPUS) // 2
    for part, some in enumerate((records[:half], records[half:])):
        put(tmp_path / "data", f"corpus/train-0000{part}-of-00002.parquet", some)
    for part, row in enumerate(("11\t1\t1\n", "12\t2\t1\n")):
        put(tmp_path / "data", f"qrels/test-0000{part}-of-00002.tsv", row)
    put(tmp_path / "data", "queries.jsonl", queries())
    put(tmp_path / "data", "queries.jsonl.gz", b"a torn copy")  # beside itself, unpacked
    data = open_dataset(tmp_path / "data", tmp_path / "cache", strict=True)
    assert texts_of(data, "corpus") == JOINED and judgements_of(data) == {"11": {"1": 1}, "12": {"2": 1}}


def test_a_collection_of_the_hub_is_read_with_all_its_configurations(tmp_path, monkeypatch):
    tables = {"corpus": {"corpus": corpus()}, "queries": {"queries": queries()}, "default": {"test": judged()}}
    for name, splits in tables.items():
        datasets.DatasetDict({s: datasets.Dataset.from_list(rows) for s, rows in splits.items()}).save_to_disk(tmp_path / name)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: list(tables))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.load_from_disk(tmp_path / config))
    data = open_dataset(type(tmp_path)("somebody/scifact"), tmp_path / "cache", strict=True)
    assert texts_of(data, "corpus") == JOINED and judgements_of(data) == JUDGED
