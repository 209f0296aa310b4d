"""The tokenizer of a model: it belongs to the model, pads, and ends texts where last-token pooling needs it.

Whatever is changed is part of the tokenizer itself, so the folder that is saved does it for every reader.
"""

import json
from typing import Any

from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainer.errors import InputError

# Embedding tables are rounded up, at most by 2 % in the models we know (Phi-2, 905 of 51,200).
LEAST_SHARE_USED = 0.9


def load_tokenizer(source: str, lower_case: bool = False, **arguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder, with a token to pad with.

    lower_case: texts are put in small letters before all else, as sentence-transformers' do_lower_case asks for.
    arguments: what the folder of a model gives its tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **arguments)
    if lower_case:
        _put_in_small_letters(tokenizer, source)
    if tokenizer.pad_token is None:
        # Padding is masked everywhere, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def check_belongs(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Raise InputError for a tokenizer that was made for another model."""
    table: Any = model.get_input_embeddings()
    num_rows: int = table.num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_rows:
        raise InputError(
            f"the tokenizer in {name} makes token ids up to {largest}, but its model has embeddings for {num_rows}; "
            "put the model's own tokenizer there, or set model.name to a whole model"
        )
    if largest + 1 < LEAST_SHARE_USED * num_rows:
        raise InputError(
            f"the tokenizer in {name} makes token ids up to {largest} only, and its model has embeddings for {num_rows}, "
            "so they do not belong together; put the model's own tokenizer there, or set model.name to a whole model"
        )


def append_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer end every text with its end token, as its saved form will, too; raises InputError."""
    if tokenizer.eos_token is None:
        raise InputError("model.append_eos=true needs a tokenizer with an end token; set it to false, or model.pooling")
    if ends_with_eos(tokenizer):
        return
    if {"add_bos_token", "add_eos_token"} & tokenizer.init_kwargs.keys():
        tokenizer.add_eos_token = True  # transformers makes the post-processor anew from these two whenever it loads one
        tokenizer.init_kwargs["add_eos_token"] = True
    else:
        _append_to_rules(tokenizer)
    if not ends_with_eos(tokenizer):
        raise InputError(
            f"model.append_eos=true does not work with a {type(tokenizer).__name__}; set it to false and end texts otherwise"
        )


def ends_with_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether texts end with the end token, cut ones too."""
    return all(tokenizer("a b c d e", truncation=True, max_length=n)["input_ids"][-1] == tokenizer.eos_token_id for n in (3, 99))


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Return what decides a tokenizer's output: its rules and vocabulary, whatever it is called."""
    if tokenizer.is_fast:
        # The last call's truncation and padding are part of the serialised rules, and none of their content.
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        return json.dumps({**rules, "truncation": None, "padding": None}, sort_keys=True).encode()
    return json.dumps([tokenizer.get_vocab(), repr(tokenizer)], sort_keys=True).encode()


def num_prompt_tokens(tokenizer: PreTrainedTokenizerBase, prefix: str, max_tokens: int) -> int:
    """Return how many tokens at the start of a text are its prefix's, what starts a text included.

    Counted as sentence-transformers counts them: by the prefix alone, without what ends it.
    """
    if not prefix:
        return 0
    ids = tokenizer(prefix, truncation=True, max_length=max_tokens)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def _put_in_small_letters(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Let a tokenizer do it, as its saved form will, too; raises InputError for one that cannot."""
    if not tokenizer.is_fast:
        raise InputError(
            f"{source} says do_lower_case, which a {type(tokenizer).__name__} cannot do; set model.name to another model"
        )
    backend = tokenizer.backend_tokenizer
    rules = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rules])


def _append_to_rules(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        return
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]
    ending = {"id": tokenizer.eos_token, "ids": [tokenizer.eos_token_id], "tokens": [tokenizer.eos_token]}
    whole = json.loads(Tokenizer(models.BPE()).to_str()) | {"post_processor": _with_ending(rules, ending)}
    tokenizer.backend_tokenizer.post_processor = Tokenizer.from_str(json.dumps(whole)).post_processor


def _with_ending(rules: dict | None, ending: dict) -> dict:
    """Return the rules of a post-processor with a token behind every text.

    One template must hold all special tokens: a second one behind it would be applied to each piece of the first.
    """
    if rules is not None and rules["type"] == "TemplateProcessing":
        pieces = {name: [*rules[name], _special(ending, name == "pair")] for name in ("single", "pair")}
        return {**rules, **pieces, "special_tokens": {**rules["special_tokens"], ending["id"]: ending}}
    text, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    pair = [text, _special(ending, False), other]
    template = _with_ending({"type": "TemplateProcessing", "single": [text], "pair": pair, "special_tokens": {}}, ending)
    if rules is None:
        return template
    parts = rules["processors"] if rules["type"] == "Sequence" else [rules]
    templates = [i for i, part in enumerate(parts) if part["type"] == "TemplateProcessing"]
    if not templates:
        return {"type": "Sequence", "processors": [*parts, template]}
    last = templates[-1]
    return {"type": "Sequence", "processors": [*parts[:last], _with_ending(parts[last], ending), *parts[last + 1 :]]}


def _special(token: dict, is_second_text: bool) -> dict:
    return {"SpecialToken": {"id": token["id"], "type_id": int(is_second_text)}}
