"""What `negpool bench gpu` reads off a GPU that a CPU cannot show: waits of the host, and kernels in a profile."""

import pytest
import torch

from launch.bench.busy import busy_share, count_waits
from launch.bench.turns import fits, free_memory
from trainer.world import stay_alone

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    return torch.device("cuda:0")


def test_reading_a_number_back_is_a_wait_and_computing_it_is_none(device):
    numbers = torch.ones(1000, device=device)
    assert count_waits(lambda: numbers.sum(), device) == 0
    assert count_waits(lambda: [numbers.sum().item() for _ in range(3)], device) == 3
    assert count_waits(lambda: torch.cuda.synchronize(device), device) == 1
    assert torch.cuda.get_sync_debug_mode() == 0, "as it was"


def test_a_profile_has_the_kernels_of_the_work(device):
    matrix = torch.randn(2048, 2048, device=device)
    share = busy_share(lambda: [matrix @ matrix for _ in range(20)], 2, device)
    assert share is not None and 0.0 < share <= 1.0


def test_what_does_not_fit_leaves_its_memory_behind_it(device):
    world = stay_alone(device)
    free_memory(device)
    before = torch.cuda.memory_reserved(device)

    def work():
        held = [torch.empty(2**28, dtype=torch.uint8, device=device)]
        held.append(torch.empty(torch.cuda.get_device_properties(device).total_memory, dtype=torch.uint8, device=device))

    assert not fits(work, world)
    assert torch.cuda.memory_reserved(device) == before
