"""What surrounds a step on a GPU: the profile's share of time, and the allocator's segments."""

import gzip
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from launch.allocator import GROWING, NAMES
from tests.trainer.worlds import world_of
from trainer.profile import TorchProfile

pytestmark = pytest.mark.gpu


def share_of(folder, wait_s):
    """Profile two steps that wait, then multiply, with no word to the device at their end; return the share and kernels."""
    told, world = [], replace(world_of(), device=torch.device("cuda", 0))
    square = torch.randn(4096, 4096, device="cuda")
    square @ square  # loads the kernel
    profile = TorchProfile(range(1, 3), world, folder, lambda step, values: told.append(values))
    for number in (1, 2):
        profile.before_step(number)
        time.sleep(wait_s)
        for _ in range(50):
            square @ square
        profile.after_step(number)
    with gzip.open(folder / "profile-rank0.json.gz") as file:
        kernels = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "kernel"]
    (values,) = told
    return values["profile/gpu_busy_share"], kernels


def test_a_gpu_that_waits_for_the_host_shows_in_the_share(tmp_path):
    busy, kernels = share_of(tmp_path / "busy", 0.0)
    assert len(kernels) >= 100, "the trace shows what ran on the GPU"
    idle, _ = share_of(tmp_path / "idle", 5 * sum(kernel["dur"] for kernel in kernels) / 1e6)
    assert 0 < idle < 0.5 < busy <= 1


def test_the_allocators_segments_grow():
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | GROWING
    code = (
        "import torch; torch.zeros(1, device='cuda'); "
        "print(torch.cuda.memory._snapshot()['allocator_settings']['expandable_segments'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
