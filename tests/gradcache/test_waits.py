"""How often the host would wait for a GPU in a step: where, and however many chunks, tiles, blocks, widths and ranks it has."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, InfoNCE, LossOptions, NoSync, Temperature, blocks, cached_step, contrastive_loss
from gradcache.objectives import CACR, AdaptiveMargins, AlignmentUniformity
from tests.gradcache.objectives.test_interface import Distilled, Encoder, candidates, make_batch, own_only, weights
from tests.pretended import Waits, on_device, put_on_device
from tests.ranks import run_ranks

AGREE, MASKS, SIBLINGS = {"agree.agree": 1}, {"masks.relate": 1}, {"siblings.siblings_of": 1}
OBJECTIVES_BY_NAME = {
    "info_nce": lambda: InfoNCE(),
    "info_nce_multi": lambda: InfoNCE(positives="mean"),
    "margins": AdaptiveMargins,
    "uniformity": AlignmentUniformity,
    "CACR": CACR,
    "distilled": Distilled,
}
SIZES = [
    (None, 2**20, 100, "all"),
    (8, 2**20, 7, 1),
    (8, 16, 3, 0),
]  # rows of a tile, bytes of a block, tokens of a chunk, graphs


def waits_of_steps(rank, num_ranks, names, gather, **options):
    """Return where a step would wait, and how much else it does, for each objective and each of the sizes."""
    group, found = dist.group.WORLD if num_ranks > 1 else None, []
    for name, (tile_rows, block_bytes, chunk_tokens, keep_graphs) in itertools.product(names, SIZES):
        blocks.BLOCK_BYTES["cpu"] = block_bytes
        encoder = Encoder(0)
        called = DistributedDataParallel(encoder, broadcast_buffers=False) if group else encoder
        extras = {"candidates": candidates, "own_only": own_only} if name == "distilled" else {}
        batch = make_batch(rank, 12 + rank, lambda inputs, call=called: on_device(call(inputs)), query_values=weights, **extras)
        temperature = put_on_device(Temperature(0.2, learnable=True).double())
        loss = LossOptions(
            objective=OBJECTIVES_BY_NAME[name](), symmetric=True, same_side=True, gather=gather, tile_rows=tile_rows, **options
        )
        with Waits() as seen:
            result = cached_step(
                batch, loss=loss, temperature=temperature, sync=DDPSync(called) if group else NoSync(), group=group,
                chunk_tokens=chunk_tokens, keep_graphs=keep_graphs, seed=0, step=0,
            )  # fmt: skip
        assert result.loss != 0 and temperature.log_scale.grad is not None
        found.append((name, dict(seen.places), seen.num_others))
    return found


@pytest.fixture(autouse=True)
def _block_bytes(monkeypatch):
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", blocks.BLOCK_BYTES["cpu"])


@pytest.mark.parametrize("gather", ["passages", "queries"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_host_waits_for_what_the_ranks_agree_on_and_for_the_masks_alone(num_ranks, gather):
    if num_ranks == 1:
        found_of_ranks = [waits_of_steps(0, 1, list(OBJECTIVES_BY_NAME), gather)]
    else:
        found_of_ranks = run_ranks(waits_of_steps, 2, 2, ["info_nce_multi", "uniformity"], gather)
    for found in found_of_ranks:
        for name, of_name in itertools.groupby(found, lambda each: each[0]):
            _, waits, others = zip(*of_name, strict=True)
            wanted = AGREE | MASKS | (SIBLINGS if name in ("info_nce_multi", "CACR") else {})
            assert all(each == wanted for each in waits), (name, waits)
            assert others[0] < others[1] < others[2], "more chunks and tiles, and more blocks"


def test_more_widths_and_text_terms_bring_no_wait():
    of_one, of_three = (
        waits_of_steps(0, 1, ["info_nce", "info_nce_multi"], "queries", **options) for options in ({}, {"widths": (6, 4, 2)})
    )
    assert [waits for _, waits, _ in of_one] == [waits for _, waits, _ in of_three]
    assert all(few[2] < many[2] for few, many in zip(of_one, of_three, strict=True))


def test_the_counter_sees_a_wait_and_a_tensor_of_the_host():
    values = on_device(torch.arange(3.0))
    for read in (float, int, bool):
        with Waits() as seen:
            read(values[0])
        assert sum(seen.places.values()) == 1, read
    reads = [
        lambda: values.tolist(),
        lambda: values.cpu(),
        lambda: values[values > 1],
        lambda: (values * 2).nonzero(),
        lambda: torch.arange(3, device=values.device).repeat_interleave(values.to(torch.int64)),
        lambda: torch.arange(3).to(values.device),
        lambda: torch.tensor([1.0], device=values.device),
        lambda: torch.zeros(2, device=values.device).unique(),
    ]
    for number, read in enumerate(reads):
        with Waits() as seen:
            read()
        assert sum(seen.places.values()) == 1, number
    with Waits() as seen:
        values.sum(), torch.arange(3).to(values.device, non_blocking=True) + values, values.to("cpu", non_blocking=True).tolist()
    assert not seen.places
    with Waits(), pytest.raises(AssertionError, match="mixes tensors of the host"):
        values[torch.arange(2)]


def test_a_loss_in_a_loop_of_ones_own_waits_as_a_step_does():
    query, passage = (on_device(torch.randn(n, 4, generator=torch.Generator().manual_seed(n))).requires_grad_() for n in (5, 9))
    with Waits() as seen:
        contrastive_loss(query, passage, temperature=put_on_device(Temperature(0.1)), group=None).backward()
    assert seen.places == AGREE | MASKS, seen.places
    assert bool(query.grad.any())
