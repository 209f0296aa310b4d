"""FSDP2 as the trainer uses it: what its ranks gather, and that half precision is that of one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

from gradcache import Temperature, cached_step, reference_step
from tests.gradcache.test_backends import LOSS, SETTINGS, full_gradients
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks
from tests.trainer.worlds import world_of
from trainer.backends import parallelize
from trainer.errors import InputError
from trainer.job import OptimSettings, ParallelSettings, PrecisionSettings, TrainJob
from trainer.precision import DTYPES, encode_in
from trainer.step_memory import model_memory

ROWS = (5, 3)
NODE_ROWS = (4, 0, 3, 1)  # of two nodes with two ranks each
LAYER_BYTES = 4 * sum(p.numel() for p in TinyEncoder(0, 0.0).bert.encoder.layer.parameters())


def build():
    """Return an encoder whose layers matter beside the residuals, and whose norms' weights are none that bfloat16 has."""
    encoder, temperature = TinyEncoder(0, 0.2).train(), Temperature(0.1, learnable=True)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "LayerNorm" in name:
                parameter.add_(torch.randn(parameter.shape) / 10)
            elif "layer" in name:
                parameter.mul_(8)
    return encoder, temperature


def count_gathers():
    """Count from now on what FSDP gathers: a list of (dtype, bytes of the whole)."""
    gathered, original = [], collectives.DefaultAllGather.__call__

    def counted(self, output_tensor, *args, **kwargs):
        gathered.append((output_tensor.dtype, output_tensor.nbytes))
        return original(self, output_tensor, *args, **kwargs)

    collectives.DefaultAllGather.__call__ = counted
    return gathered


def one_step(rank, encode, settings=None, keep_graphs=1):
    """Take a step; return the loss, whole gradients, what was gathered, and the bytes of weights' copies in graphs."""
    encoder, temperature = build()
    world = world_of(rank)
    parallel = parallelize(encoder, world, settings or ParallelSettings(backend="fsdp2"), OptimSettings(), DTYPES[encode])
    called = encode_in(parallel.module, PrecisionSettings(encode=encode), world.device)
    shapes = {shape for p in encoder.bert.encoder.layer.parameters() if p.ndim == 2 for shape in (p.shape, p.shape[::-1])}
    gathered, saved = count_gathers(), []

    def pack(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.shape in shapes and tensor.untyped_storage().nbytes() == tensor.nbytes:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        called(make_batch(rank, 3, [called]).towers[0].load(torch.arange(2)))
    list(parallel.trained())  # gathered weights are freed
    copied = sum(tensor.untyped_storage().nbytes() for tensor in saved)
    saved.clear()
    gathered.clear()
    result = cached_step(
        make_batch(rank, ROWS[rank], [called]),
        temperature=temperature,
        sync=parallel.sync,
        group=dist.group.WORLD,
        keep_graphs=keep_graphs,
        loss=LOSS,
        **SETTINGS,
    )
    return result.loss, full_gradients([encoder], temperature), gathered, copied


def reference(encode):
    encoder, temperature = build()
    called = encode_in(encoder, PrecisionSettings(encode=encode), torch.device("cpu"))
    batches = [make_batch(rank, rows, [called]) for rank, rows in enumerate(ROWS)]
    loss = reference_step(batches, temperature=temperature, equal_chunks=True, loss=LOSS, **SETTINGS)
    return loss, full_gradients([encoder], temperature)


def off(found, wanted):
    """Return how far off gradients are: the norm of the difference over the norm, of all the encoder's parameters together."""
    named = [name for name in wanted if name.startswith("tower")]
    a, b = (torch.cat([gradients[name].double().flatten() for name in named]) for gradients in (found, wanted))
    assert float(b.norm()) > 0
    return float((a - b).norm() / b.norm())


def test_bfloat16_under_fsdp2_is_bfloat16_in_one_process():
    """Norms see weights of 8 bits, which is one more rounding next to that of both factors of every product."""
    exact, narrow = reference("fp32"), reference("bf16")
    rounding = off(narrow[1], exact[1])
    assert 1e-3 < rounding < 5e-2, "autocast is at work"
    for loss, gradients, gathered, copied in run_ranks(one_step, 2, "bf16"):
        assert loss == pytest.approx(narrow[0], rel=2e-3)
        assert off(gradients, narrow[1]) < 2 * rounding and off(gradients, exact[1]) < 2 * rounding
        layers = [nbytes for dtype, nbytes in gathered if dtype == torch.bfloat16]
        assert set(layers) == {LAYER_BYTES // 4}, "a layer at a time, in half the bytes"
        assert copied == 0, "no copy of a weight in bfloat16 waits for the backward"


def gathers_of_layers(rank, resharding):
    """Return how often a step gathered layers, and whether any weight is left whole behind it."""
    settings = ParallelSettings(backend="fsdp2", reshard_after_forward=resharding)
    loss, gradients, gathered, _ = one_step(rank, "fp32", settings, keep_graphs=0)
    return loss, gradients, sum(nbytes == LAYER_BYTES // 2 for _, nbytes in gathered)


def test_layers_are_gathered_three_times_a_chunk_or_once_a_step():
    wanted_loss, wanted = reference("fp32")
    for resharding in (True, False):
        for loss, gradients, times in run_ranks(gathers_of_layers, 2, resharding):
            assert loss == pytest.approx(wanted_loss, rel=1e-5)
            assert_same_gradients(gradients, wanted)
            # two layers; a chunk is encoded without graph, with graph, and goes backward
            assert times == 2 if not resharding else (times % 6 == 0 and times > 6)


def steps_on_two_nodes(rank):
    """Take a step with a copy on each of two nodes; return it, and what another number of ranks on a node is told."""
    settings = ParallelSettings(backend="fsdp2", shard_group="node")
    encoder, temperature = build()
    parallel = parallelize(encoder, world_of(rank, 2), settings, OptimSettings())
    assert parallel.num_shards == 2
    batch = make_batch(rank, NODE_ROWS[rank], [parallel.module])
    result = cached_step(
        batch, temperature=temperature, sync=parallel.sync, group=dist.group.WORLD, keep_graphs=1, loss=LOSS, **SETTINGS
    )
    parallel.trained()  # all sharded
    held = model_memory(encoder, TrainJob(parallel=settings), 4, "cuda", is_first=True)
    refused = []
    for ranks_of_a_node in (3, 1 if rank == 0 else 3):
        try:
            parallelize(encoder, world_of(rank, ranks_of_a_node), settings, OptimSettings())
        except InputError as error:
            refused.append(str(error))
    return result.loss, full_gradients([encoder], temperature), held, refused


def test_a_copy_on_each_node_gives_the_references_gradient_and_uneven_nodes_are_refused():
    encoder, temperature = build()
    batches = [make_batch(rank, rows, [encoder]) for rank, rows in enumerate(NODE_ROWS)]
    wanted_loss = reference_step(batches, temperature=temperature, equal_chunks=True, loss=LOSS, **SETTINGS)
    wanted = full_gradients([encoder], temperature)
    numel = sum(p.numel() for p in encoder.parameters())
    for loss, gradients, held, refused in run_ranks(steps_on_two_nodes, 4):
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert_same_gradients(gradients, wanted)
        assert held.weights == pytest.approx(4 * numel / 2, rel=0.02), "half of it, not a quarter"
        assert (held.gradients, held.optimizer, held.backend) == (held.weights, 2 * held.weights, 4 * numel), (
            "gradients wait whole"
        )
        assert [len(refused), *("found 4 in all and" in said for said in refused)] == [2, True, True]
        assert "1 to 3 on a node (LOCAL_WORLD_SIZE)" in refused[1]


def test_what_only_fsdp2_can_do_is_refused_elsewhere():
    with pytest.raises(InputError, match=r'reshard_after_forward=false needs parallel\.backend="fsdp2", found "ddp"'):
        ParallelSettings(reshard_after_forward=False)
    with pytest.raises(InputError, match=r'shard_group="node" needs parallel\.backend="fsdp2", found "zero3"'):
        ParallelSettings(backend="zero3", shard_group="node")
