"""DeepSpeed on real ranks, every stage: the reference's gradients, whatever waits for a reduction and wherever it is."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from gradcache import cached_step, reference_step
from tests.gradcache.test_backends import LOSS, SETTINGS, build, full_gradients, make_batch
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks
from trainer.backends import parallelize
from trainer.errors import InputError
from trainer.job import OptimSettings, ParallelSettings

pytest.importorskip("deepspeed", reason="pip install 'negpool[deepspeed]'")

CASES = [  # settings, kept graphs
    (ParallelSettings(backend="zero0"), 2),
    (ParallelSettings(backend="zero1"), 0),
    (ParallelSettings(backend="zero2"), 2),
    (ParallelSettings(backend="zero3"), 0),
    (ParallelSettings(backend="zero3"), "all"),
    (ParallelSettings(backend="zero2", reduce="chunk"), "all"),
    (ParallelSettings(backend="zero3", reduce="chunk"), 2),
    (ParallelSettings(backend="zero1", offload=True), 2),
    (ParallelSettings(backend="zero2", offload=True), 0),
    (ParallelSettings(backend="zero3", offload=True), 2),
]


def two_steps_of_each(rank, rows):
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(len(rows)))
    world = SimpleNamespace(device=torch.device("cpu"), group=dist.group.WORLD)
    found = []
    for settings, keep_graphs in CASES:
        (encoder,), temperature = build(1)
        parallel = parallelize(encoder, world, settings, OptimSettings())
        for seed in range(2):
            temperature.zero_grad(set_to_none=True)
            result = cached_step(
                make_batch(rank, rows[rank], [parallel.module], seed=seed),
                temperature=temperature,
                sync=parallel.sync,
                group=dist.group.WORLD,
                keep_graphs=keep_graphs,
                loss=LOSS,
                **SETTINGS,
            )
            gradients = {f"tower0.{name}": gradient for name, gradient in parallel.full_gradients().items()}
            found.append((result.loss, {"temperature.log_scale": temperature.log_scale.grad.clone(), **gradients}))
            parallel.clear_gradients()
    return found


@pytest.mark.parametrize("rows", [(5, 3), (0, 4), (3, 0, 1)])
def test_gradients_under_deepspeed_are_the_references(rows):
    wanted = {}
    for equal_chunks in (False, True):
        for seed in range(2):
            encoders, temperature = build(1)
            batches = [make_batch(rank, n, encoders, seed=seed) for rank, n in enumerate(rows)]
            loss = reference_step(batches, temperature=temperature, equal_chunks=equal_chunks, loss=LOSS, **SETTINGS)
            wanted[equal_chunks, seed] = loss, full_gradients(encoders, temperature)
    for found in run_ranks(two_steps_of_each, len(rows), rows, timeout_s=300):
        for number, (loss, gradients) in enumerate(found):
            settings, _ = CASES[number // 2]
            wanted_loss, wanted_gradients = wanted[settings.backend == "zero3" or settings.reduce == "chunk", number % 2]
            assert loss == pytest.approx(wanted_loss, rel=1e-5), settings
            try:
                assert_same_gradients(gradients, wanted_gradients)
            except AssertionError as error:
                raise AssertionError(f"{settings}: {error}") from error


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(InputError, match="saves nothing"):
        ParallelSettings(backend="ddp", reduce="chunk")
    with pytest.raises(InputError, match=r"needs parallel\.backend zero1"):
        ParallelSettings(backend="fsdp2", offload=True)
