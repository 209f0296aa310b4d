"""Checkpoints: `encoder/` for the miner and for people, `state/` for resume, one manifest, one rename.

Under DDP rank 0 holds everything and writes alone; the others go on to the next step and wait for it there.
"""

import json
from pathlib import Path

import safetensors.torch

from trainer.encoder.model import Traits, save_encoder, weights_digest
from trainer.handoff.manifest import prune, publish_version, write_latest
from trainer.handoff.weights import Checkpoint, checkpoint_name, checkpoints_folder
from trainer.state import TrainState


def save_checkpoint(run: Path, state: TrainState, tokenizer, traits: Traits, fields: dict) -> Path:
    """Publish the state after `state.step` and point LATEST at it; return the folder. Rank 0 only.

    fields: JSON values for the manifest: data_digest, is_final, …
    """

    def write(folder: Path) -> None:
        (folder / "encoder").mkdir()
        save_encoder(folder / "encoder", state.encoder, tokenizer, traits)
        (folder / "state").mkdir()
        safetensors.torch.save_file(state.tensors(), folder / "state" / "tensors.safetensors")
        (folder / "state" / "trainer.json").write_text(json.dumps(state.values()))

    folder = checkpoints_folder(run) / checkpoint_name(state.step)
    publish_version(folder, write, {"step": state.step, "weights_digest": weights_digest(state.encoder), **fields})
    write_latest(folder.parent, folder.name)
    return folder


def load_checkpoint(checkpoint: Checkpoint, state: TrainState) -> None:
    """Take over counters, optimizer, schedule and temperature of a verified checkpoint, on every rank.

    The encoder's weights come with `load_encoder(checkpoint.encoder_folder)`.
    """
    tensors = safetensors.torch.load_file(checkpoint.folder / "state" / "tensors.safetensors")
    state.load(tensors, json.loads((checkpoint.folder / "state" / "trainer.json").read_text()))


def prune_checkpoints(run: Path, keep: int, needed_steps: set[int]) -> list[Path]:
    """Delete all but the newest `keep`, the pinned ones and those that a fixed schedule still mines."""
    needed = {checkpoint_name(step) for step in needed_steps}
    return prune(checkpoints_folder(run), keep, lambda folder: folder.name in needed)
