"""Losses of other libraries on the same vectors: values and gradients agree to float64's digits, but for the float32 temperature.

Install them with `pip install negpool[oracles]`; sentence-transformers comes with the tests.
"""

import functools

import pytest
import torch

from gradcache import find_objective
from tests.gradcache.objectives import plain
from tests.gradcache.objectives.test_published import GRADES, TEMPERATURE, B, assert_equal, log_scale, step, unit_rows

BOTH = {"symmetric": True, "same_side": True}


def assert_agrees(theirs, name="info_nce", parameters=None, num_passages=None, **options):
    """Compare ours with `theirs(query, passage, temperature)`; the other library has no gradient of its temperature."""
    query, passage = unit_rows(num_passages or 12)
    scale = log_scale()
    wanted = theirs(query, passage)
    found = step(find_objective(name, parameters or {}), query.detach(), passage.detach(), **options)
    # A term that is 0, so that there is a gradient to compare with.
    assert_equal((*found[:3], torch.zeros(())), wanted + 0 * scale, (query, passage, scale))


def ranking_loss(**arguments):
    """sentence-transformers' MultipleNegativesRankingLoss on columns of one hard negative a query."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=1 / TEMPERATURE, **arguments)
    return lambda query, passage: loss.compute_loss_from_embeddings([query, *passage.split(B)], None)


def test_info_nce_pytorch():
    InfoNCE = pytest.importorskip("info_nce").InfoNCE
    loss = InfoNCE(temperature=TEMPERATURE)
    assert_agrees(lambda query, passage: loss(query, passage), num_passages=B)


@pytest.mark.parametrize(("positives", "kind"), [("own", "NTXentLoss"), ("supcon", "SupConLoss")])
def test_pytorch_metric_learning(positives, kind):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    loss = getattr(losses, kind)(temperature=TEMPERATURE)
    if positives == "own":
        assert_agrees(
            lambda query, passage: loss(query, torch.arange(B), ref_emb=passage, ref_labels=torch.arange(B)), num_passages=B
        )
        return
    known = [[0, 7], [1], [2, 9], [3], [4, 11], [5]]
    labels = 99 + torch.arange(12)
    for query, own in enumerate(known):  # passages of a query's own label are its positives
        labels[own] = query
    assert_agrees(
        lambda query, passage: loss(query, torch.arange(B), ref_emb=passage, ref_labels=labels),
        parameters={"positives": "supcon"},
        positives=known,
    )


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {}),
        ({"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}, {"symmetric": True}),
        (
            {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
            {**BOTH, "partition": "joint", "num_passages": B},
        ),
        *(
            (
                {"hardness_mode": mode, "hardness_strength": 3.0},
                {"parameters": {"hardness": 3, "hardness_of": of}},
            )
            for mode, of in {"all_negatives": "all", "in_batch_negatives": "in_batch", "hard_negatives": "own"}.items()
        ),
    ],
    ids=["InfoNCE", "symmetric", "GTE", "all negatives", "in the batch", "own"],
)
@pytest.mark.parametrize("gather", ["passages", "queries"])
def test_sentence_transformers_ranking_loss(arguments, options, gather):
    assert_agrees(ranking_loss(**arguments), gather=gather, **options)


@pytest.mark.parametrize(("name", "kind"), [("cosent", "CoSENTLoss"), ("angle", "AnglELoss")])
def test_sentence_transformers_order_aware_losses(name, kind):
    from sentence_transformers.sentence_transformer import losses

    loss = getattr(losses, kind)(torch.nn.Identity(), scale=1 / TEMPERATURE)
    embed = getattr(loss, "compute_loss_from_embeddings", None)
    assert embed is not None
    assert_agrees(lambda query, passage: embed([query, passage], GRADES), name, num_passages=B, values={"grade": GRADES})


def test_diffsort_sorts_as_the_loss_does():
    diffsort = pytest.importorskip("diffsort")

    def theirs(query, passage, hardest=4):
        negative = plain.negatives_of(query, passage).topk(hardest, 1).values.flip(1)
        scores = torch.cat([negative, plain.positive_of(query, passage)[:, None]], 1) / TEMPERATURE
        network = diffsort.DiffSortNet("odd_even", hardest + 1, steepness=1.0, interpolation_type="cauchy")
        on_top = network(scores)[1][:, :, -1].clamp(0, 1)
        wanted = torch.zeros_like(on_top)
        wanted[:, -1] = 1
        return torch.nn.functional.binary_cross_entropy(on_top, wanted)

    assert_agrees(theirs, "groco", {"hardest": 4})


def test_both_directions_and_sides_of_dcl_are_lightlys_formula():
    """lightly's own package needs torchvision; its DCLLoss is this: both views are anchors, all other rows are negatives."""

    def theirs(query, passage):
        rows = torch.cat([query, passage])
        is_pair = torch.eye(B).repeat(2, 2).bool()
        negatives = (rows @ rows.T / TEMPERATURE).masked_fill(is_pair, -torch.inf).logsumexp(1)
        return (negatives - (query * passage).sum(1).repeat(2) / TEMPERATURE).mean()

    assert_agrees(theirs, "dcl", num_passages=B, **BOTH)


def test_uniformity_is_that_of_the_papers_listing():
    assert_agrees(functools.partial(plain.uniform, scale=None), "alignment_uniformity", num_passages=B, same_side=True)
