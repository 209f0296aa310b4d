"""A data set is read whole or refused with file and line; nothing half-written stays."""

import hashlib
import json
import os
import time

import numpy as np
import pytest

from tests.tiny import write_tiny_dataset
from trainer.data.cache import file_digest
from trainer.data.check import check_dataset
from trainer.data.datasets import open_dataset
from trainer.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return write_tiny_dataset(tmp_path / "data")


def test_rows_and_positives_are_those_of_the_files(folder, tmp_path):
    data = open_dataset(folder, tmp_path / "cache")
    corpus = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    queries = [json.loads(line)["_id"] for line in (folder / "queries.jsonl").read_text().splitlines()]
    assert data.corpus["_id"] == [row["_id"] for row in corpus]
    assert data.corpus["text"] == [row["text"] for row in corpus]
    judged: dict[str, set[str]] = {}
    for line in (folder / "qrels" / "train.tsv").read_text().splitlines()[1:]:
        query, passage, _ = line.split("\t")
        judged.setdefault(query, set()).add(passage)
    rows = data.training_queries()
    assert [queries[row] for row in rows] == [q for q in queries if q in judged]
    indptr, passages = data.positives(rows)
    for i, row in enumerate(rows):
        assert {corpus[p]["_id"] for p in passages[indptr[i] : indptr[i + 1]]} == judged[queries[row]]


def test_a_title_stands_before_the_text(folder, tmp_path):
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    lines[0] = json.dumps({"_id": "d0-0", "title": "A title", "text": "and text"})
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    assert open_dataset(folder, tmp_path / "cache").corpus[0]["text"] == "A title and text"


def test_an_unchanged_data_set_is_not_read_again_and_a_changed_one_is(folder, tmp_path, monkeypatch):
    first = open_dataset(folder, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("trainer.data.datasets.build_source", lambda *_: pytest.fail("read again"))
        assert open_dataset(folder, tmp_path / "cache").digest == first.digest
    with open(folder / "corpus.jsonl", "a") as corpus:
        corpus.write('{"_id": "new", "text": "a new text"}\n')
    second = open_dataset(folder, tmp_path / "cache")
    assert second.digest != first.digest and len(second.corpus) == len(first.corpus) + 1


def replace_line(name, number, content):
    def spoil(folder):
        lines = (folder / name).read_bytes().split(b"\n")
        lines[number - 1] = content
        (folder / name).write_bytes(b"\n".join(lines))

    return spoil


def empty(name):
    return lambda folder: (folder / name).write_text("")


def remove(name):
    return lambda folder: (folder / name).unlink()


CORPUS, QUERIES, TRAIN = "corpus.jsonl", "queries.jsonl", "qrels/train.tsv"
BAD = {
    "missing corpus": (remove(CORPUS), r"corpus\.jsonl is missing"),
    "empty corpus": (empty(CORPUS), r"corpus\.jsonl: .*no (sound )?line"),
    "empty qrels": (empty(TRAIN), r"train\.tsv: this file has no judgement"),
    "not JSON": (replace_line(CORPUS, 3, b'{"_id": "x", '), r"corpus\.jsonl:3: this line is not JSON"),
    "not an object": (replace_line(QUERIES, 2, b"[1]"), r"queries\.jsonl:2: expected an object"),
    "no text": (replace_line(CORPUS, 4, b'{"_id": "x"}'), r"corpus\.jsonl:4: text is missing; expected a string"),
    "id of another type": (replace_line(CORPUS, 4, b'{"_id": 4.5, "text": "t"}'), r"corpus\.jsonl:4: _id is 4\.5"),
    "duplicate id": (replace_line(CORPUS, 5, b'{"_id": "d0-0", "text": "t"}'), r"corpus\.jsonl:5: _id 'd0-0' stands on line 1"),
    "not UTF-8": (replace_line(CORPUS, 2, b'{"_id": "x", "text": "\xff"}'), r"corpus\.jsonl:2: byte 23 .* not UTF-8"),
    "two columns": (replace_line(TRAIN, 2, b"q0\td0-0"), r"train\.tsv:2: found 2 columns; expected query-id"),
    "score in words": (replace_line(TRAIN, 2, b"q0\td0-0\tgood"), r"train\.tsv:2: the score 'good' is not a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_data_set_is_refused_with_file_and_line(folder, tmp_path, case):
    spoil, sentence = BAD[case]
    spoil(folder)
    with pytest.raises(InputError, match=sentence) as error:
        open_dataset(folder, tmp_path / "cache")
    assert "\n" not in str(error.value)
    left = [p for p in (tmp_path / "cache").glob("*") if p.suffix != ".lock" and p.name != "digests"]
    assert left == [], "nothing half-written"
    if "missing" not in case:
        assert any(problem for problem in check_dataset(folder).problems if problem.number or "empty" in case)


def test_a_check_finds_every_problem_and_open_the_first(folder):
    for case in ("not JSON", "not an object", "duplicate id", "two columns"):
        BAD[case][0](folder)
    kinds = {problem.kind for problem in check_dataset(folder).refused}
    assert kinds == {"does not parse", "not an object", "duplicate id", "wrong columns"}


def test_a_sound_data_set_has_no_problems_and_its_counts(folder):
    report = check_dataset(folder)
    assert report.problems == [] and report.as_text().endswith("no problems")
    assert report.statistics["queries"]["texts"] == 48
    assert report.statistics["corpus"]["repeated"] == 6


def test_a_folder_without_data_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"there is no data set in .*data\.path"):
        open_dataset(tmp_path / "nothing", tmp_path / "cache")
    with pytest.raises(
        InputError, match=r"there is no data set in faqs/faq\.csv: there is no such file or folder; set data\.path"
    ):
        open_dataset(type(tmp_path)("faqs/faq.csv"), tmp_path / "cache")


def test_graded_scores_are_kept(folder, tmp_path):
    replace_line(TRAIN, 2, b"q0\td0-0\t3")(folder)
    qrels = open_dataset(folder, tmp_path / "cache").qrels["train"]
    assert qrels.scores.max() == 3 and qrels.scores.dtype == np.float32


def test_what_is_read_in_many_batches_is_what_is_read_in_one(folder, tmp_path, monkeypatch):
    records = [{"anchor": f"q{i % 7}", "positive": f"p{i % 11}", "negative": f"n{i % 5}"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    paths = {"beir": folder, "pairs": tmp_path / "pairs.jsonl"}
    whole = {name: open_dataset(path, tmp_path / "cache") for name, path in paths.items()}
    monkeypatch.setattr("trainer.data.texts.BATCH", 4)
    monkeypatch.setattr("trainer.data.collection.BLOCK", 5)
    for name, path in paths.items():
        parts = open_dataset(path, tmp_path / "other")
        assert len(parts.corpus.data.column("_id").chunks) > 2
        for side in ("corpus", "queries"):
            assert getattr(parts, side)[:] == getattr(whole[name], side)[:]
        assert parts.content == whole[name].content
        for split, qrels in whole[name].qrels.items():
            np.testing.assert_array_equal(parts.qrels[split].query_rows, qrels.query_rows)
            np.testing.assert_array_equal(parts.qrels[split].corpus_rows, qrels.corpus_rows)


def test_a_digest_is_remembered_until_the_file_changes(tmp_path):
    file = tmp_path / "a.jsonl"
    digests = []
    for content, age_s in (("one", 100), ("two", 50), ("new", 0), ("now", 0)):
        file.write_text(content)
        os.utime(file, (time.time() - age_s,) * 2)
        digests.append(file_digest(file, tmp_path / "cache"))
    assert digests == [hashlib.sha256(text.encode()).hexdigest() for text in ("one", "two", "new", "now")]
    assert len(list((tmp_path / "cache" / "digests").iterdir())) == 2, "what has just changed is not remembered"
