"""`negpool mine` with a model and without a run: what a person types, and what comes out."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from launch.commands import app
from launch.mine import read_to_mine
from mining import refresh
from mining.offline import clean_left, fit_depths, read_mined
from mining.table.judgements import read_judgements
from tests.mining.run import as_job, make_job, publish_checkpoint
from tests.mining.services import start_service
from tests.mining.test_service import mine as mine_for_run
from tests.tiny import write_tiny_cross_encoder, write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.errors import InputError
from trainer.handoff.claim import claim_side

SETTINGS = ["search.top_k=40", "sample.num_negatives=5", "filter.relative_margin=0.02"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    write_tiny_dataset(folder / "data", num_queries=120)
    write_tiny_encoder(folder / "encoder")
    return folder


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def quiet(monkeypatch, root):
    """Logging is set up by every command; the cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    monkeypatch.setattr("launch.mine.start_logging", lambda *_: None)


def call(capsys, *words):
    """Run a command in this process and return its exit code and its standard output."""
    code = app(["mine", *map(str, words)], standalone_mode=False)
    return code, capsys.readouterr().out


def mine(capsys, root, *words):
    return call(capsys, "--model", root / "encoder", "--data", root / "data", *words, *SETTINGS)


def test_a_model_mines_a_file_and_leaves_nothing_else(root, tmp_path, capsys):
    code, out = mine(capsys, root, "--out", tmp_path / "ids.jsonl", "--json")
    found = json.loads(out)
    records = [json.loads(line) for line in (tmp_path / "ids.jsonl").read_text().splitlines()]
    assert code == 0 and found["records"] == len(records) == found["num_queries"]
    assert sum(len(record["negative_ids"]) for record in records) == found["num_negatives"] > 300
    assert found["counts"]["queries_without"] > 0 and found["num_empty_rows"] == 0, "random passages stand in"
    data = open_dataset(root / "data")
    assert not list(data.cache.glob("mine-*")) and list((data.cache / "shards").iterdir())
    assert not (Path.cwd() / "runs" / "default" / "negatives").exists()


def test_what_is_mined_is_what_the_service_mines_from_the_same_weights(tmp_path, capsys):
    job = make_job(tmp_path, sample={"num_negatives": 5, "method": "top"}, mine={"bm25_top_k": 0})
    publish_checkpoint(job, 10)
    mine_for_run(job)
    (tmp_path / "job.toml").write_text("")
    words = [f"run.folder={job['run']['folder']}", f"data.path={job['data']['path']}", f"data.cache={job['data']['cache']}"]
    words += ["search.top_k=40", "filter.relative_margin=off", "sample.method=top", "sample.num_negatives=5", "run.seed=7"]
    assert call(capsys, tmp_path / "job.toml", *words, "--out", tmp_path / "run.jsonl")[0] == 0
    assert call(capsys, "--model", tmp_path / "encoder-10", *words, "--out", tmp_path / "model.jsonl")[0] == 0
    assert (tmp_path / "run.jsonl").read_bytes() == (tmp_path / "model.jsonl").read_bytes()
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert sum(len(record["negative_ids"]) for record in records) == len(read_mined(as_job(job)).negatives.ids)


def test_two_ranks_write_the_same_bytes_as_one(root, tmp_path):
    rerank = {"model": str(write_tiny_cross_encoder(tmp_path / "cross-encoder")), "top_k": 10}
    job = make_job(tmp_path, search={"top_k": 40, "bm25_top_k": 10}, rerank=rerank, clusters={"num": 3})
    services = []
    for num_ranks in (1, 2):
        words = ["--model", root / "encoder", "--out", tmp_path / f"{num_ranks}.jsonl", "--form", "flagembedding", "--json"]
        services.append(start_service(job, num_ranks, tuple(map(str, words))))
        assert services[-1].wait(180) == 0, services[-1].said
    told = [line for service in services for line in service.said.splitlines() if line.startswith("{")]
    assert [json.loads(line)["clusters"]["num"] for line in told] == [3, 3], "one rank speaks"
    one, two = ((tmp_path / f"{num_ranks}.jsonl").read_bytes() for num_ranks in (1, 2))
    assert one == two and len(one) > 10_000
    assert open_dataset(tmp_path / "2.jsonl", tmp_path / "cache").given is not None


def test_a_refusal_of_one_rank_ends_all_with_one_sentence(root, tmp_path):
    job = make_job(tmp_path)
    (tmp_path / "precious.jsonl").write_text("precious")
    for words, sentence in [
        (["--out", tmp_path / "precious.jsonl"], "is there already; give --out a new file"),
        (["--out", tmp_path / "a.jsonl", "audit.max_without=0.0", "filter.relative_margin=0.5"], "audit.max_without=0.0"),
    ]:
        service = start_service(job, 2, ("--model", str(root / "encoder"), *map(str, words)))
        assert service.wait(180) == 2, service.said
        assert service.said.count(sentence) == 1 and "Traceback" not in service.said
    assert (tmp_path / "precious.jsonl").read_text() == "precious" and not (tmp_path / "a.jsonl").exists()


def test_bm25_mines_without_a_model(root, tmp_path, capsys):
    code, out = call(capsys, "--model", "bm25", "--data", root / "data", "--out", tmp_path / "words.parquet", *SETTINGS)
    assert code == 0 and "form ids" in out and "relative margin" not in out
    assert (tmp_path / "words.parquet").stat().st_size > 1000


@pytest.mark.parametrize(
    "given, depths",
    [
        ([], (15, 7, 15)),  # a tenth and a twentieth of 159 passages
        (["sample.num_negatives=20"], (22, 20, 22)),  # two passages are judged of some queries
        (["filter.range_min=5"], (20, 7, 20)),
        (["filter.range_min=5", "filter.range_max=40"], (40 + 2 + 15, 7, 57)),  # 15 passages repeat another one's text
        (["filter.range_min=36", "filter.range_max=40"], (57, 4, 57)),
        (["filter.range_max=150"], (159, 7, 159)),
        (["search.top_k=200"], (200, 16, 16)),
        (["search.top_k=200", "mine.bm25_top_k=30"], (200, 16, 30)),
    ],
)
def test_there_are_as_many_candidates_as_suit_a_corpus_and_a_range_unless_they_are_set(root, given, depths):
    jobs, data = read_to_mine(None, given), open_dataset(root / "data")
    fitted = fit_depths(jobs.mine, jobs.given, data, read_judgements(data, "train"))
    assert (fitted.search.top_k, fitted.sample.num_negatives, fitted.mine.bm25_top_k) == depths


def test_a_person_reads_how_many_candidates_there_are(root, tmp_path, capsys, caplog):
    with caplog.at_level("INFO", "launch.mine"):
        words = ["--model", "bm25", "--data", root / "data", "--out", tmp_path / "few.jsonl"]
        _, out = call(capsys, *words)
    assert "up to 15 of each query" in out
    sentence = "from the 15 nearest passages of each query, which suits 159 passages; --range-max sets another number"
    assert sentence in caplog.text


def test_a_person_reads_counters_and_a_query_with_its_passages(root, tmp_path, capsys):
    _, out = mine(capsys, root, "--out", tmp_path / "ids.jsonl", "--show", "q0")
    assert "dropped: judged" in out and "queries without any that passed" in out and "95 %" in out
    assert "query q0" in out and "positive 1: d0-" in out and "negative 5: " in out and "score 0." in out
    shown = json.loads(mine(capsys, root, "--show", "q0", "--json")[1])
    assert len(shown["negatives"]) == 5 and len(shown["positives"]) == 2
    positives = [passage["score"] for passage in shown["positives"]]
    assert positives == sorted(positives, reverse=True) and np.isfinite(positives).all()


def test_a_miner_that_is_asked_to_stop_says_so_and_leaves_with_75_and_no_file(root, tmp_path, capsys, monkeypatch, caplog):
    draw = refresh.draw_tiles

    def stop_first(*how):
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(*how)

    monkeypatch.setattr(refresh, "draw_tiles", stop_first)
    with caplog.at_level("INFO", "launch.mine"):
        assert mine(capsys, root, "--out", tmp_path / "ids.jsonl")[0] == 75
    assert "stopped: nothing is written, and the same command goes on with what is encoded" in caplog.text
    assert not list(tmp_path.iterdir()) and not list(open_dataset(root / "data").cache.glob("mine-*"))


def test_what_a_killed_miner_left_is_deleted_but_nothing_of_a_live_one(tmp_path):
    names = "mine-dead", "mine-alive", "mine-new"
    for name in names:
        claim_side(tmp_path / name, "miner").release()
        os.utime(tmp_path / name, (0, 0) if name != "mine-new" else None)
    alive = claim_side(tmp_path / "mine-alive", "miner")
    os.utime(tmp_path / "mine-alive", (0, 0))
    clean_left(tmp_path)
    alive.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine-alive", "mine-new"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--show", "q1000"], "has no query 'q1000'; expected the id of a query or its exact text; near to it: q1"),
        (["--out", "ids.csv"], r"--out ids\.csv is no \.jsonl or \.parquet"),
        ([], "nothing would come of it; give --out"),
        (["--out", "a.jsonl", "--data", "nowhere"], "there is no data set in nowhere"),
        (["--out", "a.jsonl", "--model", "nowhere"], "nowhere' is not a model that can be loaded"),
        (["--out", "a.jsonl", "filter.relative_margins=1"], r"unknown key filter\.relative_margins; did you mean"),
        (["--out", "a.jsonl", "search.top_k=2"], r"sample\.num_negatives=16 is more than search\.top_k=2"),
        (["--out", "a.jsonl", "index.factory=IVF4,PQ1x4"], r"finds 0\.\d+ of the exact neighbours"),
    ],
)
def test_what_cannot_be_mined_is_refused_in_a_sentence(root, tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=sentence):
        call(capsys, "--model", root / "encoder", "--data", root / "data", *words)
    assert not list(tmp_path.iterdir())


def test_a_run_without_negatives_says_how_to_get_some(root, tmp_path, capsys):
    (tmp_path / "job.toml").write_text(f'[run]\nfolder = "{tmp_path}/run"\n[data]\npath = "{root}/data"\n')
    with pytest.raises(InputError, match=r"has no negatives for this data; negpool mine JOB\.toml --once makes some"):
        call(capsys, tmp_path / "job.toml", "--show", "q0")
    with pytest.raises(InputError, match="there is nothing to mine from; give a job file, or --model and --data"):
        call(capsys, "--out", "a.jsonl")
