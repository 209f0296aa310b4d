"""An index from the stream to the audit on one, two and three ranks: trained, taken over, raised, given up."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mining.find import indexed
from mining.find.embeddings import Embeddings
from mining.find.indexed import open_index
from mining.find.search import best_of_ranks
from mining.find.trained import FILE
from mining.job import MineJob
from mining.settings import AuditSettings, IndexSettings, SampleSettings, SearchSettings
from mining.table.filters import Keys
from tests.mining.find.world import NUM_PASSAGES, NUM_QUERIES, SHARD_ROWS, World, judgements
from tests.mining.threads import on_threads
from trainer.errors import InputError
from trainer.handoff.settings import RunSettings

FACTORY, K = "IVF8,SQ8", 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"), "float16")


def make_job(tmp_path, factory=FACTORY, nprobe=1, min_recall=0.9):
    return MineJob(
        run=RunSettings(folder=tmp_path, seed=5),
        index=IndexSettings(factory=factory, nprobe=nprobe),
        search=SearchSettings(top_k=K),
        sample=SampleSettings(num_negatives=4),
        audit=AuditSettings(num_queries=64, min_recall=min_recall),
    )


def keys_of(world):
    """Passages with one vector have one text."""
    _, key_N = np.unique(world.passages.read(np.arange(NUM_PASSAGES)), axis=0, return_inverse=True)
    return Keys(np.arange(NUM_QUERIES), key_N.ravel())


def index_on(world, job, version=1, num_ranks=1, seed=0, factory=None, see=lambda: None):
    """Return what each rank has: the index, or None, and the best of all queries' share as (scores, ids)."""
    owners = world.owners(num_ranks, seed)
    keys, known = keys_of(world), judgements()

    def work(ranks):
        passages, queries = Embeddings(world.passages.shards), Embeddings(world.queries.shards)
        settings = replace(job.index, factory=factory or job.index.factory)
        source = SimpleNamespace(index=settings, width=world.passages.width, keys=(keys,), texts={}, passages=passages.shards)

        def replay(looks):
            see()
            world.stream(ranks, owners, *(SimpleNamespace(see=look) for look in looks))

        search = SimpleNamespace(source=source, queries=queries, passages=passages, owner_of_shard=owners, replay=replay)
        service = SimpleNamespace(
            ranks=ranks, job=job, judgements=known, device=torch.device("cpu"), data=SimpleNamespace(digest="d" * 16)
        )
        index = open_index(service, SimpleNamespace(version=version), search)
        if index is None:
            return None, None
        world.stream(ranks, owners, *(SimpleNamespace(see=look) for look in index.looks()))
        index.build()
        index.audit()
        found = None if index.finder is None else best_of_ranks(ranks, index.finder, slice(0, NUM_QUERIES))
        return index, found

    return on_threads(num_ranks, work)


def joined(results):
    return [np.concatenate([found[part] for _, found in results]).tobytes() for part in (0, 1)]


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,SQ8", "IVF8,PQ4x4", "IVF8,PQ4x4,RFlat"])
def test_ranks_change_no_byte_from_the_sample_to_the_answer(world, tmp_path, factory):
    runs = [index_on(world, make_job(tmp_path / str(n), factory, min_recall=0.6), num_ranks=n, seed=n) for n in (1, 2, 3)]
    states = {(tmp_path / str(n) / "index" / "v000001" / FILE).read_bytes() for n in (1, 2, 3)}
    assert len(states) == 1 and joined(runs[0]) == joined(runs[1]) == joined(runs[2])
    for results in runs:
        (about,) = {str(index.about()) for index, _ in results}
        assert about == str(runs[0][0][0].about()) and all(index.recall == runs[0][0][0].recall for index, _ in results)


def test_nprobe_is_raised_until_enough_is_found_and_each_try_is_told(world, tmp_path, caplog):
    caplog.set_level("INFO")
    ((index, _),) = index_on(world, make_job(tmp_path, min_recall=0.95))
    tried = [record.args[1:] for record in caplog.records if "finds %.3f of the exact" in record.msg]
    assert [nprobe for nprobe, _ in tried] == [1, 2, 4, 8][: len(tried)] and len(tried) > 1
    assert tried[-1] == (index.about()["nprobe"], index.recall) and index.recall >= 0.95 > tried[-2][1]
    assert index.about()["trained"]["version"] == 1 and index.about()["factory"] == FACTORY and index.unevenness > 1


def test_the_next_version_sees_the_stream_in_the_state_of_the_last_one(world, tmp_path):
    replays = []
    job = make_job(tmp_path)
    ((first, found),) = index_on(world, job, see=lambda: replays.append(1))
    ((again, found_again),) = index_on(world, job, version=2, see=lambda: replays.append(2))
    assert replays == [1] and again.trained == first.trained and again.trained.version == 1
    assert [part.tobytes() for part in found_again] == [part.tobytes() for part in found]
    file = tmp_path / "index" / "v000001" / FILE
    file.write_bytes(b"x" + file.read_bytes()[1:])
    ((third, _),) = index_on(world, job, version=3, see=lambda: replays.append(3))
    assert replays == [1, 3] and third.trained.version == 3
    assert [path.name for path in (tmp_path / "index").glob("v*")] == ["v000003"]


def test_a_state_that_finds_too_little_is_trained_anew_and_a_restart_takes_the_new_one(world, tmp_path, monkeypatch, caplog):
    job, recalls = make_job(tmp_path), iter([0.95, *[0.5] * 4, 0.92, 0.93])
    index_on(world, job)
    monkeypatch.setattr(indexed, "audit_recall", lambda *_: next(recalls))
    assert index_on(world, job, version=2)[0][0].recall == 0.95
    ((index, _),) = index_on(world, job, version=3)
    assert index.trained.version == 3 and index.recall == 0.92
    assert "IVF8,SQ8 as trained for version 1 finds 0.500 of the exact neighbours: it is trained anew" in caplog.text
    ((again, _),) = index_on(world, job, version=3)
    assert again.trained == index.trained


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_index_that_was_chosen_gives_way_to_exact_search_and_one_that_was_asked_for_does_not(
    world, tmp_path, num_ranks, caplog
):
    for name, is_kept in (("auto", False), ("IVF4,PQ2x4", True)):
        job = make_job(tmp_path / name, name, min_recall=0.99)
        for index, _ in index_on(world, job, num_ranks=num_ranks, factory="IVF4,PQ2x4"):
            assert (index.finder is not None) == is_kept and (index.recall == 1) != is_kept
            assert index.about()["factory"] == ("IVF4,PQ2x4" if is_kept else "exact")
    assert "IVF4,PQ2x4 finds 0." in caplog.text and "the search is exact" in caplog.text


@pytest.mark.parametrize("factory", ["IVF256,Flat", "IVF4,PQ4"])
def test_too_few_passages_are_searched_exactly_and_that_is_said(world, tmp_path, factory, caplog):
    assert index_on(world, make_job(tmp_path, factory)) == [(None, None)]
    assert f"{factory} needs 256 passages at least, and there are 198 different ones: the search is exact" in caplog.text


def test_exact_search_has_no_index_and_a_graph_is_said_to_depend_on_the_ranks(world, tmp_path, caplog):
    for factory in ("exact", "Flat"):
        assert index_on(world, make_job(tmp_path, factory)) == [(None, None)]
    ((index, _),) = index_on(world, make_job(tmp_path, "HNSW8"))
    assert index.recall > 0.9 and caplog.text.count("what it finds depends on the number of ranks") == 1
    with pytest.raises(InputError, match="is not a FAISS index"):
        index_on(world, make_job(tmp_path, "IVF8,Nothing"))


def test_a_rank_without_shards_takes_part(world, tmp_path):
    world_of_one = World(world.folder, world.stored)
    world_of_one.owners = lambda num_ranks, seed: np.zeros(-(-NUM_PASSAGES // SHARD_ROWS), np.int32)
    alone, crowd = (index_on(world_of_one, make_job(tmp_path / str(n)), num_ranks=n) for n in (1, 3))
    assert joined(alone) == joined(crowd)
