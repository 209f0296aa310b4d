"""A random model of each family, two layers and width 32, with a tokenizer of its kind."""

import json
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from tests.tiny import FILLER, TOPICS

TEXTS = ["read the file", "sort a list of one date by key and value", "a", "parse json"]

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ROPE = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64, "attention_dropout": 0.1, "head_dim": 8}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
FROM_TWO = SIZES | DROPOUT | {"max_position_embeddings": 66, "pad_token_id": 1}  # positions counted behind the padding's number
MODERN = {name: 0.1 for name in ("attention_dropout", "mlp_dropout", "embedding_dropout")}

CONFIGS: dict[str, tuple[type[PretrainedConfig], dict]] = {
    "bert": (BertConfig, SIZES | DROPOUT | {"max_position_embeddings": 64}),
    "roberta": (RobertaConfig, FROM_TWO),
    "xlm-roberta": (XLMRobertaConfig, FROM_TWO),
    "mpnet": (MPNetConfig, FROM_TWO),
    "modernbert": (ModernBertConfig, SIZES | MODERN | {"max_position_embeddings": 64, "local_attention": 8}),
    "qwen2": (Qwen2Config, ROPE),
    "qwen3": (Qwen3Config, ROPE),
    "llama": (LlamaConfig, ROPE),
    "mistral": (MistralConfig, ROPE | {"sliding_window": 6}),
}
DECODERS = ["qwen2", "qwen3", "llama", "mistral"]
SPECIAL = {
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    "decoder": ["<unk>", "<s>", "</s>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}


def write_family(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a random model of a family and its tokenizer, as transformers saves them."""
    words = write_tokenizer(folder, family)
    kind, values = CONFIGS[family]
    config = kind(**{"vocab_size": words, **ids_of(family), **values})
    torch.manual_seed(seed)
    model = AutoModel.from_config(config)
    with torch.no_grad():  # an initial deviation of 0.02 would hide what depends on what
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, family: str) -> int:
    """Write a tokenizer of words, or of letters as the family's own class makes them; return the size of its vocabulary."""
    tokenizer = letters_of(family) if family in ("qwen2", "qwen3", "llama") else words_of(family)
    tokenizer.save_pretrained(folder)
    if family == "llama":  # as Llama's folders have it: what starts and ends a text is made anew from these two
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"add_bos_token": True, "add_eos_token": False}))
    return len(tokenizer)


def letters_of(family: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer class of a decoder, with letters for its vocabulary; it neither pads nor ends texts."""
    special = SPECIAL[kind_of(family)]
    vocabulary = {token: i for i, token in enumerate([*special, "\u2581", "\u0120", *string.ascii_lowercase])}
    kind = LlamaTokenizer if family == "llama" else Qwen2Tokenizer
    names = (
        {"add_bos_token": True}
        if family == "llama"
        else {"eos_token": special[2], "unk_token": special[0], "pad_token": special[0]}
    )
    return kind(vocab=vocabulary, merges=[], model_max_length=64, padding_side="left", **names)


def words_of(family: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words that starts and ends texts as encoders do; a decoder's only starts them."""
    kind = kind_of(family)
    special = SPECIAL[kind]
    places = {"bert": ("pad", "unk", "cls", "sep", "mask"), "roberta": ("cls", "pad", "sep", "unk", "mask")}
    names = {f"{n}_token": t for n, t in zip(places.get(kind, ("unk", "bos", "eos")), special, strict=True)}
    words = [*special, *TOPICS, *FILLER]
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=names["unk_token"]))
    rules.normalizer = normalizers.Lowercase()
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [names["cls_token"], names["sep_token"]] if kind != "decoder" else [names["bos_token"]]
    template = " ".join([around[0], "$A", *around[1:]])
    rules.post_processor = processors.TemplateProcessing(template, special_tokens=[(t, words.index(t)) for t in around])
    side = "left" if kind == "decoder" else "right"
    return PreTrainedTokenizerFast(tokenizer_object=rules, model_max_length=64, padding_side=side, **names)


def kind_of(family: str) -> str:
    """Return which special tokens a family has."""
    if family in DECODERS:
        return "qwen" if family.startswith("qwen") else "decoder"
    return "bert" if family in ("bert", "modernbert") else "roberta"


def ids_of(family: str) -> dict[str, int | None]:
    """Return the numbers of the special tokens in a family's configuration."""
    kind = kind_of(family)
    if kind == "bert":
        return {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": None, "eos_token_id": None}
    return {"bos_token_id": 0, "eos_token_id": 2} if kind == "roberta" else {"bos_token_id": 1, "eos_token_id": 2}
