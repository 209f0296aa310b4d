"""How often the loss of a step would wait for a GPU does not depend on its tiles and blocks."""

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache import OBJECTIVES, LossOptions, NoSync, Temperature, blocks, cached_step
from gradcache.objectives.extensions import AdaptiveMargins, AlignmentUniformity
from tests.gradcache.objectives.test_extensions import Encoder, make_batch

# Operations whose result's size or value the host has to know.
WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero", "bincount")


class Waits(TorchDispatchMode):
    """Counts operations that wait for the device, and calls of all others."""

    def __init__(self):
        super().__init__()
        self.num_waits = self.num_others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(word in name for word in WAITING) or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            self.num_waits += 1
        else:
            self.num_others += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gather", ["passages", "queries"])
@pytest.mark.parametrize(
    "objective",
    [OBJECTIVES["info_nce_multi"], AdaptiveMargins(), AlignmentUniformity()],
    ids=lambda objective: type(objective).__name__,
)
def test_the_host_waits_once_a_step_and_not_once_a_tile_or_block(objective, gather, monkeypatch):
    counts = []
    for tile_rows, block_bytes in ((None, 2**20), (8, 2**20), (8, 16)):
        monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", block_bytes)
        options = LossOptions(objective=objective, symmetric=True, same_side=True, gather=gather, tile_rows=tile_rows)
        with Waits() as seen:
            cached_step(
                make_batch(0, 16, Encoder(0)), loss=options, temperature=Temperature(0.2).double(), sync=NoSync(), group=None,
                chunk_tokens=100, keep_graphs="all", seed=0, step=0,
            )  # fmt: skip
        counts.append((seen.num_waits, seen.num_others))
    waits, others = zip(*counts, strict=True)
    assert others[0] < others[1] < others[2], "more tiles, and more blocks"
    assert len(set(waits)) == 1, waits
