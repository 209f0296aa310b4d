"""`negpool merge` as a person types it: runs and checkpoints by their folders, one JSON object, one sentence."""

import json

import pytest
import torch
from typer.testing import CliRunner

from launch.commands import app
from launch.named import model_folder
from tests.tiny import write_tiny_encoder
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder
from trainer.errors import InputError
from trainer.handoff.manifest import publish_version, write_latest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with the checkpoints of steps 2 and 4."""
    root = tmp_path_factory.mktemp("merge")
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(write_tiny_encoder(root / "start"))))

    def write(folder):
        (folder / "encoder").mkdir()
        save_encoder(folder / "encoder", encoder, tokenizer, traits)

    for step in (2, 4):
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.01)
        publish_version(root / "run" / "checkpoints" / f"step-{step:08d}", write, {"step": step})
    write_latest(root / "run" / "checkpoints", "step-00000004")
    return root / "run"


def call(*words):
    return CliRunner().invoke(app, ["merge", *map(str, words)], standalone_mode=False)


def weight_of(folder):
    return load_encoder(ModelSettings(name=str(folder)))[0].model.embeddings.word_embeddings.weight


def test_a_run_is_its_newest_checkpoint_and_a_checkpoint_its_encoder(run):
    newest = run / "checkpoints" / "step-00000004"
    assert model_folder(str(run)) == model_folder(str(newest)) == str(newest / "encoder")
    assert model_folder("some/model") == "some/model"


def test_a_checkpoint_and_a_run_are_merged_by_weight(run, tmp_path):
    start = run.parent / "start"
    found = call(tmp_path / "out", run / "checkpoints" / "step-00000002", run, "--weights", "3,1", "--json")
    assert found.exception is None and found.return_value == 0, found.output
    assert json.loads(found.stdout)["how"] == "mean"
    torch.testing.assert_close(weight_of(tmp_path / "out"), weight_of(start) + 0.01 * (3 * 1 + 1 * 2) / 4)


def test_deltas_weigh_by_how_far_training_went(run, tmp_path):
    start = run.parent / "start"
    found = call(tmp_path / "out", run / "checkpoints" / "step-00000002", run, "--how", "delta", "--base", start)
    assert found.exception is None, found.output
    assert "2 models, merged by delta" in found.stdout
    # Moved by 1 and 2 hundredths: (1 * 1 + 2 * 2) / (1 + 2).
    torch.testing.assert_close(weight_of(tmp_path / "out"), weight_of(start) + 0.01 * 5 / 3)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--how", "median"], "--how median is unknown; expected mean or delta"),
        (["--weights", "2;1"], "--weights 2;1 are not numbers with commas between"),
        (["--weights", "1,2,3"], "3 weights"),
    ],
)
def test_a_request_that_cannot_be_used_is_one_sentence(run, tmp_path, words, sentence):
    found = call(tmp_path / "out", run, run, *words)
    assert isinstance(found.exception, InputError) and sentence in str(found.exception)


def test_a_torn_checkpoint_is_refused_by_its_file(run, tmp_path):
    publish_version(tmp_path / "torn", lambda folder: (folder / "encoder").mkdir(), {"step": 1})
    manifest = json.loads((tmp_path / "torn" / "manifest.json").read_text())
    manifest["files"]["encoder/model.safetensors"] = {"bytes": 1, "sha256": ""}
    (tmp_path / "torn" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"is not whole \(.*model\.safetensors is missing\)"):
        model_folder(str(tmp_path / "torn"))
