"""Batches that are put together ahead: those of the step as it then is, and nothing is left behind."""

import json
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer import batches as batches_module
from trainer import feed
from trainer.batches import Batches
from trainer.data.collate import RowEncoder, Wants, collate, training_set
from trainer.data.datasets import open_dataset
from trainer.data.sampler import rank_slice, single_order, step_parts
from trainer.encoder.settings import ModelSettings
from trainer.encoder.tokens import tokenize
from trainer.handoff.negatives import Negatives, publish_negatives
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings, ScheduleEntry
from trainer.job import BatchSettings, CheckpointSettings, ChunkSettings, OptimSettings, TrainJob
from trainer.train import train

NUM_STEPS = 9
ENCODER = RowEncoder(print, torch.device("cpu"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def dataset(root):
    data = open_dataset(root / "data", root / "cache")
    tokenizer = AutoTokenizer.from_pretrained(root / "encoder")
    options = {"prefix": "", "max_tokens": 16, "cache": root / "cache"}
    queries = tokenize(data.queries.select(data.training_queries()), tokenizer, **options)
    return training_set(data, "train", queries, tokenize(data.corpus, tokenizer, **options))


def negatives_of(dataset, version):
    num = dataset.num_queries
    ids = np.random.default_rng(version).integers(0, 60, 3 * num)
    return Negatives(3 * np.arange(num + 1), ids, np.zeros(0), version, {})


@pytest.fixture
def of_rank(dataset):
    made = []

    def make(rank=0, num_ranks=1):
        job = SimpleNamespace(negatives=SimpleNamespace(per_query=2), run=SimpleNamespace(seed=4))
        made.append(
            Batches(job, replace(world_of(), rank=rank, num_ranks=num_ranks), dataset, ENCODER, NUM_STEPS, {None: Wants()})
        )
        return made[-1]

    yield make
    for batches in made:
        batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.fixture
def collated(monkeypatch):
    """The step and version of every batch that is put together, in their order."""
    seen, whole = [], batches_module.collate

    def watched(dataset, negatives, *rest, step, **options):
        seen.append((step, None if negatives is None else negatives.version))
        return whole(dataset, negatives, *rest, step=step, **options)

    monkeypatch.setattr(batches_module, "collate", watched)
    return seen


def assert_is_of(dataset, shares, step, order, negatives, rank=0, num_ranks=1):
    """Assert that the shares are what is made without a thread."""
    for share, part in zip(shares, step_parts(order, step), strict=True):
        rows = rank_slice(part.rows, rank, num_ranks)
        wanted = collate(dataset, negatives, rows, ENCODER, per_query=2, seed=4, step=step)
        np.testing.assert_array_equal(share.part.rows, part.rows)
        assert share.batch.keys.equal(wanted.keys)
        every = torch.arange(len(wanted.keys))
        found, expected = (batch.towers[0].load(every) for batch in (share.batch, wanted))
        assert all(found[name].equal(values) for name, values in expected.items())


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (1, 2), (2, 3)])
def test_a_swap_or_another_order_takes_effect_at_the_step_for_which_it_comes(dataset, of_rank, collated, rank, num_ranks):
    orders = [single_order(seed, dataset.num_queries, 7) for seed in (1, 2)]
    versions = [None, negatives_of(dataset, 0), negatives_of(dataset, 1)]
    batches = of_rank(rank, num_ranks)
    plan = [(0, 0), (0, 0), (1, 0), (1, 0), (2, 0), (2, 1), (2, 1), (1, 1), (0, 0)]  # negatives and order of each step
    for step, (version, order) in enumerate(plan):
        shares = batches.of_step(step, orders[order], versions[version])
        assert_is_of(dataset, shares, step, orders[order], versions[version], rank, num_ranks)
    used = [(step, None if version == 0 else version - 1) for step, (version, _) in enumerate(plan)]
    assert set(used) <= set(collated), "each as it then was"
    assert max(step for step, _ in collated) == NUM_STEPS - 1, "and none beyond the last step"


def test_a_batch_is_put_together_once_where_nothing_changes(dataset, of_rank, collated):
    order, batches = single_order(1, dataset.num_queries, 7), of_rank()
    for step in range(NUM_STEPS):
        batches.of_step(step, order, None)
    assert collated == [(step, None) for step in range(NUM_STEPS)]


def test_a_run_may_begin_anywhere(dataset, of_rank):
    order = single_order(1, dataset.num_queries, 7)
    assert_is_of(dataset, of_rank().of_step(5, order, None), 5, order, None)


def test_an_error_comes_out_at_the_step_that_needs_the_batch(dataset, of_rank, monkeypatch):
    order, batches, whole = single_order(1, dataset.num_queries, 7), of_rank(), batches_module.collate

    def failing(*args, step, **options):
        if step == 2:
            raise OSError("the disk is away")
        return whole(*args, step=step, **options)

    monkeypatch.setattr(batches_module, "collate", failing)
    for step in (0, 1):
        assert batches.of_step(step, order, None)
    with pytest.raises(OSError, match="the disk is away"):
        batches.of_step(2, order, None)


def test_closing_ends_the_thread_and_takes_no_further_batch(dataset, of_rank):
    order, batches = single_order(1, dataset.num_queries, 7), of_rank()
    batches.of_step(0, order, None)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
    with pytest.raises(RuntimeError, match="after shutdown"):
        batches.of_step(3, order, None)


def test_a_run_has_the_weights_that_it_has_without_the_thread_whatever_is_swapped_and_resumed(root, tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "POLL_S", 0.02)
    folders = [tmp_path / name for name in ("run", "resumed", "without")]
    draw = np.random.default_rng(0)
    for version, mined_at in enumerate((None, 2, 4)):
        rows = 4 * np.arange(37), draw.integers(0, 60, 4 * 36), np.zeros(4 * 36)
        publish_negatives(folders[0], version, *rows, {"checkpoint_step": mined_at})
    job = TrainJob(
        run=RunSettings(folder=folders[0], trackers=()),
        data=DataSettings(path=root / "data", cache=root / "cache"),
        model=ModelSettings(name=str(root / "encoder")),
        batch=BatchSettings(queries=7),
        chunk=ChunkSettings(tokens=64),
        optim=OptimSettings(steps=6, lr=1e-3),
        checkpoint=CheckpointSettings(every_steps=2, keep=9),
        negatives=NegativesSettings(
            per_query=2, schedule=(ScheduleEntry(checkpoint=2, step=3), ScheduleEntry(checkpoint=4, step=5))
        ),
    )
    run, resumed, without = (replace(job, run=replace(job.run, folder=folder)) for folder in folders)
    shutil.copytree(folders[0], folders[2])
    train(run, world_of())
    shutil.copytree(folders[0], folders[1])
    shutil.rmtree(folders[1] / "checkpoints" / "step-00000006")
    train(resumed, world_of())
    monkeypatch.setattr(Batches, "of_step", lambda self, *made_of: self._shares(*made_of))
    train(without, world_of())
    steps = [json.loads(line) for line in (folders[0] / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["negatives/version"] for line in steps if "loss" in line] == [0, 0, 0, 1, 1, 2]
    published = [folder / "checkpoints" / "step-00000006" / "encoder" / "model.safetensors" for folder in folders]
    wanted, *others = (load_file(path) for path in published)
    assert all(values.equal(other[name]) for other in others for name, values in wanted.items())
