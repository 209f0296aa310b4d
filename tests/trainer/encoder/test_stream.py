"""Every shard is seen once, by one rank, as it stands on disk, whoever encodes, stops or dies meanwhile."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.encoder.test_shards import texts_in
from trainer.encoder.encode import encode_rows
from trainer.encoder.missing import _Encoding, encode_missing
from trainer.encoder.settings import EncodeSettings
from trainer.encoder.shards import Shards
from trainer.encoder.stream import pass_by, stream_shards
from trainer.errors import MachineFailed
from trainer.handoff.lease import LEASE_S, Lease
from trainer.handoff.manifest import TornVersion

WAIT_S = 20.0  # for what happens at once


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return texts of seven shards, and the embeddings of each in float32."""
    folder = tmp_path_factory.mktemp("stream")
    write_tiny_encoder(folder / "encoder")
    write_tiny_dataset(folder / "data", num_queries=600)
    texts = texts_in(folder, folder / "shards")
    texts.encoder.eval()  # ranks that are threads share it
    num_shards = texts.shards.num_shards
    return texts, [encode_rows(texts.encoder, texts.tokens, texts.shards.rows(shard)) for shard in range(num_shards)]


@pytest.fixture
def texts(made, tmp_path):
    return replace(made[0], shards=replace(made[0].shards, folder=tmp_path / "shards"))


class Others:
    """The exchange between ranks that are threads of this process."""

    def __init__(self, num_ranks: int):
        self._parts: list = [None] * num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=60)

    def together(self, rank: int):
        def call(work):
            try:
                self._parts[rank] = work()
            except BaseException:
                self._barrier.abort()
                raise
            self._barrier.wait()
            found = list(self._parts)
            self._barrier.wait()
            return found

        return call


@dataclass
class Seen:
    """What the ranks of one stream have seen."""

    rank_of_shard: dict[int, int] = field(default_factory=dict)
    values: dict[int, np.ndarray] = field(default_factory=dict)
    on_device: set[int] = field(default_factory=set)
    told: list[tuple[int, int]] = field(default_factory=list)  # of rank 0

    def stream(self, source, num_ranks=1, before=lambda shard: None):
        """Return what `stream_shards` returns on each rank."""
        others = Others(num_ranks)
        shards = source if isinstance(source, Shards) else source.shards

        def of_rank(rank):
            def see(shard, embedding_nD):
                before(shard)
                assert shards.is_there(shard), "a kill from here on loses no shard"
                assert shard not in self.rank_of_shard, "seen twice"
                self.rank_of_shard[shard] = rank
                self.values[shard] = np.asarray(embedding_nD).copy()
                if isinstance(embedding_nD, torch.Tensor):
                    self.on_device.add(shard)

            def tell(done, total):
                self.told += [(done, total)] if rank == 0 else []

            return stream_shards(source, see, tell, rank, num_ranks, others.together(rank))

        with ThreadPoolExecutor(num_ranks) as pool:
            running = [pool.submit(of_rank, rank) for rank in range(num_ranks)]
        errors = [error for each in running if (error := each.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [each.result() for each in running]

    def check(self, owners, shards, made):
        """Hold what was seen against the embeddings, and owners against who saw them."""
        for shard, wanted_nD in enumerate(made[1]):
            on_disk = shards.read(shard)
            np.testing.assert_array_equal(on_disk, wanted_nD.astype(shards.settings.stored_type))
            np.testing.assert_array_equal(self.values[shard], on_disk)
            assert self.values[shard].dtype == on_disk.dtype
        for owner_of_shard in owners:
            assert owner_of_shard.tolist() == [self.rank_of_shard[shard] for shard in range(len(made[1]))]
        assert not list(shards.folder.glob(".*"))
        done, total = zip(*self.told, strict=True)
        assert set(total) == {shards.num_rows} and done[-1] == shards.num_rows


def publish(shards: Shards, shard: int, made) -> None:
    shards.publish(shard, made[1][shard].astype(shards.settings.stored_type))


def tear(shards: Shards, shard: int) -> None:
    victim = shards.folder / f"shard-{shard:06d}" / "embeddings.npy"
    victim.write_bytes(victim.read_bytes()[:-1])


@pytest.mark.parametrize(("num_ranks", "stored"), [(1, "fp32"), (2, "fp16"), (3, "fp32")])
def test_every_shard_is_seen_once_wherever_it_comes_from(texts, made, num_ranks, stored):
    texts = replace(texts, shards=replace(texts.shards, settings=EncodeSettings(dtype="fp32", stored=stored)))
    shards, seen = texts.shards, Seen()
    for shard in (0, 2, 3):
        publish(shards, shard, made)
    tear(shards, 2)
    shards.lease(5)  # by a process that died on another machine
    (left,) = shards.folder.glob(".lease-*")
    os.utime(left, (0, time.time() - LEASE_S - 1))
    others = shards.lease(6)  # of an evaluation, which encodes at the same time

    def before(shard):
        if shard == 5:
            publish(shards, 6, made)
            others.release()

    owners = seen.stream(texts, num_ranks, before)
    seen.check(owners, shards, made)
    assert seen.on_device == {1, 2, 4, 5}
    assert [rank < num_ranks for rank in seen.rank_of_shard.values()] == [True] * 7


def test_a_shard_that_another_process_publishes_first_is_seen_from_disk(texts, made, monkeypatch):
    plain, seen = Shards.publish, Seen()

    def overtaken(self, shard, *rest):  # its lease was lost
        if shard == 4:
            plain(self, shard, made[1][shard], "of another")
        return plain(self, shard, *rest)

    monkeypatch.setattr(Shards, "publish", overtaken)
    seen.check(seen.stream(texts), texts.shards, made)
    assert seen.on_device == {0, 1, 2, 3, 5, 6}


def test_a_stream_that_is_stopped_goes_on_from_disk_with_other_ranks(texts, made):
    class Enough(Exception):
        pass

    def stop(shard):
        if len(first.values) == 2:
            raise Enough

    first, second = Seen(), Seen()
    with pytest.raises(Enough):
        first.stream(texts, 2, stop)
    there = set(range(7)) - set(texts.shards.missing())
    assert set(first.values) <= there != set(range(7)) and not list(texts.shards.folder.glob(".lease-*"))
    seen = second.stream(texts, 3)
    second.check(seen, texts.shards, made)
    assert second.on_device == set(range(7)) - there


def test_what_could_not_be_written_is_not_seen_and_is_encoded_again(texts, made, monkeypatch):
    plain, first, second = Shards.publish, Seen(), Seen()

    def refused(self, shard, *rest):
        if shard == 3:
            raise ValueError("the writer was killed")
        return plain(self, shard, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Shards, "publish", refused)
        with pytest.raises(ValueError, match="was killed"):
            first.stream(texts)
    assert sorted(first.values) == [0, 1, 2] and 3 in texts.shards.missing()
    second.check(second.stream(texts), texts.shards, made)
    assert {3, 4, 5, 6} >= second.on_device >= {3, 5, 6}


def test_shards_alone_are_read_and_never_encoded(texts, made, monkeypatch):
    for shard in range(7):
        publish(texts.shards, shard, made)
    monkeypatch.setattr(Shards, "embed", lambda *_: pytest.fail("a shard was encoded"))
    seen = Seen()
    seen.check(seen.stream(texts.shards, 3), texts.shards, made)
    assert seen.on_device == set()
    tear(texts.shards, 5)
    with pytest.raises(TornVersion):
        Seen().stream(texts.shards, 3)


def test_a_shard_that_was_lost_and_encoded_again_is_not_taken_twice_in_silence(texts):
    def beside_another(work):
        return [work(), np.array([4])]  # of which rank 1 says that it has seen it

    with pytest.raises(MachineFailed, match="shard 4 was lost on disk after a rank had seen it"):
        stream_shards(texts, lambda shard, _: None, num_ranks=1, together=beside_another)


def test_the_next_shard_is_begun_and_the_last_one_written_while_one_is_encoded(texts, monkeypatch):
    taken, embedding = ([threading.Event() for _ in range(7)] for _ in range(2))
    leases, renewed, order = {}, set(), []
    plain_take, plain_embed, plain_publish = _Encoding._take, Shards.embed, Shards.publish

    def take(self):
        if (found := plain_take(self)) is not None:  # with its first batch
            leases[found.piece.shard] = found.lease
            taken[found.piece.shard].set()
        return found

    def embed(self, shard, batches, on_progress, then):
        def then_and_wait():
            then()
            if shard < 5:
                assert taken[shard + 1].wait(WAIT_S)
            else:
                assert shard == 6 or not taken[6].is_set(), "the last one is for anybody until this process is free"

        assert shard in (0, 6) or leases[shard] in renewed, "also while it waits"
        embedding[shard].set()
        return plain_embed(self, shard, batches, on_progress, then_and_wait)

    def publish(self, shard, *rest):
        assert shard == 6 or embedding[shard + 1].wait(WAIT_S)
        order.append(f"published {shard}")
        return plain_publish(self, shard, *rest)

    monkeypatch.setattr(_Encoding, "_take", take)
    monkeypatch.setattr(Lease, "renew", lambda self: renewed.add(self))
    for name, double in (("embed", embed), ("publish", publish)):
        monkeypatch.setattr(Shards, name, double)
    encode_missing([texts], see=lambda _, shard, __: order.append(f"seen {shard}"))
    assert order == [f"{what} {shard}" for shard in range(7) for what in ("published", "seen")]


def test_shards_pass_by_with_one_read_ahead_and_only_a_reader_verifies(texts, made):
    shards, asked = texts.shards, []
    for shard in range(7):
        publish(shards, shard, made)
    altered = shards.folder / "shard-000003" / "embeddings.npy"
    altered.write_bytes(altered.read_bytes()[:-1] + b"?")

    def read(shard):
        asked.append(shard)
        return shards.map(shard)

    for shard, embedding_nD in pass_by([5, 0, 3], read):
        assert len(asked) >= 1 + [5, 0, 3].index(shard)
        assert np.array_equal(embedding_nD, made[1][shard]) == (shard != 3)
        assert np.array_equal(embedding_nD[:-1], made[1][shard][:-1])
    assert asked == [5, 0, 3]
    tear(shards, 4)
    for shard, read_it in ((3, shards.read), (4, shards.read), (4, shards.map), (99, shards.map)):
        with pytest.raises(TornVersion, match=f"{shard:06d}"):
            read_it(shard)
