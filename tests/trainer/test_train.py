"""Whole runs in this process: what the job asks for happens at the steps it names, and comes out in the files."""

import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

import trainer.milestones
import trainer.train
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.jobs import tiny_job
from tests.trainer.worlds import world_of
from trainer.data.clusters import Clusters
from trainer.data.sampler import Order, SourceOrder, step_parts
from trainer.early_stop import StopSettings
from trainer.encoder.model import load_encoder
from trainer.encoder.settings import KEEP_ENCODINGS, ModelSettings
from trainer.errors import InputError, MustNotGoOn
from trainer.handoff.manifest import versions
from trainer.handoff.negatives import publish_negatives
from trainer.handoff.settings import NegativesSettings, ScheduleEntry, SourceSettings
from trainer.handoff.weights import open_checkpoint
from trainer.job import (
    BatchSettings,
    CheckpointSettings,
    EmaSettings,
    EvalSettings,
    OptimSettings,
)
from trainer.loss_settings import LossSettings
from trainer.parts import Parts
from trainer.precision import precision_on
from trainer.tasks import loss_options
from trainer.train import train
from trainer.update import update


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    write_tiny_dataset(folder / "data")
    write_tiny_dataset(folder / "more", num_queries=24, seed=1)
    write_tiny_encoder(folder / "encoder")
    return folder


@pytest.fixture
def job(root, tmp_path):
    return tiny_job(root, tmp_path / "run", steps=6)


def lines(job):
    return [json.loads(line) for line in (job.run.folder / "logs" / "metrics.jsonl").read_text().splitlines()]


def final(job, step=6):
    return open_checkpoint(job.run.folder / "checkpoints" / f"step-{step:08d}")


def test_a_task_of_each_source_makes_one_update(job, root, caplog, monkeypatch):
    taken, cached_step = [], trainer.train.cached_step

    def watched(batch, **options):
        taken.append((options["loss"], options["progress"], options["weight"]))
        return cached_step(batch, **options)

    monkeypatch.setattr(trainer.train, "cached_step", watched)
    sources = {
        "code": SourceSettings(path=root / "data", batch=7, temperature=0.1),
        "notes": SourceSettings(
            path=root / "more", batch=5, id_prefix="n-", objective="info_nce", parameters={"positives": "mean"}, loss_weight=0.5
        ),
    }
    loss = LossSettings(symmetric=True, tile_rows=3, keep_scores_gib=0.1)
    job = replace(job, sources=sources, batch=BatchSettings(mode="tasks"), loss=loss)
    caplog.set_level("INFO")
    assert train(job, world_of()).step == 6
    (start,) = [line for line in lines(job) if line.get("event") == "started"]
    parts = {key: seconds for key, seconds in start.items() if key.startswith("time/start/")}
    assert {"time/start/imports_s", "time/start/tokenising_s", "time/start/evaluating_the_untrained_model_s"} <= parts.keys()
    assert start["time/start_s"] == pytest.approx(sum(parts.values()), abs=0.1) and "the start took " in caplog.text
    steps = [line for line in lines(job) if "loss" in line]
    assert steps[0]["num_queries"] == 12 and len({line["batch_key"] for line in steps}) == 6
    assert "source notes begins again, others are longer" in caplog.text
    assert final(job).manifest["num_steps"] == 6
    whole = loss_options(loss, precision_on(job.precision, has_bf16=False))
    own = [options.objective for options, _, _ in taken[:2]]
    assert [objective.positives for objective in own] == ["own", "mean"]
    both = [(replace(whole, objective=objective), weight) for objective, weight in zip(own, (1.0, 0.5), strict=True)]
    assert taken == [(options, step / 6, weight) for step in range(6) for options, weight in both]


def test_scores_beyond_memory_are_refused_before_a_run_begins(job):
    with pytest.raises(InputError, match=r"loss\.keep_scores_gib=1e\+07 is more than the \d+\.\d GiB of memory"):
        train(replace(job, loss=LossSettings(keep_scores_gib=1e7)), world_of())
    assert not job.run.folder.exists()


@pytest.mark.parametrize("mode", ["mixed", "homogeneous"])
def test_several_sources_share_batches_or_take_turns(job, root, mode):
    sources = {name: SourceSettings(path=root / name, id_prefix=f"{name}-") for name in ("data", "more")}
    job = replace(job, sources=sources, batch=BatchSettings(queries=7, mode=mode), optim=OptimSettings(epochs=1))
    outcome = train(job, world_of())
    assert sum(line["num_queries"] for line in lines(job) if "loss" in line) == 32 + 16 or outcome.step >= 7


def test_evaluations_without_a_miner_leave_no_more_than_a_few_sets_of_embeddings(job):
    job = replace(job, eval=EvalSettings(every_steps=1), checkpoint=CheckpointSettings(every_steps=1))
    train(job, world_of())
    deadline = time.monotonic() + 30  # deleted behind the loop's back
    while len(left := list((job.run.folder / "shards").glob("[!.]*"))) > KEEP_ENCODINGS and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(left) == KEEP_ENCODINGS


def test_averaged_weights_are_published_and_the_others_resumed(job):
    job = replace(job, ema=EmaSettings(decay=0.5))
    train(job, world_of())
    checkpoint = final(job)
    parts, published = Parts(checkpoint.folder / "state"), load_file(checkpoint.encoder_folder / "model.safetensors")
    differing = 0
    for name, values in published.items():
        if name.startswith("pooler."):  # zeros, for others
            continue
        average, last = (parts.read(f"{kind}.model.{name}", 0, values.numel()) for kind in ("average", "parameter"))
        assert torch.equal(values.flatten(), average), name
        differing += not torch.equal(average, last)
    assert differing > 10


def test_a_checkpoint_has_a_card_of_what_made_it(job, root):
    job = replace(job, eval=EvalSettings(every_steps=2), run=replace(job.run, folder=job.run.folder / "named"))
    job = replace(job, data=replace(job.data, path=root / "more"), negatives=NegativesSettings(first_wait_s=0))
    train(job, world_of())
    text = (final(job).encoder_folder / "README.md").read_text()
    for row in (
        "| base | encoder |",
        "| data | more |",
        "| objective | info_nce |",
        "| steps | 6 |",
        "| negatives | those of the batch |",
    ):
        assert row in text
    on_dev = {line["step"]: line["dev/ndcg@10"] for line in lines(job) if "dev/ndcg@10" in line}
    assert f"| untrained, dev | 0 | {on_dev[0]:.4f} |" in text and f"| trained, dev | 6 | {on_dev[6]:.4f} |" in text
    assert "| untrained, test |" not in text and str(job.run.folder.parent) not in text, "of other queries than dev's"


def test_a_run_without_gain_on_dev_ends_early_and_stays_ended(job):
    stop = StopSettings(patience=1, min_gain=0.9)
    job = replace(job, stop=stop, eval=EvalSettings(every_steps=2), checkpoint=CheckpointSettings(every_steps=2, keep=1))
    assert train(job, world_of()).step == 4, "the first evaluation is the best so far, the second no gain"
    assert final(job, 4).manifest["is_final"]
    kept = [folder.name for folder in versions(job.run.folder / "checkpoints")]
    assert kept == ["step-00000004"], "the best on dev, though the gain was too small to go on"
    evaluated = [line["step"] for line in lines(job) if "dev/ndcg@10" in line]
    assert evaluated == [0, 2, 4] and any("health/alignment" in line for line in lines(job))
    again = train(job, world_of())
    assert again.step == 4 and again.finished
    assert [line["step"] for line in lines(job) if "dev/ndcg@10" in line] == evaluated


def test_negatives_under_which_dev_fell_are_taken_back(job, monkeypatch):
    num_queries = 36

    def publish(version, mined_at):
        ids = np.arange(num_queries)
        publish_negatives(
            job.run.folder, version, np.arange(num_queries + 1), ids, np.zeros(num_queries), {"checkpoint_step": mined_at}
        )

    job = replace(
        job,
        negatives=NegativesSettings(per_query="all"),
        stop=StopSettings(max_fall=0.1),
        eval=EvalSettings(every_steps=1),
        optim=OptimSettings(steps=40),
    )
    publish(0, None)
    versions_seen = []

    def scripted(world, data, split, encoder, *args, **options):
        """Good until version 1 is in force."""
        version = next((v for v in reversed([line.get("negatives/version") for line in lines(job)]) if v is not None), 0)
        versions_seen.append(version)
        if len(versions_seen) == 3:
            publish(1, 2)
        time.sleep(0.1)  # the feed polls
        return {"ndcg@10": 0.2 if version == 1 else 0.8}

    monkeypatch.setattr(trainer.milestones, "evaluate", scripted)
    train(job, world_of())
    events = [(line["event"], line["negatives/version"]) for line in lines(job) if "negatives" in line.get("event", "")]
    assert events == [
        ("negatives swapped", 0),
        ("negatives swapped", 1),
        ("negatives taken back", 1),
        ("negatives swapped", 0),
    ]
    used = [line["negatives/version"] for line in lines(job) if "loss" in line]
    assert used[-1] == 0 and 1 in used


def test_a_query_whose_places_stay_empty_is_trained_with_what_there_is(job):
    count = np.arange(36) % 4  # none for every fourth
    indptr = np.concatenate([[0], np.cumsum(count)])
    publish_negatives(job.run.folder, 0, indptr, np.arange(indptr[-1]) % 60, np.zeros(indptr[-1]), {"checkpoint_step": None})
    job = replace(job, negatives=NegativesSettings(per_query=2), batch=BatchSettings(queries=6))
    assert train(job, world_of()).step == 6
    losses = [line["loss"] for line in lines(job) if "loss" in line]
    assert len(losses) == 6 and np.isfinite(losses).all() and min(losses) > 0


def test_batches_are_made_of_the_clusters_in_force_where_an_epoch_begins(job, tmp_path):
    """36 queries, 9 a batch: 4 steps an epoch. Version 0 has no clusters, version 1 does, from step 2."""
    of_query = np.random.default_rng(0).permutation(np.repeat(np.arange(12), 3))

    def publish(version, mined_at, clusters):
        rows = np.arange(37), np.arange(36), np.zeros(36)
        publish_negatives(job.run.folder, version, *rows, {"checkpoint_step": mined_at}, clusters=clusters)

    job = replace(
        job,
        batch=BatchSettings(queries=9, clusters="mined"),
        negatives=NegativesSettings(
            per_query=0, schedule=(ScheduleEntry(checkpoint=2, step=2), ScheduleEntry(checkpoint=2, step=6))
        ),
        optim=OptimSettings(steps=12, lr=1e-3),
        checkpoint=CheckpointSettings(every_steps=2, keep=9),
    )
    publish(0, None, None)
    publish(1, 2, of_query)
    publish(2, 2, of_query[::-1].copy())
    train(job, world_of())
    keys = [line["batch_key"] for line in lines(job) if "loss" in line]
    assert len(set(keys)) == 12

    def keys_of(epoch, clusters):
        order = Order(0, 9, (SourceOrder(0, 36, 9),), clusters=clusters)
        return [xxhash.xxh3_64_hexdigest(step_parts(order, step)[0].rows.tobytes()) for step in range(4 * epoch, 4 * epoch + 4)]

    assert keys == keys_of(0, None) + keys_of(1, Clusters(of_query, 1)) + keys_of(2, Clusters(of_query[::-1], 2))
    # Resumed inside the second epoch, with other clusters in force: its batches stay.
    again = replace(job, run=replace(job.run, folder=tmp_path / "again"))
    again = replace(again, negatives=NegativesSettings(per_query=0))
    shutil.copytree(job.run.folder, again.run.folder)
    for folder in versions(again.run.folder / "checkpoints")[-3:]:
        shutil.rmtree(folder)
    (again.run.folder / "logs" / "metrics.jsonl").unlink()
    assert train(again, world_of()).step == 12
    resumed = [line["batch_key"] for line in lines(again) if "loss" in line]
    assert len(resumed) == 6 and resumed == keys[-len(resumed) :]


def test_weights_that_break_end_the_run_and_name_a_text_and_the_last_good_checkpoint(job, tmp_path, monkeypatch):
    def update_and_break(run):
        norm = update(run)
        if run.state.step == 2:
            next(iter(run.state.parallel.trained().values())).data.fill_(torch.nan)
        return norm

    monkeypatch.setattr(trainer.train, "update", update_and_break)
    with pytest.raises(
        MustNotGoOn, match=r"step 3: the embedding of query 0 .*\(id 'q\d+'\).*last good checkpoint is .*step-00000002"
    ):
        train(job, world_of())
    broken = write_tiny_encoder(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][3, 0] = torch.inf
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    job = replace(job, run=replace(job.run, folder=tmp_path / "new"), model=ModelSettings(name=str(broken)))
    with pytest.raises(InputError, match=r"broken are not finite \(parameter\.model\.embeddings\.word_embeddings\.weight\); set"):
        train(job, world_of())


@pytest.mark.parametrize(
    "changes", [{"towers": "two"}, {"lora_rank": 2}, {"pooling": "latent", "latents": 8}, {"projection": 16}], ids=str
)
def test_every_kind_of_encoder_trains_and_comes_out(job, changes):
    job = replace(job, model=replace(job.model, **changes), loss=LossSettings(widths=(16, 8), learn_temperature=True))
    outcome = train(job, world_of())
    losses = [line["loss"] for line in lines(job) if "loss" in line]
    assert all(np.isfinite(losses)) and outcome.evaluations["trained"] != outcome.evaluations["untrained"]
    encoder, *_ = load_encoder(ModelSettings(name=str(final(job).encoder_folder)))
    assert encoder.has_two_towers == ("towers" in changes)
