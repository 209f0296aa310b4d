"""Checkpoints that hold NaN are passed over by whoever opens them whole, and never taken for the newest."""

import math

import pytest
import torch
from safetensors.torch import save_file

from trainer.errors import InputError
from trainer.handoff.manifest import publish_version, read_latest, versions, write_latest
from trainer.handoff.weights import ENCODER, checkpoint_name, newest_checkpoint, open_checkpoint
from trainer.last_good import newest_to_resume


def publish(run, step, state=1.0):
    """Publish a checkpoint with one number in each of its tensors' last places."""

    def write(folder):
        for name, value in (("encoder/model", 1.0), ("state/part-00000-of-00001", state)):
            (folder / name).parent.mkdir()
            tensors = {"whole": torch.ones(3), "broken": torch.tensor([1.0, value]), "none": torch.ones(0)}
            save_file(tensors | {"ids": torch.arange(3)}, folder / f"{name}.safetensors")

    folder = run / "checkpoints" / checkpoint_name(step)
    publish_version(folder, write, {"step": step})
    write_latest(folder.parent, folder.name)
    return folder


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_is_passed_over_and_named(tmp_path, broken):
    good, spoiled, said = publish(tmp_path, 1), publish(tmp_path, 2, state=broken), []
    assert newest_checkpoint(tmp_path, lambda torn: said.append(str(torn))).folder == good
    assert "broken in " in said[0] and "state/part-00000-of-00001.safetensors is not finite" in said[0]
    assert open_checkpoint(spoiled, ENCODER).step == 2, "the miner does not read it, and names a text"


def test_a_run_goes_on_from_the_newest_finite_checkpoint_and_forgets_the_others(tmp_path, caplog):
    good = publish(tmp_path, 1)
    publish(tmp_path, 2, state=math.nan), publish(tmp_path, 3, state=math.nan)
    assert newest_to_resume(tmp_path).folder == good
    assert caplog.text.count("checkpoint passed over: broken in") == 2
    assert versions(tmp_path / "checkpoints") == [good] and read_latest(tmp_path / "checkpoints") == good.name
    assert newest_to_resume(tmp_path / "nothing") is None


def test_a_run_without_a_finite_checkpoint_is_refused_and_kept(tmp_path):
    folder = publish(tmp_path, 2, state=math.nan)
    with pytest.raises(InputError, match=r"is not finite, and .* has no checkpoint that is; set run\.folder to a new folder"):
        newest_to_resume(tmp_path)
    assert versions(tmp_path / "checkpoints") == [folder]
