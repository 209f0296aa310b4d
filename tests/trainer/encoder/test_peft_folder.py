"""A folder of PEFT adapters is its base with the adapters in its weights, or says which base is missing and where to set it."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoModel, AutoTokenizer, BertForMaskedLM

from tests.trainer.encoder.folders import TEXTS, WIDTH, assert_equal, assert_means_the_same, build, edit, load, ours
from trainer.encoder.model import ModelSettings, check_model, load_text_rules
from trainer.errors import InputError

LORA = {"r": 4, "target_modules": ["query", "value"]}


def moved(model):
    """Move every adapter: new ones would change nothing."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def write_adapters(folder, base, kind=AutoModel, **lora):
    """Write adapters as PEFT saves them, and return the mean states of the texts under them."""
    model = moved(get_peft_model(kind.from_pretrained(base), LoraConfig(**{**LORA, **lora}))).eval()
    model.save_pretrained(folder)
    tokenizer, found = AutoTokenizer.from_pretrained(base), []
    with torch.inference_mode():
        for text in TEXTS:
            out = model(**tokenizer(text, return_tensors="pt", truncation=True), output_hidden_states=True)
            found.append(out.hidden_states[-1][0].mean(0))
    return torch.nn.functional.normalize(torch.stack(found), dim=-1).numpy()


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}])
@pytest.mark.parametrize("kind", [AutoModel, BertForMaskedLM])
def test_adapters_are_added_to_the_weights_of_their_base(tmp_path, transformer, kind, lora):
    wanted = write_adapters(tmp_path / "adapters", transformer(), kind, **lora)
    loaded = load(tmp_path / "adapters")
    assert_equal(ours(*loaded, tmp_path / "cache"), [wanted, wanted])
    assert np.abs(ours(*load(transformer()), tmp_path / "cache")[0] - wanted).max() > 1e-2
    assert all(p.requires_grad for p in loaded[0].parameters()) and not any("lora" in n for n, _ in loaded[0].named_parameters())
    trained = {name for name, p in load(tmp_path / "adapters", lora_rank=2)[0].named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    check_model(str(tmp_path / "adapters"))


def test_a_sentence_transformers_folder_of_adapters_means_what_it_says(tmp_path, transformer):
    model = SentenceTransformer(
        modules=[Transformer(str(transformer())), Pooling(WIDTH, "cls"), Normalize()], device="cpu", prompts={"query": "read "}
    )
    model.add_adapter(LoraConfig(**LORA, task_type="FEATURE_EXTRACTION"))
    moved(model).save(str(tmp_path / "theirs"), create_model_card=False)
    assert not (tmp_path / "theirs" / "config.json").exists()
    traits = assert_means_the_same(tmp_path / "theirs", tmp_path)[1]
    assert traits.pooling == "cls" and traits.query_prefix == "read "


def test_adapters_alone_are_used_as_their_base_is(tmp_path, transformer):
    base = build(tmp_path / "base", Transformer(str(transformer())), Pooling(WIDTH, "cls"), prompts={"query": "read "})
    write_adapters(tmp_path / "adapters", base)
    _, traits = load_text_rules(ModelSettings(name=str(tmp_path / "adapters")))
    assert load(tmp_path / "adapters")[2] == traits and (traits.pooling, traits.query_prefix) == ("cls", "read ")


def test_a_base_beside_the_adapters_is_found(tmp_path, transformer):
    wanted = write_adapters(tmp_path / "adapters", transformer())
    shutil.copytree(transformer(), tmp_path / "base")
    edit(tmp_path / "adapters" / "adapter_config.json", base_model_name_or_path="../base")
    assert_equal(ours(*load(tmp_path / "adapters"), tmp_path / "cache")[:1], [wanted])


@pytest.mark.parametrize("base", ["/no/such/base", "no-such/base", None])
def test_a_base_that_is_missing_is_named_with_the_place_to_set_it(tmp_path, transformer, base):
    write_adapters(tmp_path / "adapters", transformer())
    edit(tmp_path / "adapters" / "adapter_config.json", base_model_name_or_path=base)
    where = r"set base_model_name_or_path in .*adapter_config\.json"
    message = f"holds adapters of {base}, which is not here; put the base there, or {where}"
    if base is None:
        message = r"adapter_config\.json names no base_model_name_or_path; set it there"
    for open_model in (check_model, load):
        with pytest.raises(InputError, match=message) as error:
            open_model(str(tmp_path / "adapters"))
        assert "\n" not in str(error.value)


def test_adapters_of_another_model_are_refused(tmp_path, transformer):
    write_adapters(tmp_path / "adapters", transformer())
    config = json.loads((transformer() / "config.json").read_text())
    shutil.copytree(transformer(), tmp_path / "short")
    edit(tmp_path / "short" / "config.json", num_hidden_layers=config["num_hidden_layers"] - 1)
    edit(tmp_path / "adapters" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "short"))
    with pytest.raises(InputError, match=r"do not fit their base: .*layer\.1.* is of one of the two alone"):
        load(tmp_path / "adapters")


def test_adapters_without_peft_say_how_to_install_it(tmp_path, transformer, monkeypatch):
    write_adapters(tmp_path / "adapters", transformer())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"holds adapters, which need PEFT; run: pip install 'negpool\[lora\]'"):
        load(tmp_path / "adapters")


def test_old_files_of_adapters_are_read_without_running_them(tmp_path, transformer):
    wanted = write_adapters(tmp_path / "adapters", transformer())
    torch.save(load_file(tmp_path / "adapters" / "adapter_model.safetensors"), tmp_path / "adapters" / "adapter_model.bin")
    (tmp_path / "adapters" / "adapter_model.safetensors").unlink()
    assert_equal(ours(*load(tmp_path / "adapters"), tmp_path / "cache")[:1], [wanted])
