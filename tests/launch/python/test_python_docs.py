"""The page about Python runs as it stands, and what its names hold afterwards is what it says. One run of it serves all tests.

This is also how a person who uses sentence-transformers meets negpool: model, Dataset and evaluator of theirs, a model back.
"""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import negpool
from tests.tiny import TOPICS, write_tiny_dataset, write_tiny_encoder

PAGE = Path(__file__).parents[3] / "docs" / "python.md"


def patched_output(patch) -> io.StringIO:
    """Return where standard output goes from now on."""
    printed = io.StringIO()
    patch.setattr("sys.stdout", printed)
    return printed


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Run the page's examples in one namespace, in a folder with what they name, and return the namespace and the folder."""
    folder = tmp_path_factory.mktemp("page")
    write_tiny_dataset(folder / "my-data")
    write_tiny_encoder(folder / "my-encoder")
    pairs = [(f"{verb} {word}", f"{verb} by {word} and one") for verb in ("sort", "read") for word in TOPICS[2:10]]
    rows = [{"anchor": query, "positive": passage} for query, passage in pairs]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict = {"folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        printed = patched_output(patch)
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)):
            exec(compile(code, f"python.md, example {number + 1}", "exec"), names)
            names.setdefault("results", []).append(names.get("result"))
        names["printed"] = printed.getvalue()
    return names


def test_a_run_returns_its_figures(page):
    result, run = page["results"][0], page["folder"] / "runs" / "first"
    kept = json.loads((run / "results.json").read_text())
    assert result.metrics["bm25"] == kept["bm25"] and result.metrics["trained"] == kept["trained"]
    assert result.metrics["trained"] != result.metrics["untrained"]
    assert result.num_queries == 8 and result.versions_swapped == kept["versions_swapped"]
    assert "BM25" in repr(result) and str(result.model_folder) in repr(result)
    assert "<pre" in result._repr_html_() and "nDCG@10" in result._repr_html_()
    again = negpool.TrainResult.read(result.run)
    assert again == result


def test_evaluations_are_those_of_the_run(page):
    metrics = page["results"][0].metrics
    for name, row in (("before", "untrained"), ("after", "trained"), ("words", "bm25")):
        assert page[name] == pytest.approx({key: metrics[row][key] for key in page[name]}), name


def test_a_sentence_transformer_comes_back_and_the_given_one_stays(page):
    result, trained = page["results"][1], page["trained"]
    before = SentenceTransformer(str(page["folder"] / "my-encoder"), device="cpu")
    assert isinstance(trained, SentenceTransformer)
    weights, earlier = trained[0].state_dict(), before[0].state_dict()
    moved = [name for name in earlier if not np.allclose(earlier[name].numpy(), weights[name].cpu().numpy(), atol=1e-6)]
    assert len(moved) > 10
    assert result.evaluation == pytest.approx({name: float(value) for name, value in page["evaluator"](trained).items()})
    assert any("ndcg@10" in name for name in result.evaluation)
    assert not (result.run / "logs" / "miner.log").exists() and (result.run / "logs" / "trainer.log").exists()


def test_mined_negatives_train_with_sentence_transformers(page):
    dataset = page["dataset"]
    assert isinstance(dataset, Dataset) and dataset.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    queries = {json.loads(line)["text"] for line in (page["folder"] / "my-data" / "queries.jsonl").read_text().splitlines()}
    texts = {json.loads(line)["text"] for line in (page["folder"] / "my-data" / "corpus.jsonl").read_text().splitlines()}
    for row in dataset:
        assert row["anchor"] in queries and len({row["positive"], row["negative_1"], row["negative_2"]} & texts) == 3
    peer = SentenceTransformer(str(page["folder"] / "my-encoder"), device="cpu")
    columns = [peer.preprocess(dataset[name][:4]) if hasattr(peer, "preprocess") else peer.tokenize(dataset[name][:4])
               for name in dataset.column_names]  # fmt: skip
    assert MultipleNegativesRankingLoss(peer)(columns, None).item() > 0


def test_vectors_are_the_loaded_models(page):
    theirs = page["model"].encode_query(["sort list", "read file"])
    assert page["vectors"].dtype == np.float32
    np.testing.assert_allclose(page["vectors"], theirs, atol=1e-5)


def test_a_job_is_the_file_that_it_writes(page):
    assert page["job"].train.optim.lr == 2e-3
    assert negpool.Job(job=page["folder"] / "job.toml", optim={"lr": 2e-3}) == page["job"]
    assert page["proof"].found["ranks"] == 1 and page["proof"].max_ratio_error < 1e-4 and "cosine" in repr(page["proof"])


def test_the_page_prints_the_sentence_of_an_error(page):
    assert "unknown key optim.learning_rate" in page["printed"].splitlines()[-1]
