"""Shards are seen on the GPU that encodes them, and no host waits for it in between."""

import numpy as np
import pytest
import torch

from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.encoder import encode
from trainer.encoder.encode import encode_rows
from trainer.encoder.missing import Texts
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.packed import packs
from trainer.encoder.settings import EncodeSettings
from trainer.encoder.shards import open_shards
from trainer.encoder.stream import stream_shards
from trainer.encoder.tokens import tokenize

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stored", ["fp16", "fp32"])
def test_shards_are_seen_on_the_gpu_as_they_stand_on_disk_and_the_host_runs_ahead(tmp_path, monkeypatch, stored):
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=str(write_tiny_encoder(tmp_path / "encoder"))))
    corpus = open_dataset(write_tiny_dataset(tmp_path / "data", num_queries=600), tmp_path / "cache").corpus
    tokens = tokenize(corpus, tokenizer, prefix="", max_tokens=32, cache=tmp_path / "cache")
    device = torch.device("cuda", torch.cuda.current_device())
    if not packs(encoder.to(device), device, torch.bfloat16):
        pytest.skip("needs a GPU that takes packed texts")
    monkeypatch.setattr(encode, "ENCODE_TOKENS_CUDA", 400)  # some batches a shard
    settings = EncodeSettings(dtype="bf16", stored=stored)
    shards = open_shards(tmp_path / "shards", "weights", "mean", tokens, encoder, "passage", settings)
    wanted = [encode_rows(encoder, tokens, shards.rows(shard), dtype=torch.bfloat16) for shard in range(shards.num_shards)]
    seen: dict[int, torch.Tensor] = {}
    torch.cuda.set_sync_debug_mode("error")
    try:
        owner_of_shard = stream_shards(Texts(shards, encoder, tokens), seen.__setitem__)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert owner_of_shard.tolist() == [0] * shards.num_shards and sorted(seen) == list(range(shards.num_shards)) and len(seen) > 5
    for shard, embedding_nD in seen.items():
        assert embedding_nD.device == device
        np.testing.assert_array_equal(embedding_nD.cpu().numpy(), shards.read(shard))
        np.testing.assert_array_equal(shards.read(shard), wanted[shard].astype(settings.stored_type))
