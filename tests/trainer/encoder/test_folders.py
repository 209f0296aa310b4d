"""A folder of sentence-transformers means here what it means there, or is refused by the name of what we cannot do.

Right values come from sentence-transformers itself, on the same folder; what is saved again is read by it once more.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Dense, Dropout, LayerNorm, Normalize, Pooling, Transformer
from transformers import AutoModel, XLNetConfig, XLNetModel

from tests.tiny import write_tiny_dataset
from tests.trainer.encoder.families import write_tokenizer
from tests.trainer.encoder.folders import TEXTS, WIDTH, assert_equal, assert_means_the_same, build, edit, load, ours, theirs
from tests.trainer.worlds import world_of
from trainer.encoder.encode import encode_rows
from trainer.encoder.model import ModelSettings, load_encoder, weights_digest
from trainer.encoder.tokens import tokenize
from trainer.errors import InputError
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings
from trainer.job import BatchSettings, ChunkSettings, OptimSettings, TrainJob
from trainer.train import train

# What follows the transformer; the order of modules is theirs
CHAINS = {
    "dense": lambda: [Pooling(WIDTH), Dense(WIDTH, 12)],
    "dense behind normalize": lambda: [Pooling(WIDTH), Normalize(), Dense(WIDTH, 12)],
    "dense between normalize": lambda: [Pooling(WIDTH), Normalize(), Dense(WIDTH, 12), Normalize()],
    "layer norm": lambda: [Pooling(WIDTH), LayerNorm(WIDTH)],
    "layer norm between dense": lambda: [Pooling(WIDTH), Dense(WIDTH, 24), LayerNorm(24), Dense(24, 8, bias=False), Normalize()],
    "gelu": lambda: [Pooling(WIDTH, "cls"), Dense(WIDTH, 12, activation_function=torch.nn.GELU())],
    "softplus": lambda: [Pooling(WIDTH), Dense(WIDTH, 12, activation_function=torch.nn.Softplus())],
    "prelu": lambda: [Pooling(WIDTH), Dense(WIDTH, 12, activation_function=torch.nn.PReLU())],
    "no activation": lambda: [Pooling(WIDTH), Dense(WIDTH, 12, activation_function=None)],
    "residual": lambda: [Pooling(WIDTH), Dense(WIDTH, WIDTH, use_residual=True), Dense(WIDTH, 12, use_residual=True)],
    "dropout": lambda: [Pooling(WIDTH), Dropout(0.5), Dense(WIDTH, 12)],
    "max": lambda: [Pooling(WIDTH, "max")],
    "mean by the root": lambda: [Pooling(WIDTH, "mean_sqrt_len_tokens")],
    "three poolings": lambda: [Pooling(WIDTH, ("mean", "cls", "max")), Dense(3 * WIDTH, 12), Normalize()],
    "weighted and last": lambda: [Pooling(WIDTH, ("weightedmean", "lasttoken"))],
}


@pytest.mark.parametrize("name", CHAINS)
def test_modules_are_applied_in_their_order(tmp_path, transformer, name):
    folder = build(tmp_path / "theirs", Transformer(str(transformer())), *CHAINS[name]())
    assert_means_the_same(folder, tmp_path)
    plain = load(folder, normalize=False)
    if "Normalize" not in (folder / "modules.json").read_text():
        model = SentenceTransformer(str(folder), device="cpu")
        assert_equal(ours(*plain, tmp_path / "cache")[:1], [model.encode(TEXTS)])


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen3"])
@pytest.mark.parametrize("mode", ["mean", "cls", "weightedmean", "lasttoken", "max", "mean_sqrt_len_tokens"])
def test_prompts_are_left_out_of_the_pooling_where_the_folder_says_so(tmp_path, transformer, family, mode):
    prompts = {"query": "read the file ", "document": "sort "}
    modules = [Transformer(str(transformer(family))), Pooling(WIDTH, mode, include_prompt=False), Normalize()]
    folder = build(tmp_path / "theirs", *modules, prompts=prompts)
    traits = assert_means_the_same(folder, tmp_path)[1]
    assert not traits.include_prompt and traits.query_prefix == prompts["query"]
    texts, tokenizer = Dataset.from_dict({"text": TEXTS}), load(folder)[1]
    tables = [
        tokenize(texts, tokenizer, prefix="sort ", max_tokens=32, include_prompt=is_in, cache=tmp_path) for is_in in (True, False)
    ]
    assert tables[0].digest != tables[1].digest and not np.isin(tables[0].key_of_row, tables[1].key_of_row).any()


def test_prompts_stay_left_out_where_a_job_chooses_the_pooling(tmp_path, transformer):
    modules = [Transformer(str(transformer())), Pooling(WIDTH, "mean", include_prompt=False)]
    folder = build(tmp_path / "theirs", *modules, prompts={"query": "read the "})
    mine = ours(*load(folder, pooling="max"), tmp_path / "cache")
    edit(folder / "1_Pooling" / "config.json", pooling_mode="max")
    assert_equal(mine, theirs(folder, True))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_recorded_width_cuts_embeddings_and_a_job_sets_another(tmp_path, transformer, normalize):
    modules = [Transformer(str(transformer())), Pooling(WIDTH), *[Normalize()] * normalize]
    folder = build(tmp_path / "theirs", *modules, truncate_dim=10, similarity_fn_name="cosine" if normalize else "dot")
    encoder, traits = assert_means_the_same(folder, tmp_path)
    assert traits.width == encoder.width == 10 and traits.normalize == normalize
    digests = {width: weights_digest(load(folder, width=width)[0]) for width in (4, 10, WIDTH)}
    assert len(set(digests.values())) == 3 and load(folder, width=WIDTH)[2].width is None
    wanted = SentenceTransformer(str(folder), device="cpu", truncate_dim=4).encode(TEXTS, normalize_embeddings=normalize)
    assert_equal(ours(*load(folder, width=4), tmp_path / "cache")[:1], [wanted])
    with pytest.raises(InputError, match=r"model\.width=33, but embeddings of .* have 32 numbers; set it lower"):
        load(folder, width=33)


def test_texts_become_small_letters_where_the_folder_says_so(tmp_path, transformer):
    cased = tmp_path / "cased"
    shutil.copytree(transformer(), cased)
    rules = json.loads((cased / "tokenizer.json").read_text())
    (cased / "tokenizer.json").write_text(json.dumps({**rules, "normalizer": None}))
    folder = build(tmp_path / "theirs", Transformer(str(cased)), Pooling(WIDTH))
    plain = theirs(folder, True)
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    (folder / "tokenizer.json").write_text(json.dumps({**rules, "normalizer": None}))
    assert_means_the_same(folder, tmp_path)
    assert np.abs(theirs(folder, True)[0] - plain[0]).max() > 1e-2


PROMPTS = [
    ({"query": "read ", "document": "sort "}, None, ("read ", "sort ")),
    ({"query": "read "}, None, ("read ", "")),
    ({"query": "read ", "document": "sort "}, "document", ("read ", "sort ")),
    ({"query": "read ", "document": ""}, "query", ("read ", "")),
]


@pytest.mark.parametrize("prompts, default, wanted", PROMPTS)
def test_prompts_of_each_side_are_taken(tmp_path, transformer, prompts, default, wanted):
    folder = build(
        tmp_path / "theirs", Transformer(str(transformer())), Pooling(WIDTH), prompts=prompts, default_prompt_name=default
    )
    traits = assert_means_the_same(folder, tmp_path)[1]
    assert (traits.query_prefix, traits.passage_prefix) == wanted


@pytest.mark.parametrize("prompts", [{"retrieval": "read the "}, {"query": "", "document": "", "retrieval": "read the "}])
def test_a_default_prompt_stands_before_all_texts_where_no_side_has_one(tmp_path, transformer, prompts):
    folder = build(tmp_path / "theirs", Transformer(str(transformer())), Pooling(WIDTH))
    edit(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name="retrieval")
    wanted = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True)
    assert_equal(ours(*load(folder), tmp_path / "cache"), [wanted, wanted])


@pytest.mark.parametrize("name", ["passage", "corpus"])
def test_a_prompt_of_passages_under_its_older_names_is_taken(tmp_path, transformer, name):
    folder = build(tmp_path / "theirs", Transformer(str(transformer())), Pooling(WIDTH))
    edit(folder / "config_sentence_transformers.json", prompts={"query": "read ", name: "sort "})
    wanted = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt_name=name, normalize_embeddings=True)
    assert_equal(ours(*load(folder), tmp_path / "cache")[1:], [wanted])


OLD_NAMES = ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"]


@pytest.mark.parametrize("name", OLD_NAMES)
def test_old_files_and_a_transformer_in_a_folder_of_its_own_are_read(tmp_path, transformer, name):
    folder = build(tmp_path / "theirs", Transformer(str(transformer())), Pooling(WIDTH, ("mean", "cls")))
    (folder / "0_Transformer").mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.move(folder / file, folder / "0_Transformer" / file)
    (folder / "sentence_bert_config.json").unlink()
    (folder / "config_sentence_transformers.json").unlink()
    edit(folder / "0_Transformer" / f"sentence_{name}_config.json", max_seq_length=7, do_lower_case=False)
    flags = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **flags}))
    types = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    paths = ["0_Transformer", "1_Pooling"]
    entries = [{"idx": i, "name": str(i), "path": paths[i], "type": types[i]} for i in range(2)]
    (folder / "modules.json").write_text(json.dumps(entries))
    traits = assert_means_the_same(folder, tmp_path)[1]
    assert traits.max_query_tokens == traits.max_passage_tokens == 7 and traits.pooling == "cls+mean"


def test_arguments_of_the_tokenizer_and_the_configuration_are_taken(tmp_path, transformer):
    folder = build(tmp_path / "theirs", Transformer(str(transformer())), Pooling(WIDTH))
    arguments = {
        "max_seq_length": 9,
        "tokenizer_args": {"model_max_length": 6, "trust_remote_code": True},
        "config_args": {"layer_norm_eps": 0.3},
        "model_args": {"dtype": "float32"},
    }
    edit(folder / "sentence_bert_config.json", **arguments)
    assert assert_means_the_same(folder, tmp_path)[1].max_query_tokens == 6


def test_lengths_of_each_side_are_taken(tmp_path, transformer):
    folder = build(tmp_path / "theirs", Transformer(str(transformer()), query_length=4, document_length=9), Pooling(WIDTH))
    encoder, tokenizer, traits = load(folder)
    assert (traits.max_query_tokens, traits.max_passage_tokens) == (4, 9)
    assert_equal(ours(encoder, tokenizer, traits, tmp_path / "cache"), theirs(folder, True))


@pytest.mark.parametrize("recorded", [{"max_seq_length": 66}, {"max_seq_length": 10**9}, {}])
def test_lengths_above_the_position_table_are_cut_to_it_and_said(tmp_path, transformer, recorded, caplog):
    folder = build(tmp_path / "theirs", Transformer(str(transformer("roberta"))), Pooling(WIDTH))
    edit(folder / "tokenizer_config.json", model_max_length=1e30)
    edit(folder / "sentence_bert_config.json", **recorded)
    assert load(folder)[2].max_query_tokens == 64  # of 66 rows the first two belong to padding
    said = f"records texts of {recorded.get('max_seq_length')} tokens, and has positions for 64: they are cut there"
    assert [said in record.message for record in caplog.records] == [True] * bool(recorded)


def test_a_length_above_the_tokenizers_is_the_folders(tmp_path, transformer):
    folder = build(tmp_path / "theirs", Transformer(str(transformer())), Pooling(WIDTH))
    edit(folder / "tokenizer_config.json", model_max_length=5)
    edit(folder / "sentence_bert_config.json", max_seq_length=20)
    assert assert_means_the_same(folder, tmp_path)[1].max_passage_tokens == 20


def test_routes_for_queries_and_documents_are_two_towers(tmp_path, transformer):
    sides = [[Transformer(str(transformer(seed=seed))), Pooling(WIDTH), Dense(WIDTH, 12)] for seed in (0, 1)]
    folder = build(tmp_path / "theirs", Router.for_query_document(*sides), Normalize(), prompts={"query": "read "})
    encoder, traits = assert_means_the_same(folder, tmp_path)
    assert encoder.has_two_towers and traits.query_prefix == "read "


def test_a_shared_transformer_below_an_old_asym_module_becomes_each_towers_own(tmp_path, transformer):
    shared = [Transformer(str(transformer())), Pooling(WIDTH)]
    folder = build(tmp_path / "theirs", *shared, Router.for_query_document([Dense(WIDTH, 12)], [Dense(WIDTH, 12), Normalize()]))
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Asym"
    (folder / "modules.json").write_text(json.dumps(modules))
    router = folder / modules[2]["path"]
    os.rename(router / "router_config.json", router / "config.json")
    encoder, _ = assert_means_the_same(folder, tmp_path)
    assert encoder.has_two_towers


def test_a_texts_own_prompt_is_left_out_of_the_pooling_too(tmp_path, transformer):
    folder = build(tmp_path / "theirs", Transformer(str(transformer())), Pooling(WIDTH, include_prompt=False))
    encoder, tokenizer, _ = load(folder, query_prefix="sort ")
    prompts = ["read the file ", None, "", "read ", "sort "]
    texts = Dataset.from_dict({"text": TEXTS, "prompt": prompts[: len(TEXTS)] + [None] * (len(TEXTS) - 5)})
    tokens = tokenize(texts, tokenizer, prefix="sort ", max_tokens=64, include_prompt=False, cache=tmp_path / "cache")
    model, wanted = SentenceTransformer(str(folder), device="cpu"), []
    for text, prompt in zip(texts["text"], texts["prompt"], strict=True):
        wanted.append(model.encode(text, prompt="sort " if prompt is None else prompt, normalize_embeddings=True))
    assert_equal([encode_rows(encoder, tokens, np.arange(len(TEXTS)))], [np.stack(wanted)])
    some = np.array([3, 0])
    assert_equal([encode_rows(encoder, tokens.select(some), np.arange(2))], [np.stack(wanted)[some]])


def test_a_model_that_counts_positions_from_one_another_has_no_longest_text(tmp_path):
    folder = tmp_path / "xlnet"
    words = write_tokenizer(folder, "bert")
    XLNetModel(XLNetConfig(vocab_size=words, d_model=WIDTH, n_layer=2, n_head=4, d_inner=48)).save_pretrained(folder)
    edit(folder / "tokenizer_config.json", model_max_length=10**30)
    saved = build(tmp_path / "theirs", Transformer(str(folder)), Pooling(WIDTH))
    edit(saved / "sentence_bert_config.json", max_seq_length=600)
    assert load(folder)[2].max_query_tokens == 512 and load(saved)[2].max_query_tokens == 600
    assert_equal(ours(*load(saved), tmp_path / "cache"), theirs(saved, True))


@pytest.mark.parametrize("kind", ["chain", "adapters"])
def test_a_model_without_its_weights_has_their_names(tmp_path, transformer, kind):
    folder = tmp_path / kind
    if kind == "chain":
        build(folder, Transformer(str(transformer())), Pooling(WIDTH), Normalize(), Dense(WIDTH, 12), LayerNorm(12))
    else:
        get_peft_model(AutoModel.from_pretrained(transformer()), LoraConfig(target_modules=["query"])).save_pretrained(folder)
    whole = load(folder)[0].state_dict()
    empty = load_encoder(ModelSettings(name=str(folder)), is_empty=True)[0]
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {name: t.shape for name, t in whole.items()}
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_folder_is_trained_and_comes_out_as_it_says(tmp_path, transformer):
    prompts = {"query": "read ", "document": "sort the "}
    modules = [Pooling(WIDTH, ("mean", "max"), include_prompt=False), Normalize(), Dense(2 * WIDTH, 12), LayerNorm(12)]
    folder = build(tmp_path / "theirs", Transformer(str(transformer())), *modules, prompts=prompts, truncate_dim=8)
    job = TrainJob(
        run=RunSettings(folder=tmp_path / "run", trackers=()),
        data=DataSettings(path=write_tiny_dataset(tmp_path / "data"), cache=tmp_path / "cache"),
        model=ModelSettings(name=str(folder)),
        batch=BatchSettings(queries=7),
        chunk=ChunkSettings(tokens=64),
        optim=OptimSettings(steps=3, lr=1e-3),
        negatives=NegativesSettings(per_query=0),
    )
    start = theirs(folder, True)
    train(job, world_of())
    encoder, tokenizer, traits = load(tmp_path / "run" / "checkpoints" / "step-00000003" / "encoder")
    assert (traits.include_prompt, traits.width, traits.passage_prefix) == (False, 8, "sort the ")
    wanted = theirs(tmp_path / "run" / "checkpoints" / "step-00000003" / "encoder", True)
    assert_equal(ours(encoder, tokenizer, traits, tmp_path / "cache"), wanted)
    assert np.abs(wanted[0] - start[0]).max() > 1e-3
