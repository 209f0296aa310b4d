"""A version from the parts of several ranks: the bytes of one process, whole or absent whoever dies, and no negative in a
message."""

import os
import pickle
import signal
import threading
from collections import deque

import numpy as np
import pytest

from mining import assembly
from mining.alone import Alone
from mining.assembly import assemble
from mining.publish import claim_negatives
from mining.ranks import GivenUp, Ranks
from mining.table.audit import audit_scores, jaccard_of_each, overlap_with, row_ends, score_quantiles
from mining.table.judgements import Judgements
from mining.table.kept import KeptTiles, Part
from tests.mining.threads import World, on_threads
from trainer.errors import MachineFailed
from trainer.handoff import digests, retry
from trainer.handoff.manifest import open_version, read_latest
from trainer.handoff.negatives import Negatives, negatives_folder, publish_negatives

NUM_QUERIES, NUM_PASSAGES, TILE = 1000, 400, 96
RANDOM = np.random.default_rng(0)
LENGTHS = RANDOM.integers(0, 9, NUM_QUERIES) * (RANDOM.random(NUM_QUERIES) < 0.9)
INDPTR = row_ends(LENGTHS)
IDS = np.concatenate([np.sort(RANDOM.choice(NUM_PASSAGES, n, replace=False)) for n in LENGTHS])
NUM_POSITIVES = RANDOM.integers(1, 4, NUM_QUERIES)
POSITIVE_INDPTR = row_ends(NUM_POSITIVES)
COLUMNS = {
    "ids": IDS,
    "scores": RANDOM.random(len(IDS), np.float32),
    "positive_scores": RANDOM.random(POSITIVE_INDPTR[-1], np.float32),
}
CLUSTERS = RANDOM.integers(0, 5, NUM_QUERIES)
JUDGEMENTS = Judgements(
    np.arange(NUM_QUERIES) * 3 + 1, POSITIVE_INDPTR, np.zeros(POSITIVE_INDPTR[-1], np.int64), *[np.zeros(0)] * 4,
    np.ones(NUM_PASSAGES, bool),
)  # fmt: skip


def part(start, stop):
    of_queries = {"positive_scores": POSITIVE_INDPTR}
    columns = {n: c[slice(*of_queries.get(n, INDPTR)[[start, stop]])] for n, c in COLUMNS.items()}
    return Part(start, LENGTHS[start:stop], columns, {"candidates": 9 * (stop - start)}, {"judged": stop - start})


def draw(ranks, run, tile=TILE):
    """Keep all parts of what is missing, as `draw_negatives` does, and return what is drawn."""
    kept = KeptTiles(run, {})

    def missing():
        kept.open()
        return kept.missing(NUM_QUERIES)

    for gap in ranks.decide(missing):
        for start in range(gap.start, gap.stop, tile):
            edges = np.linspace(start, min(start + tile, gap.stop), ranks.num_ranks + 1).astype(int).tolist()
            kept.keep(part(*edges[ranks.rank : ranks.rank + 2]))
    return kept.gather(ranks, NUM_QUERIES)


def publish(ranks, run, tile=TILE):
    clusters = CLUSTERS if ranks.speaks else None
    return assemble(ranks, run, 1, draw(ranks, run, tile), {"source": "model"}, lambda: None, clusters)


def files(run):
    folder = negatives_folder(run) / "v000001"
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """What one process publishes of the whole table."""
    for module in (digests, assembly):
        monkeypatch.setattr(module, "BLOCK_BYTES", 3000)
    more = {"positive_scores": COLUMNS["positive_scores"], "clusters": CLUSTERS}
    publish_negatives(tmp_path / "plain", 1, INDPTR, IDS, COLUMNS["scores"], {"source": "model"}, **more)
    return files(tmp_path / "plain")


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_all_ranks_publish_the_bytes_of_one_process(tmp_path, plain, num_ranks):
    manifests = on_threads(num_ranks, lambda ranks: publish(ranks, tmp_path))
    assert files(tmp_path) == plain
    assert all(manifest == open_version(negatives_folder(tmp_path) / "v000001") for manifest in manifests)
    entries = manifests[0]["files"]
    assert entries == open_version(negatives_folder(tmp_path / "plain") / "v000001")["files"]
    assert len(entries["ids.npy"]["xxh3_128"]) > 3, "blocks enough for all ranks"
    assert sorted(path.name for path in negatives_folder(tmp_path).iterdir()) == ["LATEST", "v000001"]
    np.testing.assert_array_equal(np.load(negatives_folder(tmp_path) / "v000001" / "ids.npy"), IDS)


def test_no_negative_is_in_a_message_and_each_block_is_hashed_once(tmp_path, plain, monkeypatch):
    hashed, said, hash_block, swap = [], [], digests._hash_block, World.swap
    monkeypatch.setattr(World, "swap", lambda self, rank, told: said.append(len(pickle.dumps(told))) or swap(self, rank, told))
    monkeypatch.setattr(digests, "_hash_block", lambda *which: hashed.append(which[:2]) or hash_block(*which))
    on_threads(3, lambda ranks: publish(ranks, tmp_path, NUM_QUERIES))
    assert 0 < max(said) < IDS.nbytes / 4, "most of it digests: blocks of 3,000 bytes are small"
    assert len(hashed) == len(set(hashed)) == sum(-(-len(data) // 3000) for data in plain.values())


def test_another_service_with_other_ranks_and_tiles_goes_on_with_what_is_there(tmp_path, plain):
    def half(ranks):
        kept = KeptTiles(tmp_path, {})
        if ranks.speaks:
            kept.open()
        ranks.meet()
        for start in (32, 640):
            kept.keep(part(start + 40 * ranks.rank, start + 40 * ranks.rank + 40))

    on_threads(3, half)
    old = list(tmp_path.glob("status/miner.tiles/*/*.part"))
    old[0].write_bytes(old[0].read_bytes()[:-3])
    times = {path: path.stat().st_mtime_ns for path in old[1:]}
    on_threads(2, lambda ranks: publish(ranks, tmp_path, tile=70))
    assert files(tmp_path) == plain
    assert len(times) == 5 and {path: path.stat().st_mtime_ns for path in times} == times, "they were not written again"


def publish_until_killed(run, at):
    """Publish, and die at the n-th write at a place."""
    plain_write, calls = os.pwrite, deque(maxlen=at + 1)

    def pwrite(*args):
        calls.append(args)
        if len(calls) > at:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain_write(*args)

    os.pwrite = pwrite
    publish(Ranks(Alone(), lambda: False), run)


@pytest.mark.parametrize("at", [0, 7, 45])
def test_a_kill_between_two_writes_leaves_no_version_and_the_next_service_makes_it(tmp_path, plain, at):
    child = os.fork()
    if child == 0:
        publish_until_killed(tmp_path, at)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (staging,) = negatives_folder(tmp_path).iterdir()
    assert staging.name.startswith(".staging-v000001") and read_latest(staging.parent) is None
    assert {path.name for path in staging.iterdir()} == set(plain)
    claim_negatives(tmp_path, NUM_QUERIES, NUM_PASSAGES)
    assert list(staging.parent.iterdir()) == []
    on_threads(2, lambda ranks: publish(ranks, tmp_path))
    assert files(tmp_path) == plain


def test_a_disk_that_one_rank_finds_full_stops_all_and_leaves_nothing(tmp_path, plain, monkeypatch):
    plain_write = os.pwrite

    def pwrite(handle, data, at):
        if at > 5000 and threading.current_thread() is refused:
            raise OSError(28, "No space left on device")
        return plain_write(handle, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(retry, "DELAYS_S", (0.0, 0.0))
    told = []

    def work(ranks):
        nonlocal refused
        if ranks.rank == 1:
            refused = threading.current_thread()
        try:
            publish(ranks, tmp_path)
        except (GivenUp, MachineFailed, SystemExit) as error:
            told.append(error)

    refused = None
    on_threads(3, work)
    assert len(told) == 3 and "no room left on the disk for negatives v1" in "".join(map(str, told))
    assert list(negatives_folder(tmp_path).iterdir()) == []


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_audit_finds_what_one_process_finds_of_the_whole_table(tmp_path, monkeypatch, num_ranks):
    other = row_ends(np.full(NUM_QUERIES, 4))
    last_ids = np.concatenate([RANDOM.choice(NUM_PASSAGES, 4, replace=False) for _ in range(NUM_QUERIES)])
    last = Negatives(other, last_ids, np.zeros(other[-1]), 0, {})
    mean = jaccard_of_each(INDPTR, IDS, other, last.ids).mean()
    assert mean > 0.001

    def audit(ranks):
        drawn = draw(ranks, tmp_path)
        return drawn, overlap_with(ranks, last, drawn), audit_scores(ranks, JUDGEMENTS, drawn)

    for drawn, overlap, scores in on_threads(num_ranks, audit):
        assert overlap == round(mean, 4)
        assert scores == {name: score_quantiles(COLUMNS[name]) for name in ("scores", "positive_scores")}
        assert drawn.counts == {"candidates": 9 * NUM_QUERIES} and drawn.dropped == {"judged": NUM_QUERIES}
        assert drawn.num_empty == (LENGTHS == 0).sum()
    monkeypatch.setattr("mining.table.audit.MAX_SCORED", NUM_QUERIES // 2)
    some = [scores for _, _, scores in on_threads(num_ranks, audit)]
    assert some[0] != scores and some[0]["scores"]["q50"] == pytest.approx(scores["scores"]["q50"], abs=0.05)
    SOME.append(some[0])
    assert all(each == SOME[0] for each in (*some, *SOME)), "the same queries, whoever drew them"


SOME: list = []
