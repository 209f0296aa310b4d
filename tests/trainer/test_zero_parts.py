"""Several parts in one update under DeepSpeed: the weighted sum of the parts' references, whatever the stage."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.gradcache.test_backends import build
from tests.gradcache.test_parts import TWO_RANKS, expected, take_parts
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks
from trainer.backends import parallelize
from trainer.job import OptimSettings, ParallelSettings

pytest.importorskip("deepspeed", reason="pip install 'negpool[deepspeed]'")

CASES = [  # settings, kept graphs
    (ParallelSettings(backend="zero0"), 2),
    (ParallelSettings(backend="zero1"), 0),
    (ParallelSettings(backend="zero2"), "all"),
    (ParallelSettings(backend="zero3"), 2),
    (ParallelSettings(backend="zero2", reduce="chunk"), 0),
    (ParallelSettings(backend="zero3", reduce="chunk"), 2),
]


def two_steps_of_each(rank, rows):
    """Return the losses and gradients of two steps for each case: the second one meets what the first has left behind."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(len(rows[0])))
    world = SimpleNamespace(device=torch.device("cpu"), group=dist.group.WORLD)
    found = []
    for settings, keep_graphs in CASES:
        (encoder,), temperature = build(1)
        parallel = parallelize(encoder, world, settings, OptimSettings())
        for _ in range(2):
            temperature.zero_grad(set_to_none=True)
            losses = take_parts(rank, rows, [parallel.module], temperature, parallel.sync, dist.group.WORLD, keep_graphs)
            gradients = {f"tower0.{name}": gradient for name, gradient in parallel.full_gradients().items()}
            found.append((losses, {"temperature.log_scale": temperature.log_scale.grad.clone(), **gradients}))
            parallel.clear_gradients()
    return found


def test_the_gradient_of_several_parts_under_deepspeed_is_the_weighted_sum_of_their_references():
    for found in run_ranks(two_steps_of_each, 2, TWO_RANKS, timeout_s=300):
        for number, (losses, gradients) in enumerate(found):
            settings, _ = CASES[number // 2]
            wanted_losses, wanted = expected(TWO_RANKS, 1, settings.backend == "zero3" or settings.reduce == "chunk")
            assert losses == pytest.approx(wanted_losses, rel=1e-5), settings
            try:
                assert_same_gradients(gradients, wanted)
            except AssertionError as error:
                raise AssertionError(f"{settings}, step {number % 2}: {error}") from error
