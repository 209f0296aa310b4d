"""What published collections have wrong is left out or read, counted and shown with its line; what nobody can read is refused."""

import gzip
import json
import logging
import zlib

import ir_measures
import numpy as np
import pytest

from launch.data_commands import data_check
from tests.trainer.data.collection_files import (
    CORPUS,
    JUDGED,
    QUERIES,
    beir,
    corpus,
    judgements_of,
    lines,
    put,
    queries,
    texts_of,
)
from trainer.data.check import check_dataset
from trainer.data.datasets import open_dataset
from trainer.errors import InputError
from trainer.evaluate import MEASURES, measure


def score_of(query, passage):
    """Score a pair as an encoder might: anyhow, and always the same."""
    return zlib.crc32(f"{query} {passage}".encode()) / 2**32


def figures(data, split="test"):
    """Return the measures of our evaluation for those scores."""
    names, rows = data.corpus["_id"], data.evaluated_queries(split)
    scores = np.array([[score_of(data.queries[int(row)]["_id"], name) for name in names] for row in rows], np.float32)
    order = np.argsort(-scores, axis=1)
    return measure(data, split, rows, np.take_along_axis(scores, order, 1), order)


def by_ir_measures(qrels, found):
    """Return the measures of ir-measures: the judgements are those of the file, and only `found` documents can be found."""
    run = {query: {name: np.float32(score_of(query, name)).item() for name in found} for query in qrels}
    values = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)
    return {name: values[each] for name, each in MEASURES.items()}


def with_lines(*rows):
    def write(folder):
        beir(folder)
        (folder / "qrels" / "test.tsv").write_text(lines() + "".join("\t".join(row) + "\n" for row in rows))

    return write


def with_text(value):
    """Let document 2, relevant to query 12, have another text."""

    def write(folder):
        beir(folder)
        records = [record | ({"text": value} if record["_id"] == "2" else {}) for record in corpus()]
        put(folder, "corpus.jsonl", records)

    return write


def with_records(name, records):
    def write(folder):
        beir(folder)
        put(folder, name, records)

    return write


WITHOUT_2 = [name for name in CORPUS if name != "2"]
# What is written, the blemishes' kinds and lines, the judgements of the file as they count, and the documents to be found.
BLEMISHES = {
    "an absent document": (with_lines(("11", "99", "2")), [("unknown document", 9)], {"11": {"99": 2}}, CORPUS),
    "absent documents alone": (with_lines(("14", "98", "1")), [("unknown document", 9)], {"14": {"98": 1}}, CORPUS),
    "an absent document, twice": (
        with_lines(("14", "98", "1"), ("14", "98", "2")),
        [("unknown document", 9), ("unknown document", 10), ("judged unequally", 10)],
        {"14": {"98": 2}},
        CORPUS,
    ),
    "an absent query": (with_lines(("77", "1", "1")), [("unknown query", 9)], {}, CORPUS),
    "an empty text": (with_text(""), [("empty text", 2), ("unknown document", 5)], {}, WITHOUT_2),
    "no text": (with_text(None), [("empty text", 2), ("unknown document", 5)], {}, WITHOUT_2),
    "spaces for a text": (with_text(" \n"), [("empty text", 2), ("unknown document", 5)], {}, WITHOUT_2),
    "nothing above 0": (with_lines(("14", "1", "0"), ("14", "2", "-1")), [("no positive", 9)], {}, CORPUS),
    "a grade below 0": (with_lines(("12", "3", "-1")), [], {"12": {"3": -1}}, CORPUS),
    "a line twice": (with_lines(("11", "1", "2")), [("judged twice", 9)], {}, CORPUS),
    "another grade": (with_lines(("11", "1", "3")), [("judged unequally", 9)], {"11": {"1": 3}}, CORPUS),
    "a lower grade": (with_lines(("11", "1", "0")), [("judged unequally", 9)], {}, CORPUS),
    "an id again with its text": (with_records("corpus.jsonl", corpus() + corpus()[:1]), [("text given twice", 7)], {}, CORPUS),
    "metadata": (with_records("corpus.jsonl", corpus(metadata={"url": "x"})), [("column not used", 1)], {}, CORPUS),
    "a file of no role": (with_records("pairs.jsonl", [{"anchor": "a", "positive": "b"}]), [("not read", 0)], {}, CORPUS),
    "a corpus of other times": (with_records("corpus_old.jsonl", [{"_id": "1", "text": "x"}]), [("not read", 0)], {}, CORPUS),
    "pairs of texts": (with_records("train.tsv", "query\tpositive\na\tb\n"), [("not read", 0)], {}, CORPUS),
    "what a desktop leaves": (with_records("qrels/._test.tsv", b"\0\1"), [], {}, CORPUS),
    "a split of others": (with_records("qrels/dev.tsv", "8\t1\t1\n"), [("unknown query", 1), ("split left out", 0)], {}, CORPUS),
    "an empty query": (
        with_records("queries.jsonl", [*queries(), {"_id": "15", "text": ""}]),
        [("empty text", 5)],
        {},
        CORPUS,
    ),
    "null for a title": (with_records("corpus.jsonl", [record | {"title": None} for record in corpus()]), [], {}, CORPUS),
    "no title": (with_records("corpus.jsonl", [{"_id": n, "text": text} for n, (_, text) in CORPUS.items()]), [], {}, CORPUS),
}


@pytest.mark.parametrize("case", BLEMISHES)
def test_a_blemish_is_shown_with_its_line_and_the_figures_are_those_of_the_whole_file(tmp_path, caplog, case):
    write, kinds, more, found = BLEMISHES[case]
    write(tmp_path / "data")
    qrels = {query: JUDGED.get(query, {}) | more.get(query, {}) for query in JUDGED.keys() | more.keys()}
    with caplog.at_level(logging.INFO):
        data = open_dataset(tmp_path / "data", tmp_path / "cache")
    assert texts_of(data, "corpus").keys() == set(found) and texts_of(data, "queries") == QUERIES
    assert figures(data) == pytest.approx(by_ir_measures(qrels, found), abs=1e-6)
    report = check_dataset(tmp_path / "data")
    assert report.refused == [] and [(each.kind, each.number) for each in report.blemishes] == kinds
    first = {each.kind: str(each) for each in reversed(report.blemishes)}
    said = [record.getMessage() for record in caplog.records if record.name == "trainer.data.datasets"]
    assert [line.partition("; … and")[0] for line in said] == list(reversed(first.values())), "the first of a kind, once"
    codes = [data_check(path=tmp_path / "data", overrides=given, columns=None) for given in ([], ["data.strict=true"])]
    assert codes == [0, 2 if kinds else 0]
    if kinds:
        with pytest.raises(InputError, match=r"data\.strict=true refuses that"):
            open_dataset(tmp_path / "data", tmp_path / "cache", strict=True)


def changed(name, change):
    def write(folder):
        beir(folder)
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return write


def half_packed(folder):
    beir(folder, packed=".gz")
    content = (folder / "corpus.jsonl.gz").read_bytes()
    (folder / "corpus.jsonl.gz").write_bytes(content[: len(content) // 2])


def with_gz(folder):
    beir(folder, packed=".gz")
    put(folder, "plain.jsonl", corpus())
    (folder / "plain.jsonl").rename(folder / "corpus.jsonl.gz")


def without_queries(folder):
    put(folder, "collection.tsv", "1\tone\n")
    put(folder, "qrels.train.tsv", "1 0 1 1\n")


TWO_TEXTS = [*corpus(), {"_id": "3", "title": "", "text": "another"}]
INSTRUCTED = [record | {"instruction": "Find it"} for record in queries()]
REFUSED = {
    "an id of two texts": (with_records("corpus.jsonl", TWO_TEXTS), r"corpus\.jsonl:7: _id '3' stands on line 3 already"),
    "half a file": (half_packed, r"corpus\.jsonl\.gz: this gzip file is cut off"),
    "an archive by its bytes": (
        with_records("corpus.jsonl", gzip.compress(b"x")),
        r"corpus\.jsonl: this file is a \.gz, and no text",
    ),
    "an archive by its name": (with_gz, r"corpus\.jsonl\.gz: this gzip file is cut off or damaged"),
    "UTF-16": (changed("corpus.jsonl", lambda raw: raw.decode().encode("utf-16")), r"this file is UTF-16; convert it .*iconv"),
    "UTF-16 unmarked": (changed("qrels/test.tsv", lambda raw: raw.decode().encode("utf-16-le")), r"test\.tsv:1: .*bytes of zero"),
    "Latin-1": (
        changed("queries.jsonl", lambda raw: raw.replace(b"file", b"fil\xe9")),
        r"queries\.jsonl:2: byte .*iconv -f latin1",
    ),
    "no JSON": (changed("corpus.jsonl", lambda raw: raw.replace(b'"6"', b'"6')), r"corpus\.jsonl:6: this line is not JSON"),
    "no line": (with_records("corpus.jsonl", ""), r"corpus\.jsonl: this file has no sound line"),
    "no judgement": (with_records("qrels/test.tsv", "query-id\tcorpus-id\tscore\n"), r"test\.tsv: this file has no judgement"),
    "a run": (with_records("qrels/test.tsv", "11 Q0 1 1 .5 bm25\n"), r"test\.tsv:1: found 6 columns; that is a list of results"),
    "no grade": (with_lines(("11", "2", "x")), r"test\.tsv:9: the score 'x' is not a number"),
    "an infinite grade": (with_lines(("11", "2", "inf")), r"test\.tsv:9: the score 'inf' is not a finite number"),
    "names unknown": (
        with_records("qrels/test.tsv", "a\tb\tc\n11\t1\t1\n"),
        r"test\.tsv:1: .*'c' is not .* first line that names",
    ),
    "other ids": (
        with_records("qrels/test.tsv", "q11\tx1\t1\n"),
        r"no judgement above 0 names a query and a document that are there; let the ids",
    ),
    "two texts a line": (with_records("corpus.jsonl", corpus("_id", "body", contents="x")), r"found body and contents, .* text"),
    "two ids a line": (with_records("corpus.jsonl", corpus("docid", pid="x")), r"found docid and pid, .*data\.columns = \{_id ="),
    "no known column": (with_records("corpus.jsonl", corpus("_id", "abstract")), r"corpus\.jsonl:1: found the columns .* text"),
    "a prompt": (with_records("queries.jsonl", INSTRUCTED), r"queries\.jsonl:1: .*instruction, .*data\.columns = \{prompt = "),
    "three columns without names": (
        lambda folder: (beir(folder), (folder / "corpus.jsonl").unlink(), put(folder, "corpus.tsv", "1\ta\tb\n")),
        r"corpus\.tsv:1: found 3 columns without names; expected id and text",
    ),
    "a quote left open": (with_records("queries.csv", 'qid,query\n20,"an open\n'), r"queries\.csv:2: .*is not CSV"),
    "two lines in a cell": (
        with_records("queries.tsv", 'qid\tquery\n20\t"one\ntwo"\n'),
        r"queries\.tsv:3: found 1 columns; expected 2 .*several lines can stand in JSON lines",
    ),
    "a part missing": (without_queries, r"queries\.jsonl is missing"),
    "scores of some": (
        with_records("qrels/dev.jsonl", [{"qid": "11", "docid": "1", "score": 1}, {"qid": "11", "docid": "2"}]),
        r"dev\.jsonl:2: some judgements of this file have a score and others none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_lived_with_is_refused_in_a_sentence(tmp_path, case):
    write, sentence = REFUSED[case]
    write(tmp_path / "data")
    with pytest.raises(InputError, match=sentence) as error:
        open_dataset(tmp_path / "data", tmp_path / "cache")
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").glob("data-*"))


def test_columns_of_other_names_are_read_as_the_job_says(tmp_path):
    beir(tmp_path / "data")
    put(tmp_path / "data", "corpus.jsonl", corpus("key", "abstract", "heading"))
    put(tmp_path / "data", "queries.jsonl", [{"key": n, "text": text, "instruction": "Find: "} for n, text in QUERIES.items()])
    columns = {"_id": "key", "title": "heading", "prompt": "instruction"}
    with pytest.raises(InputError, match=r"corpus\.jsonl:1: found the columns key, heading, abstract"):
        open_dataset(tmp_path / "data", tmp_path / "cache", columns)
    put(tmp_path / "data", "queries.jsonl", [{"key": n, "query": text, "instruction": "Find: "} for n, text in QUERIES.items()])
    columns["text"] = "abstract"
    data = open_dataset(tmp_path / "data", tmp_path / "cache", columns, strict=True)
    assert texts_of(data, "queries") == QUERIES and texts_of(data, "corpus")["1"] == "Sorting sort a list in order"
    assert set(data.queries["prompt"]) == {"Find: "} and set(data.corpus["prompt"]) == {None}
    left_out = open_dataset(tmp_path / "data", tmp_path / "cache", columns | {"prompt": ""})
    assert set(left_out.queries["prompt"]) == {None}
    with pytest.raises(InputError, match=r"data\.columns names 'grade' for score, and no file of this collection has that"):
        open_dataset(tmp_path / "data", tmp_path / "cache", columns | {"score": "grade"})
    with pytest.raises(InputError, match=r"data\.columns names 'x' for anchor, .*for one of _id, text, title"):
        open_dataset(tmp_path / "data", tmp_path / "cache", columns | {"anchor": "x"})


def test_a_folder_of_a_test_split_alone_says_which_setting_trains_on_it(tmp_path):
    beir(tmp_path / "data")
    data = open_dataset(tmp_path / "data", tmp_path / "cache")
    assert len(data.evaluated_queries("test")) == 3 and judgements_of(data) == JUDGED
    with pytest.raises(InputError, match=r"has no qrels/train\.tsv, only test; choose one of these: data\.train_split names"):
        data.training_queries("train")


def test_a_file_without_scores_names_what_is_relevant(tmp_path):
    beir(tmp_path / "data", "qrels/train-00000-of-00001.parquet", [{"query-id": "11", "corpus-id": "1"}])
    assert judgements_of(open_dataset(tmp_path / "data", tmp_path / "cache"), "train") == {"11": {"1": 1}}


def test_a_check_prints_the_first_of_a_kind_and_counts_the_rest(tmp_path, capsys):
    with_lines(*((f"a{number}", "1", "1") for number in range(12)))(tmp_path / "data")
    assert data_check(path=tmp_path / "data", columns=None, as_json=True) == 0
    assert len(json.loads(capsys.readouterr().out)["blemishes"]) == 12, "all, each with its line"
    said = check_dataset(tmp_path / "data").as_text()
    assert "… and 2 more: unknown query" in said and "12 blemishes, which training lives with" in said
