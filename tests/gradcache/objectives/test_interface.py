"""What the interface can express beyond InfoNCE: the oracle's gradients on real ranks, and a plain version of each."""

import functools
import itertools
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from gradcache import (
    Batch,
    Candidates,
    DDPSync,
    Extra,
    FalseNegatives,
    LossOptions,
    NoSync,
    Ragged,
    Temperature,
    TextTerm,
    Tower,
    cached_step,
    reference_step,
)
from gradcache.objectives import (
    CACR,
    AdaptiveMargins,
    AlignmentUniformity,
    AnglE,
    CoSENT,
    Progressive,
    Sigmoid,
    symile_rows,
)
from gradcache.objectives.info_nce import InfoNCE
from gradcache.objectives.tile import CANDIDATE
from tests.gradients import assert_same_gradients, gradients_of
from tests.ranks import run_ranks

WIDTH, FEATURES = 6, 5


class Encoder(nn.Module):
    """A linear map of a text's features to unit vectors, of two outputs if asked for."""

    def __init__(self, seed, two_outputs=False):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(FEATURES, 2 * WIDTH if two_outputs else WIDTH).double()
        self.two_outputs = two_outputs

    def forward(self, inputs):
        embedding = self.linear(inputs)
        if not self.two_outputs:
            return normalize(embedding, dim=1)
        first, second = embedding.split(WIDTH, dim=1)
        return {"last": normalize(first, dim=1), "layer": normalize(second, dim=1)}


def features(keys):
    """Return the features of texts, equal ones for equal keys."""
    return torch.stack([torch.randn(FEATURES, generator=torch.Generator().manual_seed(int(key))).double() for key in keys])


def make_batch(rank, num_queries, encode, **extras):
    """Return queries of few distinct texts with one to three positives, three passages each; texts stand on several ranks."""
    generator = torch.Generator().manual_seed(rank)
    queries = torch.randint(100, 107, (num_queries,), generator=generator)
    # Judgements belong to the texts: positives 200 + text, and for some texts one or two more.
    lists = [[200 + q % 7, *([207 + q % 3] if q % 2 else []), *([211] if q % 5 == 0 else [])] for q in queries.tolist()]
    targets = torch.tensor([own[0] for own in lists], dtype=torch.int64)
    others = torch.randint(200, 215, (2 * num_queries,), generator=generator)
    keys = torch.cat([queries, targets, others])
    inputs = features(keys) if len(keys) else torch.zeros(0, FEATURES).double()
    tower = Tower(encode=encode, lengths=torch.ones(len(keys), dtype=torch.int64), load=lambda rows: inputs[rows])
    return Batch(
        **{
            "towers": [tower],
            "num_queries": num_queries,
            "keys": keys,
            "target": torch.arange(num_queries),
            "positive_keys": Ragged(
                torch.tensor([key for own in lists for key in own], dtype=torch.int64),
                torch.tensor([len(own) for own in lists], dtype=torch.int64),
            ),
            **{name: make(rank, num_queries) for name, make in extras.items()},
        }
    )


def candidates(rank, num_queries):
    generator = torch.Generator().manual_seed(50 + rank)
    query = torch.arange(num_queries).repeat_interleave(2)
    passage = num_queries + torch.arange(2 * num_queries)
    return Candidates(query=query, passage=passage, values={"teacher": torch.rand(len(query), generator=generator).double()})


def weights(rank, num_queries):
    return {"weight": torch.rand(num_queries, generator=torch.Generator().manual_seed(60 + rank)).double()}


def own_only(rank, num_queries):
    return torch.arange(3 * num_queries) >= 2 * num_queries


def all_own(rank, num_queries):
    return torch.ones(3 * num_queries, dtype=torch.bool)


def extra(rank, num_queries):
    keys = torch.arange(2 + rank) + 205 + 5 * rank
    return Extra(embedding_xD=normalize(features(keys + 1000)[:, :1].repeat(1, WIDTH) + torch.arange(WIDTH), dim=1), keys=keys)


class Distilled(InfoNCE):
    """InfoNCE, and a query's candidates follow a teacher's scores."""

    cell_values = ("teacher",)

    def loss(self, rows):
        is_candidate = rows.cells.kind_c == CANDIDATE
        error = (rows.cells.score_c - rows.cells.values["teacher"]).square() * is_candidate
        return super().loss(rows) + rows.sum_cells(error)


class Guided(InfoNCE):
    """Columns that the second output thinks are as good as the positive are left out."""

    second = "layer"
    is_soft_max = False

    def statistics(self, tile):
        return torch.logsumexp(torch.where(tile.second_tP > 0.5, -1e6, tile.logits), 1)[:, None]


def near_a_vector(embedding, keys):
    return (embedding - keys[:, None].to(embedding).sin()).square().mean(1)


def own_cells(rank, num_queries):
    """One hard negative of each query, as a cell and no column of its row."""
    query = torch.arange(num_queries)
    return Candidates(query=query, passage=num_queries + query, are_columns=False)


def grades(rank, num_queries):
    return {"grade": torch.randint(0, 4, (num_queries,), generator=torch.Generator().manual_seed(80 + rank)).double()}


LIMITS = FalseNegatives(max_score=0.8, absolute_margin=-0.3)
INFO_NCE = LossOptions(objective=InfoNCE())
CASES = {
    "uniformity": ({"same_side": True}, AlignmentUniformity, {}),
    "hardest k": ({"symmetric": True}, functools.partial(InfoNCE, hardest=3), {}),
    "CACR": ({"symmetric": True}, CACR, {}),
    "ARM": ({"symmetric": True, "same_side": True}, AdaptiveMargins, {}),
    "sigmoid": ({"symmetric": True}, lambda: Sigmoid(bias=-1.0).double(), {}),
    "progress": ({}, Progressive, {}),
    "text term": ({"text_terms": (TextTerm(function=near_a_vector, weight=0.7),)}, InfoNCE, {}),
    "weights": ({"symmetric": True, "same_side": True}, InfoNCE, {"query_values": weights}),
    "candidates": ({}, Distilled, {"candidates": candidates}),
    "own columns": ({"symmetric": True}, Distilled, {"candidates": candidates, "own_only": own_only}),
    "one denominator": ({"symmetric": True, "same_side": True, "partition": "joint"}, functools.partial(InfoNCE, hardness=2), {}),
    "one denominator, widths": ({"symmetric": True, "partition": "joint", "widths": (5, 2)}, InfoNCE, {}),
    "false negatives": ({"symmetric": True, "same_side": True, "false_negatives": LIMITS}, InfoNCE, {}),
    "false negatives, by autograd": ({"false_negatives": LIMITS}, CACR, {}),
    "own negatives": (
        {"symmetric": True, "false_negatives": LIMITS},
        functools.partial(InfoNCE, hardness=2, hardness_of="own"),
        {"candidates": own_cells},
    ),
    "own negatives alone": ({}, functools.partial(InfoNCE, in_batch=False), {"candidates": own_cells, "own_only": all_own}),
    "gathered rows": ({}, CoSENT, {"query_values": grades, "own_only": all_own}),
    "a pair's own score": ({}, AnglE, {"query_values": grades, "own_only": all_own}),
    "no columns": ({}, Distilled, {"candidates": candidates, "own_only": all_own}),
    "extra": ({}, InfoNCE, {"extra": extra}),
    "widths and uniformity": ({"same_side": True, "widths": (6, 3), "width_weights": (1.0, 2.0)}, AlignmentUniformity, {}),
    "ARM at widths": ({"symmetric": True, "widths": (5, 2)}, AdaptiveMargins, {}),
}
OUTPUTS = {
    "layers": ({"outputs": {"last": 2.0, "layer": 1.0}, "symmetric": True}, InfoNCE),
    "guide": ({"symmetric": True}, Guided),
}


def step(rank, rows, name, gather, tile_rows, take):
    """Return the loss and gradients of one case, by the cached step of this rank or the reference of all."""
    options, objective, extras = CASES[name] if name in CASES else (*OUTPUTS[name], {})
    encoder, temperature, objective = Encoder(0, name in OUTPUTS), Temperature(0.2, learnable=True).double(), objective()
    if name in OUTPUTS:
        extras = {"outputs": lambda *_: {"last": WIDTH, "layer": WIDTH}}
    loss = LossOptions(objective=objective, gather=gather, tile_rows=tile_rows, **options)
    common = {"loss": loss, "temperature": temperature, "chunk_tokens": 7, "seed": 0, "step": 0, "progress": 0.3}
    if take == "reference":
        value = reference_step([make_batch(r, n, encoder, **extras) for r, n in enumerate(rows)], **common)
    else:
        group = dist.group.WORLD if len(rows) > 1 else None
        called = DistributedDataParallel(encoder, broadcast_buffers=False) if group else encoder
        batch = make_batch(rank, rows[rank], called, **extras)
        sync = DDPSync(called) if group else NoSync()
        value = cached_step(batch, sync=sync, group=group, keep_graphs=1, **common).loss
    named = {"encoder": encoder, "temperature": temperature}
    return value, gradients_of(**named, **({"objective": objective} if isinstance(objective, nn.Module) else {}))


@functools.cache
def expected(rows, name):
    """Return what the reference finds, however rows and tiles are cut."""
    value, gradients = step(0, rows, name, "auto", None, "reference")
    return value, MappingProxyType(gradients)


def steps(rank, rows, cases):
    return [step(rank, rows, *case, "cached") for case in cases]


@pytest.mark.parametrize("rows", [(6,), (5, 4), (3, 0, 4)])
def test_each_extension_has_the_oracles_gradient(rows):
    ways = [("passages", 2), ("queries", None)]
    cases = [
        (name, gather, tile_rows)
        for name, (gather, tile_rows) in itertools.product([*CASES, *OUTPUTS], ways)
        if not (name == "extra" and gather == "passages" and len(rows) > 1)
    ]
    for found in run_ranks(steps, len(rows), rows, cases):
        for case, (value, gradients) in zip(cases, found, strict=True):
            wanted_value, wanted = step(0, rows, *case, "reference")
            try:
                assert value == pytest.approx(wanted_value, rel=1e-10)
                for name in [name for name, gradient in wanted.items() if gradient is None]:  # a loss without a temperature
                    assert not gradients.pop(name).any()
                wanted = {name: gradient for name, gradient in wanted.items() if gradient is not None}
                assert_same_gradients(gradients, wanted)
                for name in wanted:
                    torch.testing.assert_close(gradients[name], wanted[name], rtol=1e-8, atol=1e-11)
            except AssertionError as error:
                raise AssertionError(f"rows {rows}, case {case}: {error}") from error


def plain_rows(seed=0):
    """Return unit queries and passages, six of each, with graphs; passage i is the positive of query i, all texts differ."""
    torch.manual_seed(seed)
    return [normalize(torch.randn(6, 4).double(), dim=1).requires_grad_() for _ in range(2)]


def by_cached_step(objective, query, passage, **options):
    """Return (loss, gradients of queries, passages and of the inverse temperature's logarithm) by a cached step."""
    rows = torch.cat([query, passage]).detach().requires_grad_()
    keys = torch.arange(len(rows))
    tower = Tower(encode=lambda x: x, lengths=torch.ones_like(keys), load=lambda chosen: rows[chosen])
    own = torch.arange(len(query))
    batch = Batch(towers=[tower], num_queries=len(query), keys=keys, target=own, positive_keys=keys[len(query) :][own][:, None])
    temperature = Temperature(0.5, learnable=True).double()
    progress = options.pop("progress", 0.0)
    found = cached_step(
        batch, loss=LossOptions(objective=objective, tile_rows=4, **options), temperature=temperature, sync=NoSync(),
        group=None, chunk_tokens=5, keep_graphs=0, seed=0, step=0, progress=progress,
    )  # fmt: skip
    return found.loss, *rows.grad.split(len(query)), temperature.log_scale.grad


def negatives_of(scores):
    """Return the scores off the diagonal, (6, 5)."""
    return scores[~torch.eye(len(scores), dtype=torch.bool)].view(len(scores), -1)


def plain_uniformity(query, passage, scale):
    potentials = (-2 * torch.pdist(query).square()).exp().mean().log()  # as in the paper's own listing
    return (query - passage).square().sum(1).mean() + potentials


def plain_hardest(query, passage, scale):
    scores = query @ passage.T
    kept = negatives_of(scores).sort(dim=1, descending=True).values[:, :3]
    return cross_entropy(scale * torch.cat([scores.diagonal()[:, None], kept], 1), torch.zeros(6, dtype=torch.int64))


def plain_cacr(query, passage, scale):
    distance = torch.cdist(query, passage).square()
    far = negatives_of(distance)
    return (distance.diagonal() - (torch.softmax(-2 * far, 1) * far).sum(1)).mean()


def plain_arm(query, passage, scale):
    scores, own = query @ passage.T, (passage @ passage.T).detach()
    lead, margin = scores.diagonal()[:, None] - negatives_of(scores), own.diagonal()[:, None] - negatives_of(own)
    return torch.nn.functional.mse_loss(lead, margin)


def plain_sigmoid(query, passage, scale):
    labels = 2 * torch.eye(6).double() - 1
    return -torch.nn.functional.logsigmoid(labels * (scale * query @ passage.T - 1)).sum() / 6


def plain_progress(query, passage, scale):
    loss = cross_entropy(scale * query @ passage.T, torch.arange(6), reduction="none")
    hard = 1 - (-loss).exp().detach()
    return (loss * 2 * (0.7 * (1 - hard) + 0.3 * hard)).mean()


PLAIN = [
    (AlignmentUniformity(), plain_uniformity, {"same_side": True}),
    (InfoNCE(hardest=3), plain_hardest, {}),
    (CACR(), plain_cacr, {}),
    (AdaptiveMargins(), plain_arm, {}),
    (Sigmoid(bias=-1.0).double(), plain_sigmoid, {}),
    (Progressive(), plain_progress, {"progress": 0.3}),
]


@pytest.mark.parametrize("objective, plain, options", PLAIN, ids=[type(objective).__name__ for objective, *_ in PLAIN])
@pytest.mark.parametrize("gather", ["passages", "queries"])
def test_each_extension_is_its_formula(objective, plain, options, gather):
    query, passage = plain_rows()
    log_scale = torch.tensor(0.5).double().reciprocal().log().requires_grad_()
    wanted = plain(query, passage, log_scale.exp())
    gradients = torch.autograd.grad(wanted, (query, passage, log_scale), allow_unused=True)
    loss, *found = by_cached_step(objective, query.detach(), passage.detach(), gather=gather, **options)
    assert loss == pytest.approx(wanted.item(), rel=1e-7)  # the temperature is held as a float32 logarithm
    of_scale, found_scale = gradients[2], found.pop()
    assert found_scale == pytest.approx(0.0 if of_scale is None else of_scale.item(), rel=1e-6, abs=1e-9)
    for rows, gradient, other in zip((query, passage), gradients, found, strict=False):
        # Distances see the lengths of rows, scores do not; encoders that return unit rows have no use for that component.
        along, found_along = ((rows * values).sum(1, keepdim=True) * rows for values in (gradient, other))
        torch.testing.assert_close(other - found_along, gradient - along, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gather", ["passages", "queries"])
def test_three_texts_are_contrasted_by_their_multilinear_product(gather):
    torch.manual_seed(0)
    x, y, z = texts = [torch.randn(5, 4).double().requires_grad_() for _ in range(3)]
    apart_y, apart_z = y.roll(1, 0), z.roll(2, 0)
    wanted = torch.zeros(()).double()
    for own, pair, apart in [(x, y * z, apart_y * apart_z), (y, x * z, x * apart_z), (z, x * y, x * apart_y)]:
        scores = torch.cat([(own * pair).sum(1, keepdim=True), own @ apart.T], 1) / 0.5
        wanted = wanted + cross_entropy(scores, torch.zeros(5, dtype=torch.int64)) / 3
    gradients = torch.autograd.grad(wanted, texts)
    rows, ones, keys = torch.cat(texts).detach().requires_grad_(), torch.ones(15, dtype=torch.int64), torch.arange(15)
    batch = Batch(
        towers=[Tower(encode=lambda inputs: inputs, lengths=ones, load=lambda chosen: rows[chosen])],
        num_queries=5,
        keys=keys,
        target=torch.arange(5),
        positive_keys=keys[5:10, None],
        own_only=torch.arange(10) < 5,
        derive=symile_rows,
        outputs={"x": 4, "y": 4, "z": 4},
    )
    options = LossOptions(objective=InfoNCE(), outputs={"x": 1.0, "y": 1.0, "z": 1.0}, gather=gather)
    common = {"chunk_tokens": 4, "keep_graphs": 0, "seed": 0, "step": 0}
    found = cached_step(batch, loss=options, temperature=Temperature(0.5).double(), sync=NoSync(), group=None, **common)
    assert found.loss == pytest.approx(wanted.item(), rel=1e-7)
    torch.testing.assert_close(rows.grad, torch.cat(gradients), rtol=1e-6, atol=1e-9)


def frozen_step(rank, rows, frozen, gather, take):
    """Return the gradients of two towers, one of which is frozen, and how often each was called."""
    encoders, temperature, calls = [Encoder(0), Encoder(1)], Temperature(0.2, learnable=True).double(), [0, 0]
    for parameter in encoders[frozen].parameters():
        parameter.requires_grad_(False)

    def towers(batch, called):
        def encode(side):
            def counted(inputs):
                calls[side] += 1
                return called[side](inputs)

            return counted

        (tower,), edge = batch.towers, batch.num_queries
        parts = [slice(0, edge), slice(edge, None)]
        return [
            replace(
                tower,
                encode=encode(side),
                lengths=tower.lengths[part],
                load=lambda rows, first=part.start: tower.load(rows + first),
                is_frozen=side == frozen,
            )
            for side, part in enumerate(parts)
        ]

    loss = LossOptions(objective=AdaptiveMargins(), symmetric=True, gather=gather)
    common = {"loss": loss, "temperature": temperature, "chunk_tokens": 3, "seed": 0, "step": 0}
    if take == "reference":
        batches = [make_batch(r, n, None) for r, n in enumerate(rows)]
        reference_step([replace(b, towers=towers(b, encoders)) for b in batches], **common)
    else:
        group = dist.group.WORLD if len(rows) > 1 else None
        batch = make_batch(rank, rows[rank], None)
        called, sync = list(encoders), NoSync()
        if group:
            called[1 - frozen] = DistributedDataParallel(encoders[1 - frozen], broadcast_buffers=False)
            sync = DDPSync(called[1 - frozen])
        cached_step(replace(batch, towers=towers(batch, called)), sync=sync, group=group, keep_graphs=0, **common)
    return gradients_of(encoder=encoders[1 - frozen]), calls


@pytest.mark.parametrize("rows", [(5,), (4, 3)])
def test_a_frozen_tower_is_encoded_once_and_costs_no_gradient(rows):
    for frozen, gather in itertools.product((0, 1), ("passages", "queries")):
        wanted, _ = frozen_step(0, rows, frozen, gather, "reference")
        for found, calls in run_ranks(frozen_step, len(rows), rows, frozen, gather, "cached"):
            assert_same_gradients(found, wanted)
            chunks = [-(-number // 3) for number in (max(rows), 3 * max(rows))]
            assert calls[frozen] <= chunks[frozen] and calls[1 - frozen] > calls[frozen] / 4


def missing_value_step(rank):
    """Return what a rank says whose batch lacks, or whose other rank's batch lacks, a value that the objective needs."""
    encoder = Encoder(0)
    batch = make_batch(rank, 4, DistributedDataParallel(encoder, broadcast_buffers=False), candidates=candidates)
    if rank == 1:
        batch.candidates.values["teacher"][5] = torch.nan  # of query 2
    try:
        cached_step(
            batch, loss=LossOptions(objective=Distilled()), temperature=Temperature(0.2), sync=NoSync(), group=dist.group.WORLD,
            chunk_tokens=9, keep_graphs=0, seed=0, step=0,
        )  # fmt: skip
    except ValueError as error:
        return str(error), [parameter.grad for parameter in encoder.parameters()]


def test_a_value_that_is_missing_is_named_on_every_rank():
    for message, gradients in run_ranks(missing_value_step, 2):
        assert message == "Distilled needs a value 'teacher' of every scored pair, and query 2 of rank 1 has one without it"
        assert gradients == [None, None]
