"""What a rank is said to hold, item by item, against what a real step, its update and its average allocate."""

from dataclasses import asdict, replace

import pytest
import torch

from gradcache import InfoNCE, LossOptions, Temperature, cached_step
from gradcache.loss_memory import LossSizes
from tests.allocator import Memory
from tests.gradcache.wide import Wide, wide_batch
from tests.trainer.worlds import world_of
from trainer.backends import parallelize
from trainer.budget import find_budget
from trainer.ema import build_average
from trainer.job import ChunkSettings, EmaSettings, OptimSettings, ParallelSettings, TrainJob
from trainer.step_memory import GIB, StepMemory, model_memory, step_memory

JOB = TrainJob(ema=EmaSettings(decay=0.9))
LOSS = LossOptions(objective=InfoNCE())
HIDDEN, PAIRS = 4096, 128


class Embedder(Wide):
    """One that says how wide its embeddings are."""

    width = 8


def test_weights_gradients_moments_and_average_are_counted_to_the_byte():
    with Memory() as memory:
        encoder = Embedder(HIDDEN)
    said = model_memory(encoder, JOB, 1, "cuda", is_first=True)
    assert memory.live == said.weights
    parallel = parallelize(encoder, world_of(), ParallelSettings(), OptimSettings())
    with Memory() as memory:
        build_average(parallel, JOB.ema).update()
        average = build_average(parallel, JOB.ema)
    assert memory.live == said.average, "one copy"
    encoder(torch.randn(4, 16)).sum().backward()
    with Memory() as memory:
        for parameter in encoder.parameters():
            parameter.grad = parameter.grad.clone()
        assert memory.live == said.gradients
        parallel.optimizer.step()
        update = memory.peak - said.gradients
        steps = 4 * sum(1 for _ in encoder.parameters())
        assert memory.live - said.gradients == said.optimizer + steps, "AdamW counts its steps beside"
    assert said.optimizer <= update <= 1.05 * said.optimizer, "a fused update takes nothing more"
    assert said.lasting == said.total - said.gradients and average.num_updates == 0


def test_a_step_within_the_budget_that_was_found_stays_within_the_memory_that_was_given(caplog):
    caplog.set_level("INFO", "trainer.budget")
    gib = 24 * 2**20 / GIB
    job = replace(JOB, chunk=ChunkSettings(memory_gib=gib))
    with Memory() as memory:
        encoder = Embedder(HIDDEN)
        parallel = parallelize(encoder, world_of(), ParallelSettings(), OptimSettings())
        average = build_average(parallel, job.ema)
        batch, temperature = wide_batch(encoder, PAIRS), Temperature(0.1)
        budget = find_budget(job, LOSS, batch, encoder, world_of())
        memory.peak = memory.live
        for _ in range(2):
            cached_step(
                batch, loss=LOSS, temperature=temperature, sync=parallel.sync, group=None, seed=0, step=0,
                chunk_tokens=budget.chunk_tokens, keep_graphs=budget.keep_graphs,
            )  # fmt: skip
            parallel.update(torch.amp.GradScaler("cpu", enabled=False))
            average.update()
    # The published copy is another process's part here.
    published = sum(p.nbytes for p in encoder.parameters())
    assert 0.5 * gib * GIB < memory.peak + published <= gib * GIB, "and makes use of it"
    said = next(record.getMessage() for record in caplog.records if "memory of a rank" in record.getMessage())
    assert "GiB of 0.02: " in said


def test_the_plan_names_its_items_in_plain_words():
    memory = StepMemory(
        weights=GIB, gradients=GIB, optimizer=2 * GIB, average=0, backend=0, published=0, embeddings=GIB // 4, tile=GIB, chunk=GIB
    )
    words = "weights 1.00, gradients 1.00, the optimizer 2.00, embeddings and their gradients 0.25, a tile of scores 1.00"
    assert str(memory) == f"{words}, a chunk's graph 1.00"
    assert memory.total == sum(asdict(memory).values()) and memory.lasting == 3 * GIB


@pytest.mark.parametrize(
    ("parallel", "weights", "gradients", "optimizer", "backend"),
    [
        (ParallelSettings(), 1, 1, 2, 1),
        (ParallelSettings(backend="fsdp2"), 1 / 4, 1 / 4, 1 / 2, 1),
        (ParallelSettings(backend="fsdp2", reduce="chunk"), 1 / 4, 1 / 4, 1 / 2, 0),
        (ParallelSettings(backend="zero1"), 1, 1, 1 / 2, 1 / 2),
        (ParallelSettings(backend="zero1", offload=True), 1, 1, 0, 0),
        (ParallelSettings(backend="zero3"), 1 / 4, 1 / 4, 1 / 2, 1 / 2),
    ],
    ids=lambda value: f"{value.backend} {value.reduce} {value.offload}" if isinstance(value, ParallelSettings) else "",
)
def test_a_backend_shards_what_it_shards(parallel, weights, gradients, optimizer, backend):
    encoder = torch.nn.Linear(1023, 1024)
    found = model_memory(encoder, TrainJob(parallel=parallel), 4, "cuda", is_first=True)
    assert [found.weights, found.gradients, found.optimizer, found.backend] == [
        int(share * 4 * 2**20) for share in (weights, gradients, optimizer, backend)
    ]
    assert model_memory(encoder, TrainJob(parallel=parallel), 4, "cpu", is_first=True).published == 4 * 2**20
    assert found.published == 0, "it lies in the host's memory"


def test_frozen_weights_have_neither_gradients_nor_moments():
    encoder = torch.nn.Linear(1023, 1024).requires_grad_(False)
    found = model_memory(encoder, JOB, 1, "cuda", is_first=True)
    assert found.total == found.weights == 4 * 2**20


def test_scores_are_kept_in_a_share_of_what_is_left():
    model = model_memory(torch.nn.Linear(1023, 1024), JOB, 1, "cuda", is_first=True)
    sizes = LossSizes(queries=2**14, passages=2**16, width=8, num_ranks=4)
    spread = replace(LOSS, gather="queries")
    found = step_memory(model, spread, sizes, torch.device("meta"), model.total + 2**28)
    assert found.kept_scores == 2**26
