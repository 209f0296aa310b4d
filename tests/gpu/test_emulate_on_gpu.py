"""One rank among many on a GPU: what the loss holds there, to the allocator's byte, beside the plan."""

from dataclasses import replace

import pytest
import torch

from gradcache import InfoNCE, LossOptions
from gradcache.loss_memory import LossSizes, loss_bytes
from launch.bench.mirrored import Mirrors, fake_world
from launch.bench.stage import make_stage
from launch.bench.step_costs import StepCosts
from launch.bench.turns import free_memory

pytestmark = pytest.mark.gpu

QUERIES, WIDTH = 64, 768


@pytest.mark.parametrize("gather", ["queries", "passages"])
@pytest.mark.parametrize("num_ranks", [64, 512])
def test_the_loss_of_one_of_many_ranks_holds_what_is_foreseen_of_a_gpu(gather, num_ranks):
    device = torch.device("cuda:0")
    options = LossOptions(objective=InfoNCE(), gather=gather, keep_scores_gib=0.5)
    sizes = LossSizes(
        queries=num_ranks * QUERIES, passages=num_ranks * QUERIES * 2, width=WIDTH, num_ranks=num_ranks, is_even=True
    )
    said = loss_bytes(replace(options, product_dtype=torch.bfloat16), sizes, device, 2**33).total
    with fake_world(num_ranks, device) as world:
        stage = make_stage(QUERIES, 2 * QUERIES, WIDTH, torch.bfloat16, device, world.group)
        free_memory(device)
        costs = StepCosts(device)
        with costs.of_step(), Mirrors(0, num_ranks, costs).in_place(), costs.phase("loss"):
            stage.loss(gather=gather, keep_scores_gib=0.5)
            held = torch.cuda.memory_allocated(device)
    peak = max(peak for name, peak in costs.peaks.items() if name != "others") - held
    assert 0.8 * peak <= said <= 1.5 * peak, f"{said / peak:.2f} of what it holds"
