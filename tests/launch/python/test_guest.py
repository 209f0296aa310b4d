"""In a person's own process: the results are those of the commands, and the process stays as it was."""

import json
import logging
import os
import signal
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from sentence_transformers import SentenceTransformer

import negpool
from launch.commands import app
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.interrupt import handlers_kept

TOP = {"sample": {"method": "top", "random_share": 0}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guest")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder")
    return folder


@pytest.fixture(autouse=True)
def guest(root, monkeypatch):
    """The cache is the tests' own; what a caller has of a process is there afterwards as before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # the person's own, for their own training
    monkeypatch.setenv("RANK", "1")  # of a world of theirs, which ours is not part of
    before = _process()
    yield
    assert _process() == before


def _process():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    logs = list(logging.getLogger().handlers), logging.getLogger().level, logging.getLogger("trainer").level
    # Torch sets variables of its own, and pytest one for each phase of a test.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KMP_", "PYTEST_"))}
    return list(sys.path), kept, handlers, logs, dict(AcceleratorState._shared_state)


def command(capsys, monkeypatch, *words):
    """Return what a command prints, as whoever starts it by itself sees it."""
    with monkeypatch.context() as patch, handlers_kept():
        patch.delenv("RANK")
        patch.delenv("ACCELERATE_MIXED_PRECISION")
        patch.setattr("launch.mine.start_logging", lambda *_: None)
        assert app([*map(str, words), "--json"], standalone_mode=False) == 0
    return json.loads(capsys.readouterr().out)


def test_an_evaluation_is_a_sentence_transformers_too(root):
    peer = SentenceTransformer(str(root / "encoder"), device="cpu")
    by_name, by_object = (negpool.evaluate(model, root / "data") for model in (root / "encoder", peer))
    assert by_name == by_object and 0 < by_name["ndcg@10"] < 1
    with_prefix = negpool.evaluate(peer, root / "data", query_prefix="merge the json tree ")
    assert with_prefix != by_name


def test_mined_negatives_are_the_commands(root, tmp_path, capsys, monkeypatch):
    mined = negpool.mine_negatives(
        root / "encoder", root / "data", num_negatives=5, form="ids", method="top", **{"search.top_k": 40}
    )
    out = tmp_path / "mined.jsonl"
    settings = ("search.top_k=40", "--num-negatives", 5, "--method", "top")
    found = command(capsys, monkeypatch, "mine", "--model", root / "encoder", "--data", root / "data", "--out", out, *settings)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert mined.rows.select_columns(["query_id", "negative_ids"]).to_list() == [
        {name: row[name] for name in ("query_id", "negative_ids")} for row in rows
    ]
    assert len(mined) == found["records"] and mined.counts["candidates"] == found["counts"]["candidates"]
    assert f"{len(mined)} rows, form ids" in repr(mined) and "<pre" in mined._repr_html_()


@pytest.mark.parametrize("form", ["sentence-transformers", "tevatron", "flagembedding"])
def test_bm25_mines_data_in_memory_in_every_form(form):
    words = ("file", "line", "json", "date")
    pairs = [{"anchor": f"sort {word} list", "positive": f"the {word} of list {word}"} for word in words]
    mined = negpool.mine_negatives("bm25", pairs, num_negatives=2, form=form, filter={"relative_margin": None}, **TOP)
    assert len(mined) == 4
    column = {"sentence-transformers": "anchor", "tevatron": "query", "flagembedding": "query"}[form]
    assert {row[column] for row in mined.to_dataset()} == {pair["anchor"] for pair in pairs}


def test_columns_are_named_as_for_the_commands():
    pairs = [{"question": f"sort {word} list", "answer": f"the {word} of list"} for word in ("file", "line", "json")]
    columns = {"query": "question", "positive": "answer"}
    assert negpool.evaluate("bm25", pairs, columns=columns)["mrr@10"] == 1
    assert len(negpool.mine_negatives("bm25", pairs, num_negatives=1, form="ids", columns=columns, **TOP)) == 3


def test_embeddings_are_sentence_transformers(root):
    peer = SentenceTransformer(str(root / "encoder"), device="cpu")
    texts = ["sort list", "", "read the file by line", "sort list"]
    theirs = peer.encode(texts, normalize_embeddings=True)
    for model in (root / "encoder", peer):
        ours = negpool.encode(model, texts)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    prefixed = negpool.encode(root / "encoder", ["list"], side="query", query_prefix="sort ")
    np.testing.assert_allclose(prefixed, theirs[:1], atol=1e-5)
    assert negpool.encode(peer, []).shape == (0, 32)
    assert not list((root / "cache" / "negpool").glob("tokens-*given*"))


def test_what_cannot_be_read_is_one_sentence(root):
    cases = [
        (lambda: negpool.encode(root / "encoder", "one text"), "expected a list of texts"),
        (lambda: negpool.encode(root / "encoder", ["x"], side="document"), "side='document' is unknown"),
        (lambda: negpool.encode("bm25", ["x"]), '"bm25" compares words and encodes nothing'),
        (lambda: negpool.load(root / "data"), "a folder without config.json"),
        (lambda: negpool.evaluate(root / "encoder", root / "data", split="tset"), "has no qrels/tset.tsv, only dev, test, train"),
        (lambda: negpool.evaluate("bm25", root / "data", width=3), "bm25 compares words and encodes nothing"),
        (lambda: negpool.evaluate(root / "encoder", root / "data", optim={"lr": 3}), "optim.lr has no effect on a model"),
        (lambda: negpool.evaluate(root / "encoder", root / "data", **{"model.lora_rank": 3}), "model.lora_rank has no effect"),
        (lambda: negpool.evaluate(torch.nn.Linear(1, 1), root / "data"), "model is a Linear; expected a name"),
        (lambda: negpool.mine_negatives("bm25", root / "data", form="csv"), "form='csv' is unknown; expected one of ids"),
        (lambda: negpool.TrainResult.read(root / "data"), "expected the folder of a run that has finished"),
    ]
    for call, sentence in cases:
        with pytest.raises(negpool.InputError, match=sentence.replace("/", ".")) as told:
            call()
        (line,) = told.value._render_traceback_()  # what a notebook shows
        assert line == f"InputError: {told.value}"
