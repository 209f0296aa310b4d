"""What may go wrong around the service: each fault is one sentence, loses nothing, and leaves the service or the next one at
work."""

import json
import os
import re
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertModel

from mining import ranks, service
from mining.find.embeddings import TokenCache
from tests.disk import fill, small_disk
from tests.mining.run import as_job, make_job, publish_checkpoint, published
from tests.mining.services import start_service
from tests.tiny import VOCABULARY, write_tiny_encoder
from trainer.encoder.shards import Shards
from trainer.errors import InputError
from trainer.handoff import retry
from trainer.handoff.manifest import TornVersion, open_version, read_latest, read_manifest, versions
from trainer.handoff.negatives import negatives_folder
from trainer.handoff.weights import checkpoint_name, checkpoints_folder
from trainer.metrics import read_status


def mine(job, **how):
    from mpi4py import MPI  # here: ranks that import this module have an environment of their own to start it with

    return service.run_service(as_job(job), MPI.COMM_SELF, once=True, **how)


def folder(job) -> Path:
    return Path(job["run"]["folder"])


def steps(job) -> list:
    """The checkpoints that all versions of a run were mined from."""
    return [read_manifest(version)["checkpoint_step"] for version in versions(negatives_folder(folder(job)))]


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def flip(file: Path) -> None:
    """Change one bit in the middle of a file, and nothing about it."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "half written": lambda checkpoint: (checkpoint / "manifest.json").unlink(),
    "truncated": lambda checkpoint: (checkpoint / "encoder" / "model.safetensors").write_bytes(b"half"),
    "bit-flipped": lambda checkpoint: flip(checkpoint / "encoder" / "model.safetensors"),
    "without its tokenizer": lambda checkpoint: (checkpoint / "encoder" / "tokenizer.json").unlink(),
    "deleted": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("when", ["before it is read", "while it is read", "as soon as it is read"])
def test_a_damaged_checkpoint_is_named_and_the_next_is_taken(tmp_path, monkeypatch, caplog, damage, when):
    job = make_job(tmp_path, num_queries=60)
    publish_checkpoint(job, 10)
    newest = publish_checkpoint(job, 20)
    plain, read = TokenCache.open, []

    def read_damaged(self, checkpoint):
        read.append(checkpoint.step)
        found = plain(self, checkpoint) if when == "as soon as it is read" else None
        if checkpoint.step == 20:
            DAMAGES[damage](newest)
        return found or plain(self, checkpoint)

    if when == "before it is read":
        DAMAGES[damage](newest)
    else:
        monkeypatch.setattr(TokenCache, "open", read_damaged)
    mine(job)
    assert steps(job) == [None, 10]
    if when != "before it is read":
        assert read == [20, 10] and "negatives v1 not published: checkpoint step-00000020: " in caplog.text
        assert read_status(folder(job), "miner")["refused"].startswith("checkpoint step-00000020: ")
    elif damage in ("truncated", "bit-flipped", "without its tokenizer"):
        assert "checkpoint passed over" in caplog.text and "step-00000020" in caplog.text


def test_a_pinned_checkpoint_outlives_the_trainers_retention(tmp_path, monkeypatch):
    from trainer.handoff.retention import prune

    job = make_job(tmp_path, num_queries=60)
    checkpoint, plain = publish_checkpoint(job, 10), TokenCache.open

    def read_while_the_trainer_prunes(self, found):
        for step in (20, 30):
            publish_checkpoint(job, step)
        assert prune(checkpoint.parent, keep=1) == [checkpoint.with_name("step-00000020")]
        return plain(self, found)

    monkeypatch.setattr(TokenCache, "open", read_while_the_trainer_prunes)
    mine(job, checkpoint=checkpoint.name)  # so that no newer one takes its place
    assert steps(job) == [None, 10]
    assert prune(checkpoint.parent, keep=1) == [checkpoint], "the service has let go of it"


def publish_diverged(job, step: int) -> Path:
    """Publish a checkpoint that gives every text with the word "socket" an embedding of NaN."""
    source = write_tiny_encoder(folder(job).parent / f"encoder-{step}", seed=step)
    model = BertModel.from_pretrained(source, add_pooling_layer=False)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[VOCABULARY.index("socket")] = torch.nan
    model.save_pretrained(source)
    return publish_checkpoint(job, step, source=source)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_embeddings_that_are_not_finite_name_a_text_and_the_checkpoint_and_the_next_is_mined(tmp_path, num_ranks):
    job = make_job(tmp_path)
    publish_diverged(job, 20)
    run = start_service(job, num_ranks)
    assert run.wait() == 2 and run.said.count("negpool: nothing was published: checkpoint step-00000020: ") == 1, run.said
    said = read_status(folder(job), "miner")["error"].removeprefix("nothing was published: ")
    start, name, end = said.split("'")
    assert start == "checkpoint step-00000020: the embedding of the text with id "
    assert "is not finite" in end and f"negatives v1 not published: {said}" in run.said and "Traceback" not in run.said
    texts = [json.loads(line) for side in ("corpus", "queries") for line in lines(tmp_path / "data" / f"{side}.jsonl")]
    assert "socket" in next(text["text"] for text in texts if text["_id"] == name)
    assert steps(job) == [None]
    publish_checkpoint(job, 30)
    run = start_service(job, num_ranks)
    assert run.wait() == 0, run.said
    assert steps(job) == [None, 30]


def test_a_schedule_cannot_go_on_without_its_checkpoint(tmp_path):
    job = make_job(tmp_path, num_queries=60, negatives={"schedule": [{"step": 25, "checkpoint": 20}]})
    publish_diverged(job, 20)
    with pytest.raises(InputError, match=r"negatives\.schedule needs version 1, but checkpoint step-00000020: the embedding of"):
        mine(job)


def newer_while_encoding(job: dict, after: int, rank: int = 0) -> None:
    """Publish checkpoint 20 as rank 0 begins its n-th shard of passages; other ranks wait for it at their first."""
    plain, calls = Shards.embed, []

    def embed(self, *args, **how):
        if self.num_rows > 300:  # else it is of the queries
            calls.append(self)
        if rank == 0 and len(calls) == after:
            publish_checkpoint(job, 20)
        while rank and len(calls) == 1 and read_latest(checkpoints_folder(Path(job["run"]["folder"]))) != checkpoint_name(20):
            time.sleep(0.05)
        return plain(self, *args)

    Shards.embed = embed


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_newer_checkpoint_wins_except_past_half_way(tmp_path, num_ranks):
    for name, after, wanted in (("early", 1, [None, 20]), ("late", {1: 4, 2: 3}[num_ranks], [None, 10])):
        job = make_job(tmp_path, run=name)
        publish_checkpoint(job, 10)
        run = start_service(job, num_ranks, before=partial(newer_while_encoding, job, after))
        assert run.wait() == 0, run.said
        assert steps(job) == wanted, run.said
        assert ("gives way to a newer one" in run.said) == (name == "early")


def test_a_named_checkpoint_is_mined_again_and_no_other(tmp_path):
    job = make_job(tmp_path, num_queries=60, mine={"bm25_top_k": 20, "keep_versions": 9})
    for step in (10, 20):
        publish_checkpoint(job, step)
    mine(job)
    mine(job, checkpoint="step-00000010")
    mine(job, checkpoint="step-00000010")
    assert steps(job) == [None, 20, 10, 10]
    with pytest.raises(
        InputError, match=r"--checkpoint step-00000030 cannot be mined: .*there are step-00000010, step-00000020 in"
    ):
        mine(job, checkpoint="step-00000030")


def test_data_that_changed_are_named(tmp_path, monkeypatch, caplog):
    job = make_job(tmp_path, num_queries=60)
    publish_checkpoint(job, 10)
    corpus, plain = tmp_path / "data" / "corpus.jsonl", TokenCache.open

    def read_as_somebody_edits(self, checkpoint):
        corpus.write_text(corpus.read_text().replace("socket", "pocket"))
        return plain(self, checkpoint)

    monkeypatch.setattr(TokenCache, "open", read_as_somebody_edits)
    mine(job)
    assert steps(job) == [None, 10], "what was opened stays what it was"
    with pytest.raises(InputError, match=rf"{corpus} changed since negatives v000001 of .* were mined .* set run\.folder"):
        mine(job)
    assert steps(job) == [None, 10]


def test_a_service_at_work_tells_that_its_data_changed(tmp_path, monkeypatch, caplog):
    job = make_job(tmp_path, num_queries=60)
    queries, plain = tmp_path / "data" / "queries.jsonl", service.mine_bm25

    def mine_as_somebody_edits(work, task):
        plain(work, task)
        queries.write_text(queries.read_text().replace("socket", "pocket"))

    publish_checkpoint(job, 10)
    monkeypatch.setattr(service, "mine_bm25", mine_as_somebody_edits)
    mine(job)
    assert f"{queries} changed since this service opened the data; it goes on with the texts as they were" in caplog.text
    assert steps(job) == [None, 10]


def be_impatient(rank):
    retry.DELAYS_S = (0.01, 0.01)


def wait_until(run, is_so):
    deadline = time.monotonic() + 120
    while not is_so():
        assert run.is_alive() and time.monotonic() < deadline, run.said
        time.sleep(0.02)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_full_or_read_only_disk_is_one_sentence_and_the_next_service_goes_on(tmp_path, num_ranks):
    undisturbed, disk = make_job(tmp_path), tmp_path / "disk"
    publish_checkpoint(undisturbed, 10)
    mine(undisturbed)
    with small_disk(disk, "1m"):
        job = make_job(tmp_path, run="disk/run")
        publish_checkpoint(job, 10)
        full, small = (1, "negpool: no room left on the disk for"), (2, "negpool: disk of the run: 0.23 MiB are needed")
        for free_kib, (code, sentence) in {0: full, 12: full, 60: small}.items():
            ballast = fill(disk, free_kib)
            run = start_service(job, num_ranks, before=be_impatient)
            assert run.wait() == code, run.said
            assert run.said.count(sentence) == 1 and "Traceback" not in run.said, run.said
            for version in versions(negatives_folder(folder(job))):
                open_version(version)
            ballast.unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        run = start_service(job, num_ranks)
        assert run.wait() == 2, run.said
        assert "negpool: cannot write" in run.said and "Traceback" not in run.said, run.said
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        run = start_service(job, num_ranks)
        assert run.wait() == 0, run.said
        assert published(job) == published(undisturbed)
        assert json.loads(lines(folder(job) / "logs" / "miner.jsonl")[-1])["phase"] == "publishing"


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_full_disk_costs_a_service_versions_and_not_its_life(tmp_path, num_ranks):
    undisturbed, disk = make_job(tmp_path), tmp_path / "disk"
    publish_checkpoint(undisturbed, 10)
    mine(undisturbed)
    with small_disk(disk, "1m"):
        job = make_job(tmp_path, run="disk/run")
        publish_checkpoint(job, 10)
        ballast = fill(disk, 12)
        run = start_service(job, num_ranks, words=(), before=be_impatient)
        try:
            wait_until(run, lambda: run.said.count("the service tries again") + run.said.count("the service asks again") > 1)
            assert "no room left on the disk for" in run.said
            ballast.unlink()
            wait_until(run, lambda: "negatives v1 published" in run.said)
            assert published(job) == published(undisturbed) and "Traceback" not in run.said
        finally:
            run.end()
            run.wait()


def test_torn_embeddings_are_encoded_again(tmp_path):
    job = make_job(tmp_path)
    publish_checkpoint(job, 10)
    mine(job)
    expected = published(job)
    shutil.rmtree(negatives_folder(folder(job)))
    torn = list(folder(job).glob("shards/[0-9a-f]*/shard-000000/embeddings.npy"))
    assert len(torn) == 2, "of the queries and of the passages"
    for file in torn:
        flip(file)
        with pytest.raises(TornVersion):
            open_version(file.parent)
    mine(job)
    assert published(job) == expected
    for file in torn:
        open_version(file.parent)


def test_who_is_asked_to_stop_does_not_wait_for_a_dead_rank_for_ever(monkeypatch):
    monkeypatch.setattr(ranks, "STOP_PATIENCE_S", 0.2)
    nobody_comes = SimpleNamespace(Test=lambda: False)
    comm = SimpleNamespace(rank=0, size=2, Ibarrier=lambda: nobody_comes, isend=lambda *_, **__: None, iprobe=lambda **_: False)
    child = os.fork()
    if child == 0:
        ranks.Ranks(comm, lambda: True).meet()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75


def hangs_in_the_end(rank: int) -> None:
    from mpi4py import MPI

    ranks.FAREWELL_S = 1.0
    MPI.Finalize = partial(time.sleep, 600)


def still_writes(rank: int) -> None:
    from mpi4py import MPI

    leave_mpi, finalize = ranks.leave_mpi, MPI.Finalize
    if rank == 0:
        ranks.leave_mpi = lambda code: (time.sleep(2), print("written", flush=True), leave_mpi(code))
    MPI.Finalize = lambda: (print("ended", flush=True), finalize())


def test_an_mpi_that_hangs_in_its_end_holds_nobody_and_who_still_writes_is_waited_for(tmp_path):
    job = make_job(tmp_path / "run")
    run = start_service(job, before=hangs_in_the_end)
    assert run.wait() == 0 and published(job), run.said
    run = start_service(job, 2, before=still_writes)
    assert run.wait() == 0 and re.findall("written|ended", run.said) == ["written", "ended", "ended"], run.said
