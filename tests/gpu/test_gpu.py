"""The same proofs where the tensors live on a GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gradcache import (
    InfoNCE,
    LossOptions,
    NoSync,
    Ragged,
    Temperature,
    cached_step,
    probe_budget,
    reference_step,
)
from gradcache.masks import Masks, Pairing, first_columns, relate
from gradcache.tiles import Matrix, Tiles
from tests.gradcache.test_step import build, make_batch, named
from tests.gradcache.wide import Wide, wide_batch
from tests.gradients import assert_same_gradients
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.encoder.encode import encode_rows
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.tokens import tokenize
from trainer.encoder.topk import top_k

pytestmark = pytest.mark.gpu
LOSS = LossOptions(objective=InfoNCE(), symmetric=True)
OPTIONS = {"chunk_tokens": 35, "seed": 3, "step": 7}


def on_gpu(encoder):
    """Return an encoder whose inputs are brought to the GPU."""
    return lambda inputs: encoder({name: tensor.cuda() for name, tensor in inputs.items()})


@pytest.mark.parametrize(("keep_graphs", "gather"), [(0, "queries"), (2, "passages"), ("all", "queries")])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_the_references_on_a_gpu(keep_graphs, gather, dropout):
    found = []
    for step in ("cached", "reference"):
        encoders, temperature = [e.cuda() for e in build(1, dropout)], Temperature(0.1, learnable=True).cuda()
        batch = make_batch(0, 6, [on_gpu(e) for e in encoders])
        if step == "cached":
            cached_step(
                batch,
                loss=replace(LOSS, gather=gather),
                temperature=temperature,
                sync=NoSync(),
                group=None,
                keep_graphs=keep_graphs,
                **OPTIONS,
            )
        else:
            reference_step([batch], loss=LOSS, temperature=temperature, **OPTIONS)
        found.append(named(encoders, temperature))
    assert_same_gradients(*found)


def take_step(encode=lambda encoder: on_gpu(encoder), loss=LOSS, scaler=None):
    """Return the result of a step on a GPU and its gradients."""
    encoders, temperature = [e.cuda() for e in build(1, 0.0)], Temperature(0.1, learnable=True).cuda()
    batch = make_batch(0, 6, [encode(e) for e in encoders])
    step = {"sync": NoSync(), "group": None, "keep_graphs": 1, "scaler": scaler, **OPTIONS}
    result = cached_step(batch, loss=loss, temperature=temperature, **step)
    return result, named(encoders, temperature)


def flat(gradients):
    return torch.cat([g.flatten().double() for g in gradients.values()])


def test_bfloat16_encoding_and_products_point_the_same_way_on_a_gpu():
    def under_autocast(encoder):
        def encode(inputs):
            with torch.autocast("cuda", torch.bfloat16):
                return on_gpu(encoder)(inputs)

        return encode

    exact, wanted = take_step()
    for result, found in (take_step(under_autocast), take_step(loss=replace(LOSS, product_dtype=torch.bfloat16))):
        assert result.loss == pytest.approx(exact.loss, rel=2e-2) and result.loss != exact.loss
        assert torch.cosine_similarity(flat(found), flat(wanted), 0) > 0.99


def test_gradients_at_several_widths_are_the_references_on_a_gpu():
    loss = replace(LOSS, widths=(32, 12, 5), width_weights=(1.0, 2.0, 0.5))
    result, found = take_step(loss=loss)
    encoders, temperature = [e.cuda() for e in build(1, 0.0)], Temperature(0.1, learnable=True).cuda()
    batch = make_batch(0, 6, [on_gpu(e) for e in encoders])
    wanted = reference_step([batch], loss=loss, temperature=temperature, **OPTIONS)
    assert result.loss == pytest.approx(wanted, rel=1e-5)
    assert_same_gradients(found, named(encoders, temperature))
    narrow, rounded = take_step(loss=replace(loss, product_dtype=torch.bfloat16))
    assert narrow.loss == pytest.approx(wanted, rel=2e-2) and narrow.loss != result.loss
    assert torch.cosine_similarity(flat(rounded), flat(found), 0) > 0.99


def test_float16_gradients_unscaled_are_those_of_float32_on_a_gpu():
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    _, wanted = take_step()
    _, found = take_step(scaler=scaler)
    assert_same_gradients({name: g / 2**10 for name, g in found.items()}, wanted)


@pytest.mark.parametrize("keep_graphs", [0, "all"])
def test_a_gpu_that_is_too_small_for_a_chunk_gives_the_same_gradient(keep_graphs, caplog):
    found = []
    options = {"loss": replace(LOSS, symmetric=False), "seed": 0, "step": 0}
    for fits in (True, False):
        encoder, temperature = Wide().cuda(), Temperature(0.1, learnable=True).cuda()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        room = 400 * 2**20 + torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction(1.0 if fits else room / total)
        try:
            result = cached_step(
                wide_batch(encoder, device="cuda"),
                temperature=temperature,
                sync=NoSync(encoder),
                group=None,
                chunk_tokens=32 if fits else 1024,
                keep_graphs=0 if fits else keep_graphs,
                **options,
            )
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        found.append(named([encoder], temperature))
    assert result.num_halved > 0 and "out of memory" in caplog.text
    assert_same_gradients(found[1], found[0])


def test_what_a_probe_chooses_fits_a_gpu():
    encoder, limit = Wide().cuda(), 256 * 2**20
    batch = wide_batch(encoder, device="cuda")
    budget = probe_budget(batch.towers, limit, torch.device("cuda"))
    gradients = 2 * sum(p.nbytes for p in encoder.parameters())  # a chunk's own, and the sum of all
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cached_step(
        batch,
        loss=replace(LOSS, symmetric=False),
        temperature=Temperature(0.1).cuda(),
        sync=NoSync(),
        group=None,
        chunk_tokens=budget.chunk_tokens,
        keep_graphs=budget.keep_graphs,
        seed=0,
        step=0,
    )
    tile = 512 * 512 * 4 * 4
    assert torch.cuda.max_memory_allocated() - before < limit + gradients + tile


def test_a_million_columns_take_time_and_no_memory():
    rows, columns, width = 512, 2**20, 768
    query, passage = (torch.randn(n, width, device="cuda").to(torch.bfloat16) for n in (rows, columns))
    own, keys = torch.arange(rows, device="cuda"), torch.arange(columns, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row_keys, column_keys = Ragged.of_table(own[:, None]), Ragged.of_table(keys[:, None])
    (related,) = relate([Pairing(row_keys, column_keys, first_columns(keys), range(columns))])
    matrix = Matrix(
        row_RD=query,
        column_PD=passage,
        kind_P=torch.zeros(columns, dtype=torch.int8, device="cuda"),
        masks=Masks(keys[:0], [(0, related)]),
        scale=torch.tensor(0.05, device="cuda"),
        positive_R=torch.zeros(rows, device="cuda"),
    )
    found = Tiles(matrix, InfoNCE()).gradients(lambda block, statistics_bS: torch.full_like(statistics_bS, 1 / rows))
    assert float(found.row_RD.norm()) > 0 and torch.isfinite(found.column_PD).all()
    # The columns' gradient, and one tile of all rows: scores in float32, their gradient in bfloat16. The rest is the product that
    # is added to the gradient, a few columns at once, the workspace of the products, and keys of columns.
    held = columns * width * 4 + rows * columns * (4 + 2)
    assert torch.cuda.max_memory_allocated() - before < held + 2**28


@pytest.mark.parametrize("k", [10, 3000])
def test_exact_search_on_a_gpu_finds_what_it_finds_on_a_cpu(k):
    draw = np.random.default_rng(0)
    # Small whole numbers: products are exact on both, and ties are many.
    passage_ND, query_QD = (draw.integers(-3, 4, (n, 16)).astype(np.float32) for n in (70_001, 67))
    found = top_k(query_QD, passage_ND, k, device="cuda:0")
    for values, wanted in zip(found, top_k(query_QD, passage_ND, k), strict=True):
        np.testing.assert_array_equal(values, wanted)


def test_bfloat16_embeddings_of_a_gpu_are_near_those_of_a_cpu(tmp_path):
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=str(write_tiny_encoder(tmp_path / "encoder"))))
    corpus = open_dataset(write_tiny_dataset(tmp_path / "data"), tmp_path / "cache").corpus
    tokens = tokenize(corpus, tokenizer, prefix="", max_tokens=32, cache=tmp_path / "cache")
    rows = np.arange(len(tokens.lengths))
    exact = encode_rows(encoder, tokens, rows)
    np.testing.assert_allclose(encode_rows(encoder.cuda(), tokens, rows), exact, atol=1e-3)  # TF32 may be allowed
    half = encode_rows(encoder, tokens, rows, dtype=torch.bfloat16)
    assert (half != exact).any() and (half * exact).sum(1).min() > 0.99
