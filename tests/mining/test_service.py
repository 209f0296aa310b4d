"""The service in one process: what it publishes, what it passes over, and what a killed one leaves to the next."""

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from mpi4py import MPI

from mining import assembly, service
from mining.publish import last_version
from mining.table.clusters import cluster_queries
from mining.table.judgements import read_judgements
from tests.mining.run import as_job, make_job, publish_checkpoint, published, rows_of
from tests.ranks import PRELOAD
from trainer.data.datasets import open_dataset
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.shards import Shards
from trainer.errors import InputError
from trainer.handoff.manifest import pin, read_latest
from trainer.handoff.negatives import negatives_folder, open_negatives
from trainer.metrics import Status, read_status


def mine(job, once=True):
    return service.run_service(as_job(job), MPI.COMM_SELF, once=once)


def manifest(job, version):
    data = open_dataset(Path(job["data"]["path"]), Path(job["data"]["cache"]))
    sizes = len(data.training_queries()), len(data.corpus)
    return open_negatives(Path(job["run"]["folder"]), version, *sizes).manifest


def folder(job):
    return Path(job["run"]["folder"])


def test_bm25_comes_first_and_then_the_checkpoint(tmp_path):
    job = make_job(tmp_path)
    assert mine(job) == "finished"
    assert read_latest(negatives_folder(folder(job))) == "v000000"
    publish_checkpoint(job, 10)
    mine(job)
    first, second = manifest(job, "v000000"), manifest(job, "v000001")
    assert (first["source"], first["checkpoint_step"]) == ("bm25", None)
    assert (second["source"], second["checkpoint_step"], second["audit"]["recall"]) == ("model", 10, 1.0)
    assert second["filter"]["dropped"]["judged"] > 0 and second["held_out"] > 0
    assert read_latest(negatives_folder(folder(job))) == "v000001"
    before = published(job)
    mine(job)  # nothing new: nothing is made
    assert published(job) == before


def test_doubts_about_a_version_and_numbers_that_defeat_the_job_are_said_by_the_service(tmp_path):
    job = make_job(tmp_path, num_queries=48, filter={"relative_margin": 0.05})
    publish_checkpoint(job, 10)
    mine(job)
    now = {warning["kind"]: warning for warning in read_status(folder(job), "miner")["warnings"]}
    assert now["top_k"]["step"] is None and "search.top_k=40 is most of the corpus" in now["top_k"]["sentence"]
    assert now["most_dropped"]["step"] == 10, "a random encoder puts all texts near to each other"
    lines = [json.loads(line) for line in (folder(job) / "logs" / "miner.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines if line.get("event") == "warning"] == list(now)
    found = manifest(job, "v000001")
    assert found["random_score"] < found["audit"]["positive_scores"]["q50"] and "random_score" not in manifest(job, "v000000")


def test_no_positive_held_out_or_equal_text_is_ever_a_negative(tmp_path):
    job = make_job(tmp_path)
    publish_checkpoint(job, 10)
    mine(job)
    data = open_dataset(tmp_path / "data", tmp_path / "cache")
    relevant = {split: set(zip(q.query_rows.tolist(), q.corpus_rows.tolist(), strict=True)) for split, q in data.qrels.items()}
    trained = {passage for _, passage in relevant["train"]}
    held_out = {passage for split in ("dev", "test") for _, passage in relevant[split]} - trained
    texts = list(data.corpus["text"])
    assert len(held_out) > 20
    for version in ("v000000", "v000001"):
        rows = rows_of(job, version)
        assert len(rows) == len(data.training_queries()) and sum(map(len, rows)) > 4 * len(rows)
        for query, ids in zip(data.training_queries().tolist(), rows, strict=True):
            own = {texts[passage] for judged, passage in relevant["train"] if judged == query}
            assert not held_out & set(ids.tolist()) and not own & {texts[i] for i in ids}
            assert len({texts[i] for i in ids}) == len(ids)


@pytest.mark.parametrize("towers", ["one", "two"])
def test_the_negatives_are_the_best_of_a_plain_search(tmp_path, towers):
    job = make_job(tmp_path, sample={"method": "top", "num_negatives": 3})
    checkpoint = publish_checkpoint(job, 10, towers)
    mine(job)
    data = open_dataset(tmp_path / "data", tmp_path / "cache")
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=str(checkpoint / "encoder")))
    with torch.no_grad():
        queries, passages = (
            encoder.eval().side(side)(dict(tokenizer(texts, padding=True, return_tensors="pt"))).numpy()
            for side, texts in (("query", list(data.queries["text"])), ("passage", list(data.corpus["text"])))
        )
    judgements, texts = read_judgements(data, "train"), list(data.corpus["text"])
    for place, (query, ids) in enumerate(zip(judgements.query_rows, rows_of(job, "v000001"), strict=True)):
        judged = judgements.judged_rows[slice(*judgements.judged_indptr[judgements.text_of_query[place] :][:2])]
        seen, best = {texts[i] for i in judged}, []
        score_N = passages @ queries[query]
        for passage in np.argsort(-score_N):
            if judgements.allowed_N[passage] and texts[passage] not in seen:
                seen.add(texts[passage])
                best.append(score_N[passage])
        # Scores and not ids: padding moves the last bits, and with them near ties.
        np.testing.assert_allclose(score_N[ids], best[:3], atol=1e-5)


def test_the_heart_beats_while_one_long_call_returns_to_nobody(tmp_path, monkeypatch):
    job = make_job(tmp_path, clusters={"num": 2})
    publish_checkpoint(job, 10)
    seen = []

    def long_call(*arguments):
        for _ in range(2):
            before = read_status(folder(job), "miner")["heartbeat"]
            deadline = time.monotonic() + 10
            while read_status(folder(job), "miner")["heartbeat"] == before and time.monotonic() < deadline:
                time.sleep(0.05)
            seen.append((read_status(folder(job), "miner")["phase"], read_status(folder(job), "miner")["heartbeat"] > before))
        return cluster_queries(*arguments)

    monkeypatch.setattr("mining.work.BEAT_S", 0.1)
    monkeypatch.setattr("mining.refresh.cluster_queries", long_call)
    threads = threading.active_count()
    mine(job)
    assert seen == [("clustering", True)] * 2
    assert threading.active_count() == threads


def test_a_torn_checkpoint_is_passed_over(tmp_path, caplog):
    job = make_job(tmp_path)
    publish_checkpoint(job, 10)
    torn = publish_checkpoint(job, 20)
    weights = torn / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    mine(job)
    assert manifest(job, "v000001")["checkpoint_step"] == 10
    assert "checkpoint passed over" in caplog.text and "model.safetensors" in caplog.text


def test_a_bad_index_is_refused_with_its_recall(tmp_path, caplog):
    index = {"factory": "IVF4,PQ1x4", "nprobe": 1}  # four bits of a passage tell too little, in however many lists
    job = make_job(tmp_path, index=index)
    publish_checkpoint(job, 10)
    with pytest.raises(InputError, match="nothing was published: checkpoint step-00000010: "):
        mine(job)
    assert last_version(folder(job), 225, 398).version == 0
    assert "less than audit.min_recall=0.9" in read_status(folder(job), "miner")["refused"] and "v1 not published" in caplog.text
    with_schedule = make_job(tmp_path, index=index, negatives={"schedule": [{"step": 15, "checkpoint": 10}]})
    with pytest.raises(InputError, match=r"negatives\.schedule needs version 1"):
        mine(with_schedule)


def test_a_schedule_is_kept_whatever_is_newest(tmp_path):
    schedule = [{"step": 15, "checkpoint": 10}, {"step": 25, "checkpoint": 20}]
    job = make_job(tmp_path, negatives={"schedule": schedule})
    for step in (10, 20, 30):
        publish_checkpoint(job, step)
    for _ in range(3):
        mine(job)
    steps = [manifest(job, f"v{v:06}")["checkpoint_step"] for v in range(3)]
    assert steps == [None, 10, 20] and not (negatives_folder(folder(job)) / "v000003").exists()


def test_a_scheduled_checkpoint_that_is_not_there_is_waited_for(tmp_path):
    job = make_job(tmp_path, negatives={"schedule": [{"step": 15, "checkpoint": 10}]})
    publish_checkpoint(job, 20)
    threading.Timer(1.0, publish_checkpoint, (job, 10)).start()
    threading.Timer(3.0, lambda: Status(folder(job), "trainer").update(phase="finished")).start()
    assert mine(job, once=False) == "finished"
    assert manifest(job, "v000001")["checkpoint_step"] == 10


def test_a_request_to_stop_ends_the_watch(tmp_path):
    job = make_job(tmp_path)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert mine(job, once=False) == "stopped"
    assert read_status(folder(job), "miner")["phase"] == "stopped"


def test_old_versions_go_and_their_embeddings_with_them(tmp_path):
    job = make_job(tmp_path, mine={"bm25_top_k": 20, "keep_versions": 2, "keep_encodings": 2})
    for step in (10, 20, 30):
        publish_checkpoint(job, step)
        mine(job)
    assert sorted(p.name for p in negatives_folder(folder(job)).glob("v*")) == ["v000002", "v000003"]
    assert len(list((folder(job) / "shards").glob("[!.]*"))) == 2


def test_refused_versions_leave_no_embeddings_behind_either(tmp_path):
    job = make_job(
        tmp_path, mine={"bm25_top_k": 0, "keep_encodings": 2}, audit={"max_suspected": 0.0}, filter={"relative_margin": 0}
    )
    for step in (10, 20, 30):
        publish_checkpoint(job, step)
        with pytest.raises(InputError, match="nothing was published"):
            mine(job)
    assert len(list((folder(job) / "shards").glob("[!.]*"))) == 2
    assert not list((folder(job) / "shards" / ".pins").iterdir())


def test_negatives_that_are_not_easy_stay_from_one_model_to_the_next(tmp_path):
    job = make_job(tmp_path, sample={"num_negatives": 5, "replace": "easy", "easy_below": 1.0, "easy_ratio": 1.001})
    for step in (10, 20):
        publish_checkpoint(job, step)
        mine(job)
    stayed = [manifest(job, f"v{version:06}")["counts"]["stayed"] for version in range(3)]
    assert stayed[:2] == [0, 0], "scores of BM25 compare with none"
    assert 0.05 < stayed[2] / (5 * 225) < 0.95
    last, rows = rows_of(job, "v000001"), rows_of(job, "v000002")
    assert sum(len(set(a) & set(b)) for a, b in zip(last, rows, strict=True)) >= stayed[2]


def test_a_version_beyond_the_gate_is_refused_with_every_reason(tmp_path, caplog):
    gate = {"max_suspected": 0.01, "max_without": 0.01}
    job = make_job(tmp_path, audit=gate, filter={"relative_margin": 0.02})
    publish_checkpoint(job, 10)
    with pytest.raises(InputError, match="nothing was published: checkpoint step-00000010: "):
        mine(job)
    told = read_status(folder(job), "miner")["refused"]
    assert "more than audit.max_suspected=0.01" in told and "more than audit.max_without=0.01" in told
    assert last_version(folder(job), 225, 398).version == 0
    lines = [json.loads(line) for line in (folder(job) / "logs" / "miner.jsonl").read_text().splitlines()]
    assert [told.endswith(line["reason"]) for line in lines if line["event"] == "given up"] == [True]


def test_a_version_that_the_trainer_holds_is_not_pruned_and_none_ever_changes(tmp_path):
    job = make_job(tmp_path, mine={"bm25_top_k": 20, "keep_versions": 1})
    mine(job)
    pin(negatives_folder(folder(job)) / "v000000", "trainer", 600)
    first = published(job)
    for step in (10, 20):
        publish_checkpoint(job, step)
        mine(job)
    assert sorted(p.name for p in negatives_folder(folder(job)).glob("v*")) == ["v000000", "v000002"]
    assert {name: array for name, array in published(job).items() if name in first} == first


@pytest.mark.parametrize(
    "sections, sentence",
    [
        ({"clusters": {"num": 226}}, r"clusters\.num=226 is more than the 225 training queries"),
        ({"rerank": {"model": "nowhere"}}, r"rerank\.model='nowhere' is not a cross-encoder"),
    ],
)
def test_what_the_data_or_the_disk_cannot_give_is_refused_before_any_work(tmp_path, sections, sentence):
    job = make_job(tmp_path, **sections)
    with pytest.raises(InputError, match=sentence):
        mine(job)
    assert not negatives_folder(folder(job)).exists()


def test_a_second_service_on_the_same_run_says_so(tmp_path):
    job = make_job(tmp_path)
    (folder(job) / "status").mkdir(parents=True)
    with (
        filelock.FileLock(folder(job) / "status" / "miner.lock"),
        pytest.raises(InputError, match="another miner is at work"),
    ):
        mine(job)
    assert read_status(folder(job), "miner") == {}


def mine_until_killed(job):
    """Kill this process between the publication of version 1 and that of its name in LATEST."""
    plain, calls = assembly.write_latest, []

    def until_killed(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(*args)

    assembly.write_latest = until_killed
    mine(job)


def mine_until_killed_encoding(job):
    """Kill this process at its third shard."""
    plain, calls = Shards.embed, []

    def until_killed(*args):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args)

    Shards.embed = until_killed
    mine(job)


@pytest.mark.parametrize("until_killed", [mine_until_killed, mine_until_killed_encoding])
def test_what_a_killed_service_had_begun_is_finished_before_a_newer_checkpoint_is_taken(tmp_path, until_killed):
    undisturbed, job = (make_job(tmp_path, run=run) for run in ("undisturbed", "killed"))
    for one in (undisturbed, job):
        publish_checkpoint(one, 10)
    mine(undisturbed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=until_killed, args=(job,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    publish_checkpoint(job, 20)  # newer, but what was begun is finished first
    mine(job)
    assert read_latest(negatives_folder(folder(job))) in ("v000001", "v000002")
    expected = published(undisturbed)
    assert {name: published(job)[name] for name in expected} == expected
    assert np.load(negatives_folder(folder(job)) / "v000001" / "ids.npy").size > 0
