"""mteb evaluates a saved folder as it is, prompts included, and finds the figures that our own evaluation finds."""

import json

import pytest
from sentence_transformers import SentenceTransformer

from tests.tiny import FILLER, write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.data.datasets import open_dataset
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder
from trainer.evaluate import evaluate

mteb = pytest.importorskip("mteb")


def task_on(data):
    """Return an mteb retrieval task on a data set of ours."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class Local(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name="Local", description="local data", reference="https://example.org", type="Retrieval", category="t2t",
            dataset={"path": "local/data", "revision": "1"}, eval_splits=["test"], eval_langs=["eng-Latn"],
            main_score="ndcg_at_10", date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None,
            dialect=None, sample_creation=None, bibtex_citation="",
        )  # fmt: skip

        def load_data(self, **_):
            qrels, relevant = data.qrels["test"], {}
            for query, passage, score in zip(qrels.query_rows, qrels.corpus_rows, qrels.scores, strict=True):
                relevant.setdefault(data.queries[int(query)]["_id"], {})[data.corpus[int(passage)]["_id"]] = int(score)
            queries = data.queries.filter(lambda row: row["_id"] in relevant)
            self.dataset = {"default": {"test": {
                "corpus": data.corpus.select_columns(["_id", "text"]).rename_column("_id", "id"),
                "queries": queries.select_columns(["_id", "text"]).rename_column("_id", "id"),
                "relevant_docs": relevant,
                "top_ranked": None,
            }}}  # fmt: skip
            self.data_loaded = True

    return Local()


def write_distinct(folder):
    """Write a data set without equal texts, whose order in a ranking is anyone's choice."""
    path = write_tiny_dataset(folder) / "corpus.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["text"] += f" {FILLER[i % len(FILLER)]} {FILLER[i // len(FILLER)]}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_mteb_finds_the_figures_that_we_find(tmp_path):
    data = open_dataset(write_distinct(tmp_path / "data"), tmp_path / "cache")
    settings = ModelSettings(
        name=str(write_tiny_encoder(tmp_path / "encoder")), pooling="weighted_mean", query_prefix="find the ", projection=16
    )
    encoder, tokenizer, traits = load_encoder(settings)
    (tmp_path / "saved").mkdir()
    save_encoder(tmp_path / "saved", encoder, tokenizer, traits)
    ours = evaluate(world_of(), data, "test", encoder, tokenizer, traits, tmp_path / "shards")
    model = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    result = mteb.evaluate(model, task_on(data), cache=None, co2_tracker=False, show_progress_bar=False)
    (theirs,) = result.task_results[0].scores["test"]
    assert 0.05 < ours["ndcg@10"] < 0.95
    for name, of_mteb in {"ndcg@10": "ndcg_at_10", "mrr@10": "mrr_at_10", "recall@100": "recall_at_100"}.items():
        assert theirs[of_mteb] == pytest.approx(ours[name], abs=1e-5)
