"""Shards are encoded once, whoever encodes at the same time, and kept apart by all that changes them; what is used stays."""

import os
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.encoder import missing
from trainer.encoder.missing import Texts, encode_missing
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.shards import Shards, open_shards, prune_shards, rows_of_shard
from trainer.encoder.tokens import tokenize
from trainer.errors import NotFiniteEmbedding
from trainer.handoff import lease
from trainer.handoff.manifest import PINS, TornVersion
from trainer.handoff.pins import Pins


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_tiny_encoder(folder / "encoder")
    write_tiny_dataset(folder / "data", num_queries=600)
    return folder


def texts_in(root: Path, place: Path, settings: ModelSettings | None = None) -> Texts:
    encoder, tokenizer, _ = load_encoder(settings or ModelSettings(name=str(root / "encoder")))
    tokens = tokenize(
        open_dataset(root / "data", root / "cache").corpus, tokenizer, prefix="", max_tokens=32, cache=root / "cache"
    )
    return Texts(open_shards(place, "weights", "mean", tokens, encoder, "passage"), encoder, tokens)


def embedded(texts: Texts, shard: int) -> np.ndarray:
    with ThreadPoolExecutor(1) as reader:
        return texts.shards.embed(shard, texts.shards.batches(shard, texts.encoder, texts.tokens, reader)).numpy()


def counted(log: Path) -> None:
    """Have every shard that this process embeds noted in a file."""
    plain = Shards.embed

    def embed(self, shard, *rest):
        with open(log, "a") as file:
            file.write(f"{shard}\n")
        return plain(self, shard, *rest)

    Shards.embed = embed


def encode_beside_others(rank, root, place, num_ranks):
    counted(place / "log")
    told = []
    num_rows = encode_missing([texts_in(root, place)], lambda *told_now: told.append(told_now), rank, num_ranks)
    return num_rows, told[-1], texts_in(root, place).shards.missing()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_processes_at_once_encode_each_shard_once_and_leave_when_all_are_there(root, tmp_path, num_ranks):
    """num_ranks: as each thinks; 1: they know nothing of each other, as a trainer and a miner."""
    found = run_ranks(encode_beside_others, 3, root, tmp_path, num_ranks)
    shards = texts_in(root, tmp_path).shards
    assert Counter((tmp_path / "log").read_text().split()) == {str(shard): 1 for shard in range(shards.num_shards)}
    assert sum(rows for rows, _, _ in found) == shards.num_rows and all(left == [] for _, _, left in found)
    assert all(done == total for _, (done, total), _ in found if total)
    assert not list(shards.folder.glob(".*"))


def test_the_bytes_do_not_depend_on_who_encodes(root, tmp_path):
    run_ranks(encode_beside_others, 3, root, tmp_path, 1)
    alone = texts_in(root, tmp_path / "alone")
    encode_missing([alone])
    together = texts_in(root, tmp_path).shards
    for shard in range(together.num_shards):
        assert np.array_equal(together.read(shard), alone.shards.read(shard))


def test_a_shard_that_another_holds_is_waited_for(root, tmp_path):
    texts = texts_in(root, tmp_path)
    held, naps = texts.shards.lease(1), []

    def on_progress(done, total):
        if done == total and not texts.shards.is_there(1):  # all the rest is done: the other one ends now
            naps.append(1)
            texts.shards.publish(1, embedded(texts, 1))
            held.release()

    num_rows = encode_missing([texts], on_progress)
    assert naps and texts.shards.missing() == []
    assert num_rows == texts.shards.num_rows - len(texts.shards.rows(1))


@pytest.mark.parametrize(
    "why", ["its process is dead", "nobody asked for its process's end", "it was not renewed", "it was killed before it wrote"]
)
def test_a_shard_whose_holder_is_gone_is_encoded_by_another(root, tmp_path, why, monkeypatch):
    texts = texts_in(root, tmp_path)
    if "process" in why:
        if (child := os.fork()) == 0:
            texts.shards.lease(1)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it is a zombie now
        if why == "its process is dead":
            os.waitpid(child, 0)
    else:
        texts.shards.lease(1)
        (left,) = texts.shards.folder.glob(".lease-*")
        seconds = lease.LEASE_S
        if why == "it was killed before it wrote":
            left.write_text("")
            seconds = lease.NAMED_S
        os.utime(left, (0, time.time() - seconds - 1))

    def wait(seconds):
        raise AssertionError("the holder that is gone is waited for")

    monkeypatch.setattr(missing, "time", SimpleNamespace(monotonic=time.monotonic, sleep=wait))
    try:
        assert encode_missing([texts]) == texts.shards.num_rows
    finally:
        if why == "nobody asked for its process's end":
            os.waitpid(child, 0)
    assert texts.shards.missing() == [] and not list(texts.shards.folder.glob(".lease-*"))


def test_who_is_stopped_leaves_what_it_began_to_others(root, tmp_path):
    class Enough(Exception):
        pass

    def stop(done, total):
        if done > total / 2:
            raise Enough

    texts = texts_in(root, tmp_path)
    with pytest.raises(Enough):
        encode_missing([texts], stop)
    left = texts.shards.missing()
    assert 0 < len(left) < texts.shards.num_shards and not list(texts.shards.folder.glob(".lease-*"))
    encode_missing([texts])
    assert texts.shards.missing() == []


def test_one_finds_that_weights_have_diverged_and_the_others_take_its_word(root, tmp_path, monkeypatch):
    texts = texts_in(root, tmp_path)
    encode_missing([texts])
    shutil.rmtree(texts.shards.folder / "shard-000001")
    with torch.no_grad():
        next(texts.encoder.parameters()).fill_(torch.nan)
    for _ in range(2):
        with pytest.raises(NotFiniteEmbedding, match="the weights have diverged"):
            encode_missing([texts])
        monkeypatch.setattr(Shards, "embed", lambda *_: pytest.fail("embedded again"))


def test_torn_shards_are_encoded_again_and_nothing_else(root, tmp_path, monkeypatch):
    texts = texts_in(root, tmp_path)
    encode_missing([texts])
    victim = texts.shards.folder / "shard-000001" / "embeddings.npy"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(TornVersion):
        texts.shards.read(1)
    assert encode_missing([texts]) == len(texts.shards.rows(1))
    assert len(texts.shards.read(1)) == len(texts.shards.rows(1))


def test_a_listing_says_what_is_there_not_a_look_at_every_shard(root, tmp_path, monkeypatch):
    texts, lists = texts_in(root, tmp_path), []
    plain = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: lists.append(folder) or plain(folder))
    encode_missing([texts])
    assert texts.shards.num_shards >= 5 and len(lists) <= 4


def test_shards_are_many_and_small_whoever_encodes():
    for num_rows in (100, 20_000, 300_000, 8_841_823, 100_000_000):
        assert 128 <= rows_of_shard(num_rows) <= 8192
    for num_rows, num_ranks in ((20_000, 32), (300_000, 32), (8_841_823, 256), (100_000_000, 2048)):
        assert num_rows / rows_of_shard(num_rows) >= 4 * num_ranks
    assert 100_000_000 / rows_of_shard(100_000_000) < 25_000


def test_what_changes_an_embedding_keeps_shards_apart(root, tmp_path):
    name = str(root / "encoder")
    plain, compiled = (texts_in(root, tmp_path, ModelSettings(name=name, compile=compiles)) for compiles in (False, True))
    assert compiled.shards.folder == plain.shards.folder, "layers that training compiles are plain here"
    again = open_shards(tmp_path, "weights", "mean", plain.tokens, plain.encoder, "passage")
    elsewhere = open_shards(tmp_path, "weights", "mean", plain.tokens, plain.encoder.to("meta"), "passage")
    assert again.folder == plain.shards.folder != elsewhere.folder, "and so does another kind of device"


def test_pruning_spares_the_youngest_and_what_is_in_use(tmp_path):
    for age, name in enumerate("abcde"):
        (tmp_path / name / "shard-000000").mkdir(parents=True)
        os.utime(tmp_path / name, (0, time.time() - age))
    with Pins() as pins:
        pins.hold(tmp_path / "d")
        assert [folder.name for folder in prune_shards(tmp_path, keep=2)] == ["c", "e"]
        assert sorted(p.name for p in tmp_path.iterdir()) == [PINS, "a", "b", "d"]
    assert [folder.name for folder in prune_shards(tmp_path, keep=2)] == ["d"] and not list((tmp_path / PINS).iterdir())
    assert prune_shards(tmp_path / "nothing", keep=0) == []


def test_what_a_killed_pruner_left_goes_with_the_next(tmp_path):
    (tmp_path / ".staging-abc-host-1-deleted" / "shard-000000").mkdir(parents=True)
    prune_shards(tmp_path, keep=2)
    assert list(tmp_path.iterdir()) == []


def prune_all_the_time(rank, root, place):
    if rank == 0:
        while not (place / "done").exists():
            prune_shards(place / "shards", keep=0)
        return None
    texts = texts_in(root, place / "elsewhere")
    found = []
    for _ in range(10):
        with Pins() as pins:
            shards = open_shards(place / "shards", "weights", "mean", texts.tokens, texts.encoder, "passage", pins=pins)
            encode_missing([Texts(shards, texts.encoder, texts.tokens)])
            found.append(sum(len(shards.read(shard)) for shard in range(shards.num_shards)))
    (place / "done").touch()
    return found, shards.num_rows


def test_what_is_encoded_and_read_is_there_whoever_prunes(root, tmp_path):
    _, (found, num_rows) = run_ranks(prune_all_the_time, 2, root, tmp_path)
    assert found == [num_rows] * 10
    assert missing.NAP_S < 1


def test_a_folder_that_is_pruned_while_it_is_opened_never_becomes_a_file(root, tmp_path, monkeypatch):
    texts, plain = texts_in(root, tmp_path), Path.mkdir

    def pruned(folder, *args, **options):
        plain(folder, *args, **options)
        shutil.rmtree(folder)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", pruned)
        shards = open_shards(tmp_path / "pruned", "weights", "mean", texts.tokens, texts.encoder, "passage")
    assert not shards.folder.exists()
    assert encode_missing([Texts(shards, texts.encoder, texts.tokens)]) == shards.num_rows
