"""What a step promises besides its gradients (see test_cover.py), and that a proof of these would notice a fault."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel

from gradcache import (
    Batch,
    DDPSync,
    InfoNCE,
    LossOptions,
    NoSync,
    Temperature,
    Tower,
    cached_step,
    exchange,
    reference_step,
)
from gradcache import plan as plan_module
from tests.gradcache.named import NAMED
from tests.gradients import assert_same_gradients, gradients_of
from tests.ranks import run_ranks

VOCABULARY, WIDTH, MAX_TOKENS = 60, 32, 11


class TinyEncoder(nn.Module):
    """A random two-layer BERT with mean pooling and unit length."""

    def __init__(self, seed: int, dropout: float):
        super().__init__()
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            max_position_embeddings=MAX_TOKENS,
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, inputs):
        states = self.bert(**inputs).last_hidden_state
        weight = inputs["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)


def texts(num_rows: int, num_distinct: int, seed: int) -> list[list[int]]:
    """Random texts of uneven lengths, some of them equal."""
    generator = torch.Generator().manual_seed(seed)

    def text(number: int) -> list[int]:
        own = torch.Generator().manual_seed(number)
        length = int(torch.randint(1, MAX_TOKENS + 1, (), generator=own))
        return torch.randint(1, VOCABULARY, (length,), generator=own).tolist()

    return [text(int(i)) for i in torch.randint(num_distinct, (num_rows,), generator=generator)]


def make_batch(rank: int, num_queries: int, encoders: list[nn.Module], seed: int = 0, num_negatives: int = 1) -> Batch:
    """One rank's batch: queries, their positives, so many hard negatives a query; several positives a query, equal texts."""
    query = texts(num_queries, 40, seed=seed + 10 * rank)
    num_distinct = 25 if num_negatives else 8  # few enough that ranks have texts in common
    passage = texts((1 + num_negatives) * num_queries, num_distinct, seed=seed + 10 * rank + 5)
    rows = query + [[0, *text][:MAX_TOKENS] for text in passage]  # token 0 as the passages' prefix
    keys = torch.tensor([hash(tuple(text)) for text in rows], dtype=torch.int64)
    target = torch.arange(num_queries)
    # Judgements belong to the texts, so that equal queries on several ranks agree: shared positives besides the own.
    pool = torch.tensor([hash((0, *text)[:MAX_TOKENS]) for text in texts(25, 25, seed=1)], dtype=torch.int64)
    pick = keys[:num_queries, None].remainder(7) + torch.arange(2 if rank == 0 else 3)
    positive = torch.cat([keys[num_queries:][target][:, None], pool[pick]], dim=1)

    def load_from(first: int):
        def load(chunk):
            chosen = [rows[first + i] for i in chunk.tolist()] or [[1]]  # no rows: any input
            width = max(map(len, chosen))
            ids = torch.tensor([text + [0] * (width - len(text)) for text in chosen])
            mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in chosen])
            return {"input_ids": ids, "attention_mask": mask}

        return load

    lengths = torch.tensor([len(text) for text in rows], dtype=torch.int64)
    cuts = [0, len(rows)] if len(encoders) == 1 else [0, num_queries, len(rows)]
    towers = [
        Tower(encode=encoder, lengths=lengths[a:b], load=load_from(a), encode_keys=keys[a:b])
        for encoder, (a, b) in zip(encoders, itertools.pairwise(cuts), strict=True)
    ]
    return Batch(towers=towers, num_queries=num_queries, keys=keys, target=target, positive_keys=positive)


def build(num_towers: int, dropout: float) -> list[nn.Module]:
    return [TinyEncoder(seed, dropout).train() for seed in range(num_towers)]


def named(encoders, temperature):
    return gradients_of(**{f"tower{i}": e for i, e in enumerate(encoders)}, temperature=temperature)


@functools.cache
def expected(rows, num_towers, dropout, objective, symmetric, chunk_tokens, step):
    encoders, temperature = build(num_towers, dropout), Temperature(0.1, learnable=True)
    batches = [make_batch(rank, n, encoders) for rank, n in enumerate(rows)]
    options = LossOptions(objective=NAMED[objective], symmetric=symmetric)
    loss = reference_step(batches, loss=options, temperature=temperature, chunk_tokens=chunk_tokens, seed=3, step=step)
    return loss, named(encoders, temperature)


def take_step(rank, rows, num_towers, dropout, objective, symmetric, chunk_tokens, keep_graphs, step):
    encoders, temperature = build(num_towers, dropout), Temperature(0.1, learnable=True)
    group = dist.group.WORLD if len(rows) > 1 else None
    called = [DistributedDataParallel(e, broadcast_buffers=False) for e in encoders] if group else encoders
    result = cached_step(
        make_batch(rank, rows[rank], called),
        loss=LossOptions(objective=NAMED[objective], symmetric=symmetric),
        temperature=temperature,
        sync=DDPSync(*called) if group else NoSync(),
        group=group,
        chunk_tokens=chunk_tokens,
        keep_graphs=keep_graphs,
        seed=3,
        step=step,
    )
    return result, named(encoders, temperature)


def test_dropout_is_on_and_differs_between_steps():
    losses = {expected((4,), 1, 0.2, "info_nce", False, 30, step)[0] for step in (1, 2)}
    losses |= {expected((4,), 1, 0.0, "info_nce", False, 30, step)[0] for step in (1, 2)}
    assert len(losses) == 3, "two draws with dropout, one value without"


def test_the_proof_notices_a_dropout_that_is_not_replayed(monkeypatch):
    _, gradients = expected((4,), 1, 0.2, "info_nce", False, 22, 7)
    monkeypatch.setattr(plan_module.torch, "manual_seed", lambda seed: None)
    _, found = take_step(0, (4,), 1, 0.2, "info_nce", False, 22, 0, 7)
    with pytest.raises(AssertionError):
        assert_same_gradients(found, gradients)


def test_the_proof_notices_a_wrong_scale():
    _, gradients = expected((4,), 1, 0.0, "info_nce", False, 22, 7)
    _, found = take_step(0, (4,), 1, 0.0, "info_nce", False, 22, 0, 7)
    with pytest.raises(AssertionError, match="ratio"):
        assert_same_gradients({name: 1.01 * g for name, g in found.items()}, gradients)


def test_gradients_add_up_over_steps():
    encoders, temperature = build(1, 0.0), Temperature(0.1, learnable=True)
    options = {
        "loss": LossOptions(objective=InfoNCE()),
        "sync": NoSync(),
        "group": None,
        "chunk_tokens": 30,
        "keep_graphs": 1,
        "seed": 0,
        "step": 0,
    }
    cached_step(make_batch(0, 4, encoders), temperature=temperature, **options)
    once = named(encoders, temperature)
    cached_step(make_batch(0, 4, encoders), temperature=temperature, **options)
    assert_same_gradients(named(encoders, temperature), {name: 2 * g for name, g in once.items()})


def test_the_callers_generator_is_given_back():
    torch.manual_seed(11)
    wanted = torch.rand(3)
    encoders = build(1, 0.2)
    torch.manual_seed(11)
    options = {
        "loss": LossOptions(objective=InfoNCE()),
        "sync": NoSync(),
        "group": None,
        "chunk_tokens": 30,
        "keep_graphs": 1,
        "seed": 0,
        "step": 0,
    }
    cached_step(make_batch(0, 4, encoders), temperature=Temperature(0.1), **options)
    assert torch.equal(torch.rand(3), wanted)


def test_a_step_without_any_query_is_refused():
    encoders = build(1, 0.0)
    options = {
        "loss": LossOptions(objective=InfoNCE()),
        "sync": NoSync(),
        "group": None,
        "chunk_tokens": 30,
        "keep_graphs": 1,
        "seed": 0,
        "step": 0,
    }
    with pytest.raises(ValueError, match="no query on any rank"):
        cached_step(make_batch(0, 0, encoders), temperature=Temperature(0.1), **options)


def test_equal_texts_are_encoded_once():
    encoders, rows_encoded = build(1, 0.0), []
    batch = make_batch(0, 20, [lambda inputs: rows_encoded.append(len(inputs["input_ids"])) or encoders[0](inputs)])
    options = {
        "loss": LossOptions(objective=InfoNCE()),
        "sync": NoSync(),
        "group": None,
        "chunk_tokens": 50,
        "seed": 0,
        "step": 0,
    }
    result = cached_step(batch, temperature=Temperature(0.1), keep_graphs="all", **options)
    num_distinct = len(set(batch.keys.tolist()))
    assert sum(rows_encoded) == num_distinct < len(batch.keys)
    assert result.share_encoded_twice == 0


def test_two_passes_of_the_same_texts_are_two_views():
    def step(taker):
        encoder, temperature, seen = TinyEncoder(0, 0.2).train(), Temperature(0.1, learnable=True), []

        def encode(inputs):
            seen.append(encoder(inputs))
            return seen[-1]

        tower = make_batch(0, 6, [encode, encode]).towers[0]
        keys = tower.encode_keys
        views = Batch(
            towers=[tower, tower],
            num_queries=6,
            keys=torch.cat([keys, keys]),
            target=torch.arange(6),
            positive_keys=keys[:, None],
        )
        taker(views, loss=LossOptions(objective=InfoNCE()), temperature=temperature, chunk_tokens=10**6, seed=3, step=7)
        return seen, named([encoder], temperature)

    def cached(batch, **options):
        cached_step(batch, sync=NoSync(), group=None, keep_graphs=0, **options)

    def reference(batch, **options):
        reference_step([batch], **options)

    ((first, second, *_), found), (_, wanted) = step(cached), step(reference)
    cosine = torch.cosine_similarity(first, second)
    assert first.shape == second.shape and bool((cosine < 0.999).all()) and float(cosine.mean()) > 0.3
    assert_same_gradients(found, wanted)


COUNTED = [(exchange, "_all_gather"), (exchange, "_reduce_scatter"), (dist, "all_reduce"), (dist, "all_to_all_single")]


def count_collectives(rank, chunk_tokens, symmetric, keep_graphs, gather):
    """Return how often each collective was called in one step, the reductions of DDP among them."""
    calls = dict.fromkeys([*(name for _, name in COUNTED), "parameters"], 0)

    def counted(name, original):
        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    encoder = DistributedDataParallel(TinyEncoder(0, 0.1).train(), broadcast_buffers=False, bucket_cap_mb=100)

    def hook(_, bucket):
        calls["parameters"] += 1
        return dist.group.WORLD.allreduce([bucket.buffer()]).get_future().then(lambda f: f.value()[0] / 2)

    encoder.register_comm_hook(None, hook)
    for module, name in COUNTED:
        setattr(module, name, counted(name, getattr(module, name)))
    ids = torch.randint(0, 20, (64, 4), generator=torch.Generator().manual_seed(rank))
    tower = Tower(
        encode=encoder,
        lengths=torch.full((64,), 4),
        load=lambda rows: {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows])},
    )
    keys = rank * 64 + torch.arange(64)
    result = cached_step(
        Batch(towers=[tower], num_queries=32, keys=keys, target=torch.arange(32), positive_keys=keys[32:, None]),
        loss=LossOptions(objective=InfoNCE(), symmetric=symmetric, gather=gather),
        temperature=Temperature(0.1, learnable=True),
        sync=DDPSync(encoder),
        group=dist.group.WORLD,
        chunk_tokens=chunk_tokens,
        keep_graphs=keep_graphs,
        seed=0,
        step=0,
    )
    return result.num_chunks, dict(calls)  # later cases go on to count in the same dictionary


def count_in_every_case(rank, symmetric, gather):
    cases = [(1, 0), (8, 3), (64, 0), (64, "all")]
    return [(n, *count_collectives(rank, 64 * 4 // n, symmetric, keep_graphs, gather)) for n, keep_graphs in cases]


@pytest.mark.parametrize("gather", ["passages", "queries"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_collectives_do_not_depend_on_the_number_of_chunks(symmetric, gather):
    counts = []
    for wanted_chunks, num_chunks, calls in itertools.chain(*run_ranks(count_in_every_case, 2, symmetric, gather)):
        assert num_chunks == wanted_chunks
        counts.append(calls)
    wanted = {
        "_all_gather": 3,  # the counts, the keys, and the rows of all sides that travel
        "_reduce_scatter": 1,
        "all_reduce": 1,  # loss and temperature
        "all_to_all_single": 2 if gather == "queries" else 0,  # statistics to the rows' owners, derivatives back
        "parameters": 1,
    }
    assert all(calls == wanted for calls in counts), counts
