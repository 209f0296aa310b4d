"""Data in memory is the data set that the same content makes as files."""

import json
from pathlib import Path

import datasets
import numpy as np
import pandas
import polars
import pytest
import torch
from sentence_transformers import SentenceTransformer

from launch.python.in_memory import data_path, model_folder
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.errors import InputError

PAIRS = [{"anchor": f"sort {word}", "positive": f"the {word} of all"} for word in ("file", "line", "json")]
COLUMNS = {name: [row[name] for row in PAIRS] for name in ("anchor", "positive")}


def opened(data, tmp_path, split="train"):
    return open_dataset(Path(data_path(data, split, tmp_path / "given")), tmp_path / "cache")


def pairs_of(data, split):
    """Return (query, positive) of a split as texts."""
    qrels = data.qrels[split]
    return {
        (data.queries[int(query)]["text"], data.corpus[int(passage)]["text"])
        for query, passage in zip(qrels.query_rows, qrels.corpus_rows, strict=True)
    }


WANTED = {(row["anchor"], row["positive"]) for row in PAIRS}


@pytest.mark.parametrize(
    "data",
    [
        PAIRS,
        (*PAIRS, PAIRS[0]),
        COLUMNS,
        datasets.Dataset.from_list(PAIRS),
        datasets.Dataset.from_list([*PAIRS, {"anchor": "x", "positive": "y"}]).select(range(3)),
        datasets.Dataset.from_list(PAIRS).to_iterable_dataset(),
        pandas.DataFrame(PAIRS),
        polars.DataFrame(PAIRS),
        [{name: np.str_(text) for name, text in row.items()} for row in PAIRS],
    ],
    ids=["records", "a tuple of records", "columns", "Dataset", "a selection", "IterableDataset", "pandas", "polars", "numpy"],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_pairs_are_the_split_that_is_asked_for(tmp_path, data, split):
    found = opened(data, tmp_path, split)
    assert list(found.qrels) == [split] and pairs_of(found, split) == WANTED


@pytest.mark.parametrize("kind", ["records", "DatasetDict", "dict of Datasets"])
def test_splits_keep_their_names(tmp_path, kind):
    splits = {"train": PAIRS[:2], "validation": PAIRS[2:]}
    if kind != "records":
        splits = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    found = opened(datasets.DatasetDict(splits) if kind == "DatasetDict" else splits, tmp_path, "train")
    assert pairs_of(found, "train") | pairs_of(found, "dev") == WANTED and len(pairs_of(found, "dev")) == 1


def read_collection(folder):
    """Return the dictionaries that BEIR's loader makes of a folder; qrels by split."""
    queries, corpus = (
        {row["_id"]: row for row in map(json.loads, (folder / f"{side}.jsonl").read_text().splitlines())}
        for side in ("queries", "corpus")
    )
    qrels: dict = {}
    for file in (folder / "qrels").iterdir():
        for line in file.read_text().splitlines()[1:]:
            query, passage, score = line.split("\t")
            qrels.setdefault(file.stem, {}).setdefault(query, {})[passage] = int(score)
    return {key: row["text"] for key, row in queries.items()}, corpus, qrels


def test_dictionaries_of_a_collection_are_its_folder(tmp_path):
    queries, corpus, qrels = read_collection(write_tiny_dataset(tmp_path / "folder"))
    corpus["d0-0"]["title"] = "of a"
    (tmp_path / "folder" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus.values()))
    from_folder = open_dataset(tmp_path / "folder", tmp_path / "cache")
    given = opened((queries, corpus, qrels), tmp_path, "train")
    assert given.content == from_folder.content and given.qrels.keys() == from_folder.qrels.keys()
    for split in qrels:
        for field in ("query_rows", "corpus_rows", "scores"):
            assert np.array_equal(getattr(given.qrels[split], field), getattr(from_folder.qrels[split], field)), (split, field)


@pytest.mark.parametrize("relevant", [{1: {"d1", "d2"}}, {1: ["d2", "d1"]}, {1: {"d1": 1, "d2": np.float64(2)}}])
def test_judgements_of_one_split_as_evaluators_have_them(tmp_path, relevant):
    """Sets and lists of ids, as sentence-transformers has them, or grades; ids may be numbers."""
    found = opened(({1: "sort"}, {"d1": "list", "d2": "merge"}, relevant), tmp_path, "test")
    assert pairs_of(found, "test") == {("sort", "list"), ("sort", "merge")}


def test_the_same_content_is_the_same_folder_and_other_content_another(tmp_path):
    first, again, other = (data_path(data, "train", tmp_path) for data in (PAIRS, list(map(dict, PAIRS)), PAIRS[:2]))
    assert first == again != other
    tables = [datasets.Dataset.from_list(PAIRS).map(lambda row: row) for _ in range(2)]
    assert len({data_path(table, "train", tmp_path) for table in tables}) == 1
    assert len(list(tmp_path.glob("given-*"))) == 3


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], "data holds no record for the split train"),
        ({"train": PAIRS, "part2": PAIRS}, "data names the split 'part2'; expected one of train, dev"),
        ([{"anchor": object(), "positive": "x"}], "record 1 of data holds a object"),
        (iter([{"anchor": "a", "positive": "b"}, "c"]), "record 2 of data is a str"),
        (["a", "b"], "data is a list; expected a path, a name of the hub, a datasets.Dataset"),
        (({"q": 3}, {"d": "x"}, {"q": {"d": 1}}), "the query 'q' of data is 3; expected a text"),
        (({"q": "x"}, {"d": {"title": "x"}}, {"q": {"d": 1}}), "the passage 'd' of data is {'title': 'x'}; expected a text"),
    ],
)
def test_what_is_no_data_is_one_sentence(tmp_path, data, sentence):
    with pytest.raises(InputError, match=sentence):
        data_path(data, "train", tmp_path)
    assert not list(tmp_path.glob("given-*"))


def test_a_model_is_the_same_folder_until_its_weights_change(tmp_path):
    model = SentenceTransformer(str(write_tiny_encoder(tmp_path / "encoder")), device="cpu")
    first = model_folder(model, tmp_path)
    assert first == model_folder(SentenceTransformer(first, device="cpu"), tmp_path)
    reread = SentenceTransformer(first, device="cpu").encode(["sort list"])
    assert np.array_equal(reread, model.encode(["sort list"]))
    next(model.parameters()).data += 1
    assert first != model_folder(model, tmp_path)
    assert model_folder(tmp_path / "encoder", tmp_path) == str(tmp_path / "encoder")
    with pytest.raises(InputError, match="model is a Linear; expected a name, a folder or a SentenceTransformer"):
        model_folder(torch.nn.Linear(1, 1), tmp_path)
