"""What a service that was killed while it searched has drawn already is taken over, whoever drew it, and nothing torn is."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mining.ranks import Stopped
from mining.settings import FilterSettings, RerankSettings, SampleSettings
from mining.table.kept import KeptTiles, Part, Placed, Span, disjoint
from mining.table.share import Draw
from tests.mining.table.test_draw import JUDGED, KEYS, RANKS, SCORES, Matrix
from tests.mining.table.whole import draw_negatives, whole
from trainer.errors import MachineFailed

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
        found = whole(draw_negatives(DRAW, RANKS, retriever, KeptTiles(run, {"about": about}), lambda *_: None, query_tile))
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
    assert asked == [48]
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
    (first,) = (tmp_path / "status" / "miner.tiles").glob("*/000000000000-*.part")
    data = bytearray(first.read_bytes())
    if harm == "flipped":
        data[len(data) // 3] ^= 0x10
    first.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "emptied": b""}[harm])
    found, asked = draw(tmp_path)
    assert asked == [0, 48]
    assert_same(found, undisturbed)


def spans(*names):
    return [Span(int(place), int(stop) - int(place)) for place, stop in (name.split("-") for name in names)]


def test_of_parts_that_overlap_the_first_stays_and_the_longer_of_two_at_one_place():
    assert disjoint(spans("0-4", "0-9", "4-9", "8-12", "9-11", "20-30"), 25) == spans("0-9", "9-11")
    assert disjoint(spans("5-9", "9-9"), 9) == spans("5-9")


PART = Part(0, np.array([1, 0, 2]), {"ids": np.arange(3), "positive_scores": np.zeros(3, np.float32)}, {"c": 3}, {"judged": 1})


def test_what_is_missing_lies_between_the_parts_of_any_tiles(tmp_path):
    tiles = KeptTiles(tmp_path, {})
    tiles.open()
    assert tiles.missing(0) == [] and tiles.missing(3) == [slice(0, 3)]
    for place in (3, 7, 10):
        tiles.keep(replace(PART, place=place))
    tiles.keep(replace(PART, place=12, lengths=np.zeros(0, int)))  # a rank without a share keeps nothing
    folder = next((tmp_path / "status" / "miner.tiles").iterdir())
    (folder / f"{8:012d}-{3}.part").write_bytes((folder / f"{7:012d}-{3}.part").read_bytes())
    (folder / f"{20:012d}-{3}.part").write_bytes(b"torn")
    (folder / "of something else").write_bytes(b"")
    assert tiles.missing(14) == [slice(0, 3), slice(6, 7), slice(13, 14)]
    assert sorted(path.name for path in folder.glob("*.part")) == [f"{place:012d}-3.part" for place in (3, 7, 10)]
    tiles.open()
    assert len(list(folder.iterdir())) == 3


def test_ten_thousand_parts_are_listed_once(tmp_path, monkeypatch):
    tiles, listed = KeptTiles(tmp_path, {}), []
    tiles.open()
    tiles.keep(PART)
    (first,) = (tmp_path / "status" / "miner.tiles").glob("*/*.part")
    for number in range(1, 10_000):
        os.link(first, first.with_name(f"{3 * number:012d}-3.part"))
    plain = os.listdir
    monkeypatch.setattr(os, "listdir", lambda *where: listed.append(where) or plain(*where))
    assert tiles.missing(30_002) == [slice(30_000, 30_002)] and len(listed) == 1
    monkeypatch.setattr(Path, "glob", None)
    drawn = tiles.gather(RANKS, 30_000)
    assert len(listed) == 2 and len(drawn.parts) == 10_000
    assert drawn.parts[-1] == Placed(Span(29_997, 3), {"ids": 29_997, "positive_scores": 29_997})
    assert (drawn.sizes["ids"], drawn.counts, drawn.dropped, drawn.num_empty) == (
        30_000,
        {"c": 30_000},
        {"judged": 10_000},
        10_000,
    )


def test_a_part_that_is_altered_while_the_service_works_is_said_and_drawn_anew(tmp_path, undisturbed):
    retriever, tiles = Matrix(SCORES, JUDGED), KeptTiles(tmp_path, {"about": "one"})
    drawn = draw_negatives(DRAW, RANKS, retriever, tiles, lambda *_: None, 16)
    part = next((tmp_path / "status" / "miner.tiles").glob("*/000000000016-*.part"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(MachineFailed, match=f"has lost or altered {part}; the same command draws it anew"):
        list(drawn.read())
    found, asked = draw(tmp_path)
    assert asked == [16]
    assert_same(found, undisturbed)
