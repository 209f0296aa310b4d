"""Several widths in one loss: the oracle's gradients, one gather and one reduce-scatter a side, one cut at a time."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from gradcache import OBJECTIVES, Batch, DDPSync, NoSync, Temperature, Tower, cached_step, gather, reference_step
from gradcache import loss as loss_module
from gradcache.widths import add_first, cut_rows
from tests.gradcache.test_backends import SETTINGS, full_gradients
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks

STEP = SETTINGS | {"widths": (32, 12, 5)}
CASES = [  # symmetric, same side, objective, weights, widths, rows of a tile
    (False, False, "info_nce", None, (32, 12, 5), None),
    (True, False, "info_nce_multi", (1.0, 0.5, 2.0), (32, 12, 5), 2),
    (True, True, "info_nce_multi", None, (20, 7), None),
    (False, True, "info_nce", (3.0,), (9,), 2),
]


def options_of(symmetric, same_side, objective, weights, widths):
    known = {"symmetric": symmetric, "same_side": same_side, "width_weights": weights, "widths": widths}
    return SETTINGS | known | {"objective": OBJECTIVES[objective]}


@functools.cache
def expected(rows, *case):
    encoder, temperature = TinyEncoder(0, 0.2).train(), Temperature(0.1, learnable=True)
    batches = [make_batch(rank, n, [encoder]) for rank, n in enumerate(rows)]
    loss = reference_step(batches, temperature=temperature, **options_of(*case))
    return loss, full_gradients([encoder], temperature)


def steps(rank, rows):
    group, found = dist.group.WORLD if len(rows) > 1 else None, []
    for *case, tile_rows in CASES:
        encoder, temperature = TinyEncoder(0, 0.2).train(), Temperature(0.1, learnable=True)
        called = DistributedDataParallel(encoder, broadcast_buffers=False) if group else encoder
        result = cached_step(
            make_batch(rank, rows[rank], [called]),
            temperature=temperature,
            sync=DDPSync(called) if group else NoSync(),
            group=group,
            keep_graphs=1,
            tile_rows=tile_rows,
            **options_of(*case),
        )
        found.append((result.loss, full_gradients([encoder], temperature)))
    return found


@pytest.mark.parametrize("rows", [(5,), (5, 3), (0, 4), (3, 0, 4)])
def test_gradients_at_several_widths_are_the_references(rows):
    for found in run_ranks(steps, len(rows), rows):
        for (*case, _), (loss, gradients) in zip(CASES, found, strict=True):
            wanted_loss, wanted = expected(rows, *case)
            assert loss == pytest.approx(wanted_loss, rel=1e-5), case
            assert_same_gradients(gradients, wanted)


def vectors(rows_nD):
    """Return the batch of a tower whose embeddings are the given rows: half queries, half their passages."""
    num_queries = len(rows_nD) // 2
    lengths = torch.ones(len(rows_nD), dtype=torch.int64)
    tower = Tower(encode=lambda x: x, lengths=lengths, load=lambda chosen: rows_nD[chosen])
    keys, target = torch.arange(len(rows_nD)), torch.arange(num_queries)
    return Batch(towers=[tower], num_queries=num_queries, keys=keys, target=target, positive_keys=keys[num_queries:, None])


@pytest.mark.parametrize("take", ["reference", "cached"])
def test_the_loss_is_the_weighted_mean_of_cross_entropies_of_cut_and_renormalised_embeddings(take):
    torch.manual_seed(0)
    rows = torch.randn(8, 6, requires_grad=True)  # of no particular length
    options = {"objective": OBJECTIVES["info_nce"], "chunk_tokens": 4, "seed": 0, "step": 0}
    options |= {"widths": (6, 3), "width_weights": (1.0, 3.0), "temperature": Temperature(0.5)}
    if take == "reference":
        found = reference_step([vectors(rows)], **options)
    else:
        found = cached_step(vectors(rows), sync=NoSync(), group=None, keep_graphs=0, **options).loss
    gradient, rows.grad = rows.grad, None
    whole, short = (normalize(rows[:, :width], dim=1) for width in (6, 3))
    losses = [cross_entropy(cut[:4] @ cut[4:].T / 0.5, torch.arange(4)) for cut in (whole, short)]
    wanted = losses[0] * 0.25 + losses[1] * 0.75
    wanted.backward()
    assert found == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(gradient, rows.grad)
    assert float((gradient * rows.detach()).sum(1).abs().max()) < 1e-6 < float(gradient.norm()), "only directions count"


def test_one_width_of_all_components_changes_nothing_for_unit_embeddings():
    found = []
    for widths in (None, (32,)):
        encoder, temperature = TinyEncoder(0, 0.2).train(), Temperature(0.1, learnable=True)
        cached_step(
            make_batch(0, 5, [encoder]), temperature=temperature, sync=NoSync(), group=None, keep_graphs=0,
            **SETTINGS | {"widths": widths},
        )  # fmt: skip
        found.append(full_gradients([encoder], temperature))
    assert_same_gradients(found[1], found[0])


def test_bfloat16_products_at_several_widths_point_the_same_way():
    found = []
    for dtype in (torch.bfloat16, None):
        encoder, temperature = TinyEncoder(0, 0.0).train(), Temperature(0.1, learnable=True)
        result = cached_step(
            make_batch(0, 6, [encoder]), temperature=temperature, sync=NoSync(), group=None, keep_graphs=0,
            product_dtype=dtype, **STEP,
        )  # fmt: skip
        gradient = torch.cat([g.flatten() for g in full_gradients([encoder], temperature).values()])
        found.append((result.loss, gradient))
    (narrow_loss, narrow), (loss, wide) = found
    assert narrow_loss == pytest.approx(loss, rel=2e-2) and narrow_loss != loss
    assert float(torch.cosine_similarity(narrow, wide, 0)) > 0.99  # 8 bits of mantissa


COUNTED = [(gather, "_all_gather"), (gather, "_reduce_scatter"), (dist, "all_reduce")]


def collectives_of_a_step(rank, widths):
    """Return how often each collective is called in one symmetric step without the parameters' own."""
    calls = dict.fromkeys((name for _, name in COUNTED), 0)

    def counted(name, original):
        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    for module, name in COUNTED:
        setattr(module, name, counted(name, getattr(module, name)))
    encoder = DistributedDataParallel(TinyEncoder(0, 0.1).train(), broadcast_buffers=False)
    options = SETTINGS | {"widths": widths, "symmetric": True}
    cached_step(
        make_batch(rank, 4, [encoder]),
        temperature=Temperature(0.1, learnable=True),
        sync=DDPSync(encoder),
        group=dist.group.WORLD,
        keep_graphs=1,
        **options,
    )
    return calls


def test_collectives_do_not_depend_on_the_number_of_widths():
    for widths in (None, (32, 16, 8, 4)):
        for calls in run_ranks(collectives_of_a_step, 2, widths):
            assert calls == {"_all_gather": 3, "_reduce_scatter": 2, "all_reduce": 1}  # counts, and each side


def test_one_cut_of_the_columns_is_held_at_a_time(monkeypatch):
    cuts, most = [], []

    def watched(parts, width):
        found = cut_rows(parts, width)
        cuts.append(torch.multiprocessing.reductions.StorageWeakRef(found.unit_nw.untyped_storage()))
        most.append(sum(not cut.expired() for cut in cuts))
        return found

    monkeypatch.setattr(loss_module, "cut_rows", watched)
    encoder = TinyEncoder(0, 0.0).train()
    cached_step(
        make_batch(0, 6, [encoder]), temperature=Temperature(0.1), sync=NoSync(), group=None, keep_graphs=0, **STEP
    )  # fmt: skip
    assert len(cuts) == 6 and max(most) == 2, "the rows and the columns of one width"


def test_gathered_rows_stay_as_they_are():
    rows = torch.randn(5, 4)
    before = rows.clone()
    cut = cut_rows([rows], 4)
    torch.testing.assert_close(cut.unit_nw, normalize(rows, dim=1))
    assert torch.equal(rows, before)


def test_gradients_of_narrow_cuts_go_to_the_first_components():
    total = add_first(add_first(None, torch.ones(2, 2), 4), torch.ones(2, 1), 4)
    assert total.tolist() == [[2, 1, 0, 0]] * 2


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"widths": (64, 32)}, "widths begin with 64, and embeddings have only 32 components"),
        ({"widths": (8, 16)}, r"widths are \[8, 16\]; expected one or more that fall"),
        ({"widths": (8, 8)}, "that fall"),
        ({"widths": (8, 0)}, "each at least 1"),
        ({"widths": ()}, "one or more"),
        ({"widths": (8, 4), "width_weights": (1.0,)}, r"width_weights are \[1\.0\]; expected one above 0 for each"),
        ({"widths": (8, 4), "width_weights": (1.0, 0.0)}, "above 0"),
    ],
)
def test_widths_that_cannot_be_used_are_refused_before_any_gradient(options, sentence):
    encoder = TinyEncoder(0, 0.0).train()
    with pytest.raises(ValueError, match=sentence):
        cached_step(
            make_batch(0, 4, [encoder]), temperature=Temperature(0.1), sync=NoSync(), group=None, keep_graphs=0,
            **SETTINGS | options,
        )  # fmt: skip
    assert all(parameter.grad is None for parameter in encoder.parameters())
