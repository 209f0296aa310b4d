"""Packed texts: embeddings and gradients of padded ones, for every family that is said to take them."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.gradients import assert_same_gradients, gradients_of
from tests.trainer.encoder.families import DROPOUT, FROM_TWO, MODERN, ROPE, SIZES
from trainer.encoder.architecture import without_pooler
from trainer.encoder.attention import ATTENTION
from trainer.encoder.backbone import checkpoint_activations
from trainer.encoder.dropout import replace_dropout
from trainer.encoder.latent import LatentAttention
from trainer.encoder.packed import PACKED_FAMILIES, packs
from trainer.encoder.pooling import POOLINGS, pooling_of
from trainer.encoder.settings import Traits
from trainer.encoder.towers import Encoder, TwoTowers

LENGTHS = [20, 3, 31, 1, 17, 31]  # 103 tokens, more than there are positions
TABLE = SIZES | DROPOUT | {"max_position_embeddings": 32}
CONFIGS = {
    "bert": TABLE,
    "electra": TABLE | {"embedding_size": 24},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 32},
    "modernbert": SIZES | MODERN | {"local_attention": 8},
    "mistral": ROPE | {"sliding_window": 6},
    "nomic_bert": SIZES,
    "gemma3_text": ROPE | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    **{family: FROM_TWO | {"max_position_embeddings": 34} for family in ("roberta", "xlm-roberta", "camembert")},
    **{family: ROPE for family in ("eurobert", "gemma", "granite", "llama", "olmo2", "phi3", "qwen2", "qwen3")},
}
VARIANTS = [
    *((family, {}) for family in sorted(CONFIGS)),
    *((family, {"is_causal": False}) for family in ("qwen3", "llama", "mistral")),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
]


def build(family="bert", pooling="mean", **values):
    """Return an encoder of a random transformer of a family, as `load_encoder` makes it."""
    torch.manual_seed(0)
    special = {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(family, vocab_size=40, **special | CONFIGS[family] | {"use_cache": False} | values)
    model = AutoModel.from_config(config, **without_pooler(config))
    with torch.no_grad():  # an initial deviation of 0.02 would hide what depends on what
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    replace_dropout(model)
    model.set_attn_implementation(ATTENTION)
    pool = LatentAttention(32, 4) if pooling == "latent" else pooling_of(pooling)
    traits = Traits(
        pooling=pooling, normalize=False, query_prefix="", passage_prefix="", max_query_tokens=31, max_passage_tokens=31
    )
    return Encoder(model, pool, [], traits)


def inputs_of(lengths=LENGTHS, prompt=0):
    """Return one set of random texts, padded and packed."""
    draw, longest = torch.Generator().manual_seed(1), max(lengths)
    lengths_n = torch.tensor(lengths)
    ids_nL = torch.randint(2, 40, (len(lengths), longest), generator=draw)
    mask_nL = (torch.arange(longest) < lengths_n[:, None]).long()
    starts_n1 = torch.nn.functional.pad(lengths_n.cumsum(0), (1, 0)).int()
    padded = {"input_ids": ids_nL * mask_nL, "attention_mask": mask_nL}
    packed = {"input_ids": ids_nL[mask_nL.bool()], "starts": starts_n1, "longest": longest}
    if prompt:
        pooled_nL = mask_nL * (torch.arange(longest) >= torch.minimum(torch.tensor(prompt), lengths_n - 1)[:, None])
        padded["pooled_mask"], packed["pooled_mask"] = pooled_nL, pooled_nL[mask_nL.bool()]
    return padded, packed


def step(encoder, inputs):
    """Return embeddings and the gradients of a random weighting of them."""
    encoder.zero_grad()
    torch.manual_seed(3)
    embedding_nD = encoder(inputs)
    weight_nD = torch.randn(embedding_nD.shape, generator=torch.Generator().manual_seed(2))
    (embedding_nD * weight_nD).sum().backward()
    return embedding_nD.detach(), gradients_of(encoder=encoder)


def assert_same_step(found, expected):
    assert float(torch.pdist(expected[0]).min()) > 0.05, "texts differ"
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert_same_gradients(found[1], expected[1])


def test_every_family_that_packs_is_proven_here():
    assert set(CONFIGS) == PACKED_FAMILIES


@pytest.mark.parametrize(("family", "values"), VARIANTS, ids=[f"{f}-{'-'.join(v)}" for f, v in VARIANTS])
def test_packed_texts_have_the_embeddings_and_the_gradients_of_padded_ones(family, values):
    encoder = build(family, **values).eval()
    padded, packed = inputs_of()
    assert_same_step(step(encoder, packed), step(encoder, padded))
    with torch.inference_mode():
        embedding_nD = encoder(packed)
        start, end = packed["starts"][2:4].tolist()
        others = packed["input_ids"].clone()
        others[:start] = others[end:] = 7
        moved_nD = encoder({**packed, "input_ids": others})
    assert torch.equal(moved_nD[2], embedding_nD[2]), "another text's tokens change nothing"
    assert float((moved_nD - embedding_nD).norm(dim=1)[[0, 1, 3, 4, 5]].min()) > 0.05


@pytest.mark.parametrize("prompt", [0, 2])
@pytest.mark.parametrize("pooling", [*POOLINGS, "latent", "mean+last"])
def test_every_pooling_is_that_of_padded_texts(pooling, prompt):
    encoder = build(pooling=pooling).eval()
    padded, packed = inputs_of(prompt=prompt)
    assert_same_step(step(encoder, packed), step(encoder, padded))
    if prompt and pooling != "last":
        assert not torch.allclose(encoder(packed), encoder(inputs_of()[1]), atol=1e-3), "the prompt is left out"


@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_a_seed_replays_dropout_with_and_without_graph(family):
    encoder = build(family, attention_dropout=0.3) if family == "mistral" else build(family)
    _, packed = inputs_of()
    with_graph, gradients = step(encoder, packed)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(encoder(packed), with_graph)
        assert not torch.allclose(encoder(packed), with_graph, atol=1e-3)
    assert_same_gradients(step(encoder, packed)[1], gradients)


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [9]])
def test_texts_of_one_token_and_a_single_text_are_packed(lengths):
    encoder = build("qwen3", "last").eval()
    padded, packed = inputs_of(lengths)
    torch.testing.assert_close(encoder(packed), encoder(padded), rtol=1e-5, atol=1e-5)


def test_recomputed_activations_change_no_gradient():
    expected = step(build("qwen3"), inputs_of()[1])
    encoder = build("qwen3")
    checkpoint_activations(encoder.model)
    assert_same_step(step(encoder, inputs_of()[1]), expected)


def test_texts_are_not_packed_where_nothing_proves_that_they_stay_apart():
    encoder = build()
    encoder.model.config.model_type = "mpnet"
    with pytest.raises(ValueError, match="a model of type mpnet takes no packed texts"):
        encoder(inputs_of()[1])


CUDA = torch.device("cuda", 0)


@pytest.fixture
def a_gpu(monkeypatch):
    """Let torch say what it says of itself beside an H100."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_packs_says_where_the_flash_kernel_takes_the_texts(a_gpu, monkeypatch):
    encoder = build()
    assert packs(encoder, CUDA, torch.bfloat16) and packs(encoder, CUDA, torch.float16)
    assert not packs(encoder, CUDA, torch.float32) and not packs(encoder, torch.device("cpu"), torch.bfloat16)
    assert packs(TwoTowers(encoder, build("roberta")), CUDA, torch.bfloat16)
    assert not packs(TwoTowers(encoder, build(num_attention_heads=8)), CUDA, torch.bfloat16), "heads of 4 numbers"
    wide = build("gemma", head_dim=256)
    assert packs(wide, CUDA, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert not packs(wide, CUDA, torch.bfloat16) and packs(encoder, CUDA, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not packs(encoder, CUDA, torch.float16)


def test_packs_refuses_attention_that_is_not_ours(a_gpu):
    encoder = build()
    encoder.model.set_attn_implementation("eager")
    assert not packs(encoder, CUDA, torch.bfloat16)
