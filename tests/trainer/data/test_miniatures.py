"""ArguAna and FiQA in miniature, with what is wrong in them: they open, evaluate as BEIR does, mine and train."""

import json

import ir_measures
import numpy as np
import pytest
import torch
from mpi4py import MPI

from launch.jobfile import read_job
from mining.service import run_service
from tests.mining.run import as_job, make_job, publish_checkpoint, rows_of
from tests.tiny import FILLER, TOPICS, write_tiny_encoder
from tests.trainer.data.collection_files import put
from tests.trainer.worlds import world_of
from trainer.data.check import check_dataset
from trainer.data.datasets import open_data, open_dataset
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.evaluate import MEASURES, evaluate
from trainer.train import train

NUM_QUERIES, NUM_ABSENT = 18, 5


def words(number):
    """Three topics in an order that no other number has."""
    return " ".join(TOPICS[(number * step + start) % len(TOPICS)] for step, start in ((1, 0), (5, 3), (7, number // 18)))


def write_arguana(folder):
    """Queries are documents, too, under their ids; a query's one relevant document is near to it, and five are absent."""
    documents, rows = [], []
    for number in range(NUM_QUERIES):
        query, relevant = f"test-argument-{number}-con01a", f"test-argument-{number}-con01b"
        documents.append({"_id": query, "title": "the" if number % 2 else None, "text": words(number), "metadata": {}})
        if number >= NUM_ABSENT:
            documents.append({"_id": relevant, "title": "", "text": f"{words(number)} {FILLER[number % 5 + 4]}"})
        rows.append(f"{query}\t{relevant}\t1\n")
    put(folder, "corpus.jsonl", documents)
    asked = [{"_id": document["_id"], "text": document["text"]} for document in documents if document["_id"].endswith("a")]
    put(folder, "queries.jsonl", [record | {"metadata": {"side": "con"}} for record in asked])
    put(folder, "qrels/test.tsv", "query-id\tcorpus-id\tscore\n" + "".join(rows))


def write_fiqa(folder):
    """Numbers for ids, empty titles everywhere, empty texts, of which some are relevant; three splits."""
    documents, questions, rows = [], [], {"train": [], "dev": [], "test": []}
    for number in range(48):
        split = ("train", "train", "dev", "test")[number % 4]
        questions.append({"_id": str(number), "text": words(number), "metadata": {}})
        for copy in range(1 + number % 3):
            name = str(1000 + 10 * number + copy)
            text = None if number % 24 == 5 else "" if (number + copy) % 12 == 3 else f"{words(number + copy)} {FILLER[copy]}"
            documents.append({"_id": name, "title": "", "text": text, "metadata": {}})
            rows[split].append(f"{number}\t{name}\t1\n")
    put(folder, "corpus.jsonl", documents)
    put(folder, "queries.jsonl", questions)
    for split, judged in rows.items():
        put(folder, f"qrels/{split}.tsv", "query-id\tcorpus-id\tscore\n" + "".join(judged))


WRITERS = {"arguana": write_arguana, "fiqa": write_fiqa}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniatures")
    for name, write in WRITERS.items():
        write(folder / name)
    write_tiny_encoder(folder / "encoder", seed=2)
    return folder


def ours(root, name, shards):
    data = open_dataset(root / name, root / "cache")
    return evaluate(world_of(), data, "test", *load_encoder(ModelSettings(name=str(root / "encoder"))), shards)


def beirs(root, name, only_there=False):
    """Return ir-measures' figures for all judgements of the file, identical ids taken out of the scores of all texts."""
    documents, questions = (
        [json.loads(line) for line in (root / name / file).read_text().splitlines()] for file in ("corpus.jsonl", "queries.jsonl")
    )
    texts = {each["_id"]: f"{each['title'] or ''} {each['text'] or ''}".strip() for each in documents}
    texts = {name: text for name, text in texts.items() if text}
    qrels: dict[str, dict[str, int]] = {}
    for line in (root / name / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, passage, score = line.split("\t")
        if passage in texts or not only_there:
            qrels.setdefault(query, {})[passage] = int(score)
    asked = {each["_id"]: each["text"] for each in questions if each["_id"] in qrels}
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=str(root / "encoder")))
    with torch.inference_mode():
        query_QD, passage_ND = (
            encoder.eval()(tokenizer(list(each.values()), padding=True, return_tensors="pt")) for each in (asked, texts)
        )
    scores = dict(zip(asked, (query_QD @ passage_ND.T).tolist(), strict=True))
    run = {q: {n: s for n, s in zip(texts, row, strict=True) if n != q} for q, row in scores.items()}
    values = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)
    return {measure: values[each] for measure, each in MEASURES.items()}


def test_the_figures_of_arguana_are_beirs(root, tmp_path):
    found = ours(root, "arguana", tmp_path)
    assert beirs(root, "arguana", only_there=True)["ndcg@10"] == 1, "all that is there is found first"
    assert found == pytest.approx(beirs(root, "arguana")) and found["ndcg@10"] == pytest.approx(1 - NUM_ABSENT / NUM_QUERIES)
    report = check_dataset(root / "arguana")
    assert report.refused == [] and report.statistics["corpus"]["texts"] == 2 * NUM_QUERIES - NUM_ABSENT
    assert report.statistics["qrels-test"]["of_absent_documents"] == NUM_ABSENT
    kinds = [blemish.kind for blemish in report.blemishes]
    assert kinds == ["column not used"] + ["unknown document"] * NUM_ABSENT


def test_the_figures_of_fiqa_are_those_of_the_whole_judgement_file(root, tmp_path):
    wanted = beirs(root, "fiqa")
    assert ours(root, "fiqa", tmp_path) == pytest.approx(wanted, abs=0.01)  # equal texts, as in test_evaluate.py
    assert wanted["recall@100"] < beirs(root, "fiqa", only_there=True)["recall@100"], "relevant documents without a text"
    kinds = {blemish.kind for blemish in check_dataset(root / "fiqa").blemishes}
    assert kinds == {"empty text", "unknown document"}


@pytest.mark.parametrize(("name", "split"), [("arguana", "test"), ("fiqa", "train")])
def test_a_miniature_mines_and_no_query_gets_itself(tmp_path, name, split):
    WRITERS[name](tmp_path / "data")
    job = make_job(tmp_path, search={"top_k": 30}, sample={"num_negatives": 20}, mine={"bm25_top_k": 30})
    job["data"]["train_split"] = split
    publish_checkpoint(job, 10)
    assert run_service(as_job(job), MPI.COMM_SELF, once=True) == "finished"
    settings = as_job(job)
    data = open_data(settings.data, settings.sources)
    names, query_rows = np.array(data.corpus["_id"]), data.training_queries(split)
    indptr, positives = data.positives(query_rows, split)
    for version in ("v000000", "v000001"):
        rows = rows_of(job, version)
        assert len(rows) == len(query_rows) and min(map(len, rows)) > 0
        for place, (query, found) in enumerate(zip(query_rows, rows, strict=True)):
            assert data.queries[int(query)]["_id"] not in names[found]
            assert not np.isin(found, positives[indptr[place] : indptr[place + 1]]).any()


def write_hub(folder):
    """A folder of the hub: Parquet files by configuration."""
    write_fiqa(folder / "beir")
    for side in ("corpus", "queries"):
        records = [json.loads(line) for line in (folder / "beir" / f"{side}.jsonl").read_text().splitlines()]
        put(folder / "hub", f"{side}/{side}-00000-of-00001.parquet", [{**record, "metadata": ""} for record in records])
    rows = [line.split("\t") for line in (folder / "beir" / "qrels" / "train.tsv").read_text().splitlines()[1:]]
    records = [{"query-id": q, "corpus-id": p, "score": float(s)} for q, p, s in rows]
    put(folder / "hub", "data/train-00000-of-00001.parquet", records)
    return folder / "hub"


def write_msmarco(folder):
    put(folder, "collection.tsv", "".join(f"{n}\t{words(n)} {FILLER[n % 9]}\n" for n in range(30)))
    put(folder, "queries.train.tsv", "".join(f"{n + 100}\t{words(n)}\n" for n in range(12)))
    put(folder, "qrels.train.tsv", "".join(f"{n + 100}\t0\t{n}\t1\n" for n in range(12)))
    return folder


def write_triples(folder):
    write_msmarco(folder)
    (folder / "qrels.train.tsv").unlink()
    put(folder, "qidpidtriples.train.tsv", "".join(f"{n + 100}\t{n}\t{n + 12 + k}\n" for n in range(12) for k in range(2)))
    return folder


def write_test_split(folder):
    write_arguana(folder)
    return folder


LAYOUTS = {"hub": write_hub, "msmarco": write_msmarco, "triples": write_triples, "test split": write_test_split}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_five_steps(root, tmp_path, layout):
    job = tmp_path / "job.toml"
    job.write_text(f'run.folder = "{tmp_path}/run"\nrun.trackers = []\nmodel.name = "{root}/encoder"\n')
    overrides = [f"data.path={LAYOUTS[layout](tmp_path / 'data')}", f"data.cache={tmp_path}/cache", "optim.steps=5"]
    overrides += ["data.train_split=test"] if layout == "test split" else []
    overrides += ["batch.queries=4", f"negatives.per_query={2 if layout == 'triples' else 0}"]
    assert train(read_job(job, overrides).train, world_of()).step == 5
