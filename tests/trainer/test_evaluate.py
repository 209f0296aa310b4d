"""The sharded evaluation equals ir-measures on the full score matrix, on any number of ranks, and encodes nothing twice."""

import dataclasses
import time
from datetime import timedelta

import ir_measures
import numpy as np
import pytest
import torch
import torch.distributed as dist

import trainer.evaluate
from tests.ranks import run_ranks
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.data.datasets import open_dataset
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.shards import Shards
from trainer.errors import InputError
from trainer.evaluate import MEASURES, Stopped, evaluate, measure


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_tiny_dataset(folder / "data", num_queries=300)  # several shards
    write_tiny_encoder(folder / "encoder")
    return folder


def run_evaluation(rank, root, shards, **options):
    data = open_dataset(root / "data", root / "cache")
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(root / "encoder")))
    return evaluate(world_of(rank), data, "test", encoder, tokenizer, traits, shards, **options)


def on_the_full_matrix(root, embed_tokens=None):
    data = open_dataset(root / "data", root / "cache")
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=str(root / "encoder")))

    def embed(texts):
        with torch.inference_mode():
            return (embed_tokens or encoder.eval())(tokenizer(list(texts), padding=True, return_tensors="pt"))

    rows = data.training_queries("test")
    scores = embed(data.queries.select(rows)["text"]) @ embed(data.corpus["text"]).T
    names = list(data.corpus["_id"])
    run = {str(q): dict(zip(names, row.tolist(), strict=True)) for q, row in zip(rows, scores, strict=True)}
    qrels: dict[str, dict[str, int]] = {}
    judged = data.qrels["test"]
    for query, passage, score in zip(judged.query_rows, judged.corpus_rows, judged.scores, strict=True):
        qrels.setdefault(str(query), {})[names[passage]] = int(score)
    values = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)
    return {name: values[measure] for name, measure in MEASURES.items()}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_figures_are_those_of_the_full_matrix(root, tmp_path, num_ranks):
    wanted = on_the_full_matrix(root)
    for found in run_ranks(run_evaluation, num_ranks, root, tmp_path):
        # Equal texts share a score to the last bit or nearly so; what order they take moves a figure a little.
        assert found == pytest.approx(wanted, abs=0.01)
    assert 0 < wanted["mrr@10"] < 1


def coarse(inputs, **options):
    """Embed texts in few whole numbers, so that their products are exact and most scores are shared by many."""
    mask_BL = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))  # none where nothing is padded
    count_BD = torch.nn.functional.one_hot(inputs["input_ids"] % 3, 3) * mask_BL[:, :, None]
    return (count_BD.sum(1) % 2).float()


def run_coarse(rank, root, shards):
    data = open_dataset(root / "data", root / "cache")
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(root / "encoder")))
    encoder.forward = coarse
    return evaluate(world_of(rank), data, "test", encoder, tokenizer, traits, shards)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ties_stand_as_ir_measures_puts_them_on_the_full_matrix(root, tmp_path, num_ranks):
    wanted = on_the_full_matrix(root, coarse)
    for found in run_ranks(run_coarse, num_ranks, root, tmp_path):
        assert found == wanted
    assert 0 < wanted["recall@100"] < 1, "the last of the hundred shares its score"


def test_a_rank_may_have_no_shard(tmp_path):
    write_tiny_dataset(tmp_path / "data")
    write_tiny_encoder(tmp_path / "encoder")
    alone, *_ = run_ranks(run_evaluation, 1, tmp_path, tmp_path / "alone")
    assert len(list(tmp_path.glob("alone/*/shard-*"))) == 2, "of queries and of passages"
    assert run_ranks(run_evaluation, 3, tmp_path, tmp_path / "three") == [alone] * 3


def health_of(rank, root, shards):
    found = []
    run_evaluation(rank, root, shards, on_health=found.append)
    return found


def test_rank_0_hears_of_the_health_of_what_was_evaluated(root, tmp_path):
    (alone,) = health_of(0, root, tmp_path / "alone")
    (first,), second = run_ranks(health_of, 2, root, tmp_path)
    assert second == [] and first.keys() == alone.keys()
    numbers = [name for name, value in alone.items() if isinstance(value, float)]
    assert [first[name] for name in numbers] == pytest.approx([alone[name] for name in numbers], rel=1e-3)
    data = open_dataset(root / "data", root / "cache")
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=str(root / "encoder")))

    def embed(texts):
        with torch.inference_mode():
            return encoder.eval()(tokenizer(list(texts), padding=True, return_tensors="pt"))

    judged = data.qrels["test"]
    cosines = (embed(data.queries[judged.query_rows]["text"]) * embed(data.corpus[judged.corpus_rows]["text"])).sum(1)
    assert alone["health/alignment"] == pytest.approx(2 - 2 * float(cosines.mean()), rel=1e-4)
    assert sum(alone["health/positive_score/counts"]) == len(cosines)
    assert sum(alone["health/hardest_negative_score/counts"]) == len(data.training_queries("test"))


def test_what_is_encoded_is_not_encoded_again_and_torn_shards_are(root, tmp_path, monkeypatch):
    first = run_evaluation(0, root, tmp_path)
    encoded = []
    original = Shards.embed
    monkeypatch.setattr(Shards, "embed", lambda self, shard, *rest: encoded.append(shard) or original(self, shard, *rest))
    assert run_evaluation(0, root, tmp_path) == first and encoded == []
    victim = next(tmp_path.glob("*/shard-000001/embeddings.npy"))
    victim.write_bytes(victim.read_bytes()[:-1])
    assert run_evaluation(0, root, tmp_path) == first and encoded == [1]


def test_an_evaluation_can_be_stopped_and_keeps_what_it_encoded(root, tmp_path):
    calls = []
    with pytest.raises(Stopped):
        run_evaluation(0, root, tmp_path, should_stop=lambda: len(calls) >= 2, on_progress=lambda *_: calls.append(1))
    assert len(list(tmp_path.glob("*/shard-*"))) == 1, "the second was begun"
    assert not list(tmp_path.glob("*/.lease-*"))


def evaluate_slowly(rank, root, shards):
    """Take longer for one shard, for one group of them, and for the measures than a collective waits."""
    limit_s, original = 1.5, Shards.embed
    world = dataclasses.replace(world_of(rank), control=dist.new_group(timeout=timedelta(seconds=limit_s)), timeout_s=limit_s)

    def embed(self, shard, batches, on_progress, *rest):
        for _ in range(5 if rank == 1 and self.num_rows > 128 and shard == 1 else 0):
            time.sleep(0.6)
            on_progress(0)
        return original(self, shard, batches, on_progress, *rest)

    def lease(self, shard):
        return plain_lease(self, shard) if (self.num_rows > 128 and shard == 1) == (rank == 1) else None

    plain_lease, Shards.lease, Shards.embed = Shards.lease, lease, embed

    def slow_health(found):
        time.sleep(3)

    data = open_dataset(root / "data", root / "cache")
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(root / "encoder")))
    return evaluate(world, data, "test", encoder, tokenizer, traits, shards, on_health=slow_health)


def test_a_rank_may_take_longer_than_a_collective_waits(root, tmp_path):
    first, second = run_ranks(evaluate_slowly, 2, root, tmp_path)
    assert first == second


def test_the_corpus_is_searched_on_the_jobs_device(root, tmp_path, monkeypatch):
    devices, plain = [], trainer.evaluate.top_k
    monkeypatch.setattr(trainer.evaluate, "top_k", lambda *args, device: devices.append(device) or plain(*args, device=device))
    run_evaluation(0, root, tmp_path)
    assert set(devices) == {world_of().device}


def test_an_absent_split_is_one_sentence(root, tmp_path):
    data = open_dataset(root / "data", root / "cache")
    with pytest.raises(InputError, match=r"has no qrels/final\.tsv, only dev, test, train"):
        data.training_queries("final")
    assert np.unique(data.qrels["test"].scores).tolist() == [1]


def test_a_fractional_grade_is_relevant(root):
    data = open_dataset(root / "data", root / "cache")
    rows = data.training_queries("test")
    qrels = data.qrels["test"]
    half = dataclasses.replace(data, qrels={"test": dataclasses.replace(qrels, scores=np.full(len(qrels.scores), 0.5))})
    ids = np.array([[data.positives(np.array([row]), "test")[1][0]] for row in rows])
    assert measure(half, "test", rows, np.ones((len(rows), 1), np.float32), ids)["mrr@10"] == 1
