"""Models by the name of their size: random weights in the shape of a known model, for measurements where no model is at hand.

Weights are drawn from one seed. The tokenizer knows 30,517 made words, one token each, as `made_texts.py` writes them, so a text
has as many tokens as its words and two more. The folder is written once, into the cache; sentence-transformers opens it, too.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.cache import build_once, cache_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VOCABULARY, SPECIAL = 30522, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # BERT's, and as many tokens
NUM_WORDS = VOCABULARY - len(SPECIAL)
MOST_TOKENS = 512
# Layers, width, heads, width between of BERT's models and of MiniLM.
SHAPES = {"minilm": (6, 384, 12, 1536), "bert-base": (12, 768, 12, 3072), "bert-large": (24, 1024, 16, 4096)}
# Layers, width, heads, heads of keys, width between and vocabulary of decoders, for plans alone: Mistral-7B's (arXiv 2310.06825)
# and Qwen3-Embedding's of 0.6B (arXiv 2506.05176).
DECODERS = {"mistral-7b": (32, 4096, 32, 8, 14336, 32000), "qwen3-0.6b": (28, 1024, 16, 8, 3072, 151669)}
# Models of the hub whose shape is one of these, so that a plan of them needs no download.
SHAPE_OF = {
    "all-MiniLM-L6-v2": "minilm",
    "bert-base-uncased": "bert-base",
    "bge-base-en-v1.5": "bert-base",
    "e5-base-v2": "bert-base",
    "bert-large-uncased": "bert-large",
    "bge-large-en-v1.5": "bert-large",
    "e5-large-v2": "bert-large",
    "Mistral-7B-v0.1": "mistral-7b",
    "e5-mistral-7b-instruct": "mistral-7b",
    "Qwen3-Embedding-0.6B": "qwen3-0.6b",
}
FORMAT = 1  # of the folder; another number makes it again


def model_of(name: str, cache: Path | None = None) -> str:
    """Return the folder of a model of a known size, made now or before; any other name as it is."""
    if name not in SHAPES or Path(name).is_dir():
        return name
    folder = cache_folder(cache) / f"bench-{name}-{FORMAT}"
    return str(build_once(folder, f"random weights in the shape of {name}", lambda staging: _write_model(staging, name)))


def config_of(name: str) -> "PretrainedConfig | None":
    """Return the configuration of a size, or of a model of the hub that has one of these shapes; None for any other name."""
    from transformers import BertConfig, MistralConfig

    name = SHAPE_OF.get(name.rpartition("/")[2], name)
    if name in DECODERS:
        layers, width, heads, key_heads, between, vocabulary = DECODERS[name]
        return MistralConfig(
            vocab_size=vocabulary,
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=128,
            intermediate_size=between,
        )
    if name not in SHAPES:
        return None
    layers, width, heads, between = SHAPES[name]
    return BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=between,
        max_position_embeddings=MOST_TOKENS,
    )


def word(number: int) -> str:
    """Return a word of the vocabulary, 0 to NUM_WORDS - 1."""
    return f"w{number}"


def _write_model(folder: Path, name: str) -> None:
    import torch
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    from trainer.encoder.model import ModelSettings, load_encoder, save_encoder

    logging.disable_progress_bar()
    config = config_of(name)
    assert isinstance(config, BertConfig)
    with tempfile.TemporaryDirectory() as plain, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=False).save_pretrained(plain)
        _write_tokenizer(plain)
        save_encoder(folder, *load_encoder(ModelSettings(name=plain)))


def _write_tokenizer(folder: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *map(word, range(NUM_WORDS))]
    rules = Tokenizer(models.WordLevel({text: i for i, text in enumerate(words)}, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    ends = [(text, SPECIAL.index(text)) for text in ("[CLS]", "[SEP]")]
    rules.post_processor = processors.TemplateProcessing(*template, special_tokens=ends)
    names = {f"{text.strip('[]').lower()}_token": text for text in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=rules, model_max_length=MOST_TOKENS, **names).save_pretrained(folder)
