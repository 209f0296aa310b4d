"""Gates for versions of torch stand in one module."""

import re
import warnings
from pathlib import Path

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradcache import gates
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
GATE = re.compile(r'filterwarnings|hasattr\((torch|dist)\b|getattr\((torch|dist), "')


def test_no_other_module_has_a_gate():
    files = [file for package in ("gradcache", "trainer", "mining", "launch") for file in (ROOT / package).rglob("*.py")]
    found = {file.name for file in files for line in file.read_text().splitlines() if GATE.search(line)}
    assert found == {"gates.py"}, "gradcache/gates.py is their place"


def warned_of(rank):
    module = nn.Linear(2, 2)
    with warnings.catch_warnings(action="error"):
        gates.quiet_torch()
        DistributedDataParallel(module, broadcast_buffers=False)
        values = module.weight.detach().flatten()
        gates.all_gather(values.new_empty(8), values, group=dist.group.WORLD)
        gates.reduce_scatter(values.new_empty(2), values, group=dist.group.WORLD)
    return True


def test_the_present_torch_warns_of_nothing_that_we_call():
    assert run_ranks(warned_of, 2) == [True, True]
