"""`contrastive_loss` is the loss of one graph over all ranks' rows, in value and in every gradient."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache import Batch, LossOptions, NotFinite, Objective, Temperature, Tower, contrastive_loss
from gradcache.lost import told_failure
from gradcache.objectives.info_nce import InfoNCE
from gradcache.reference import reference_loss
from tests.gradients import assert_same_gradients, gradients_of
from tests.ranks import run_ranks

WIDTH = 6


def embeddings(rank, num_queries, num_passages, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + rank)
    rows = torch.randn(num_queries + num_passages, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return [normalize(part).requires_grad_() for part in rows.split([num_queries, num_passages])]


def plain(parts, temperature):
    """The definition: every query against the passages of all ranks, passage i of its rank its own."""
    query, passage = (torch.cat(side) for side in zip(*parts, strict=True))
    starts = itertools.accumulate((len(p) for _, p in parts), initial=0)
    target = torch.cat([start + torch.arange(len(q)) for start, (q, _) in zip(starts, parts, strict=False)])
    return cross_entropy(query @ passage.T / temperature, target)


@pytest.mark.parametrize("num_passages", [7, 17])
@pytest.mark.parametrize("options", [{}, {"tile_rows": 3}, {"gather": "queries"}])
def test_it_is_the_cross_entropy_of_one_graph(num_passages, options):
    found, wanted = (embeddings(0, 7, num_passages) for _ in range(2))
    learnt, expected = (torch.tensor(0.2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = contrastive_loss(*found, temperature=learnt, options=LossOptions(objective=InfoNCE(), **options))
    (3 * loss).backward()
    reference = plain([wanted], expected)
    (3 * reference).backward()
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=0)
    for a, b in zip([*found, learnt], [*wanted, expected], strict=True):
        assert b.grad.norm() > 0
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)


def test_a_number_and_a_temperature_say_the_same():
    temperature = Temperature(0.2, learnable=True)
    loss = contrastive_loss(*embeddings(0, 4, 9), temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(contrastive_loss(*embeddings(0, 4, 9), temperature=0.2).item())
    expected = Temperature(0.2, learnable=True)
    plain([embeddings(0, 4, 9)], 1 / expected.scale()).backward()
    assert temperature.log_scale.grad.item() == pytest.approx(expected.log_scale.grad.item(), rel=1e-5) != 0


class Scaled(nn.Module, InfoNCE):
    """InfoNCE times a number that is learnt."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def loss(self, rows):
        return super().loss(rows) * self.factor


ROWS = {1: (5,), 2: (5, 3), 3: (2, 0, 4)}
WAYS = [{"gather": "passages"}, {"gather": "queries"}, {"symmetric": True}]


def on_ranks(rank, rows):
    found = []
    for way in WAYS:
        objective = Scaled()
        query, passage = embeddings(rank, rows[rank], 2 * rows[rank] + 1)
        temperature = Temperature(0.2, learnable=True).double()
        loss = contrastive_loss(
            query, passage, temperature=temperature, options=LossOptions(objective=objective, tile_rows=4, **way)
        )
        loss.backward()
        found.append((loss.item(), query.grad, passage.grad, temperature.log_scale.grad, objective.factor.grad))
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_gradients_are_the_mean_loss_of_all_ranks_times_their_number(num_ranks):
    rows = ROWS[num_ranks]
    found = run_ranks(on_ranks, num_ranks, rows) if num_ranks > 1 else [on_ranks(0, rows)]
    for number, way in enumerate(WAYS):
        parts = [embeddings(rank, n, 2 * n + 1) for rank, n in enumerate(rows)]
        objective, temperature = Scaled(), Temperature(0.2, learnable=True).double()
        if "symmetric" in way:
            expected = reference(parts, LossOptions(objective=objective, **way), temperature.scale())
        else:
            expected = plain(parts, 1 / temperature.scale()) * objective.factor
        expected.backward()
        for (query, passage), of_rank in zip(parts, found, strict=True):
            value, of_query, of_passage, of_temperature, of_factor = of_rank[number]
            assert value == pytest.approx(expected.item(), rel=1e-12)
            torch.testing.assert_close(of_query, query.grad * num_ranks, rtol=1e-9, atol=1e-13)
            torch.testing.assert_close(of_passage, passage.grad * num_ranks, rtol=1e-9, atol=1e-13)
            torch.testing.assert_close(of_temperature, temperature.log_scale.grad, rtol=1e-9, atol=0)
            torch.testing.assert_close(of_factor, objective.factor.grad, rtol=1e-9, atol=0)
        assert sum(query.grad.norm() for query, _ in parts) > 0 and objective.factor.grad != 0


def reference(parts, options, scale, keys=None, positives=None):
    """The oracle of `cached_step`, for rows whose keys are given, or differ."""
    batches = []
    for rank, (query, passage) in enumerate(parts):
        num_rows = len(query) + len(passage)
        row_keys = torch.arange(num_rows) + 1000 * rank if keys is None else torch.cat(keys[rank])
        table = torch.arange(len(query))[:, None] if positives is None else positives[rank]
        tower = Tower(encode=nn.Identity(), lengths=torch.ones(num_rows, dtype=torch.int64), load=nn.Identity())
        batches.append(
            Batch(
                towers=[tower],
                num_queries=len(query),
                keys=row_keys,
                target=table[:, 0],
                positive_keys=row_keys[len(query) :][table.clamp(min=0)],
            )
        )
    return reference_loss([torch.cat(part) for part in parts], batches, loss=options, scale=scale)


KEYS = [  # passages 1 of rank 0 and 2 of rank 1 are copies, and so are queries 0 of both
    (torch.tensor([1, 2, 3]), torch.tensor([11, 12, 13, 14])),
    (torch.tensor([1, 5]), torch.tensor([16, 17, 12])),
]
POSITIVES = [torch.tensor([[0, 3], [1, -1], [2, 0]]), torch.tensor([[0, -1], [1, 2]])]


def with_keys(rank):
    query, passage = embeddings(rank, *map(len, KEYS[rank]))
    options = LossOptions(objective=InfoNCE(positives="mean"), symmetric=True)
    loss = contrastive_loss(query, passage, temperature=0.2, keys=KEYS[rank], positives=POSITIVES[rank], options=options)
    loss.backward()
    return loss.item(), query.grad, passage.grad


def test_copies_are_no_negatives_and_several_passages_may_belong_to_a_query():
    parts = [embeddings(rank, *map(len, KEYS[rank])) for rank in range(2)]
    options = LossOptions(objective=InfoNCE(positives="mean"), symmetric=True)
    # The oracle's table knows no gaps: a query's own passage stands in them again, which changes nothing.
    tables = [torch.where(table < 0, table[:, :1], table) for table in POSITIVES]
    expected = reference(parts, options, torch.tensor(5.0, dtype=torch.float64), KEYS, tables)
    expected.backward()
    for (value, of_query, of_passage), (query, passage) in zip(run_ranks(with_keys, 2), parts, strict=True):
        assert value == pytest.approx(expected.item(), rel=1e-9)
        torch.testing.assert_close(of_query, 2 * query.grad)
        torch.testing.assert_close(of_passage, 2 * passage.grad)
    assert expected.item() != pytest.approx(reference(parts, options, torch.tensor(5.0).double()).item(), rel=1e-4)


def through_ddp(rank, rows):
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(WIDTH, WIDTH))
    for _ in range(2):  # DDP rebuilds its buckets in the second
        model.zero_grad()
        query, passage = (model(side.detach().float()) for side in embeddings(rank, rows[rank], 3))
        contrastive_loss(query, passage, temperature=0.2).backward()
    alone = contrastive_loss(query, passage, temperature=0.2, group=None).item()
    return gradients_of(model=model.module), alone


def test_an_ordinary_model_under_ddp_gets_the_gradient_of_one_graph():
    rows = (3, 2)
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, WIDTH)
    parts = [[model(side.detach().float()) for side in embeddings(rank, n, 3)] for rank, n in enumerate(rows)]
    plain(parts, 0.2).backward()
    for (found, alone), part in zip(run_ranks(through_ddp, 2, rows), parts, strict=True):
        assert_same_gradients(found, gradients_of(model=model))
        assert alone == pytest.approx(plain([part], 0.2).item(), rel=1e-5)


def test_half_precision_embeddings_get_half_precision_gradients_of_an_exact_loss():
    found, wanted = embeddings(0, 4, 9, torch.bfloat16), embeddings(0, 4, 9, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(*found, temperature=0.05)
    loss.backward()
    plain([[side.float() for side in wanted]], 0.05).backward()
    assert loss.dtype == torch.float32
    for a, b in zip(found, wanted, strict=True):
        assert a.grad.dtype == torch.bfloat16
        torch.testing.assert_close(a.grad, b.grad, rtol=2**-7, atol=1e-4)


def test_a_loss_without_grad_mode_has_no_graph_and_a_backward_runs_once():
    rows = embeddings(0, 4, 9)
    with torch.no_grad():
        value = contrastive_loss(*rows, temperature=0.2)
    loss = contrastive_loss(*rows, temperature=0.2)
    assert not value.requires_grad and value.item() == pytest.approx(loss.item())
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_side_that_is_not_trained_gets_no_gradient_and_changes_none():
    (query, passage), (wanted, _) = embeddings(0, 4, 9), embeddings(0, 4, 9)
    contrastive_loss(query, passage.detach(), temperature=0.2).backward()
    plain([(wanted, passage.detach())], 0.2).backward()
    torch.testing.assert_close(query.grad, wanted.grad)
    assert query.grad.norm() > 0 and passage.grad is None


class Largest(TorchDispatchMode):
    """The largest tensor that anything made."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        made = [part for part in (found if isinstance(found, tuple | list) else [found]) if isinstance(part, torch.Tensor)]
        self.num_elements = max([self.num_elements, *(part.numel() for part in made)])
        return found


def test_no_matrix_of_all_scores_is_ever_made():
    query, passage = embeddings(0, 64, 512)
    with Largest() as found:
        contrastive_loss(query, passage, temperature=0.2, options=LossOptions(tile_rows=4)).backward()
        assert query.grad.norm() > 0
    assert 4 * 512 <= found.num_elements <= passage.numel() + query.numel() < 64 * 512
    with Largest() as found:
        plain([(query, passage)], 0.2)
    assert found.num_elements == 64 * 512


def of_embeddings(**changed):
    query, passage = embeddings(0, 3, 4)
    contrastive_loss(**{"query_BD": query, "passage_nD": passage, "temperature": 0.1} | changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"query_BD": [1.0]}, "query_BD is a list; expected a tensor of embeddings"),
        ({"query_BD": torch.ones(3)}, r"query_BD is \(3,\) of torch.float32; expected floating point embeddings"),
        ({"query_BD": torch.ones(3, 2, dtype=torch.int64)}, "of torch.int64; expected floating point"),
        ({"query_BD": torch.ones(3, WIDTH, device="meta")}, "query_BD is on meta and passage_nD on cpu"),
        ({"query_BD": torch.ones(3, 4)}, "embeddings of widths 4 and 6"),
        ({"query_BD": torch.ones(5, WIDTH)}, "5 queries and 4 passages; expected a passage for each query, or positives"),
        ({"query_BD": torch.ones(0, WIDTH)}, "no query on any rank"),
        ({"temperature": 0}, "temperature=0 must be one number, more than 0"),
        ({"temperature": torch.ones(2)}, "must be one number"),
        ({"positives": torch.tensor([0, 1])}, r"positives is \(2,\); expected the passages of each of 3 queries"),
        ({"positives": torch.tensor([0, 1, 4])}, "positives must be passages 0 to 3"),
        ({"positives": torch.tensor([0, 1, -1])}, "-1 behind a query's first"),
        ({"positives": torch.tensor([0.0, 1, 2])}, "positives are of type torch.float32; expected tensors of torch.int64"),
        ({"keys": (torch.arange(3), torch.arange(3))}, r"keys are \(3,\) and \(3,\), expected one for each of 3 queries and 4"),
        ({"keys": ([1, 2, 3], torch.arange(4))}, "keys are of type list"),
    ],
)
def test_what_does_not_fit_is_one_sentence(changed, said):
    with pytest.raises((ValueError, TypeError), match=said) as caught:
        of_embeddings(**changed)
    assert "\n" not in str(caught.value)


def test_an_embedding_that_is_not_finite_is_named():
    broken = torch.full((3, WIDTH), torch.nan)
    with pytest.raises(NotFinite, match="query 0 of rank 0"):
        of_embeddings(query_BD=broken)


def test_an_objective_without_parameters_is_used_as_it_is():
    class Doubled(InfoNCE):
        def loss(self, rows):
            return 2 * super().loss(rows)

    assert isinstance(Doubled(), Objective)
    loss = contrastive_loss(*embeddings(0, 3, 4), temperature=0.1, options=LossOptions(objective=Doubled()))
    assert loss.item() == pytest.approx(2 * contrastive_loss(*embeddings(0, 3, 4), temperature=0.1).item())


def failing_on_rank_1(rank):
    if rank == 1:
        with pytest.raises(ValueError, match="3 queries and 2 passages"):
            contrastive_loss(*embeddings(rank, 3, 2), temperature=0.1, group=dist.group.WORLD)
        return told_failure()


def test_an_error_of_one_rank_is_left_for_the_others_that_wait():
    _, told = run_ranks(failing_on_rank_1, 2)
    assert told.startswith("rank 1 failed: ValueError: there are 3 queries and 2 passages")
