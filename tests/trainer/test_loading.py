"""A sharded model is never whole on a rank that does not read its files, and starts from the values that one rank would."""

import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from tests.ranks import run_ranks
from tests.tiny import VOCABULARY, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.backends import parallelize
from trainer.encoder.model import ModelSettings, load_encoder, weights_digest
from trainer.errors import InputError
from trainer.job import OptimSettings, ParallelSettings, TrainJob
from trainer.loading import is_empty, load, num_parameters, refuse_too_large
from trainer.parallel import fill_copy, take_weights

FSDP2 = ParallelSettings(backend="fsdp2")
MADE_OF = {
    "lora_rank": {"lora_rank": 2},
    "latent": {"pooling": "latent", "latents": 8},
    "projection": {"projection": 8, "towers": "two"},
}


def shared(rank, settings):
    """Return the model under FSDP2 as a run prepares it, and what was loaded."""
    world = world_of(rank)
    loaded = load(TrainJob(model=settings, parallel=FSDP2), world)
    assert is_empty(loaded.encoder)
    parallel = parallelize(loaded.encoder, world, FSDP2, OptimSettings())
    take_weights(parallel, loaded.plain, world)
    return parallel, loaded


def first_values(rank, folder):
    """Return the digests of a whole copy as an evaluation makes it, for each kind of model."""
    found = []
    for more in MADE_OF.values():
        parallel, loaded = shared(rank, ModelSettings(name=str(folder), **more))
        assert is_empty(loaded.plain) == (rank > 0)
        trained = {name for name, p in parallel.encoder.named_parameters() if p.requires_grad}
        whole = loaded.plain.to_empty(device="cpu")
        fill_copy(parallel, whole)
        buffers = {name: buffer.clone() for name, buffer in whole.named_buffers()}
        found.append((weights_digest(whole), trained, buffers))
    return found


def test_every_rank_starts_from_the_values_of_a_model_that_is_not_sharded(tmp_path):
    folder = write_tiny_encoder(tmp_path / "encoder")
    for found in run_ranks(first_values, 2, folder):
        for (digest, trained, buffers), more in zip(found, MADE_OF.values(), strict=True):
            wanted, *_ = load_encoder(ModelSettings(name=str(folder), **more))
            assert digest == weights_digest(wanted), more
            assert trained == {name for name, p in wanted.named_parameters() if p.requires_grad}
            for name, buffer in wanted.named_buffers():
                assert torch.equal(buffers[name], buffer), name


def memory_kib(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def growth(rank, folder):
    """Return the bytes of the model, and how much larger than before this process has been while it was shared out."""
    parallelize(load_encoder(ModelSettings(name=f"{folder}/small"))[0], world_of(rank), FSDP2, OptimSettings())  # libraries
    before = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    parallel, _ = shared(rank, ModelSettings(name=f"{folder}/large"))
    held = sum(p.to_local().nbytes for p in parallel.trained().values())
    return 4 * num_parameters(parallel.encoder), held, 1024 * (memory_kib("VmHWM") - before)


def test_a_rank_that_reads_no_files_holds_its_shard_and_little_more(tmp_path):
    write_tiny_encoder(tmp_path / "small")
    write_tiny_encoder(tmp_path / "large")
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "large")
    first, second = run_ranks(growth, 2, tmp_path)
    whole, held, grown = second
    assert whole > 100e6 and abs(held - whole / 2) < whole / 50
    assert grown < 0.8 * whole, f"{grown / 2**20:.0f} MiB for a shard of {held / 2**20:.0f}"
    assert first[2] > whole, "rank 0 has the copy that is published, and this test sees such a copy"


def test_a_model_that_no_device_holds_whole_is_refused_with_the_figures():
    refuse_too_large("large", 7 * 10**9, 80 * 2**30, 8)
    refuse_too_large("large", 7 * 10**9, 37 * 2**30, 8)
    with pytest.raises(InputError, match=r"model\.name='large' takes 26\.1 GiB whole.* beside 9\.8 GiB .* device has 24\.0 GiB"):
        refuse_too_large("large", 7 * 10**9, 24 * 2**30, 8)
