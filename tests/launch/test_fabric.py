"""Fabrics: the file and its refusals, the model by hand, the fit, and the command on real ranks."""

import json
import random

import pytest

from launch.bench.fabric_start import measure_fabric, refuse_crowd
from launch.bench.fabric_times import checked, fit, measure
from launch.fabric import COLLECTIVES, Fabric, Wire, built_in_names, find_fabric, hops, read_fabric, sent_bytes, write_fabric
from launch.fabric_tables import fabric_parts
from launch.tables import as_markdown
from tests.ranks import run_ranks
from tests.trainer.worlds import world_of
from trainer.errors import InputError

NEAR, FAR = Wire(latency_s=1e-6, bytes_per_s=100e9), Wire(latency_s=10e-6, bytes_per_s=5e9)


def fabric_of(**more) -> Fabric:
    about = {"name": "made", "ranks_per_node": 4, "hardware": "none", "date": "2026-01-31", "source": "made up"}
    return Fabric(**about | {"inside": dict.fromkeys(COLLECTIVES, NEAR), "between": dict.fromkeys(COLLECTIVES, FAR)} | more)


def text_of(tmp_path) -> str:
    write_fabric(tmp_path / "made.toml", fabric_of())
    return (tmp_path / "made.toml").read_text()


@pytest.mark.parametrize("more", [{}, {"between": {}}, {"ranks_per_node": 1, "inside": {}}, {"all_reduce": "tree"}])
def test_a_fabric_survives_its_file(tmp_path, more):
    write_fabric(tmp_path / "made.toml", fabric_of(**more))
    assert read_fabric(tmp_path / "made.toml") == find_fabric(str(tmp_path / "made.toml")) == fabric_of(**more)


@pytest.mark.parametrize(
    ("was", "instead", "said"),
    [
        ("latency_s = 1e-06", "latency_s = -1e-06", r"inside.all_gather.latency_s=-1e-06 cannot be used; expected the seconds"),
        ("latency_s = 1e-06", "latency_s = 0.0", r"inside.all_gather.latency_s=0.0 cannot be used; .*a number > 0"),
        ("latency_s = 1e-06", "latency_s = nan", r"inside.all_gather.latency_s=nan cannot be used"),
        ("latency_s = 1e-06", 'latency_s = "fast"', r"inside.all_gather.latency_s='fast' cannot be used"),
        ("latency_s = 1e-06", "", r"inside.all_gather.latency_s is missing; expected the seconds of one hop"),
        ("latency_s = 1e-06", "latency_us = 1.0", r"unknown key inside.all_gather.latency_us; did you mean latency_s\?"),
        ("bytes_per_s = 100000000000.0", "bytes_per_s = inf", r"inside.all_gather.bytes_per_s=inf cannot .*bytes a second"),
        ("[inside.all_gather]", "[inside.gather]", r"unknown collective \[inside.gather\]; did you mean all_gather\?"),
        ("[between.all_to_all]", "[other.all_to_all]", r"unknown key other; known are name"),
        ("ranks_per_node = 4", "ranks_per_node = 0", r"ranks_per_node=0 cannot be used; expected a whole number > 0"),
        ("ranks_per_node = 4", "", r"ranks_per_node is missing; expected a whole number > 0"),
        ('source = "made up"', "", r"source is missing; expected a text that says where"),
        ('all_reduce = "ring"', 'all_reduce = "star"', r"all_reduce='star' cannot be used; .*\"ring\" or \"tree\""),
        ("ranks_per_node = 4", "ranks_per_node = ", r"is not a readable TOML file"),
    ],
)
def test_what_a_file_cannot_say_is_refused_with_file_and_key(tmp_path, was, instead, said):
    text = text_of(tmp_path)
    assert was in text
    (tmp_path / "made.toml").write_text(text.replace(was, instead, 1))
    with pytest.raises(InputError, match=said) as error:
        read_fabric(tmp_path / "made.toml")
    assert str(error.value).startswith(str(tmp_path / "made.toml"))


def test_a_collective_without_constants_is_refused(tmp_path):
    for part in ("inside", "between"):
        text = text_of(tmp_path)
        begin = text.index(f"[{part}.all_reduce]")
        (tmp_path / "made.toml").write_text(text[:begin] + text[text.index("[", begin + 1) :])
        with pytest.raises(InputError, match=rf"\[{part}.all_reduce\] is missing"):
            read_fabric(tmp_path / "made.toml")


def test_a_fabric_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"there is no fabric 'nvlink-ib40'; did you mean nvlink-ib400\?"):
        find_fabric("nvlink-ib40")
    with pytest.raises(InputError, match=r"there is no fabric file .*; negpool bench fabric --out .* measures one"):
        find_fabric(str(tmp_path / "none.toml"))
    with pytest.raises(InputError, match=r"is of one node of 4 ranks, and 5 were asked for; .* --fabric"):
        fabric_of(between={}).seconds("all_gather", 100, 5)


def test_built_in_fabrics_say_where_they_come_from_and_are_faster_inside_a_node():
    assert built_in_names() == ["ethernet-100", "nvlink-ib200", "nvlink-ib400"]
    for name in built_in_names():
        fabric = find_fabric(name)
        assert fabric.name == name and len(fabric.source) > 100
        for collective in COLLECTIVES:
            assert fabric.inside[collective].bytes_per_s > fabric.between[collective].bytes_per_s
            seconds = [fabric.seconds(collective, 64e6, num_ranks) for num_ranks in (1, 2, 8, 16, 64, 4096)]
            assert seconds[0] == 0 and seconds == sorted(seconds)


def test_seconds_are_those_of_a_ring_by_hand():
    fabric = fabric_of()
    # Inside a node of 4: three hops of 1 us, three quarters of the bytes at 100 GB/s.
    assert fabric.seconds("all_gather", 4e9, 4) == pytest.approx(3e-6 + 3e9 / 100e9)
    assert fabric.seconds("reduce_scatter", 4e9, 2) == pytest.approx(1e-6 + 2e9 / 100e9)
    assert fabric.seconds("all_reduce", 4e9, 4) == pytest.approx(6e-6 + 6e9 / 100e9)
    assert fabric.seconds("all_to_all", 4e9, 4) == pytest.approx(3e-6 + 3e9 / 100e9)
    # Three nodes of 4: two hops leave a node, nine do not, and four ranks of a node have 20 GB/s between nodes together.
    assert fabric.seconds("all_gather", 12e9, 12) == pytest.approx(9 * 1e-6 + 2 * 10e-6 + 11e9 / 20e9)
    assert fabric.seconds("all_reduce", 12e9, 12) == pytest.approx(18 * 1e-6 + 4 * 10e-6 + 22e9 / 20e9)
    # Eight of twelve parts of an all-to-all leave a node, by each rank's own 5 GB/s.
    assert fabric.seconds("all_to_all", 12e9, 12) == pytest.approx(3 * 1e-6 + 8 * 10e-6 + 8e9 / 5e9)
    # A network that outruns what is inside a node: the slower of the two bounds the ring.
    fast = fabric_of(between=dict.fromkeys(COLLECTIVES, Wire(latency_s=10e-6, bytes_per_s=90e9)))
    assert fast.seconds("all_gather", 12e9, 12) == pytest.approx(29e-6 + 11e9 / 100e9)
    alone = fabric_of(ranks_per_node=1, inside={})
    assert alone.seconds("all_gather", 4e9, 4) == pytest.approx(30e-6 + 3e9 / 5e9)


def test_a_tree_of_nodes_has_as_many_hops_as_it_is_high():
    assert hops("all_reduce", 4096, 8, "tree") == (2 * 7, 2 * 9) and hops("all_reduce", 4096, 8, "ring") == (2 * 3584, 2 * 511)
    tree, ring = fabric_of(all_reduce="tree"), fabric_of()
    assert tree.seconds("all_reduce", 16e9, 16) == pytest.approx(6e-6 + 4 * 10e-6 + 30e9 / 20e9)
    assert tree.seconds("all_gather", 1e6, 4096) == ring.seconds("all_gather", 1e6, 4096)


@pytest.mark.parametrize("num_ranks", [2, 8])
@pytest.mark.parametrize("is_between", [False, True])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_fit_finds_the_constants_that_times_with_noise_were_made_of(collective, is_between, num_ranks):
    draw, own = random.Random(num_ranks), 1 if is_between else num_ranks
    truth = fabric_of(ranks_per_node=own, inside=dict.fromkeys(COLLECTIVES, Wire(latency_s=2e-4, bytes_per_s=2e9)))
    truth = fabric_of(ranks_per_node=own, inside=truth.inside, between=truth.inside)
    times = {
        size: truth.seconds(collective, size, num_ranks) * draw.uniform(0.95, 1.05) for size in (1024 * 4**k for k in range(9))
    }
    found = fit(collective, times, num_ranks, is_between)
    assert found.latency_s == pytest.approx(2e-4, rel=0.05) and found.bytes_per_s == pytest.approx(2e9, rel=0.05)


def test_times_that_shrink_with_the_message_are_refused():
    with pytest.raises(InputError, match=r"the times of all_gather do not grow with the message .* --rounds or --max-mib"):
        fit("all_gather", {1024: 2.0, 2**20: 1.0}, 2, is_between=False)


def test_the_largest_error_is_that_of_what_was_held_out():
    row = {"part": "inside", "collective": "all_gather", "ranks": 2}
    said = fabric_of().seconds("all_gather", 1000, 2)
    rows = [
        row | {"num_bytes": 1000, "median_s": said * times, "is_held_out": held} for times, held in ((2, False), (1.25, True))
    ]
    assert checked(fabric_of(), rows)["largest_held_out_error"] == pytest.approx(0.2)
    assert rows[0]["error"] == pytest.approx(-0.5) and rows[0]["bytes_per_s"] == pytest.approx(500 / (2 * said))


def two_nodes_of_two(rank):
    return measure(world_of(rank, ranks_per_node=2), [1024, 2**20, 2**24], rounds=3, name="two")


def uneven_nodes(rank):
    with pytest.raises(InputError, match="the nodes have from 1 to 2 ranks"):
        measure(world_of(rank, ranks_per_node=1 if rank == 2 else 2), [1024], rounds=1, name="uneven")


def test_nodes_are_measured_within_between_and_together():
    found, *others = run_ranks(two_nodes_of_two, 4)
    assert {
        part: {row["ranks"] for row in found["rows"] if row["part"] == part} for part in ("inside", "between", "together")
    } == {
        "inside": {2},
        "between": {2},
        "together": {4},
    }
    assert [row["num_bytes"] for row in found["rows"][:3]] == [1024, 2**20, 2**24]
    assert [row["is_held_out"] for row in found["rows"][:3]] == [False, True, False]
    assert all(row["is_held_out"] for row in found["rows"] if row["part"] == "together")
    fabric = Fabric(**found["fabric"])
    assert set(fabric.inside) == set(fabric.between) == set(COLLECTIVES) and fabric.ranks_per_node == 2
    for row in found["rows"]:
        assert row["bytes_per_s"] == sent_bytes(row["collective"], row["num_bytes"], row["ranks"]) / row["median_s"]
    assert all(other["fabric"] == found["fabric"] for other in others)
    said = as_markdown(fabric_parts(found))
    assert "all ranks together, 4 ranks" in said and "| all_to_all, between nodes, a rank of each |" in said


def test_nodes_of_several_sizes_are_refused():
    run_ranks(uneven_nodes, 3)


def test_the_command_measures_two_ranks_and_writes_a_file_that_is_read(tmp_path):
    found = measure_fabric(2, rounds=3, max_mib=16, out=tmp_path / "here.toml")
    fabric = read_fabric(tmp_path / "here.toml")
    assert fabric == Fabric(**json.loads(json.dumps(found))["fabric"])
    assert (fabric.name, fabric.ranks_per_node, fabric.between) == ("here", 2, {}) and "gloo" in fabric.hardware
    assert {row["num_bytes"] for row in found["rows"]} == {1024 * 4**k for k in range(8)}
    assert found["largest_held_out_error"] == max(abs(row["error"]) for row in found["rows"] if row["is_held_out"])
    assert (tmp_path / "here.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_refused_before_anything_starts(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"4096 ranks were asked for, and this machine has .*; set --ranks \d+ or less"):
        refuse_crowd(4096)
    with pytest.raises(InputError, match=r"does not end in .toml; set --out to a file"):
        measure_fabric(2, 1, 1, tmp_path / "fabric.json")
    with pytest.raises(InputError, match=r"which is no folder; set --out"):
        measure_fabric(2, 1, 1, tmp_path / "none" / "fabric.toml")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="a launcher has started the ranks, and --ranks 2 would start others"):
        measure_fabric(2, 1, 1, None)
