"""Several widths in one loss: the oracle's gradients, as many collectives as one width has, one cut at a time."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, InfoNCE, LossOptions, NoSync, Temperature, cached_step, reference_step
from gradcache import terms as terms_module
from gradcache.terms import Source
from gradcache.widths import View, view_rows
from tests.gradcache.test_backends import LOSS, SETTINGS, full_gradients
from tests.gradcache.test_step import COUNTED, TinyEncoder, make_batch
from tests.gradcache.vectors import step_of_vectors, vectors
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks

WIDE = replace(LOSS, widths=(32, 12, 5))


@pytest.mark.parametrize("take", ["reference", "cached"])
def test_the_loss_is_the_weighted_mean_of_cross_entropies_of_cut_and_renormalised_embeddings(take):
    torch.manual_seed(0)
    rows = torch.randn(8, 6, requires_grad=True)  # of no particular length
    options = LossOptions(objective=InfoNCE(), widths=(6, 3), width_weights=(1.0, 3.0))
    batch = vectors(*rows.split(4))
    if take == "reference":
        found = reference_step([batch], loss=options, temperature=Temperature(0.5), chunk_tokens=4, seed=0, step=0)
    else:
        found = step_of_vectors(batch, options, 2.0)[0].loss
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
        loss = replace(LOSS, widths=widths)
        batch = make_batch(0, 5, [encoder])
        cached_step(batch, loss=loss, temperature=temperature, sync=NoSync(), group=None, keep_graphs=0, **SETTINGS)
        found.append(full_gradients([encoder], temperature))
    assert_same_gradients(found[1], found[0])


def test_bfloat16_products_at_several_widths_point_the_same_way():
    found = []
    for dtype in (torch.bfloat16, None):
        encoder, temperature = TinyEncoder(0, 0.0).train(), Temperature(0.1, learnable=True)
        loss = replace(WIDE, product_dtype=dtype)
        batch = make_batch(0, 6, [encoder])
        result = cached_step(batch, loss=loss, temperature=temperature, sync=NoSync(), group=None, keep_graphs=0, **SETTINGS)
        gradient = torch.cat([g.flatten() for g in full_gradients([encoder], temperature).values()])
        found.append((result.loss, gradient))
    (narrow_loss, narrow), (loss, wide) = found
    assert narrow_loss == pytest.approx(loss, rel=2e-2) and narrow_loss != loss
    assert float(torch.cosine_similarity(narrow, wide, 0)) > 0.99  # 8 bits of mantissa


def collectives_of_a_step(rank, widths, gather):
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
    cached_step(
        make_batch(rank, 4, [encoder]),
        temperature=Temperature(0.1, learnable=True),
        sync=DDPSync(encoder),
        group=dist.group.WORLD,
        keep_graphs=1,
        loss=replace(LOSS, widths=widths, symmetric=True, gather=gather),
        **SETTINGS,
    )
    return calls


@pytest.mark.parametrize("gather", ["passages", "queries"])
def test_collectives_do_not_depend_on_the_number_of_widths(gather):
    for widths in (None, (32, 16, 8, 4)):
        for calls in run_ranks(collectives_of_a_step, 2, widths, gather):
            back_and_forth = 2 if gather == "queries" else 0
            # counts, keys and rows; one reduction of the rows' gradients; one of the loss
            assert calls == {"_all_gather": 3, "_reduce_scatter": 1, "all_reduce": 1, "all_to_all_single": back_and_forth}


@pytest.mark.parametrize("gather", ["passages", "queries"])
def test_one_cut_of_the_columns_is_held_at_a_time(monkeypatch, gather):
    cuts, most = [], []

    def watched(parts, view):
        found = view_rows(parts, view)
        cuts.append(torch.multiprocessing.reductions.StorageWeakRef(found.rows_nw.untyped_storage()))
        most.append(sum(not cut.expired() for cut in cuts))
        return found

    monkeypatch.setattr(terms_module, "view_rows", watched)
    encoder = TinyEncoder(0, 0.0).train()
    step = {"sync": NoSync(), "group": None, "keep_graphs": 0, **SETTINGS}
    cached_step(make_batch(0, 6, [encoder]), loss=replace(WIDE, gather=gather), temperature=Temperature(0.1), **step)
    # for each width the rows and the columns of its tiles, in each of the phases, then those of the rows' own positives
    assert len(cuts) == (12 if gather == "passages" else 18) and max(most) == 2, "the rows and the columns of one width"


def test_gathered_rows_stay_as_they_are():
    rows = torch.randn(5, 4)
    before = rows.clone()
    cut = view_rows([rows], View(0, 4, True, 1.0))
    torch.testing.assert_close(cut.rows_nw, normalize(rows, dim=1))
    assert torch.equal(rows, before)


def test_gradients_of_narrow_cuts_go_to_the_first_components():
    source = Source(torch.zeros(2, 4))
    for width in (2, 1):
        source.add(torch.ones(2, width), View(0, width, True, 0.5))
    assert source.gradient().tolist() == [[2, 1, 0, 0]] * 2


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
            make_batch(0, 4, [encoder]), loss=replace(LOSS, **options), temperature=Temperature(0.1), sync=NoSync(), group=None,
            keep_graphs=0, **SETTINGS,
        )  # fmt: skip
    assert all(parameter.grad is None for parameter in encoder.parameters())
