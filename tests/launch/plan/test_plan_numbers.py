"""The arithmetic of a plan, by hand, against the trainer's own estimates, and as it must change with what it is told."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gradcache.budget import measure_graphs
from gradcache.chunks import plan_chunks
from launch.bench.flops import TokenFlops
from launch.fabric import COLLECTIVES, Fabric, Wire
from launch.jobfile import read_job
from launch.plan.devices import TABLE, PlannedDevice
from launch.plan.plan_job import PlanRequest, plan_job
from launch.plan.planned_model import planned_model
from launch.plan.planned_texts import SaidTexts, planned_texts
from launch.plan.rank_memory import rank_memory
from launch.plan.refresh_age import ranks_for_age, refresh_of
from launch.plan.step_work import step_work
from launch.plan.storage import own_part_bytes
from launch.step_phases import PHASES
from tests.tiny import write_tiny_encoder
from trainer.encoder.model import load_encoder
from trainer.encoder.settings import ModelSettings
from trainer.job import ParallelSettings, TrainJob
from trainer.step_memory import model_memory

GIB = 2**30
BERT_WEIGHTS = 12 * (4 * 768**2 + 2 * 768 * 3072)  # of the matrices in its layers
TEXTS = SaidTexts(query_tokens=10, passage_tokens=50, num_queries=1000, num_passages=5000)
WORDS = ["model.name=bert-base-uncased", "batch.queries=64", "negatives.per_query=3", "chunk.tokens=4000", "chunk.keep_graphs=0"]
WORDS += ["precision.encode=bf16", "model.compile=false"]
ROUND = PlannedDevice(
    name="round", type="cuda", hardware="made up", source="made up", memory_gib=80, process_gib=1, memory_bytes_per_s=1e12,
    peak_flops_per_s=2e14, matmul_flops_per_s=1e14, matmul_fp32_flops_per_s=1e13, forward_share=0.5, both_share=0.4,
    compiled_gain=1.0, launch_s=1e-12, loss_share=0.5, watts=500,
)  # fmt: skip
WIRES = {name: Wire(latency_s=1e-6, bytes_per_s=1e10) for name in COLLECTIVES}
NET = Fabric(name="net", ranks_per_node=4, hardware="made up", date="", source="made up", inside=WIRES, between=WIRES)


def planned(*words, ranks=(2, 4), monkeypatch=None, device=ROUND, **asked):
    from launch.plan import plan_job as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "find_device", lambda name: device)
        patch.setattr(module, "find_fabric", lambda name: NET)
        given = {"texts": TEXTS, "fabric": "net", "device": "round"} | asked
        return plan_job(read_job(None, [*WORDS, *words]), PlanRequest(ranks=ranks, **given))


@pytest.fixture(scope="module")
def bert():
    return planned_model(ModelSettings(name="bert-base-uncased"), "bf16", "cuda")


def test_a_known_shape_has_its_parameters_and_operations(bert):
    embeddings = (30522 + 512 + 2) * 768 + 2 * 768
    layer = 4 * (768**2 + 768) + 2 * 768 * 3072 + 768 + 3072 + 4 * 768
    assert bert.num_parameters == bert.num_trained == embeddings + 12 * layer
    assert bert.other_parameters == embeddings and bert.layer_parameters == layer and bert.width == 768
    assert bert.flops == TokenFlops(weights=2 * BERT_WEIGHTS, trained_weights=2 * BERT_WEIGHTS, attention=4 * 768 * 12)
    assert bert.forward_flops(10, 5) == 10 * (2 * BERT_WEIGHTS + 5 * 4 * 768 * 12)
    assert bert.backward_flops(10, 5) == 2 * bert.forward_flops(10, 5)


def test_a_step_takes_the_seconds_that_paper_and_pencil_give():
    row = planned(ranks=(2,))["sizes"][0]
    tokens = 32 * 10 + 128 * 50
    squares = 32 * 100 + 128 * 2500
    forward = tokens * 2 * BERT_WEIGHTS + squares * 4 * 768 * 12
    assert (row["queries_per_rank"], row["tokens"], row["tokens_of_all"]) == (32, tokens, 2 * tokens)
    assert row["flops"]["encode"] == pytest.approx(forward) and row["flops"]["encode_again"] == pytest.approx(3 * forward)
    assert row["phases"]["encode"] == pytest.approx(forward / 5e13) and row["phases"]["encode_again"] == pytest.approx(
        3 * forward / 4e13
    )
    score = 2 * 64 * 128 * 768  # queries travel: all of them against this rank's passages
    assert row["travels"] == "queries" and row["flops"]["statistics"] == score
    assert row["flops"]["loss"] == pytest.approx(2 * score, rel=0.01), "scores are kept"
    assert row["phases"]["loss"] == pytest.approx(row["flops"]["loss"] / 5e13)
    assert row["bytes"]["gather"] == 64 * 768 * 2 / 2 and row["bytes"]["reduce_scatter"] == 64 * 768 * 4 / 2
    assert row["phases"]["gather"] == pytest.approx(1e-6 + 64 * 768 * 2 / 2 / 1e10)
    parameters = 108_891_648
    sync = 4 * parameters / 1e10  # an all-reduce of two ranks sends the buffer once
    assert row["parameters_hidden_s"] + row["phases"]["parameters"] == pytest.approx(sync, rel=0.01)
    assert row["phases"]["optimizer"] == pytest.approx(36 * parameters / 1e12)
    assert row["step_s"] == pytest.approx(sum(row["phases"].values())) and set(row["phases"]) == set(PHASES)
    assert row["step_without_overlap_s"] == pytest.approx(row["step_s"] + row["parameters_hidden_s"])
    assert row["bottleneck"] == "encode_again (products)" and row["efficiency"] == 1
    assert row["share_of_matmul_rate"] == pytest.approx(sum(row["flops"].values()) / row["step_s"] / 1e14)
    steps = 16  # of 1,000 queries
    assert row["steps"] == steps and row["rank_hours"] == pytest.approx(steps * row["step_s"] * 2 / 3600)
    assert row["energy_kwh"] == pytest.approx(row["rank_hours"] / 2)


def test_chunks_are_those_that_the_trainer_would_make():
    row = planned(ranks=(2,))["sizes"][0]
    lengths = torch.tensor([10] * 32 + [50] * 128)
    assert row["chunks"] == len(plan_chunks(lengths, 4000, is_packed=True)) and row["share_padding"] == 0


def test_weak_scaling_grows_the_batch_and_strong_scaling_does_not():
    weak = planned("batch.queries=65", mode="weak")["sizes"]
    assert [row["queries"] for row in weak] == [65, 130] and [row["queries_per_rank"] for row in weak] == [33, 33]
    strong = planned("batch.queries=65")["sizes"]
    assert [row["queries"] for row in strong] == [65, 65], "the trainer gives the first rank one more"
    assert weak[0]["step_s"] == strong[0]["step_s"] and 0.5 < weak[1]["efficiency"] < 1


@pytest.mark.parametrize("words", [[], ["parallel.backend=fsdp2"], ["loss.gather=passages"]])
def test_more_ranks_never_take_more_memory_nor_more_products(words):
    rows = planned(*words, ranks=(2, 4, 8, 32))["sizes"]
    for before, after in itertools.pairwise(rows):
        assert after["tokens"] < before["tokens"] and sum(after["flops"].values()) < sum(before["flops"].values())
        assert after["memory_total_gib"] <= before["memory_total_gib"] + 1e-3
        assert after["phases"]["encode"] < before["phases"]["encode"]
        assert after["efficiency"] <= before["efficiency"] + 1e-9, "nothing is kept, so nothing is gained"


def test_a_slower_network_or_device_makes_a_longer_step():
    base = planned(ranks=(4,))["sizes"][0]
    slow = planned(ranks=(4,), device=replace(ROUND, both_share=0.2))["sizes"][0]
    assert slow["phases"]["encode_again"] == pytest.approx(2 * base["phases"]["encode_again"])
    assert planned(ranks=(4,), device=replace(ROUND, launch_s=1e-3))["sizes"][0]["step_s"] > base["step_s"], "the host"


def test_memory_is_the_trainers_own_estimate(tmp_path):
    write_tiny_encoder(tmp_path / "encoder")
    settings = ModelSettings(name=str(tmp_path / "encoder"), lora_rank=0)
    model = planned_model(settings, "fp32", "cpu")
    encoder, *_ = load_encoder(settings)
    assert model.num_parameters == sum(p.numel() for p in encoder.parameters()) and model.width == encoder.width
    texts = SaidTexts(query_tokens=8, passage_tokens=16)
    for backend in ("ddp", "fsdp2"):
        words = [f"model.name={settings.name}", f"parallel.backend={backend}", "precision.encode=fp32", "precision.products=fp32"]
        jobs = read_job(None, words)
        device = replace(ROUND, type="cpu")
        work = step_work(jobs.train, model, planned_texts(jobs, model.traits, texts), device, 4, 32, 1)
        about = planned_texts(jobs, model.traits, texts)
        found = rank_memory(jobs.train, model, about, device, work, 4 if backend == "fsdp2" else 1)
        said = model_memory(encoder, TrainJob(parallel=ParallelSettings(backend=backend)), 4, "cpu", is_first=True)
        for item in ("weights", "gradients", "optimizer", "backend", "published"):
            assert getattr(found.items, item) == getattr(said, item), f"{item} under {backend}"
        assert found.fits and found.chunks.num_kept == 0


def test_a_graph_is_as_large_as_the_one_that_is_measured(tmp_path):
    from gradcache import Tower

    write_tiny_encoder(tmp_path / "encoder")
    settings = ModelSettings(name=str(tmp_path / "encoder"), max_passage_tokens=32, dropout=0.0)
    encoder, *_ = load_encoder(settings)
    ids = torch.randint(5, 40, (128, 32))

    def encode(chosen):
        return encoder({"input_ids": chosen, "attention_mask": torch.ones_like(chosen)})

    tower = Tower(encode=encode, lengths=torch.full((128,), 32), load=lambda rows: ids[rows])
    measured = measure_graphs(tower).of(2048, 32)
    assert planned_model(settings, "fp32", "cpu").graph.of(2048, 32) == pytest.approx(measured, rel=0.1)


def test_a_large_model_takes_no_memory_and_the_first_ranks_that_cannot_run_are_named():
    words = ["model.name=intfloat/e5-mistral-7b-instruct", "model.max_passage_tokens=64", "chunk.tokens=auto"]
    found = planned(*words, ranks=(2, 4))
    assert found["model"]["parameters"] == 7_110_660_096
    first = found["first_that_cannot_run"]
    assert first["ranks"] == 2 and "parallel.backend=fsdp2" in first["problems"][0] and "GiB more" in first["problems"][0]
    half = replace(ROUND, memory_gib=48)
    sharded = planned(*words, "parallel.backend=fsdp2", "parallel.reduce=chunk", ranks=(2, 64), device=half)
    assert sharded["sizes"][0]["problems"] and not sharded["sizes"][1]["problems"], "many ranks hold it"
    adapters = planned(*words, "model.lora_rank=8", ranks=(2,))
    assert not adapters["sizes"][0]["problems"] and adapters["model"]["trained"] < 0.01 * adapters["model"]["parameters"]
    flops = adapters["sizes"][0]["flops"]
    assert flops["encode_again"] / flops["encode"] == pytest.approx(2, rel=0.02), "frozen weights need no gradient"


def test_negatives_age_with_the_refresh_and_more_ranks_keep_them_younger():
    fast, slow = refresh_of(20.0, 2.0, 50), refresh_of(200.0, 2.0, 50)
    assert (fast.youngest_age, fast.oldest_age) == (10, 60), "mined at every checkpoint, in force until the next is"
    assert (slow.youngest_age, slow.oldest_age) == (100, 250)
    assert ranks_for_age(200.0, 2.0, 50, 60) == 10 and ranks_for_age(200.0, 2.0, 50, 250) == 1
    assert ranks_for_age(200.0, 2.0, 50, 50) is None, "a checkpoint is as old as that when the next one comes"
    row = planned(age_steps=100, ranks=(2,))["sizes"][0]
    of_one = row["refresh"]["seconds"]
    forward = 2 * BERT_WEIGHTS
    tokens = 1000 * 10 * (forward + 10 * 36864) + 5000 * 50 * (forward + 50 * 36864)
    assert of_one == pytest.approx(tokens / 5e13 + 2 * 1000 * 5000 * 768 / 5e13)
    assert row["evaluation_s"] == pytest.approx(5000 * 50 * (forward + 50 * 36864) / 5e13 / 2)


def test_a_checkpoint_has_weights_moments_and_as_many_parts_as_ranks_share(bert):
    row = planned(ranks=(2,))["sizes"][0]["storage"]
    whole = 4 * bert.num_parameters
    assert row["checkpoint_bytes"] == 4 * whole, "the exported model, weights and two moments"
    assert row["checkpoint_s"] == pytest.approx(4 * whole / 1e9)
    assert row["save_seconds"] == math.ceil(3 * 4 * whole / 1e9 + planned(ranks=(2,))["sizes"][0]["step_s"])
    job = TrainJob()
    assert own_part_bytes(job, bert, 2, 1) == math.ceil(3 * whole / 2)
    assert own_part_bytes(job, bert, 4096, 1) == math.ceil(3 * whole / math.ceil(3 * whole / 2**26))
    assert own_part_bytes(job, bert, 512, 512) == math.ceil(3 * whole / 512)


def test_the_table_of_devices_is_plausible():
    for device in TABLE.values():
        assert device.matmul_flops_per_s < device.peak_flops_per_s and device.matmul_fp32_flops_per_s < device.matmul_flops_per_s
        assert 0.3 < device.both_share * device.compiled_gain < 0.6 and device.source.count(";") >= 2


def test_texts_of_the_jobs_data_are_read_where_they_are_here(tmp_path):
    from tests.tiny import write_tiny_dataset

    write_tiny_dataset(tmp_path / "data")
    write_tiny_encoder(tmp_path / "encoder")
    words = [f"data.path={tmp_path}/data", f"data.cache={tmp_path}/cache", f"model.name={tmp_path}/encoder", "batch.queries=8"]
    found = planned(*words, texts=SaidTexts(), ranks=(2,))
    assert found["texts"]["num_queries"] == 36 and str(tmp_path) in found["texts"]["source"]
    assert 0 < found["texts"]["query_tokens"] <= found["texts"]["longest"]
    assert planned(ranks=(2,), texts=SaidTexts())["texts"]["source"].startswith("as long as the job lets them be")
    assert np.isclose(planned(*words, ranks=(2,))["texts"]["passage_tokens"], 50), "what is said counts"
