"""The transformer below the pooling: encoders and decoders of transformers' families, without unused parts.

For every family we replace its dropout (dropout.py), and cache nothing between tokens. Every trained parameter gets a
gradient, because data parallelism waits for all of them.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from trainer.encoder.architecture import load_config, without_pooler
from trainer.encoder.attention import ATTENTION
from trainer.encoder.dropout import replace_dropout
from trainer.encoder.peft_folder import add_to_weights, base_of, transformer_of
from trainer.encoder.settings import ModelSettings
from trainer.encoder.tensors import refused_pickle
from trainer.errors import InputError

UNLIMITED = 1 << 20  # tokens: positions that are counted from one another have no last one
# what the families call it
DROPOUT_NAMES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "attention_dropout", "dropout",
                 "embedding_dropout", "mlp_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop")  # fmt: skip


def load_backbone(source: str, settings: ModelSettings, is_empty: bool = False, **arguments) -> PreTrainedModel:
    """Return the model in a folder, float32 or quantised; raises InputError and what transformers raises.

    is_empty: its parameters are on the meta device, and only its configuration is read.
    arguments: what the folder of a model gives its configuration.
    """
    base = base_of(source)
    config = with_dropout(load_config(source, **arguments), settings.dropout)
    if is_empty:
        with init_empty_weights(include_buffers=False):
            model = AutoModel.from_config(config, dtype=torch.float32, **without_pooler(config))
    else:
        model = _read_weights(source if base is None else transformer_of(base), config, settings)
        if base is not None:
            if settings.quantize is not None:
                raise InputError(f"{source} holds adapters, which 4-bit weights cannot take in; leave model.quantize out")
            model = add_to_weights(model, source)
    return ready_backbone(model, settings)


def ready_backbone(model: PreTrainedModel, settings: ModelSettings) -> PreTrainedModel:
    """Return a model of transformers as we train it; raises InputError for what it cannot do."""
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # keys and values are for generating text, which we do not
    if settings.quantize is not None:
        keep_to_one_product(model)
    replace_dropout(model)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)  # the same on a GPU and without dropout
    if settings.attention is not None:
        set_attention(model, settings.attention)
    if settings.checkpoint_activations:
        if not model.supports_gradient_checkpointing:
            raise InputError(
                f"model.checkpoint_activations=true cannot be had from a model of type {model.config.model_type}; "
                "set it to false, or model.name to another model"
            )
        checkpoint_activations(model)
    return model


def bare_backbone(source: str, settings: ModelSettings, **arguments) -> PreTrainedModel:
    """Return the model without weights, on the meta device: its shapes and its configuration, as the job asks for."""
    config = load_config(source, **arguments)
    with torch.device("meta"):
        model = AutoModel.from_config(config, **without_pooler(config))
    if settings.attention is not None and is_decoder(model):
        model.config.is_causal = settings.attention == "causal"
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let the model's layers recompute their activations in backward, with the same draws."""
    model.activation_checkpointing_enable({"use_reentrant": False})


def is_decoder(model: nn.Module) -> bool:
    """Return whether the model's layers are made to look back only, whatever its configuration lets them do now."""
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def is_causal(model: PreTrainedModel) -> bool:
    """Return whether a token's state depends on no later token."""
    return is_decoder(model) and getattr(model.config, "is_causal", None) is not False


def set_attention(model: PreTrainedModel, attention: str) -> None:
    """Let a decoder's tokens see those behind them or not; the configuration keeps it. Raises InputError if it cannot be had.

    Source: transformers' masks read `config.is_causal`; LLM2Vec, arXiv 2404.05961, for what it is good for.
    """
    if is_decoder(model):
        model.config.is_causal = attention == "causal"
    if next(model.parameters()).is_meta:
        return  # whoever has the weights looks
    if _looks_ahead(model) != (attention == "bidirectional"):
        raise InputError(
            f'model.attention="{attention}" cannot be had from a model of type {model.config.model_type}; '
            "leave it out, or set model.name to another model"
        )


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of a transformer: the members of its longest list of modules."""
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def max_positions(model: PreTrainedModel) -> int:
    """Return the length of the longest text that the model takes, in tokens; UNLIMITED where it counts none."""
    table = _position_table(model)
    if table is None:
        recorded = getattr(model.config, "max_position_embeddings", None) or 0
        return recorded if recorded > 0 else UNLIMITED
    return table.num_embeddings - first_position(model)


def first_position(model: PreTrainedModel) -> int:
    """Return the position of a text's first token."""
    table = _position_table(model)
    # RoBERTa and its kin count from the number behind the padding's.
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def positions_from_mask(model: PreTrainedModel) -> bool:
    """Return whether positions are those of a table counted from the first column, so that padding on the left moves them."""
    table = _position_table(model)
    return table is not None and table.padding_idx is None


def quantization(settings: ModelSettings) -> dict:
    """Return what from_pretrained needs for 4-bit weights, nothing where none are asked for; raises InputError.

    Source: QLoRA, arXiv 2305.14314: NormalFloat and quantised constants.
    """
    if settings.quantize is None:
        return {}
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise InputError(
            f'model.quantize="{settings.quantize}" needs bitsandbytes, which is not installed; '
            "run: pip install 'negpool[qlora]', or leave model.quantize out"
        ) from error
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
    return {"quantization_config": config}


def keep_to_one_product(model: nn.Module) -> None:
    """Have 4-bit layers multiply in evaluation as they do in training, on every CPU.

    On those with bfloat16 instructions bitsandbytes would repack the weights for evaluation, which rounds otherwise and takes
    only widths that are multiples of its blocks.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _read_weights(source: str, config: PretrainedConfig, settings: ModelSettings) -> PreTrainedModel:
    """Return the model in a folder with all of its weights; raises InputError where some are missing."""
    try:
        model, found = AutoModel.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            **without_pooler(config),
            **quantization(settings),
        )
    except Exception as error:
        told = refused_pickle(Path(source), error)
        if told is None:
            raise
        raise told from error
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    if missing:  # transformers fills them with random numbers
        raise InputError(
            f"{source} has no weights for {len(missing)} tensors of a {type(model).__name__}, such as {missing[0]}; "
            "set model.name to a whole model of that type"
        )
    return model


def with_dropout(config: PretrainedConfig, dropout: float | None) -> PretrainedConfig:
    """Give a configuration the rate of dropout that a job asks for, everywhere; None: leave it."""
    if dropout is not None:
        for name in DROPOUT_NAMES:
            if hasattr(config, name):
                setattr(config, name, dropout)
    return config


def _position_table(model: nn.Module) -> nn.Embedding | None:
    tables = [m for name, m in model.named_modules() if name.split(".")[-1] in ("position_embeddings", "wpe")]
    return next((table for table in tables if isinstance(table, nn.Embedding)), None)


def _looks_ahead(model: PreTrainedModel) -> bool:
    """Return whether the first token's state depends on the second token, by trying."""
    was_training = model.training
    model.eval()
    first_states = []
    for text in ([0, 1], [0, 2]):  # one by one: rows of one batch may differ in their last bits
        ids = torch.tensor([text], device=next(model.parameters()).device)
        with torch.inference_mode():
            first_states.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, 0])
    model.train(was_training)
    return not torch.equal(*first_states)
