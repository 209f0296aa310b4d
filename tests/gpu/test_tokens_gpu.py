"""Chunks' inputs are made on a GPU as on a CPU, and the host never waits for them."""

import pytest
import torch

from tests.trainer.encoder.test_step_tokens import chunks_of, step_of, tables  # noqa: F401 - tables is a fixture

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
