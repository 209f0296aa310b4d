"""What `negpool bench gpu` does on a GPU alone: waits of the host, kernels in a profile, a search and a refresh there."""

import pytest
import torch

from launch.bench import gpu_mining, shapes
from launch.bench.busy import busy_share, count_waits
from launch.bench.exact_search import SearchSize
from launch.bench.sizes import Sizes
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


def test_half_embeddings_are_searched_on_the_device():
    size = SearchSize(queries=512, passages=40_000, width=64, top_k=50, dtype=torch.float16)
    took, share = gpu_mining.search(Sizes(rounds=1, search=size))
    assert took.found > 0 and share.found > 0 and share.word == "of a product in fp16"


def test_a_refresh_stands_against_bare_encoding(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(shapes.SHAPES, "minilm", (2, 64, 2, 128))
    sizes = Sizes(model="minilm", max_tokens=64, refreshed=2000)
    took, share, rate = gpu_mining.refresh(sizes)
    assert took.what == "minilm, refresh, 2,000 x 100" and share.found > 0 and rate.found > 0
