"""A data set of a few dozen texts and a random two-layer encoder, made on the spot."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

TOPICS = [
    "sort",
    "list",
    "merge",
    "file",
    "read",
    "line",
    "parse",
    "json",
    "date",
    "open",
    "socket",
    "write",
    "cache",
    "key",
    "hash",
    "tree",
    "graph",
    "path",
]
FILLER = [
    "the",
    "a",
    "of",
    "in",
    "with",
    "from",
    "to",
    "by",
    "for",
    "each",
    "when",
    "and",
    "or",
    "not",
    "one",
    "two",
    "all",
    "any",
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TOPICS, *FILLER]


def write_tiny_dataset(folder: Path, num_queries: int = 48, seed: int = 0) -> Path:
    """Write a BEIR folder: a query shares its topic words with its documents; some have two, some texts repeat."""
    draw = random.Random(seed)
    (folder / "qrels").mkdir(parents=True)
    queries, corpus, qrels = [], [], {"train": [], "dev": [], "test": []}
    for number in range(num_queries):
        words = draw.sample(TOPICS, 3)
        queries.append({"_id": f"q{number}", "text": " ".join([*words, draw.choice(FILLER)])})
        split = "test" if number % 6 == 4 else "dev" if number % 12 == 5 else "train"
        for copy in range(1 + (number % 5 == 0)):
            text = " ".join(draw.choices(FILLER, k=draw.randint(1, 9)) + words[copy:] + draw.choices(FILLER, k=3))
            corpus.append({"_id": f"d{number}-{copy}", "title": "", "text": text})
            qrels[split].append(f"q{number}\td{number}-{copy}\t1")
        if number % 8 == 3:  # an equal text that nobody judged
            corpus.append({"_id": f"copy{number}", "title": "", "text": corpus[-1]["text"]})
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, lines in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    return folder


def write_own_modules(folder: Path) -> Path:
    """Write a working folder where a person keeps modules named as ours, which fail when they are imported."""
    folder.mkdir()
    for name in ("launch", "trainer", "mining", "gradcache"):
        (folder / f"{name}.py").write_text(f"raise RuntimeError('{name}.py of the working folder was imported')\n")
    return folder


def write_tiny_encoder(folder: Path, seed: int = 0, dropout: float = 0.1) -> Path:
    """Write a random BERT of two layers and width 32, and its tokenizer, as transformers saves them."""
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    rules.normalizer = normalizers.Lowercase()
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    rules.post_processor = processors.TemplateProcessing(*template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    special = {f"{name}_token": token for name, token in names.items()}
    PreTrainedTokenizerFast(tokenizer_object=rules, model_max_length=32, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    BertModel(_config(dropout), add_pooling_layer=False).save_pretrained(folder)
    return folder


def write_tiny_cross_encoder(folder: Path, num_labels: int = 1) -> Path:
    """Write a random BERT that classifies pairs, and its tokenizer."""
    write_tiny_encoder(folder)
    torch.manual_seed(0)
    # Wider than what BERT starts with: scores of different pairs differ.
    config = _config(0.1, initializer_range=0.3, num_labels=num_labels)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def _config(dropout: float, **more) -> BertConfig:
    return BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **more,
    )
