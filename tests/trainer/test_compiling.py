"""Which runs compile their layers, and the warm-up before their first step."""

import json
import logging
from dataclasses import replace

import pytest
import torch

import trainer.compiling
import trainer.warm_up
from gradcache.plan import encode_chunk
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.compiling import MARGIN, SAVED_SHARE, WARM_UP_S, decide
from trainer.encoder import compiled as compiled_module
from trainer.encoder.settings import ModelSettings
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings
from trainer.job import BatchSettings, CheckpointSettings, ChunkSettings, OptimSettings, ParallelSettings, TrainJob
from trainer.train import train
from trainer.warm_up import try_chunk

WORK = {"num_steps": 1000, "tokens_a_step": 1e5, "num_parameters": 10**8, "flop_per_s": 1e14, "keeps_graphs": False}  # 800 s


def of(setting="auto", device="cuda", hindrance=None, **work):
    return decide(setting, device, hindrance, **{**WORK, **work})


def test_auto_compiles_on_a_gpu_where_the_saved_time_repays_the_warm_up():
    assert of().compiles and of().is_due
    assert "1,000 steps of 100,000 tokens a rank encode for about 800 s" in of().reason
    assert "would save about 144 s, and have to save 120 s" in of().reason
    shortest = MARGIN * WARM_UP_S / SAVED_SHARE / 800
    for share, compiles in ((1.01, True), (0.99, False)):
        assert of(num_steps=round(1000 * shortest * share)).compiles == compiles
        assert of(tokens_a_step=1e5 * shortest * share).compiles == compiles
        assert of(num_parameters=round(1e8 * shortest * share)).compiles == compiles
        assert of(flop_per_s=1e14 / (shortest * share)).compiles == compiles
    assert not of(num_steps=900, keeps_graphs=True).compiles and of(num_steps=900).compiles  # a third less is encoded


def test_auto_leaves_out_what_is_not_proven_and_a_word_of_the_job_decides():
    assert not of(device="cpu").compiles and of(device="cpu").reason == 'model.compile="auto" compiles on GPUs alone'
    assert not of(hindrance="something keeps the layers plain").compiles
    for setting in (True, False):
        found = of(setting, device="cpu", hindrance="something", num_steps=1)
        assert (found.compiles, found.is_due, found.reason) == (setting, setting, f"model.compile={str(setting).lower()}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiling")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder")
    return folder


def job_of(root, folder, compiles):
    return TrainJob(
        run=RunSettings(folder=folder, trackers=()),
        data=DataSettings(path=root / "data", cache=root / "cache"),
        model=ModelSettings(name=str(root / "encoder"), compile=compiles),
        batch=BatchSettings(queries=7),
        chunk=ChunkSettings(tokens=64, keep_graphs=1),
        optim=OptimSettings(steps=2, lr=1e-3),
        checkpoint=CheckpointSettings(every_steps=2),
        negatives=NegativesSettings(per_query=0),
    )


def lines(job):
    return [json.loads(line) for line in (job.run.folder / "logs" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "hindrance", [{"parallel": ParallelSettings(backend="fsdp2")}, {"parallel": ParallelSettings(backend="zero3")}]
)
def test_a_backend_that_communicates_in_forwards_keeps_auto_from_compiling(root, tmp_path, hindrance):
    assert "communicates in forwards" in trainer.compiling._hindrance(replace(job_of(root, tmp_path, "auto"), **hindrance))
    assert trainer.compiling._hindrance(job_of(root, tmp_path, "auto")) is None


def test_a_run_compiles_before_its_first_step_and_says_so(root, tmp_path, monkeypatch, caplog):
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_module, "HOW", {"backend": "eager", "dynamic": True})
    phases, tried, update = [], [], trainer.prepare.Status.update

    def watched_update(self, **values):
        phases.append(values.get("phase"))
        update(self, **values)

    def watched_try(chunk, encoder, *more):
        generator = torch.get_rng_state()
        tried.append(try_chunk(chunk, encoder, *more))
        assert torch.equal(torch.get_rng_state(), generator) and all(p.grad is None for p in encoder.parameters())
        assert not torch.equal(*(encode_chunk(replace(chunk, seed=seed), with_graph=False) for seed in (1, 2)))  # it draws
        return tried[-1]

    monkeypatch.setattr(trainer.prepare.Status, "update", watched_update)
    monkeypatch.setattr(trainer.warm_up, "try_chunk", watched_try)
    caplog.set_level(logging.INFO)
    job = job_of(root, tmp_path / "run", True)
    assert train(job, world_of()).step == 2
    assert tried and not any(tried)
    told = [phase for phase in phases if phase in ("compiling", "training")]
    assert told[:3] == ["training", "compiling", "training"] and told.count("compiling") == 1
    (event,) = [line for line in lines(job) if line.get("event") == "layers compiled"]
    assert event["compiled"] and event["step"] == 0 and event["time/compile_s"] > 0
    steps = [line for line in lines(job) if "loss" in line]
    assert [line["compiled"] for line in steps] == [True, True]
    assert json.loads((job.run.folder / "status" / "trainer.json").read_text())["compiled"]
    assert "layers are compiled; model.compile=true" in caplog.text and "layers compiled in" in caplog.text


def test_a_run_whose_layers_do_not_compile_or_replay_goes_as_one_that_does_not_try(root, tmp_path, monkeypatch, caplog):
    def fail(graph, inputs):
        raise RuntimeError("no compiler here")

    def draws_anew(graph, inputs):
        """Draw with a graph other numbers than without one, as a kernel with a state of its own would."""

        def run(*args):
            if torch.is_grad_enabled():
                torch.rand(1)
            return graph(*args)

        return run

    losses = []
    for name, backend in (("plain", None), ("fails", fail), ("draws", draws_anew)):
        torch._dynamo.reset()
        monkeypatch.setattr(compiled_module, "HOW", {"backend": backend, "dynamic": True})
        job = job_of(root, tmp_path / name, backend is not None)
        assert train(job, world_of()).step == 2
        losses.append([line["loss"] for line in lines(job) if "loss" in line])
    assert losses[0] == losses[1] == losses[2]
    told = [record.message for record in caplog.records if record.name == compiled_module.__name__]
    assert len(told) == 2 and "no compiler here" in told[0]
    assert "a seed does not replay their dropout: embeddings with and without graph differ by " in told[1]
