"""Embeddings of `cached_encode` have the gradient of one graph: any chunks, inputs, kept graphs, ranks, dropout."""

import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from gradcache import cached_encode, contrastive_loss
from tests.gradcache.test_contrastive import plain
from tests.gradients import assert_same_gradients, gradients_of
from tests.ranks import run_ranks

WIDTH, VOCABULARY = 8, 30


class Encoder(nn.Module):
    """The mean of token embeddings, through two layers; takes what a tokenizer returns."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(dropout), nn.Linear(WIDTH, WIDTH))
        self.num_calls = 0

    def forward(self, inputs):
        self.num_calls += 1
        mask = inputs["attention_mask"][..., None]
        return normalize(self.head((self.table(inputs["input_ids"]) * mask).sum(1) / mask.sum(1)))


def tokens(num_rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (num_rows, 1), generator=generator)
    ids = torch.randint(VOCABULARY, (num_rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}


@pytest.mark.parametrize(("chunk_rows", "keep_graphs"), [(3, 0), (3, 1), (4, 2), (100, 1), (1, "all")])
def test_gradients_are_those_of_one_graph(chunk_rows, keep_graphs):
    found, wanted = Encoder(), Encoder()
    queries, passages = tokens(7, 5, 1), tokens(17, 9, 2)
    embedded = cached_encode(found, queries, passages, chunk_rows=chunk_rows, keep_graphs=keep_graphs)
    loss = contrastive_loss(*embedded, temperature=0.2)
    (loss / 4).backward()
    reference = plain([(wanted(queries), wanted(passages))], 0.2)
    (reference / 4).backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    assert_same_gradients(gradients_of(model=found), gradients_of(model=wanted))
    num_chunks = -(-7 // chunk_rows) + -(-17 // chunk_rows)
    assert found.num_calls == 2 * num_chunks - (num_chunks if keep_graphs == "all" else min(keep_graphs, num_chunks))


def test_any_loss_may_follow_and_each_input_may_have_its_own_encoder():
    pictures, words, sounds = (
        torch.randn(5, 3, 2),
        [torch.randn(4) for _ in range(7)],
        {"wave": {"left": torch.randn(3, 4)}, "times": 2},
    )

    def build():
        torch.manual_seed(1)
        return nn.ModuleList(nn.Linear(width, WIDTH) for width in (6, 4, 4))

    def encoders(models):
        return (
            lambda x: models[0](x.flatten(1)),
            lambda x: models[1](torch.stack(x)),
            lambda x: models[2](x["wave"]["left"] * x["times"]),
        )

    def loss_of(a, b, c):
        return (a.mean(0) * b.sum(0)).sum() + (c @ a.T).square().mean()

    def halved(a, b, c):
        return a / 2, b, c

    found, wanted = build(), build()
    embedded = cached_encode(encoders(found), pictures, words, sounds, chunk_rows=2)
    embedded[0].mul_(0.5)
    loss_of(*embedded).backward()
    loss_of(*halved(*(e(x) for e, x in zip(encoders(wanted), (pictures, words, sounds), strict=True)))).backward()
    assert_same_gradients(gradients_of(model=found), gradients_of(model=wanted))


def test_dropout_is_replayed_and_follows_the_seed():
    def run(seed, keep_graphs):
        model = Encoder(dropout=0.3)
        torch.manual_seed(seed)
        loss = contrastive_loss(
            *cached_encode(model, tokens(7, 5, 1), tokens(9, 5, 2), chunk_rows=3, keep_graphs=keep_graphs), temperature=0.2
        )
        torch.rand(5)  # what is drawn in between changes nothing
        after = torch.get_rng_state()
        loss.backward()
        assert torch.equal(after, torch.get_rng_state())
        return loss.item(), gradients_of(model=model)

    loss, gradients = run(7, 0)
    in_one_graph, expected = run(7, "all")
    other, _ = run(8, 0)
    assert loss == in_one_graph != other
    assert_same_gradients(gradients, expected)


def test_the_second_encoding_has_the_mixed_precision_of_the_first():
    model, dtypes = nn.Linear(4, WIDTH), []

    def encode(rows):
        embedding = model(rows)
        dtypes.append(embedding.dtype)
        return embedding

    with torch.autocast("cpu", dtype=torch.bfloat16):
        query, passage = cached_encode(encode, torch.randn(3, 4), torch.randn(5, 4), chunk_rows=2)
        loss = contrastive_loss(query, passage, temperature=0.5)
    loss.backward()
    assert query.dtype == torch.bfloat16 and set(dtypes) == {torch.bfloat16} and len(dtypes) == 9
    assert model.weight.grad.dtype == torch.float32 and model.weight.grad.norm() > 0


def test_without_grad_mode_there_is_no_graph_and_a_backward_runs_once():
    model, queries = Encoder(), tokens(3, 4, 1)
    with torch.no_grad():
        (embedding,) = cached_encode(model, queries, chunk_rows=2)
    assert not embedding.requires_grad and model.num_calls == 2
    (trained,) = cached_encode(model, queries, chunk_rows=2)
    torch.testing.assert_close(trained.detach(), model(queries).detach())
    trained.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="encode them again for another one"):
        trained.sum().backward()


ROWS = {2: (4, 3), 3: (3, 0, 2)}


def inputs_of(rank, num_rows):
    return tokens(num_rows, 5, 10 * rank), tokens(2 * num_rows, 7, 10 * rank + 1)


def steps_under_ddp(rank, rows):
    found, unreduced = [], {}
    for as_function in (False, True):
        model = DistributedDataParallel(Encoder(), broadcast_buffers=False)
        encode, models = (lambda chunk, m=model: m(chunk), [model]) if as_function else (model, None)
        for step in range(3):  # DDP rebuilds its buckets in the second
            model.zero_grad()
            # The third update has two parts, of which only the last reduces.
            for part in range(2 if step == 2 else 1):
                is_last = part == 1 or step < 2
                with contextlib.nullcontext() if is_last else model.no_sync():
                    embedded = cached_encode(encode, *inputs_of(rank + 5 * part, rows[rank]), chunk_rows=3, models=models)
                    loss = contrastive_loss(*embedded, temperature=0.2)
                    loss.backward()
                    unreduced = unreduced if is_last else gradients_of(model=model.module)
            found.append((loss.item(), gradients_of(model=model.module)))
        assert model.require_backward_grad_sync
    with torch.no_grad():
        if rank == 0:  # by itself: nothing communicates
            contrastive_loss(*cached_encode(model, *inputs_of(0, 4), chunk_rows=3), temperature=0.2, group=None)
    # An ordinary step goes on as ever.
    model.zero_grad()
    model(inputs_of(rank, 2)[0]).sum().backward()
    return found, gradients_of(model=model.module), unreduced


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_gradients_under_ddp_are_those_of_one_graph(num_ranks):
    rows = ROWS[num_ranks]
    answers = run_ranks(steps_under_ddp, num_ranks, rows)
    model = Encoder()

    def gradients(parts):
        model.zero_grad()
        for part in parts:
            sides = [inputs_of(rank + 5 * part, n) for rank, n in enumerate(rows)]
            loss = plain([tuple(map(model, side)) for side in sides if len(side[0]["input_ids"])], 0.2)
            loss.backward()
        return loss.item(), gradients_of(model=model)

    once, twice = gradients([0]), gradients([0, 1])
    model.zero_grad()
    for rank in range(num_ranks):
        (model(inputs_of(rank, 2)[0]).sum() / num_ranks).backward()
    first, last = (answers[rank][2]["model.head.3.weight"] for rank in (0, -1))
    assert not torch.allclose(first, last), "reduced although under no_sync"
    for found, ordinary, _ in answers:
        for (loss, actual), (expected_loss, expected) in zip(found, [once, once, twice] * 2, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert_same_gradients(actual, expected)
        assert_same_gradients(ordinary, gradients_of(model=model))


def averaged_by_hand(rank, rows):
    model = Encoder()
    contrastive_loss(*cached_encode(model, *inputs_of(rank, rows[rank]), chunk_rows=3), temperature=0.2).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    function_refused = ""
    try:
        cached_encode(lambda chunk: model(chunk), tokens(2, 3, 0), chunk_rows=1)
    except ValueError as error:
        function_refused = str(error)
    return gradients_of(model=model), function_refused


def test_the_average_over_ranks_is_exact_without_ddp_too():
    rows, model = (4, 3), Encoder()
    plain([tuple(map(model, inputs_of(rank, n))) for rank, n in enumerate(rows)], 0.2).backward()
    for found, refused in run_ranks(averaged_by_hand, 2, rows):
        assert_same_gradients(found, gradients_of(model=model))
        assert refused.startswith("encode is a function on 2 ranks; set models=[...] to the modules that it calls")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"chunk_rows": 0}, "chunk_rows=0 must be at least 1"),
        ({"inputs": ["a text", "another"]}, "input 0 is a str without rows; expected a tensor, a list, or a mapping of these"),
        ({"inputs": [torch.ones(())]}, "input 0 is a Tensor without rows"),
        (
            {"inputs": [{"ids": torch.ones(3, 2), "mask": torch.ones(4, 2)}]},
            "input 0 holds 3 of 'ids', 4 of 'mask'; expected the",
        ),
        ({"inputs": [{"ids": torch.ones(3, 2), "mask": (1, 1, 1)}]}, r"input 0\['mask'\] is a tuple without rows"),
        ({"inputs": [{"task": "sts"}]}, "input 0 holds no rows"),
        ({"inputs": []}, "encode has 0 functions for 0 inputs"),
        ({"encode": (len, len)}, "encode has 2 functions for 1 inputs; expected one, or one for each input"),
        ({"encode": lambda x: {"embedding": x}}, "encode returned a dict; expected a tensor of embeddings"),
        ({"encode": lambda x: x[:, None]}, r"encode returned \(2, 1, 4\) for 2 rows; expected \(rows, width\)"),
        ({"encode": (lambda x: x, lambda x: x[:, :3]), "inputs": [torch.ones(3, 4)] * 2}, r"embeddings of widths \[3, 4\]"),
        ({"models": nn.Identity()}, "models is Identity; expected a list of the modules that encode calls"),
        ({"keep_graphs": -1}, "keep_graphs=-1 must be at least 0"),
    ],
)
def test_what_does_not_fit_is_one_sentence(given, said):
    given = {"encode": lambda x: x, "inputs": [torch.ones(3, 4)], "chunk_rows": 2} | given
    with pytest.raises((ValueError, TypeError), match=said) as caught:
        cached_encode(given.pop("encode"), *given.pop("inputs"), **given)
    assert "\n" not in str(caught.value)


class Small(nn.Linear):
    """Has memory for some rows, in its first or its second encoding."""

    def __init__(self, most_rows, in_which):
        super().__init__(4, WIDTH)
        self.most_rows, self.in_which = most_rows, in_which

    def forward(self, rows):
        if len(rows) > self.most_rows and torch.is_grad_enabled() == (self.in_which == 2):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(rows)


@pytest.mark.parametrize("in_which", [1, 2])
def test_a_chunk_that_does_not_fit_is_halved_or_named(in_which):
    model, rows = Small(2, in_which), torch.randn(7, 4)
    (embedding,) = cached_encode(model, rows, chunk_rows=5, keep_graphs=0)
    embedding.sum().backward()
    torch.testing.assert_close(model.weight.grad, rows.sum(0).expand(WIDTH, 4))
    with pytest.raises(torch.OutOfMemoryError, match=r"^a chunk of rows does not fit into memory; set chunk_rows lower$"):
        cached_encode(Small(0, in_which), rows, chunk_rows=5, keep_graphs=0)[0].sum().backward()


def refused_models(rank):
    with pytest.raises(ValueError, match="is under fully_shard, which cached_encode does not know; use cached_step"):
        cached_encode(fully_shard(nn.Linear(4, 4)), torch.ones(3, 4), chunk_rows=2)
    with pytest.raises(ValueError, match="broadcast_buffers=True"):
        cached_encode(DistributedDataParallel(nn.Linear(4, 4)), torch.ones(3, 4), chunk_rows=2)


def test_models_that_communicate_in_a_forward_are_refused():
    run_ranks(refused_models, 2)


def test_chunks_cover_sizes_that_do_not_divide():
    for num_rows, chunk_rows in itertools.product((1, 2, 5), (1, 2, 3, 7)):
        rows = torch.randn(num_rows, 3)
        (embedding,) = cached_encode(nn.Identity(), rows, chunk_rows=chunk_rows)
        assert torch.equal(embedding, rows)
