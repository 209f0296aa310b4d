"""What a service that was killed while it searched has drawn already is taken over, whoever drew it, and nothing torn is."""

from dataclasses import replace

import numpy as np
import pytest

from mining.ranks import Stopped
from mining.settings import FilterSettings, RerankSettings, SampleSettings
from mining.table.draw import Draw
from mining.table.kept import KeptTiles, Part
from mining.table.tiles import draw_negatives
from tests.mining.table.test_draw import JUDGED, KEYS, RANKS, SCORES, Matrix

DRAW = Draw(FilterSettings(), SampleSettings(num_negatives=4), RerankSettings(), 0, 1, JUDGED, KEYS)


class Counting(Matrix):
    """Counts the tiles it was asked for, and is stopped after some."""

    asked: list[int]
    last = 99

    def find(self, tile):
        self.asked.append(tile.start)
        if len(self.asked) > self.last:
            raise Stopped
        return super().find(tile)


def draw(run, last=99, query_tile=16, about="one"):
    retriever = Counting(SCORES, JUDGED)
    retriever.asked, retriever.last = [], last
    try:
        found = draw_negatives(DRAW, RANKS, retriever, KeptTiles(run, {"about": about}), lambda *_: None, query_tile)
    except Stopped:
        found = None
    return found, retriever.asked


def assert_same(one, other):
    for name in ("indptr", "ids", "scores"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.counts, one.dropped) == (other.counts, other.dropped)
    assert one.more.keys() == other.more.keys() and all((one.more[key] == other.more[key]).all() for key in one.more)


@pytest.fixture
def undisturbed(tmp_path):
    return draw(tmp_path / "undisturbed")[0]


def test_only_tiles_that_are_missing_are_searched_again(tmp_path, undisturbed):
    assert draw(tmp_path, last=2) == (None, [0, 16, 32])
    found, asked = draw(tmp_path)
    assert asked == [32, 48]
    assert_same(found, undisturbed)
    assert draw(tmp_path)[1] == [], "killed before it published: nothing is searched"


def test_parts_of_another_tile_size_are_taken_where_they_fit(tmp_path, undisturbed):
    draw(tmp_path, last=3)
    found, asked = draw(tmp_path, query_tile=32)
    assert asked == [32]
    assert_same(found, undisturbed)


def test_nothing_is_taken_from_another_job_or_version(tmp_path, undisturbed):
    draw(tmp_path, last=2)
    found, asked = draw(tmp_path, about="other")
    assert asked == [0, 16, 32, 48]
    assert_same(found, undisturbed)
    assert len(list((tmp_path / "status" / "miner.tiles").iterdir())) == 1
    KeptTiles(tmp_path, {}).forget()
    assert not (tmp_path / "status" / "miner.tiles").exists()


@pytest.mark.parametrize("harm", ["cut", "flipped", "emptied"])
def test_a_torn_part_is_drawn_anew(tmp_path, undisturbed, harm):
    draw(tmp_path, last=3)
    (first,) = (tmp_path / "status" / "miner.tiles").glob("*/000000000000-*.npz")
    data = bytearray(first.read_bytes())
    if harm == "flipped":
        data[len(data) // 3] ^= 0x10
    first.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "emptied": b""}[harm])
    found, asked = draw(tmp_path)
    assert asked == [0, 48]
    assert_same(found, undisturbed)


def test_the_shares_of_several_ranks_make_a_tile(tmp_path):
    tiles = KeptTiles(tmp_path, {})
    tiles.open()
    part = Part(0, np.array([1, 2]), {"ids": np.arange(3)}, {"candidates": 3}, {"judged": 1})
    for place in (0, 2, 6):
        tiles.keep(replace(part, place=place))
    tiles.keep(replace(part, place=4, lengths=np.zeros(0, int)))  # a rank without a share keeps nothing
    assert [p.place for p in tiles.read(slice(0, 4)) or []] == [0, 2]
    assert tiles.read(slice(0, 8)) is None, "queries 4 and 5 are missing"
    assert tiles.read(slice(0, 3)) is None
