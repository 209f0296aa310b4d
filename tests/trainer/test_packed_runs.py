"""Runs whose chunks are packed go the way of padded ones under backends that communicate in forwards, where nothing is drawn."""

import json
import os

import pytest

import trainer.prepare
from tests.ranks import run_ranks
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.encoder.settings import ModelSettings
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings
from trainer.job import BatchSettings, ChunkSettings, OptimSettings, ParallelSettings, TrainJob
from trainer.train import train


def run(rank, root, backend, is_packed):
    """Train two steps and return their figures."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2")  # for DeepSpeed
    trainer.prepare.packs = lambda *_: is_packed
    folder = root / f"{backend}-{is_packed}"
    job = TrainJob(
        run=RunSettings(folder=folder, trackers=()),
        data=DataSettings(path=root / "data", cache=root / "cache"),
        model=ModelSettings(name=str(root / "encoder"), dropout=0.0),
        batch=BatchSettings(queries=7),
        chunk=ChunkSettings(tokens=400),
        optim=OptimSettings(steps=2, lr=1e-3),
        parallel=ParallelSettings(backend=backend),
        negatives=NegativesSettings(per_query=0),
    )
    train(job, world_of(rank))
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def run_both(rank, root, backend):
    return [run(rank, root, backend, is_packed) for is_packed in (False, True)]


@pytest.mark.parametrize("backend", ["fsdp2"])
def test_packed_chunks_train_as_padded_ones(tmp_path, backend):
    write_tiny_dataset(tmp_path / "data")
    write_tiny_encoder(tmp_path / "encoder")
    padded, packed = run_ranks(run_both, 2, tmp_path, backend)[0]
    for found, wanted in zip(packed, padded, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
        assert found["share/padding"] == 0 and found["num_chunks"] <= wanted["num_chunks"]
    assert max(line["share/padding"] for line in padded) > 0
