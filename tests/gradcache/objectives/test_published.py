"""Each published loss, by its name in a job file, against its plain version: values and gradients, both ways of gathering."""

import functools

import pytest
import torch
from torch.nn.functional import normalize

from gradcache import Batch, Candidates, LossOptions, NoSync, Ragged, Temperature, Tower, cached_step, find_objective
from gradcache.options import FalseNegatives
from tests.gradcache.objectives import plain

B, P, WIDTH, TEMPERATURE = 6, 12, 6, 0.5
BOTH_SIDES = {"symmetric": True, "same_side": True}
POSITIVES = [[0, 7], [1], [2, 9, 3], [3], [4, 11], [5]]  # of each query, its own first

# id: (name, parameters, plain version, options)
ROWS = {
    "InfoNCE, GradCache, E5, ANCE": ("info_nce", {}, plain.info_nce, {}),
    "symmetric: cpt-text, CLIP": ("info_nce", {}, plain.symmetric, {"symmetric": True}),
    "SimCSE and SimCLR, NT-Xent of 2 B rows": ("info_nce", {}, plain.nt_xent, {**BOTH_SIDES, "num_passages": B}),
    "GTE, one denominator": ("info_nce", {}, plain.gte, {**BOTH_SIDES, "partition": "joint"}),
    "DCL": ("dcl", {}, plain.dcl, {}),
    "DCLW": ("dclw", {}, plain.dclw, {}),
    "DCLW, sigma": ("dclw", {"sigma": 0.3}, functools.partial(plain.dclw, sigma=0.3), {}),
    "Debiased Contrastive Learning": ("debiased", {}, plain.debiased, {}),
    "Debiased, at its floor": ("debiased", {"positive_share": 0.9}, functools.partial(plain.debiased, share=0.9), {}),
    "HCL, HaSa: debiased and weighted": (
        "debiased", {"hardness": 2.0, "mean_weight": True}, functools.partial(plain.debiased, hardness=2.0), {}
    ),
    "NT-Xent-AM": ("info_nce", {"margin": 0.2}, plain.additive_margin, {}),
    "NT-Xent-AAM": ("info_nce", {"margin": 0.2, "margin_of": "angle"}, plain.additive_angle, {}),
    "LLaVE, hardness of all negatives": ("info_nce", {"hardness": 3}, functools.partial(plain.weighted, hardness=3), {}),
    "LLaVE, hardness in the batch": (
        "info_nce", {"hardness": 3, "hardness_of": "in_batch"},
        functools.partial(plain.weighted, hardness=3, which="in_batch"), {},
    ),
    "EmbeddingGemma, hardness of the query's own": (
        "info_nce", {"hardness": 3, "hardness_of": "own"}, functools.partial(plain.weighted, hardness=3, which="own"), {}
    ),
    "RzenEmbed, weights of mean 1": (
        "info_nce", {"hardness": 3, "mean_weight": True}, functools.partial(plain.weighted, hardness=3, mean_weight=True), {}
    ),
    "KaLM-V2 focal": ("info_nce", {"focal": 0.5}, plain.focal, {}),
    "PEG, progressive weights": ("progressive", {}, plain.progressive, {"progress": 0.3}),
    "masks, absolute": (
        "info_nce", {}, functools.partial(plain.masked, limit=lambda s: torch.full_like(s, 0.2)), {"limits": {"max_score": 0.2}}
    ),
    "masks, relative to the positive: NV-Retriever, NeMo": (
        "info_nce", {}, functools.partial(plain.masked, limit=lambda s: s - 0.05 * s.abs()), {"limits": {"relative_margin": 0.05}}
    ),
    "masks and the hardest k of the rest: UniME": (
        "info_nce", {"hardest": 4}, functools.partial(plain.masked, limit=lambda s: s + 0.1, hardest=4),
        {"limits": {"absolute_margin": -0.1}},
    ),
    "hardest k": (
        "info_nce", {"hardest": 3}, functools.partial(plain.masked, limit=lambda s: s + 9, hardest=3), {}
    ),
    "NV-Embed, without in-batch negatives": ("info_nce", {"in_batch": False}, plain.own_only, {}),
    "CACR": ("cacr", {}, plain.cacr, {}),
    "ALIGN, label smoothing": ("label_smoothing", {}, plain.smoothed, {}),
    "alignment and uniformity": ("alignment_uniformity", {}, plain.uniform, {"same_side": True}),
    "ARM": ("adaptive_margins", {}, plain.arm, {}),
    "SigLIP": ("sigmoid", {"bias": -1.0}, plain.siglip, {}),
    "GroCo, sorting": ("groco", {"hardest": 3}, plain.groco, {}),
    "AMCL, a temperature per pair": (
        "pair_temperature", {}, plain.pair_temperature, {"learnt": {"slope": 0.4, "offset": -0.2}}
    ),
}  # fmt: skip


def unit_rows(num_passages=P, seed=0):
    """Return unit queries and passages with graphs; all texts differ."""
    torch.manual_seed(seed)
    return [normalize(torch.randn(num, WIDTH).double(), dim=1).requires_grad_() for num in (B, num_passages)]


def step(objective, query, passage, *, progress=0.0, positives=None, limits=None, values=None, **options):
    """Return (loss, gradients of queries, passages and of the inverse temperature's logarithm) by a cached step."""
    rows = torch.cat([query, passage]).detach().requires_grad_()
    keys, own = torch.arange(len(rows)), torch.arange(B)
    tower = Tower(encode=lambda x: x, lengths=torch.ones_like(keys), load=lambda chosen: rows[chosen])
    known = positives or [[number] for number in range(B)]
    batch = Batch(
        towers=[tower], num_queries=B, keys=keys, target=own,
        positive_keys=Ragged(B + torch.tensor([j for of_row in known for j in of_row]), torch.tensor([len(n) for n in known])),
        candidates=Candidates(query=own, passage=B + own, are_columns=False) if objective.wants_own_negatives else None,
        query_values=values or {},
    )  # fmt: skip
    temperature = Temperature(TEMPERATURE, learnable=True).double()
    loss = LossOptions(objective=objective, tile_rows=4, false_negatives=limits and FalseNegatives(**limits), **options)
    common = {"group": None, "chunk_tokens": 5, "keep_graphs": 0, "seed": 0, "step": 0}
    found = cached_step(batch, loss=loss, temperature=temperature, sync=NoSync(), progress=progress, **common)
    return found.loss, *rows.grad.split([B, len(passage)]), temperature.log_scale.grad


def assert_equal(found, wanted, inputs):
    """Compare loss and gradients; along a unit row's own direction encoders have no use for them."""
    query, passage, _ = inputs
    gradients = torch.autograd.grad(wanted, inputs, allow_unused=True)
    assert gradients[0].norm() > 1e-3, "the plain version trains"
    loss, of_query, of_passage, of_scale = found
    assert loss == pytest.approx(wanted.item(), rel=1e-7)  # the temperature is held as a float32 logarithm
    assert of_scale == pytest.approx(0.0 if gradients[2] is None else gradients[2].item(), rel=1e-6, abs=1e-9)
    for rows, gradient, other in ((query, gradients[0], of_query), (passage, gradients[1], of_passage)):
        across, found_across = (values - (rows * values).sum(1, keepdim=True) * rows for values in (gradient, other))
        torch.testing.assert_close(found_across, across, rtol=1e-6, atol=1e-9)


def log_scale():
    return torch.tensor(TEMPERATURE).double().reciprocal().log().requires_grad_()


@pytest.mark.parametrize("gather", ["passages", "queries"])
@pytest.mark.parametrize("row", ROWS)
def test_each_row_is_its_formula(row, gather):
    name, parameters, by_formula, options = ROWS[row]
    options = dict(options)
    objective = find_objective(name, parameters)
    if isinstance(objective, torch.nn.Module):
        objective.double()
    for parameter, value in options.pop("learnt", {}).items():
        getattr(objective, parameter).data.fill_(value)
    query, passage = unit_rows(options.pop("num_passages", P))
    scale = log_scale()
    wanted = by_formula(query, passage, scale.exp())
    found = step(objective, query.detach(), passage.detach(), gather=gather, **options)
    assert_equal(found, wanted, (query, passage, scale))


@pytest.mark.parametrize("gather", ["passages", "queries"])
@pytest.mark.parametrize("reading", ["mean", "sum", "supcon"])
def test_several_positives_are_read_as_asked(reading, gather):
    query, passage = unit_rows()
    scale = log_scale()
    wanted = plain.several(query, passage, scale.exp(), POSITIVES, reading)
    found = step(
        find_objective("info_nce", {"positives": reading}), query.detach(), passage.detach(), positives=POSITIVES, gather=gather
    )
    assert_equal(found, wanted, (query, passage, scale))


GRADES = torch.tensor([0.2, 0.9, 0.5, 0.9, 0.0, 0.5]).double()


def angle_similarity(query, passage):
    """As sentence-transformers has it: a quotient of complex numbers."""
    z, w = (torch.complex(*rows.chunk(2, dim=1)) for rows in (query, passage))
    quotient = z / (w.abs().square().sum(1, keepdim=True)) * w.conj()
    length = query.norm(dim=1) / passage.norm(dim=1)
    return ((quotient.real + quotient.imag).sum(1) / length).abs()


@pytest.mark.parametrize("gather", ["passages", "queries"])
@pytest.mark.parametrize("row", ["CoDiEmb, CoSENT", "AnglE", "CoDiEmb, correlation", "correlation of ranks"])
def test_order_aware_losses_are_their_formula(row, gather):
    name = {"CoDiEmb, CoSENT": "cosent", "AnglE": "angle"}.get(row, "correlation")
    query, passage = unit_rows(B)
    scale = log_scale()
    score = angle_similarity(query, passage) if name == "angle" else (query * passage).sum(1)
    grades = torch.tensor([2, 5.5, 3.5, 5.5, 1, 3.5]).double() if row == "correlation of ranks" else GRADES
    wanted = (plain.correlation if name == "correlation" else plain.cosent)(score, grades, scale.exp())
    objective = find_objective(name, {"of": "ranks"} if row == "correlation of ranks" else {})
    found = step(objective, query.detach(), passage.detach(), values={"grade": GRADES}, gather=gather)
    assert_equal(found, wanted, (query, passage, scale))
