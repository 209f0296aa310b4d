"""A chunk that does not fit is halved, or its graph goes to the host: the same step, the same gradient, said aloud.

The encoder here runs out of memory above a number of tokens, as a GPU does; everything else is real.
"""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, NoSync, Temperature, cached_step, reference_step
from gradcache.plan import plan_encoding
from tests.gradcache.test_backends import LOSS, SETTINGS, full_gradients
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks

WHOLE = SETTINGS | {"loss": LOSS, "chunk_tokens": 44, "keep_graphs": 0}


class Limited:
    """An encoder on a device of little memory."""

    def __init__(self, encoder, without_graph=10**9, with_graph=10**9, backward=10**9):
        self.encoder, self.limits, self.backward = encoder, (without_graph, with_graph), backward
        self.refused = 0

    def __call__(self, inputs):
        tokens = inputs["input_ids"].numel()
        on_host = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        if tokens > self.limits[torch.is_grad_enabled()] and not (on_host and torch.is_grad_enabled()):
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        embedding = self.encoder(inputs)
        if embedding.requires_grad and tokens > self.backward and not on_host:
            embedding.register_hook(self._fail)
        return embedding

    def _fail(self, gradient):
        self.refused += 1
        raise torch.OutOfMemoryError("CUDA out of memory.")


def step(limited, dropout, batch_seed=0, **options):
    encoder, temperature = TinyEncoder(0, dropout).train(), Temperature(0.1, learnable=True)
    called = Limited(encoder, **limited)
    batch = make_batch(0, 6, [called], seed=batch_seed)
    result = cached_step(batch, temperature=temperature, sync=NoSync(encoder), group=None, **WHOLE | options)
    return called, result, full_gradients([encoder], temperature)


def wanted(dropout):
    encoder, temperature = TinyEncoder(0, dropout).train(), Temperature(0.1, learnable=True)
    options = {key: value for key, value in WHOLE.items() if key != "keep_graphs"}
    reference_step([make_batch(0, 6, [encoder])], temperature=temperature, **options)
    return full_gradients([encoder], temperature)


@pytest.mark.parametrize("dropout, remedy", [(0.0, "encoded again in halves"), (0.2, "goes to the host")])
def test_a_graph_that_does_not_fit_gives_the_same_gradient(dropout, remedy, caplog):
    called, _, found = step({"with_graph": 20}, dropout)
    assert called.refused > 1 and remedy in caplog.text
    assert_same_gradients(found, wanted(dropout))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_backward_that_does_not_fit_gives_the_same_gradient(dropout):
    chunks = plan_encoding(make_batch(0, 6, [None]).towers, WHOLE["chunk_tokens"], 3, 7, 0).chunks
    smallest = chunks[-1].num_padded_tokens
    called, _, found = step({"backward": max(20, smallest)}, dropout)
    assert called.refused >= 1
    assert_same_gradients(found, wanted(dropout))


def test_before_the_loss_a_chunk_is_halved_and_the_step_says_so(caplog):
    called, result, found = step({"without_graph": 30, "with_graph": 30}, 0.0)
    assert called.refused and result.num_halved > 0 and "is halved" in caplog.text
    assert_same_gradients(found, wanted(0.0))


def halve_on_one_rank(rank):
    encoder = TinyEncoder(0, 0.0).train()
    called = Limited(encoder, **({"without_graph": 30, "with_graph": 30} if rank else {}))
    module = DistributedDataParallel(encoder, broadcast_buffers=False)
    batch = make_batch(rank, 6, [called])
    options = {"temperature": Temperature(0.1, learnable=True), "sync": DDPSync(module), "group": dist.group.WORLD}
    result = cached_step(batch, **options, **WHOLE)
    return called.refused, result.num_halved


def test_all_ranks_hear_of_a_chunk_that_one_has_halved():
    (refused_here, here), (refused_there, there) = run_ranks(halve_on_one_rank, 2)
    assert not refused_here and refused_there and here == there > 0


def test_kept_graphs_are_given_up_first(caplog):
    _, result, found = step({"with_graph": 20}, 0.0, keep_graphs="all")
    assert "is not kept" in caplog.text and result.share_encoded_twice > 0
    assert_same_gradients(found, wanted(0.0))


def test_one_text_that_does_not_fit_is_a_sentence():
    with pytest.raises(torch.OutOfMemoryError, match="set chunk_tokens lower"):
        step({"without_graph": 5, "with_graph": 5}, 0.0)


def test_gradients_of_earlier_steps_are_never_lost():
    encoder, temperature = TinyEncoder(0, 0.0).train(), Temperature(0.1, learnable=True)
    called = Limited(encoder, backward=20)
    for parameter in encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(torch.OutOfMemoryError, match="set chunk_tokens lower"):
        cached_step(make_batch(0, 6, [called]), temperature=temperature, sync=NoSync(encoder), group=None, **WHOLE)
