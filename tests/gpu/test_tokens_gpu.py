"""Inputs are made on a GPU as on a CPU, and the host waits neither for them nor for each batch's embeddings."""

import numpy as np
import pytest
import torch

from tests.tiny import write_tiny_encoder
from tests.trainer.encoder.test_step_tokens import chunks_of, step_of, tables  # noqa: F401 - tables is a fixture
from trainer.encoder import encode
from trainer.encoder.encode import encode_rows
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.packed import packs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_inputs_on_a_gpu_are_those_of_a_cpu_and_keep_the_host_from_waiting(tables, is_packed, include_prompt):  # noqa: F811
    for seed in range(3):
        tokens, where = step_of(tables[include_prompt], seed, is_packed, torch.device("cuda", torch.cuda.current_device()))
        on_cpu, _ = step_of(tables[include_prompt], seed, is_packed)
        chunks = [*chunks_of(where, 60, is_packed), torch.empty(0, dtype=torch.int64)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [tokens.load(rows) for rows in chunks]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for inputs, rows in zip(found, chunks, strict=True):
            wanted = on_cpu.load(rows)
            assert inputs.keys() == wanted.keys()
            for name, values in wanted.items():
                assert inputs[name] == values if name == "longest" else inputs[name].cpu().equal(values), name


def test_the_host_waits_for_no_copy_while_packed_batches_are_encoded(tables, tmp_path, monkeypatch):  # noqa: F811
    encoder, *_ = load_encoder(ModelSettings(name=str(write_tiny_encoder(tmp_path / "encoder"))))
    table, device = tables[True][1], torch.device("cuda", torch.cuda.current_device())
    rows, counts = np.arange(len(table.lengths)), []
    exact = encode_rows(encoder, table, rows)
    if not packs(encoder.to(device), device, torch.bfloat16):
        pytest.skip("needs a GPU that takes packed texts")
    encode_rows(encoder, table, rows, dtype=torch.bfloat16)  # what the first call alone asks for is made
    monkeypatch.setattr(encode, "ENCODE_TOKENS_CUDA", 100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = encode_rows(encoder, table, rows, counts.append, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(counts) == -(-table.lengths.sum() // 100) and sum(counts) == len(rows)
    assert (found * exact).sum(1).min() > 0.99  # eight bits, once in every layer
