"""Negatives from vectors that a person supplies, against a plain version of what they should be."""

import json
import re

import numpy as np
import pytest

from launch.commands import app
from tests.mining.services import start_service
from tests.tiny import write_tiny_dataset
from trainer.data.datasets import open_dataset
from trainer.errors import InputError

FIRST, STOP = 5, 12  # the band of neighbours
BAND = [f"filter.range_min={FIRST}", f"filter.range_max={STOP}", "filter.relative_margin=off", "sample.method=top"]
BAND += ["search.top_k=90", f"sample.num_negatives={STOP - FIRST}"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    write_tiny_dataset(folder / "data", num_queries=300)
    data, rng = open_dataset(folder / "data", folder / "cache"), np.random.default_rng(0)
    for name, texts, kind in (("queries", data.queries, np.float64), ("passages", data.corpus, np.float32)):
        np.save(folder / f"{name}.npy", rng.standard_normal((len(texts), 24)).astype(kind))
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("launch.mine.start_logging", lambda *_: None)


def mine(root, *words):
    data = [f"data.path={root}/data", f"data.cache={root}/cache"]
    return app(["mine", *map(str, words), *data, *BAND], standalone_mode=False)


def in_the_band(root):
    """Return the ids of each training query's neighbours from place FIRST to STOP, without those that are known."""
    data = open_dataset(root / "data", root / "cache")
    texts, ids = list(data.corpus["text"]), list(data.corpus["_id"])
    lines = {path.stem: path.read_text().splitlines()[1:] for path in (root / "data" / "qrels").iterdir()}
    judged = [(split, *line.split("\t")[:2]) for split in lines for line in lines[split]]
    held_out = {p for _, _, p in judged} - {p for split, _, p in judged if split == "train"}
    score_QN = np.load(root / "queries.npy").astype(np.float32) @ np.load(root / "passages.npy").T
    wanted = {}
    for row, (query, text) in enumerate(zip(data.queries["_id"], data.queries["text"], strict=True)):
        positives = {passage for _, q, passage in judged if q == query}
        seen = {text, *(texts[ids.index(passage)] for passage in positives)}
        passed = []
        for place in np.argsort(-score_QN[row], kind="stable"):
            if ids[place] not in held_out:
                passed += [ids[place]] if texts[place] not in seen else []
                seen.add(texts[place])
        wanted[query] = passed[FIRST:STOP]
    return wanted


def test_a_band_of_neighbours_among_supplied_vectors_is_what_numpy_finds(root, tmp_path):
    assert mine(root, "--model", root, "--out", tmp_path / "band.jsonl") == 0
    records = [json.loads(line) for line in (tmp_path / "band.jsonl").read_text().splitlines()]
    wanted = in_the_band(root)
    assert len(records) == 225
    for record in records:
        assert sorted(record["negative_ids"]) == sorted(wanted[record["query_id"]]), record["query_id"]


def test_two_ranks_with_an_index_write_the_same_bytes_as_one(root, tmp_path):
    job = {"run": {"folder": str(tmp_path / "run")}, "data": {"path": f"{root}/data", "cache": f"{tmp_path}/cache"}}
    for ranks in (1, 2):
        words = ["--model", root, "--out", tmp_path / f"{ranks}.jsonl", "index.factory=IVF4,Flat", "index.nprobe=4", *BAND]
        service = start_service(job, ranks, tuple(map(str, words)))
        assert service.wait(180) == 0, service.said
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_vectors_that_changed_are_read_anew(root, tmp_path):
    queries, passages = np.load(root / "queries.npy"), np.load(root / "passages.npy")
    for number, passages_now in enumerate((passages, -passages, passages)):
        np.save(tmp_path / "queries.npy", queries)
        np.save(tmp_path / "passages.npy", passages_now)
        assert mine(root, "--model", tmp_path, "--out", tmp_path / f"{number}.jsonl") == 0
    first, turned, again = ((tmp_path / f"{number}.jsonl").read_bytes() for number in range(3))
    assert first == again != turned


def spoil(row):
    vectors = np.ones((300, 24), np.float32)
    vectors[row] = np.nan
    return vectors


@pytest.mark.parametrize(
    ("spoilt", "settings", "sentence"),
    [
        (np.zeros((7, 24), np.float32), [], "queries.npy holds float32 of shape (7, 24), expected floats of shape (300, D)"),
        (np.zeros((300, 24), np.int64), [], "queries.npy holds int64 of shape (300, 24), expected floats"),
        (np.zeros((300, 25), np.float32), [], "queries.npy is 25 numbers wide and passages.npy 24"),
        (np.array([["a"]], object), [], "queries.npy is no whole .npy file"),
        (spoil(6), [], "queries.npy: row 6, for the text with id 'q6', is not finite as fp32"),
        (np.full((300, 24), 1e5), ["encode.stored=fp16"], "is not finite as fp16; mend it, or set encode.stored=fp32"),
        (None, [], "queries.npy is missing; vectors are queries.npy and passages.npy in one folder"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_in_a_sentence(root, tmp_path, spoilt, settings, sentence):
    (tmp_path / "passages.npy").symlink_to(root / "passages.npy")
    if spoilt is not None:
        np.save(tmp_path / "queries.npy", spoilt)
    with pytest.raises(InputError, match=re.escape(sentence)):
        mine(root, "--model", tmp_path, "--out", tmp_path / "out.jsonl", *settings)
    assert not (tmp_path / "out.jsonl").exists()
