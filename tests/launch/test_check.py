"""`negpool check`: it must find what is wrong, not only pass what is right."""

import pytest
import torch

import launch.check
import trainer.encoder.attention
from launch.check import PACKED, check_here, compare, group_of
from launch.commands import app
from tests.tiny import write_tiny_dataset, write_tiny_encoder


@pytest.fixture(scope="module")
def job_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("check")
    write_tiny_dataset(root / "data")
    write_tiny_encoder(root / "encoder")
    path = root / "job.toml"
    path.write_text(
        f'[data]\npath = "{root}/data"\ncache = "{root}/cache"\n[model]\nname = "{root}/encoder"\n[batch]\nqueries = 6\n'
    )
    return path


@pytest.mark.parametrize(
    "override", ["loss.same_side=true", "loss.parameters.positives=mean", "model.checkpoint_activations=true"]
)
def test_exact_gradients_pass_whatever_the_job_asks_for(job_file, override):
    found = check_here(str(job_file), [override, "loss.symmetric=true", "negatives.per_query=2"], queries=6)
    assert found["ok"] and found["max_ratio_error"] <= 1e-4 and found["min_cosine"] >= 0.99999
    groups = found["variants"]["tiled"]["groups"]
    assert {"model.embeddings", "model.encoder.layer.0", "model.encoder.layer.1", "temperature"} <= groups.keys()


@pytest.mark.parametrize("override", ["towers=two", "lora_rank=2", "pooling=latent", "projection=8", "pooling=weighted_mean"])
def test_exact_gradients_pass_whatever_the_model_is_made_of(job_file, override):
    found = check_here(str(job_file), [f"model.{override}"], queries=6)
    assert found["ok"] and len(found["variants"]["tiled"]["groups"]) > 2
    assert found["variants"][PACKED]["groups"].keys() == found["variants"]["tiled"]["groups"].keys()
    if override == "towers=two":
        assert {"query.model.encoder.layer.0", "passage.model.encoder.layer.0"} <= found["variants"]["tiled"]["groups"].keys()


def test_texts_that_see_each_other_when_packed_are_found(job_file, monkeypatch):
    right = trainer.encoder.attention._padded

    def as_one_text(module, query, key, value, rows, *more):
        one = torch.tensor([0, query.shape[2]], dtype=torch.int32)
        return right(module, query, key, value, (one, query.shape[2], *rows[2:]), *more)

    monkeypatch.setattr(trainer.encoder.attention, "_padded", as_one_text)
    found = check_here(str(job_file), [], queries=6)
    assert not found["ok"] and found["variants"][PACKED]["min_cosine"] < 0.999 < found["variants"]["tiled"]["min_cosine"]


@pytest.mark.parametrize("wrong", ["temperature", "one layer"])
def test_a_gradient_that_is_off_in_one_group_is_exit_1(job_file, monkeypatch, capsys, wrong):
    right = launch.check.cached_step

    def off(batch, *, temperature, **options):
        result = right(batch, temperature=temperature, **options)
        if wrong == "temperature":
            temperature.log_scale.grad *= 1.001
        else:
            batch.towers[0].encode.model.encoder.layer[1].output.dense.weight.grad *= 1.01
        return result

    monkeypatch.setattr(launch.check, "cached_step", off)
    assert app(["check", str(job_file), "--queries", "6"], standalone_mode=False) == 1
    assert "The gradients are NOT those of the reference." in capsys.readouterr().out


def test_more_queries_than_there_are_is_one_sentence(job_file):
    with pytest.raises(launch.check.InputError, match=r"training queries; set batch\.queries lower"):
        check_here(str(job_file), ["batch.queries=500"], queries=500)


def test_nothing_to_compare_is_no_proof():
    some = {"a.0.weight": torch.ones(3)}
    with pytest.raises(ValueError, match="no gradient for a"):
        compare(some, {"a.0.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"a\.0\.weight has no gradient"):
        compare({}, some)


def test_what_cancels_is_judged_against_its_terms():
    def off(actual, expected):
        groups = {"temperature": torch.tensor(actual)}, {"temperature": torch.tensor(expected)}
        return compare(*groups, {"temperature": 0.2})["max_ratio_error"]

    assert off(1.0010e-3, 1e-3) == pytest.approx(5e-6)
    assert off(0.4, 0.2) == pytest.approx(1.0)
    assert off(-0.2002, -0.2) == pytest.approx(1e-3)


def test_groups_are_layers_and_what_stands_beside_them():
    names = ["model.encoder.layer.3.output.bias", "model.embeddings.norm.weight", "temperature"]
    assert [group_of(name) for name in names] == ["model.encoder.layer.3", "model.embeddings", "temperature"]
