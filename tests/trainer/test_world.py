"""What a launcher's environment says of a step's numbers, the job overrules, to the bit."""

import logging
import os

import pytest
import torch

from tests.gradcache.test_backends import LOSS, SETTINGS
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.ranks import run_ranks
from trainer.backends import parallelize
from trainer.job import OptimSettings, ParallelSettings
from trainer.world import contradictions, join_world, take_arithmetic

LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "false", "RANK": "0"}


def outputs_and_gradients(rank, environment):
    """Return what a step under DDP gives in the launcher's environment, what was said, and how the model is called."""
    from gradcache import Temperature, cached_step

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("trainer.world").addHandler(handler)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    world = join_world()
    encoder = TinyEncoder(0, 0.0).train()
    parallel = parallelize(encoder, world, ParallelSettings(), OptimSettings())
    batch = make_batch(rank, 4, [parallel.module])
    temperature = Temperature(0.1, learnable=True)
    result = cached_step(
        batch, temperature=temperature, sync=parallel.sync, group=world.group, keep_graphs=1, loss=LOSS, **SETTINGS
    )
    kept = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    return result.loss, parallel.full_gradients(), said, kept


@pytest.fixture(scope="module")
def wanted():
    return run_ranks(outputs_and_gradients, 2, {})


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            'the environment says ACCELERATE_MIXED_PRECISION=bf16 and the job precision.encode="fp32"; the job decides',
        ),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "the environment says ACCELERATE_DYNAMO_BACKEND=AOT_EAGER and the job model.compile=false; the job decides",
        ),
    ],
)
def test_a_launchers_arithmetic_changes_no_bit_and_is_said_once(wanted, environment, sentence):
    found = run_ranks(outputs_and_gradients, 2, environment)
    for (loss, gradients, _, kept), (wanted_loss, wanted_gradients, *_) in zip(found, wanted, strict=True):
        assert loss == wanted_loss and not kept
        assert any(bool(g.any()) for g in wanted_gradients.values())
        for name, gradient in wanted_gradients.items():
            assert torch.equal(gradients[name], gradient), name
    assert found[0][2] == [sentence] and found[1][2] == []


@pytest.mark.parametrize(
    ("environment", "clauses"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, []),
        ({"ACCELERATE_MIXED_PRECISION": "bf16", "NVIDIA_TF32_OVERRIDE": "1", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, []),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, ['ACCELERATE_MIXED_PRECISION=fp8 and the job precision.encode="bf16"']),
        ({"NVIDIA_TF32_OVERRIDE": "0"}, ["NVIDIA_TF32_OVERRIDE=0 and the job precision.tf32=true"]),
        ({"ACCELERATE_DOWNCAST_BF16": "true", "ACCELERATE_FP8_BACKEND": "TE", "ACCELERATE_USE_MEGATRON_LM": "true"}, []),
    ],
)
def test_only_what_the_job_does_not_ask_for_is_said_and_all_of_it_is_taken_away(environment, clauses):
    given = LAUNCHED | environment
    assert contradictions(take_arithmetic(given), "bf16", tf32=True, compiles=True) == clauses
    assert given == {"ACCELERATE_USE_CPU": "false", "RANK": "0"}
