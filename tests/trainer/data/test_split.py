"""Test and dev queries that are set aside: no query in two splits, the same draw for a seed, and what is there stays."""

import csv
import json
from pathlib import Path

import pytest

from launch.commands import app
from tests.tiny import write_tiny_dataset
from tests.trainer.data.test_convert import write_lines
from trainer.data.datasets import open_dataset
from trainer.data.split import split_data
from trainer.errors import InputError


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def faq(name="faq.csv", columns=("question", "answer"), size=400):
    with open(name, "w", newline="") as file:
        csv.writer(file).writerows([columns, *((f"how do I sort {i}", f"call sorted {i}") for i in range(size))])
    return name


def said(capsys, *words):
    assert app([*map(str, words)], standalone_mode=False) == 0
    return capsys.readouterr().out


def lines(path):
    return Path(path).read_text().splitlines()


def judged(folder, split):
    """The queries of a written split, by its own file."""
    return [line.split("\t")[0] for line in lines(f"{folder}/qrels/{split}.tsv")[1:]]


def test_a_table_becomes_a_collection_with_three_splits(capsys):
    words = ["data", "split", faq(), "data/mine", "--test", "60", "--dev", 0.05]
    assert said(capsys, *words) == "320 train, 20 dev, 60 test queries, 400 passages in data/mine\n"
    parts = [judged("data/mine", split) for split in ("train", "dev", "test")]
    assert list(map(len, parts)) == [320, 20, 60] and len(set().union(*parts)) == 400
    texts = {
        side: {r["_id"]: r["text"] for r in map(json.loads, lines(f"data/mine/{side}.jsonl"))} for side in ("queries", "corpus")
    }
    for split in ("train", "dev", "test"):
        for query, passage, score in (line.split("\t") for line in lines(f"data/mine/qrels/{split}.tsv")[1:]):
            assert texts["queries"][query].split()[-1] == texts["corpus"][passage].split()[-1] and score == "1"
    with pytest.raises(InputError, match="data/mine is not empty; give OUT a new folder"):
        said(capsys, *words)
    with pytest.raises(InputError, match=r"OUT mine\.csv names a file, .* give OUT a name without \.csv"):
        said(capsys, "data", "split", "faq.csv", "mine.csv")


def test_a_draw_is_repeated_by_its_seed_and_reads_named_columns(capsys):
    faq("odd.csv", ("frage", "antwort"), 60)
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        words = ["data", "split", "odd.csv", out, "--seed", seed, "--json", "--columns", "query=frage,positive=antwort"]
        found = json.loads(said(capsys, *words))
        assert found["queries"] == {"train": 51, "dev": 3, "test": 6} and found["passages"] == 60
    assert judged("a", "test") == judged("b", "test") != judged("c", "test")


def test_a_split_that_is_there_stays_and_equal_texts_go_together(place, capsys):
    """Two training queries have the text of a third, and one has that of a test query, which no draw may take."""
    source = write_tiny_dataset(place / "source", 200)
    (source / "qrels/dev.tsv").unlink()
    train, queries = lines(source / "qrels/train.tsv"), [json.loads(line) for line in lines(source / "queries.jsonl")]
    names = list(dict.fromkeys(line.split("\t")[0] for line in train[1:]))
    texts = {query["_id"]: query["text"] for query in queries}
    tested = judged(source, "test")[0]
    texts |= dict.fromkeys(names[1:3], texts[names[0]]) | {names[3]: texts[tested]}
    write_lines(source / "queries.jsonl", [{"_id": name, "text": text} for name, text in texts.items()])
    told = said(capsys, "data", "split", source, "out", "--dev", "30")
    assert "the test queries stay as they are" in told
    assert lines("out/qrels/test.tsv")[1:] and set(lines("out/qrels/test.tsv")) == set(lines(source / "qrels/test.tsv"))
    assert sorted(lines("out/qrels/train.tsv")[1:] + lines("out/qrels/dev.tsv")[1:]) == sorted(train[1:])
    parts = {split: {texts[name] for name in judged("out", split)} for split in ("train", "dev", "test")}
    assert parts["train"].isdisjoint(parts["dev"]) and parts["dev"].isdisjoint(parts["test"])
    assert len(lines("out/corpus.jsonl")) == len(lines(source / "corpus.jsonl"))
    with pytest.raises(InputError, match="has test and dev queries already"):
        said(capsys, "data", "split", "out", "again")


def test_records_keep_negatives_scores_and_prompts(capsys):
    names = ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt")
    rows = [(f"find {i}", [f"found {i}"], [f"not {i}", f"nor {i}"], [0.75], [0.5, i / 64], "search: ") for i in range(40)]
    write_lines(Path("pairs.jsonl"), [dict(zip(names, row, strict=True)) for row in rows])
    told = said(capsys, "data", "split", "pairs.jsonl", "out", "--form", "flagembedding", "--test", 8, "--dev", 2)
    assert told == "30 train, 2 dev, 8 test queries, 120 passages in out\n"
    written = [json.loads(line) for split in ("train", "dev", "test") for line in lines(f"out/{split}.jsonl")]
    written.sort(key=lambda record: int(record["query"].split()[1]))
    assert [tuple(record[name] for name in names) for record in written] == rows
    told = said(capsys, "data", "split", "pairs.jsonl", "beir", "--test", 8)
    assert "BEIR has no place for 80 given negatives, 120 teacher's scores" in told and "--form flagembedding keeps" in told


def test_shares_have_a_limit_and_what_is_too_small_is_refused(capsys):
    data = open_dataset(Path(faq(size=30_000)))
    parts = split_data(data, {"test": 0.1, "dev": 0.05}, 0)
    assert [len(parts.training_queries(split)) for split in ("train", "dev", "test")] == [27_000, 1000, 2000]
    assert len(split_data(data, {"test": 9000, "dev": 0}, 0).training_queries("test")) == 9000
    for wanted, match in (
        ({"test": 29_990}, "30,000 training queries with 30,000 texts .* 29,990 for test .* at least 20 have to stay"),
        ({"test": 1.5}, "--test 1.5 cannot be used; expected a share below 1"),
        ({"dev": float("nan")}, "--dev nan cannot be used"),
        ({"test": 0, "dev": 0}, "nothing is to be set aside: --test and --dev are 0"),
    ):
        with pytest.raises(InputError, match=match):
            split_data(data, wanted, 0)


def test_what_a_data_set_lacks_is_said(place, capsys):
    told = said(capsys, "data", "check", faq(size=40))
    command = "negpool data split faq.csv data/faq"
    sentence = f"no test and no dev queries: nothing will tell whether the model is better; {command} sets some aside"
    assert told.splitlines()[-2] == sentence
    app(command.split()[1:], standalone_mode=False)
    capsys.readouterr()
    assert json.loads(said(capsys, "data", "check", "data/faq", "--json"))["advice"] == []
    Path("data/faq/qrels/dev.tsv").unlink()
    assert "no dev queries: no checkpoint can be chosen as the best" in said(capsys, "data", "check", "data/faq")
