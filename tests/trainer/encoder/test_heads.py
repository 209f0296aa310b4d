"""What follows the transformer: poolings as sentence-transformers has them, latent attention, layers behind the pooling."""

import math

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense as TheirDense
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from tests.trainer.encoder.families import TEXTS, write_family
from trainer.encoder.latent import LatentAttention
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.pooling import MODES, POOLINGS
from trainer.encoder.rows import Padded
from trainer.errors import InputError


def load(folder, **settings):
    return load_encoder(ModelSettings(name=str(folder), **settings))


def padded_states(side):
    states, mask = torch.randn(3, 6, 8), torch.zeros(3, 6, dtype=torch.int64)
    for row, length in enumerate((6, 3, 1)):
        mask[row, slice(6 - length, 6) if side == "left" else slice(0, length)] = 1
    return states, mask


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_is_that_of_sentence_transformers(name, side, dtype):
    states, mask = padded_states(side)
    theirs = Pooling(8, MODES[name][0])({"token_embeddings": states.to(dtype), "attention_mask": mask})
    assert torch.equal(POOLINGS[name](states.to(dtype), Padded(mask, mask)), theirs["sentence_embedding"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_latent_attention_is_its_formula(side):
    torch.manual_seed(0)
    pool, (states, mask) = LatentAttention(8, 5), padded_states(side)
    assert pool.num_heads == 8 and LatentAttention(12, 3).num_heads == 4
    key, value = (pool.latent_norm(pool.latents_rD) @ pool.key_value.weight.T).split(8, dim=-1)
    query = pool.norm(states) @ pool.query.weight.T
    heads = [
        torch.softmax(query[..., h : h + 1] * key[:, h] / math.sqrt(1), -1) @ value[:, h : h + 1] for h in range(pool.num_heads)
    ]
    attended = states + torch.cat(heads, -1) @ pool.out.weight.T
    wanted = attended + pool.mlp(pool.mlp_norm(attended))
    real = [wanted[row][mask[row].bool()].mean(0) for row in range(3)]
    torch.testing.assert_close(pool(states, Padded(mask, mask)), torch.stack(real))


def test_every_new_weight_behind_the_transformer_is_trained_and_the_same_at_every_start(tmp_path):
    folder = write_family(tmp_path, "qwen3")
    torch.manual_seed(1)
    first, tokenizer, _ = load(folder, pooling="latent", latents=5, projection=9)
    torch.manual_seed(2)
    second, _, _ = load(folder, pooling="latent", latents=5, projection=9)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.pool.latents_rD.shape == (5, 32) and first.width == 9
    embedding = first(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    (embedding * torch.randn(embedding.shape)).sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in first.parameters())


@pytest.mark.parametrize("options", [{}, {"bias": False, "activation_function": torch.nn.Identity()}])
def test_layers_of_a_sentence_transformers_folder_are_read(tmp_path, options):
    transformer = Transformer(str(write_family(tmp_path / "model", "bert")))
    modules = [transformer, Pooling(32, "cls"), TheirDense(32, 12, **options), TheirDense(12, 7)]
    theirs = SentenceTransformer(modules=modules, device="cpu")
    theirs.save(str(tmp_path / "theirs"))
    encoder, tokenizer, traits = load(tmp_path / "theirs", normalize=False)
    assert traits.pooling == "cls" and encoder.width == 7
    with torch.inference_mode():
        found = encoder.eval()(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    torch.testing.assert_close(found, theirs.encode(TEXTS, convert_to_tensor=True), rtol=0, atol=1e-5)
    assert load(tmp_path / "theirs", projection=7)[0].width == 7
    with pytest.raises(InputError, match=r"model\.projection=8, but .* has a projection to 7; leave model\.projection out"):
        load(tmp_path / "theirs", projection=8)
