"""The benchmark of a step at a size of milliseconds: in what it multiplies, and what becomes of a peer that does not fit."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from launch.bench import mining, peer, step
from launch.bench.flops import forward_flops
from launch.bench.machine import matmul_rate
from launch.bench.peer import SETTINGS, Peer, best_setting
from launch.bench.step import PEER, bench_step, precision_of
from launch.bench.turns import fits, take_turns
from launch.tables import as_markdown, step_parts
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.world import stay_alone

CPU = torch.device("cpu")
WORLD = stay_alone(CPU)
SIZE = {"queries": 8, "max_tokens": 16, "rounds": 1, "keep_gib": 0.1}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    return {"data": str(write_tiny_dataset(root / "data")), "model": str(write_tiny_encoder(root / "encoder"))}


@pytest.fixture
def rates(monkeypatch):
    """The types of the products that rates are measured in."""
    asked = []

    def rate(device, dtype=torch.float32):
        asked.append(dtype)
        return 1e9

    monkeypatch.setattr(step, "matmul_rate", rate)
    return asked


def out_of_memory(*settings):
    """Return a step of the peer that does not fit with some settings."""
    take = Peer.step

    def take_or_raise(self, pairs, setting):
        if settings and setting not in settings:
            return take(self, pairs, setting)
        raise torch.OutOfMemoryError("CUDA out of memory")

    return take_or_raise


@pytest.mark.parametrize(("half", "dtype", "name"), [(True, torch.bfloat16, "bf16"), (None, torch.float32, "fp32")])
def test_the_rate_is_that_of_the_products_of_the_encoder(places, rates, half, dtype, name):
    found = bench_step(**places, **SIZE, half=half, peer=False)
    assert (found["precision"], rates) == (name, [dtype])
    assert f"A large matrix product in {name} runs at 1 GFLOP/s" in as_markdown(step_parts(found))


def test_a_gpu_multiplies_in_half_precision_unless_it_is_told_otherwise(monkeypatch):
    monkeypatch.setattr(step, "takes_bf16", lambda device: device.type == "cuda")
    asked = [(None, "cuda"), (False, "cuda"), (None, "cpu"), (True, "cpu")]
    assert [precision_of(half, torch.device(kind)) for half, kind in asked] == ["bf16", "fp32", "fp32", "bf16"]


def test_a_product_is_measured_in_the_type_that_is_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr("launch.bench.machine.seconds_of", lambda work, device: seen.append(work().dtype) or 1.0)
    assert matmul_rate(CPU, torch.bfloat16) == 2 * 256**3 and set(seen) == {torch.bfloat16}, "too slow for a larger one"
    monkeypatch.setattr("launch.bench.machine.seconds_of", lambda work, device: 1e-3)
    assert matmul_rate(CPU) == pytest.approx(2 * 2048**3 / 1e-3)


def test_a_setting_of_the_peer_that_does_not_fit_is_out_and_the_others_go_on(places, rates, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.setitem(SETTINGS, "cpu", [{"mini_batch_size": 2}, {"mini_batch_size": 4}])
    monkeypatch.setattr(Peer, "step", out_of_memory({"mini_batch_size": 2}))
    found = bench_step(**places, **SIZE, half=None, peer=True)
    assert found["peer_trials"]["mini_batch_size=2"] is None and found["peer_trials"]["mini_batch_size=4"] > 0
    assert found["peer_setting"] == {"mini_batch_size": 4} and found["steps"][PEER]["ratio"] == 1
    said = as_markdown(step_parts(found))
    assert "| mini_batch_size=2 | out of memory |" in said and "The peer ran at its best: mini_batch_size=4." in said


def test_a_peer_that_fits_with_no_setting_is_left_out_in_a_sentence(places, rates, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(step.StepBench, "compare_gradients", lambda self, theirs: None)
    monkeypatch.setattr(Peer, "step", out_of_memory())
    found = bench_step(**places, **SIZE, half=None, peer=True)
    assert found["peer_setting"] is None and PEER not in found["steps"] and len(found["steps"]) == 2
    assert "The peer is left out: it does not fit into memory." in as_markdown(step_parts(found))


def test_a_way_that_fits_at_first_and_not_later_is_left_out():
    calls = []

    def grows():
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    turns = take_turns({"grows": grows, "stays": lambda: None}, 3, WORLD)
    assert turns.keys() == {"stays"} and len(turns["stays"].seconds) == 3


def test_what_did_not_fit_holds_nothing_behind_it():
    class Held(list):
        pass

    alive = []

    def work():
        held = Held([1])
        alive.append(weakref.ref(held))
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert not fits(work, WORLD)
    assert alive[0]() is None, "the traceback would have held it"


def test_on_several_ranks_the_others_would_wait_so_it_is_an_error():
    def work():
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Two:
        group = "of two"

    with pytest.raises(torch.OutOfMemoryError):
        fits(work, Two())


def test_the_settings_of_a_gpu_are_larger_than_those_of_a_cpu():
    named = [peer.named(setting) for setting in SETTINGS["cuda"]]
    assert named == [*(f"mini_batch_size={n}" for n in (128, 512, 1024)), *(f"mini_batch_num_tokens={n}" for n in (32768, 65536))]
    trials = dict(zip(named, (3.0, None, 2.0, None, 5.0), strict=True))
    assert best_setting(trials, torch.device("cuda")) == {"mini_batch_size": 1024}
    assert best_setting(dict.fromkeys(named), torch.device("cuda")) is None
    assert peer.TRIAL_PAIRS["cuda"] >= 2 * 1024, "the largest chunk is not the whole of a trial"


def test_the_operations_of_a_forward_are_those_that_torch_counts(places):
    encoder, _, _ = load_encoder(ModelSettings(name=places["model"]))
    ids = torch.randint(5, 20, (3, 11))
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):  # as products, which it counts on a CPU
        encoder.eval()({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert counted.get_total_flops() == forward_flops(encoder, np.full(3, 11))


def test_the_peer_encodes_in_what_we_encode_in(places, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(mining, "matmul_rate", lambda device, dtype=torch.float32: 1e9)
    sizes = mining.MiningSizes(texts=12, max_tokens=16, rounds=1)
    found = mining.measure_encoding(Path(places["data"]), places["model"], sizes, WORLD, "bf16", True)
    assert found["largest_difference"] > 1e-5 or found["largest_difference"] == 0
    assert found["precision"] == "bf16" and found["sides"].keys() == {"bare model", "ours", PEER}
