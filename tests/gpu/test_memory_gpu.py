"""What a step and two processes take of a real GPU, against what is planned."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gradcache import InfoNCE, LossOptions, Temperature, cached_step
from gradcache.free import free_bytes
from tests.gradcache.wide import Wide, wide_batch
from tests.trainer.worlds import world_of
from trainer.backends import parallelize
from trainer.budget import find_budget
from trainer.encoder import fit
from trainer.encoder.gpu_share import GPU_SHARE
from trainer.job import ChunkSettings, OptimSettings, ParallelSettings, TrainJob
from trainer.step_memory import GIB

pytestmark = pytest.mark.gpu

# Takes a share, fills it in blocks of 64 MiB, says how many there were, and holds them until it is told to end.
SIDE = """
import os, sys, torch
from trainer.encoder import fit
from trainer.encoder.gpu_share import keep_to_share
keep_to_share(torch.device("cuda", 0), os.environ)
blocks = []
try:
    while True:
        blocks.append(torch.empty(2**26, dtype=torch.uint8, device="cuda"))
except torch.OutOfMemoryError:
    print(len(blocks), flush=True)
sys.stdin.read()
"""


def test_two_processes_on_one_gpu_get_their_shares_whoever_comes_first():
    torch.cuda.empty_cache()
    before, total = torch.cuda.mem_get_info()
    if before < 0.9 * total:
        pytest.skip(f"others hold {(total - before) / GIB:.1f} GiB of this GPU")
    sides = []
    try:
        for share in ("0.25", "0.5"):
            command = [sys.executable, "-c", f"import os\nos.environ['{GPU_SHARE}'] = '{share}'\n{SIDE}"]
            sides.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            taken = int(sides[-1].stdout.readline()) * 2**26
            assert 0.9 * float(share) * total - GIB < taken <= float(share) * total
        assert before - torch.cuda.mem_get_info()[0] <= 0.75 * total, "with what CUDA takes beside"
    finally:
        for side in sides:
            side.stdin.close()
            side.wait()
            side.stdout.close()


def test_what_is_free_counts_what_the_allocator_keeps():
    torch.cuda.empty_cache()
    before = free_bytes(torch.device("cuda", 0))
    block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert before - free_bytes(torch.device("cuda", 0)) == pytest.approx(2**28, abs=2**26)
    del block
    assert torch.cuda.memory_reserved() >= 2**28
    assert free_bytes(torch.device("cuda", 0)) == pytest.approx(before, abs=2**26)


class Embedder(Wide):
    """One that says how wide its embeddings are."""

    width = 8


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_two_updates_stay_within_the_memory_that_was_given(products):
    gib = 0.75
    loss = LossOptions(objective=InfoNCE(), product_dtype=products)
    job = TrainJob(chunk=ChunkSettings(memory_gib=gib))
    world = replace(world_of(), device=torch.device("cuda", 0))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    encoder = Embedder()
    parallel = parallelize(encoder, world, ParallelSettings(), OptimSettings())
    batch, temperature = wide_batch(encoder, device="cuda"), Temperature(0.1).cuda()
    budget = find_budget(job, loss, batch, encoder, world)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        cached_step(
            batch, loss=loss, temperature=temperature, sync=parallel.sync, group=None, seed=0, step=0,
            chunk_tokens=budget.chunk_tokens, keep_graphs=budget.keep_graphs,
        )  # fmt: skip
        parallel.update(torch.amp.GradScaler("cuda", enabled=False))
    # cuBLAS takes a workspace of up to 32 MiB for each stream, which no plan knows of.
    assert 0.3 * gib * GIB < torch.cuda.max_memory_allocated() - before <= gib * GIB + 2**26


def test_a_batch_of_texts_that_does_not_fit_a_gpu_is_halved(monkeypatch, caplog):
    monkeypatch.setattr(fit, "_fitting", {})
    encoder, device = Embedder().cuda(), torch.device("cuda", 0)
    rows, lengths = torch.randn(2048, 16), torch.ones(2048, dtype=torch.int64)

    def encode(chosen):
        return encoder(rows[chosen].cuda())

    with torch.inference_mode():
        wanted = torch.cat([encode(chosen) for chosen in torch.arange(2048).split(64)])
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 600 * 2**20) / total)
        try:
            found = fit.encode_fitting(encode, lengths, device)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert fit.halved_to() == 512 and caplog.text.count("does not fit") == 1, "a row takes a MiB"
