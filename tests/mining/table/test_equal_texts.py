"""No text is a negative of itself, whatever prefix stands before it and whichever query it was judged for."""

import json

import pytest

from tests.mining.run import as_job, make_job, publish_checkpoint, rows_of
from tests.mining.services import start_service
from tests.tiny import write_tiny_dataset
from trainer.data.datasets import open_data

PREFIXES = {"query_prefix": "for the ", "passage_prefix": "of a "}


def write_data(folder):
    """Write a data set where a passage is each query's text, and each query comes again, with a positive of its own."""
    write_tiny_dataset(folder, num_queries=36)
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    with (
        open(folder / "corpus.jsonl", "a") as corpus,
        open(folder / "queries.jsonl", "a") as more,
        open(folder / "qrels" / "train.tsv", "a") as qrels,
    ):
        for number, query in enumerate(queries):
            corpus.write(json.dumps({"_id": f"same{number}", "title": "", "text": query["text"]}) + "\n")
            corpus.write(json.dumps({"_id": f"again{number}", "title": "", "text": f"{query['text']} and {number}"}) + "\n")
            more.write(json.dumps({"_id": f"r{number}", "text": query["text"]}) + "\n")
            qrels.write(f"\nr{number}\tagain{number}\t1")
    return folder


def own_texts_of(data):
    """Return for each query text the texts that are no negatives of it: itself, and what is judged for it anywhere."""
    queries, corpus = data.queries["text"][:], data.corpus["text"][:]
    own = {text: {text} for text in queries}
    for qrels in data.qrels.values():
        for query, passage in zip(qrels.query_rows, qrels.corpus_rows, strict=True):
            own[queries[query]].add(corpus[passage])
    return own


@pytest.mark.parametrize("num_sources", [1, 2])
def test_no_text_is_a_negative_of_itself(tmp_path, num_sources):
    write_data(tmp_path / "data")
    job = make_job(tmp_path, search={"top_k": 120}, sample={"num_negatives": 50}, mine={"bm25_top_k": 60})
    if num_sources == 2:  # the second has all texts of the first, read behind other prefixes
        own = [{}, {"id_prefix": "b/", "query_prefix": "to ", "passage_prefix": "from "}]
        job["sources"] = {name: {"path": str(tmp_path / "data"), **more} for name, more in zip("ab", own, strict=True)}
    publish_checkpoint(job, 10, **PREFIXES)
    service = start_service(job)
    assert service.wait() == 0, service.said
    settings = as_job(job)
    data = open_data(settings.data, settings.sources)
    own, corpus = own_texts_of(data), data.corpus["text"][:]
    queries = data.queries.select(data.training_queries())["text"][:]
    for version in ("v000000", "v000001"):
        found = [[corpus[row] for row in rows] for rows in rows_of(job, version)]
        wrong = [(query, text) for query, texts in zip(queries, found, strict=True) for text in texts if text in own[query]]
        assert not wrong, f"{version}: {len(wrong)}, such as {wrong[0]}"
        assert all(len(set(texts)) == len(texts) > 10 for texts in found), "each text once"
