"""A document with its query's id is never found for it, nor a negative of it: as BEIR has it, where ArguAna needs it."""

import json

import ir_measures
import numpy as np
import pytest
import torch

from launch.models import evaluate_bm25
from mining.find.bm25 import bm25_top_k
from tests.mining.run import as_job, make_job, publish_checkpoint, rows_of
from tests.mining.services import start_service
from tests.ranks import run_ranks
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.data.datasets import open_data
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.evaluate import MEASURES, evaluate
from trainer.handoff.settings import DataSettings, SourceSettings


def write_arguments(folder, num_queries=36):
    """Write a data set whose queries are documents too, by their ids; one is judged relevant to itself."""
    write_tiny_dataset(folder, num_queries=num_queries)
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    with open(folder / "corpus.jsonl", "a") as corpus:
        for query in queries:
            corpus.write(json.dumps({"_id": query["_id"], "title": "one", "text": query["text"]}) + "\n")
    with open(folder / "qrels" / "test.tsv", "a") as qrels:
        qrels.write("q4\tq4\t1\n")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_arguments(folder / "data")
    write_tiny_encoder(folder / "encoder")
    return folder


def opened(root, **settings):
    return open_data(DataSettings(path=root / "data", cache=root / "cache", **settings), {})


def beir(root, scores_QN, data, rows, ignores):
    """Return what ir-measures makes of a matrix of scores, identical ids taken out as BEIR does, but for judged ones."""
    names, queries = data.corpus["_id"][:], data.queries.select(rows)["_id"][:]
    qrels: dict[str, dict[str, int]] = {}
    for line in (root / "data" / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, passage, score = line.split("\t")
        qrels.setdefault(query, {})[passage] = int(score)
    run = {
        query: {n: float(s) for n, s in zip(names, row, strict=True) if not ignores or n != query or n in qrels[query]}
        for query, row in zip(queries, scores_QN, strict=True)
    }
    values = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)
    return {name: values[measure] for name, measure in MEASURES.items()}


def run_evaluation(rank, root, shards, ignores):
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(root / "encoder")))
    return evaluate(world_of(rank), opened(root, ignore_identical_ids=ignores), "test", encoder, tokenizer, traits, shards)


@pytest.mark.parametrize("ignores", [True, False])
def test_an_evaluation_finds_no_query_itself(root, tmp_path, ignores):
    data = opened(root)
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=str(root / "encoder")))
    rows = data.evaluated_queries("test")
    with torch.inference_mode():
        texts = data.queries.select(rows)["text"][:], data.corpus["text"][:]
        query_QD, passage_ND = (encoder.eval()(tokenizer(each, padding=True, return_tensors="pt")) for each in texts)
    wanted = beir(root, (query_QD @ passage_ND.T).numpy(), data, rows, ignores)
    for found in run_ranks(run_evaluation, 2, root, tmp_path, ignores):
        assert found == pytest.approx(wanted, abs=0.01)  # equal texts, as in test_evaluate.py
    assert wanted["ndcg@10"] != beir(root, (query_QD @ passage_ND.T).numpy(), data, rows, not ignores)["ndcg@10"]


@pytest.mark.parametrize("ignores", [True, False])
def test_the_baseline_finds_no_query_itself(root, ignores):
    data = opened(root, ignore_identical_ids=ignores)
    rows = data.evaluated_queries("test")
    scores, ids = bm25_top_k(data, rows, len(data.corpus))
    scores_QN = np.zeros((len(rows), len(data.corpus)))
    np.put_along_axis(scores_QN, np.where(ids < 0, 0, ids), np.where(ids < 0, 0, scores), 1)
    scores_QN[:, 0] = np.where(ids == 0, scores, 0).sum(1)
    assert evaluate_bm25(data, "test") == pytest.approx(beir(root, scores_QN, data, rows, ignores), abs=0.02)


@pytest.mark.parametrize("ignores", [True, False])
def test_no_query_is_a_negative_of_itself(tmp_path, ignores):
    write_arguments(tmp_path / "data")
    job = make_job(tmp_path, search={"top_k": 60}, sample={"num_negatives": 40}, mine={"bm25_top_k": 40})
    job["data"]["ignore_identical_ids"] = ignores
    publish_checkpoint(job, 10)
    service = start_service(job)
    assert service.wait() == 0, service.said
    settings = as_job(job)
    data = open_data(settings.data, settings.sources)
    queries, names = data.queries.select(data.training_queries())["_id"][:], data.corpus["_id"][:]
    for version in ("v000000", "v000001"):
        got = [query in [names[row] for row in rows] for query, rows in zip(queries, rows_of(job, version), strict=True)]
        assert any(got) != ignores, f"{version}: {sum(got)} of {len(got)}"


def test_ids_that_we_made_and_those_of_other_sources_do_not_count(root, tmp_path):
    data = opened(root)
    names, queries = data.corpus["_id"][:], data.queries["_id"][:]
    assert [names[row] for row in data.own_rows] == queries, "each query is a document here"
    record = {"anchor": "one text", "positive": "one text"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    pairs = DataSettings(path=tmp_path / "pairs.jsonl", cache=tmp_path / "cache")
    assert open_data(pairs, {}).own_rows.tolist() == [-1]
    write_tiny_dataset(tmp_path / "plain")  # queries q0 …, and no document of such a name
    sources = {
        "first": SourceSettings(path=root / "data"),
        "second": SourceSettings(path=tmp_path / "plain", id_prefix="b/"),
        "third": SourceSettings(path=root / "data", id_prefix="c/"),
    }
    both = open_data(DataSettings(cache=tmp_path / "cache"), sources)
    names, queries = both.corpus["_id"][:], both.queries["_id"][:]
    found = [names[row] if row >= 0 else None for row in both.own_rows]
    assert found == [None if query.startswith("b/") else query for query in queries]
