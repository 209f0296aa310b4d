"""The benchmark of everybody who computes this loss, at a size of seconds: real packages, real ranks, a real search."""

import json
import sys
from dataclasses import asdict, replace

import pytest

from launch.bench.kept_parts import KeptParts
from launch.bench.peers import everybody, roster
from launch.bench.peers.aloud import repeated, say_to
from launch.bench.peers.contender import BY_LENGTH, row_settings
from launch.bench.peers.grad_cache import grad_cache
from launch.bench.peers.judged_part import write_judged_part
from launch.bench.peers.mined_alike import shared
from launch.bench.peers.on_one_world import measure_on_ranks
from launch.bench.peers.peer_sizes import QUICK, peer_sizes, ranks_of
from launch.bench.report import write_tables
from launch.peer_tables import is_exact, peer_parts, plot_peers
from launch.tables import as_markdown
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.errors import InputError

pytest.importorskip("sentence_transformers")
TINY = replace(
    QUICK, queries=16, max_tokens=16, rounds=1, compared=16, steps=1, trained_queries=8, test_passages=40, texts=16, mined=60
)
NO_GRAD_CACHE = "GradCache" in roster.left_out(has_gpu=False)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("peers")
    return {"data": str(write_tiny_dataset(root / "data", 60)), "model": str(write_tiny_encoder(root / "encoder"))}


@pytest.fixture(scope="module")
def alone(places, tmp_path_factory):
    """What everybody does on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    everybody.prepare(folder, everybody.data_of(places["data"]), places["model"], TINY)
    return measure_on_ranks(str(folder), places["data"], "fp32", True, asdict(TINY))


@pytest.fixture(scope="module")
def on_two(places, tmp_path_factory):
    """The whole benchmark on two ranks."""
    out = tmp_path_factory.mktemp("out")
    return out, everybody.bench_peers(places["data"], places["model"], [2], TINY, None, True, out)


def test_on_one_rank_everybody_has_the_exact_gradient(alone):
    assert {"ours", "sentence-transformers, plain", "plain torch loop"} < alone["rows"].keys()
    trained = {name: row for name, row in alone["rows"].items() if name != "untrained"}
    for name, row in trained.items():
        assert row["gradient_cosine"] > 1 - 1e-5 and abs(row["gradient_ratio"] - 1) < 1e-4, name
        assert row["seconds"] > 0 and row["peak_gib"] >= 0 and 0 <= row["mrr@10"] <= 1, name


def test_everybody_runs_with_the_fastest_setting_of_a_search_that_is_told(alone):
    searched = {name: trials for name, trials in alone["trials"].items() if trials}
    assert {"ours", "sentence-transformers, cached by rows", "sentence-transformers, cached by tokens"} <= searched.keys()
    for name, trials in searched.items():
        chosen = ", ".join(f"{key}={value}" for key, value in alone["rows"][name]["setting"].items())
        assert len(trials) > 1 and trials[chosen] == min(trials.values()), name


def test_on_two_ranks_a_gradient_that_is_another_one_is_seen(on_two):
    rows = on_two[1]["ranks"]["2"]["rows"]
    for name in ("ours", "ours, all graphs kept", "plain torch loop", "sentence-transformers, cached by rows"):
        assert rows[name]["gradient_cosine"] > 1 - 1e-5 and abs(rows[name]["gradient_ratio"] - 1) < 1e-4, name
    # It gathers nothing: each rank's queries see this rank's passages alone.
    assert not is_exact(rows["plain torch loop, info-nce-pytorch"])
    assert rows["plain torch loop, info-nce-pytorch"]["gradient_cosine"] < 0.999
    said = as_markdown(peer_parts(on_two[1]))
    assert "a step on 2 ranks: 16 pairs" in said and "| gradient ratio | cosine | MRR@10 |" in said
    assert "Left out: memeff, needs an NVIDIA GPU" in said


@pytest.mark.skipif(NO_GRAD_CACHE, reason="GradCache is not installed")
def test_grad_cache_by_its_authors_is_too_small_by_the_number_of_ranks(on_two, alone):
    assert abs(alone["rows"]["GradCache"]["gradient_ratio"] - 1) < 1e-4
    row = on_two[1]["ranks"]["2"]["rows"]["GradCache"]
    assert abs(row["gradient_ratio"] - 0.5) < 1e-4 and row["gradient_cosine"] > 1 - 1e-5
    assert "| 0.5000 | 1.000000 |" in as_markdown(peer_parts(on_two[1]))


def test_mining_and_encoding_are_the_same_work(on_two):
    found = on_two[1]
    assert found["mining"]["same_negatives"] == 1 and len(found["mining"]["trials"]) >= 3
    assert found["encoding"]["largest_difference"] < 1e-5 and len(found["encoding"]["peer_trials"]) == 3


def test_the_report_has_a_picture_in_which_a_wrong_gradient_is_hatched(on_two, tmp_path):
    found = on_two[1]
    write_tables(tmp_path, "peers", found, peer_parts(found), ["peers"])
    plot_peers(found, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "peers.json").read_text())["ranks"].keys() == {"2"}


def test_what_was_measured_before_is_kept_and_not_measured_again(on_two, places, monkeypatch):
    out, found = on_two

    def started(*_, **__):
        raise AssertionError("it is measured again")

    for name in ("on_ranks", "measure_mined", "measure_encoding"):
        monkeypatch.setattr(everybody, name, started)
    again = everybody.bench_peers(places["data"], places["model"], [2], TINY, None, True, out)
    assert again["ranks"] == json.loads(json.dumps(found["ranks"]))
    with pytest.raises(AssertionError, match="measured again"):  # of one rank nothing is there yet
        everybody.bench_peers(places["data"], places["model"], [1, 2], TINY, None, True, out)
    with pytest.raises(InputError, match=r"measured with rounds=1, and this is rounds=3; .* set --out"):
        everybody.bench_peers(places["data"], places["model"], [2], replace(TINY, rounds=3), None, True, out)


def test_parts_of_another_commit_or_machine_are_refused(tmp_path):
    parts = KeptParts(tmp_path, {"commit": "a1", "device": "EPYC"})
    assert parts.part("steps", lambda: {"seconds": 1}) == {"seconds": 1} == parts.part("steps", lambda: {"seconds": 2})
    for other, words in (
        ({"commit": "b2", "device": "EPYC"}, "commit='a1'"),
        ({"commit": "a1", "device": "H100"}, "device='EPYC'"),
    ):
        with pytest.raises(InputError, match=f"steps.json was measured with {words}, and this is"):
            KeptParts(tmp_path, other)
    (tmp_path / "half.json").write_text('{"ident')
    with pytest.raises(InputError, match=r"half.json is no part of a benchmark; delete it"):
        KeptParts(tmp_path, {"commit": "a1", "device": "EPYC"})
    parts.clear()
    assert not tmp_path.exists()


def test_who_is_not_installed_is_named_with_what_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(roster, "is_installed", lambda module: False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "grad_cache"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError):
        grad_cache()
    out = roster.left_out(has_gpu=True)
    assert out["sentence-transformers"] == "not installed; run: pip install 'negpool[bench]'"
    assert out["GradCache"].endswith(f"pip install --no-deps --target {tmp_path}/peers/GradCache GradCache==0.0.1")
    assert out["memeff"] == "not installed; run: pip install memeff" and len(out) == 6
    assert roster.left_out(has_gpu=False)["inf-cl"] == "needs an NVIDIA GPU; there: pip install inf-cl"


@pytest.mark.parametrize(
    ("ranks", "sizes", "words"),
    [
        ([64], TINY, r"--ranks 64 is more than this machine takes: it has \d+ cores?; up to \d+ ranks fit"),
        ([2], replace(TINY, queries=15), "15 pairs cannot be divided over 2 ranks; set --queries to a multiple of 8"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_with_what_does(places, tmp_path, ranks, sizes, words):
    with pytest.raises(InputError, match=words):
        everybody.bench_peers(places["data"], places["model"], ranks, sizes, None, True, tmp_path)


@pytest.mark.parametrize("text", ["", "two", "1,,2", "0", "2,2"])
def test_ranks_are_numbers(text):
    assert ranks_of("1,2,4") == [1, 2, 4]
    with pytest.raises(InputError, match="is no list of numbers; expected as in 1,2,4"):
        ranks_of(text)


def test_texts_that_are_not_there_are_refused(places, tmp_path):
    with pytest.raises(InputError, match=r"of distinct texts in its split train, fewer than 1600; lower --queries or --steps"):
        sizes = replace(TINY, queries=1600, compared=1600)
        everybody.bench_peers(places["data"], places["model"], [1], sizes, None, True, tmp_path)
    data = write_tiny_dataset(tmp_path / "data", 20)
    (data / "qrels" / "test.tsv").unlink()
    with pytest.raises(InputError, match="no judgements of a split 'test', which peers are compared on"):
        write_judged_part(data, tmp_path / "part", "test", 4, 4)


def test_a_search_has_each_size_by_length_and_one_as_the_batch_comes():
    sizes = row_settings("rows", 24, (16, 32, 64))
    assert sizes == [{"rows": 16, BY_LENGTH: True}, {"rows": 32, BY_LENGTH: True}, {"rows": 16, BY_LENGTH: False}]


def test_sizes_that_are_given_bound_the_others():
    sizes = peer_sizes(False, queries=16, steps=None)
    assert (sizes.queries, sizes.compared, sizes.trained_queries, sizes.steps) == (16, 16, 16, 20)
    assert peer_sizes(True) == QUICK


def test_what_ranks_say_is_repeated_while_they_work(tmp_path, capsys):
    with repeated(tmp_path / "said.txt"):
        say_to(tmp_path / "said.txt", "2 ranks: [ours]: 3 settings are tried")
    assert "2 ranks: [ours]: 3 settings are tried" in capsys.readouterr().err


def test_the_share_of_equal_negatives_is_over_queries_of_both():
    assert shared({"a": {"x", "y"}, "b": {"z"}}, {"a": {"x", "w"}}) == 0.5
